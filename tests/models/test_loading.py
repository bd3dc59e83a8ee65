"""Where models come from: GGUF files, folders that bring their own code, the hub's cache."""

import json
import os
import runpy
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from masformer.cli import run
from masformer.errors import CorruptError, InputError
from masformer.models.checkpoint import load, load_config
from masformer.models.convert import plan_of
from masformer.models.tokenizer import load_tokenizer
from masformer.spans import Full, SpanPlan
from tests.small import TEXT, small_tokenizer

LAYERS, HEADS, KEY_HEADS = 3, 4, 2
LOCAL = ["--layout", "masformer", "--full", "0", "--window", "8"]


@pytest.fixture(autouse=True)
def _loud_again() -> Iterator[None]:
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return small_tokenizer()


def source_model(kind: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Random float32 weights, norms and biases too; Qwen3's heads are wider than their share of the width."""
    sizes = {"hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "initializer_range": 0.2}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 512}
    if kind != "gpt2":
        sizes |= {"intermediate_size": 96, "num_key_value_heads": KEY_HEADS}
        ends |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    if kind == "qwen3":
        sizes["head_dim"] = 32
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, vocab_size=len(tokenizer), tie_word_embeddings=False, **sizes, **ends)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def as_llama_cpp_has_it(kind: str, name: str, weight: torch.Tensor) -> np.ndarray:
    """Llama's queries and keys with the halves of each head interleaved; GPT-2's linear layers as out x in."""
    if kind == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = HEADS if "q_proj" in name else KEY_HEADS
        weight = weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
    if kind == "gpt2" and weight.ndim == 2 and ".h." in name:
        weight = weight.T
    return np.ascontiguousarray(weight.detach().numpy())


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    kind: str | None = None,
    rule: str = "gpt-2",
    quantised: gguf.GGMLQuantizationType | None = None,
    change: Callable[[gguf.GGUFWriter], Any] = lambda writer: None,
) -> Path:
    """What llama.cpp's converter writes for such a model, `kind` in the place of its architecture's name."""
    config = model.config
    writer = gguf.GGUFWriter(path, kind or config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * config.hidden_size))
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // HEADS
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer, rule)
    change(writer)
    number = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[config.model_type]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        module, _, suffix = name.rpartition(".")
        weight = as_llama_cpp_has_it(config.model_type, name, parameter)
        packed = quantised if weight.ndim == 2 else None
        data = weight if packed is None else gguf.quants.quantize(weight, packed)
        writer.add_tensor(f"{names.get_name(module)}.{suffix}", data, raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, rule: str) -> None:
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in ("<s>", "<user>", "<bot>") else 1 for token, _ in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(model.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def llama(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return source_model("llama", tokenizer)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, llama: Any, tokenizer: Any) -> Path:
    """A Llama of float32 with its tokenizer; not to be changed."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama, tokenizer)


# GGUF files


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
def test_a_gguf_file_is_its_source_model(kind: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = source_model(kind, tokenizer)
    path = str(write_gguf(tmp_path / "model.gguf", model))
    loaded = load(path)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    assert plan_of(loaded) == load_config(path)[1] == SpanPlan((Full(),) * LAYERS)
    assert loaded.config.to_dict() == load_config(path)[0].to_dict()
    assert loaded.config.name_or_path == path
    assert load(path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_tied_weights_in_a_gguf_file(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = source_model("llama", tokenizer)
    model.lm_head.weight = model.model.embed_tokens.weight
    loaded = load(str(write_gguf(tmp_path / "tied.gguf", model)))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(model))


def test_a_quantised_gguf_file_is_close(llama: PreTrainedModel, tmp_path: Path) -> None:
    """Q8_0 rounds a weight by half of 1/127 of the largest of its 32, and that step to half precision."""
    q8 = gguf.GGMLQuantizationType.Q8_0
    loaded = load(str(write_gguf(tmp_path / "q8.gguf", llama, quantised=q8)))
    assert loaded.dtype == torch.float32
    weight = llama.lm_head.weight.detach().numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight, q8), q8)
    assert np.array_equal(loaded.lm_head.weight.detach().numpy(), expected)
    for name, parameter in llama.named_parameters():
        bar = parameter.abs().max().item() * (1 / 254 + 2**-11)
        torch.testing.assert_close(loaded.get_parameter(name), parameter, rtol=0, atol=bar)
    nearest = torch.nn.functional.cosine_similarity(logits(loaded), logits(llama), dim=-1)
    assert 0.99 < nearest.min() < 1 - 1e-7


def test_the_name_mistral_gives_a_llama_no_window(llama: PreTrainedModel, tmp_path: Path) -> None:
    """transformers would make a Mistral with a window of 4096 of it, which the file does not state."""
    path = write_gguf(tmp_path / "m.gguf", llama, change=lambda writer: writer.add_name("mistral"))
    loaded = load(str(path))
    assert isinstance(loaded, LlamaForCausalLM)
    assert torch.equal(logits(loaded), logits(llama))


def test_neighbours_of_a_gguf_file_do_not_count(
    file: Path, llama: PreTrainedModel, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of that name in the working directory, and tokenizer files beside it, are other models'."""
    for folder in (here := tmp_path / "here", there := tmp_path / "there"):
        folder.mkdir()
    (here / "tiny.gguf").write_bytes(b"GGUF, or not")
    (there / "tiny.gguf").write_bytes(file.read_bytes())
    (there / "tokenizer.json").write_text("{}")
    (there / "tokenizer_config.json").write_text('{"chat_template": "another"}')
    (there / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(here)
    assert torch.equal(logits(load("../there/tiny.gguf")), logits(llama))
    assert load_tokenizer("../there/tiny.gguf").chat_template == tokenizer.chat_template


def refused(path: Path, kind: type[Exception], said: str) -> None:
    for read in (load_config, load):
        with pytest.raises(kind, match=said) as error:
            read(str(path))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip", b"GGML" * 99])
def test_not_a_gguf_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    refused(tmp_path / "x.gguf", CorruptError, r"x\.gguf is not a GGUF file: it begins with b'")
    with pytest.raises(CorruptError):
        load_tokenizer(str(tmp_path / "x.gguf"))


def test_a_truncated_gguf_file(file: Path, tmp_path: Path) -> None:
    """At every eleventh byte of its start, where all the kinds of fields are, and at places after that."""
    whole, cut = file.read_bytes(), tmp_path / "cut.gguf"
    for kept in [*range(4, 900, 11), *range(900, len(whole), len(whole) // 20), len(whole) - 64]:
        cut.write_bytes(whole[:kept])
        with pytest.raises(CorruptError, match=r"cut\.gguf is truncated"):
            load_config(str(cut))
    refused(cut, CorruptError, r"is truncated: it has [\d,]+ of at least [\d,]+ bytes")


def test_a_gguf_file_of_another_version(file: Path, tmp_path: Path) -> None:
    (tmp_path / "v.gguf").write_bytes(b"GGUF" + struct.pack("<I", 9) + file.read_bytes()[8:])
    refused(tmp_path / "v.gguf", CorruptError, "GGUF v9")


@pytest.mark.parametrize("kind", ["bloom", "gemma3", "nonsense", "clip"])
def test_an_architecture_that_is_not_supported(kind: str, llama: PreTrainedModel, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", llama, kind=kind)
    refused(path, InputError, f"architecture '{kind}', which is not supported; supported are: gpt2, llama")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), r"rope\.scaling\.type = 'linear'"),
        (lambda writer: writer.add_rope_scaling_factor(2.0), r"llama\.rope\.scaling\.factor = 2\.0, which is not"),
        (lambda writer: writer.add_rope_dimension_count(8), r"rope\.dimension_count = 8"),
        (lambda writer: writer.add_sliding_window(8), r"attention\.sliding_window = 8"),
        (lambda writer: writer.add_expert_count(4), r"expert_count = 4"),
        (lambda writer: writer.add_uint16("split.count", 3), "one of 3 parts"),
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32)), r"holds rope_freqs\.weight"),
        (lambda writer: writer.add_tensor("blk.1.attn_q.bias", np.ones(64, np.float32)), r"holds blk\.1\.attn_q\.bias"),
    ],
)
def test_what_transformers_would_drop_is_refused(change: Any, said: str, llama: Any, tmp_path: Path) -> None:
    refused(write_gguf(tmp_path / "d.gguf", llama, change=change), InputError, said)


@pytest.mark.parametrize("key", ["block_count", "attention.head_count_kv"])
def test_sizes_that_are_not_stated(key: str, llama: PreTrainedModel, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "n.gguf", llama, change=lambda writer: writer.kv_data[0].pop(f"llama.{key}"))
    refused(path, CorruptError, f"does not state llama.{key}")


def test_sizes_that_are_others(llama: PreTrainedModel, tmp_path: Path) -> None:
    def more_layers(writer: gguf.GGUFWriter) -> None:
        del writer.kv_data[0]["llama.block_count"]
        writer.add_block_count(LAYERS + 1)

    path = write_gguf(tmp_path / "n.gguf", llama, change=more_layers)
    with pytest.raises(CorruptError, match=f"missing keys, the first is model.layers.{LAYERS}"):
        load(str(path))


def test_the_package_gguf_is_missing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else object())
    refused(file, InputError, r"tiny\.gguf needs gguf: pip install gguf")


def test_no_such_gguf_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.gguf", InputError, r"none\.gguf cannot be read: No such file")
    (tmp_path / "folder.gguf").mkdir()
    refused(tmp_path / "folder.gguf", InputError, r"holds no config\.json")


# Code that a model brings along


def bring_code(folder: Path, mark: Path, model_type: str) -> None:
    """Make a folder's config, model and tokenizer point to Python files that leave a mark when they are run."""
    config, tokenizer = folder / "config.json", folder / "tokenizer_config.json"
    for what in ("configuration", "modeling", "tokenization"):
        code = f"from pathlib import Path\nPath({str(mark)!r}).write_text({what!r})\nclass Homemade: pass\n"
        (folder / f"{what}_homemade.py").write_text(code)
    models = {"AutoConfig": "configuration_homemade.Homemade", "AutoModelForCausalLM": "modeling_homemade.Homemade"}
    content = json.loads(config.read_text()) if config.exists() else {}
    config.write_text(json.dumps({**content, "model_type": model_type, "auto_map": models}))
    content = json.loads(tokenizer.read_text()) if tokenizer.exists() else {}
    tokenizer.write_text(
        json.dumps({**content, "auto_map": {"AutoTokenizer": ["tokenization_homemade.Homemade", None]}})
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that were put to the user."""
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": questions.append(prompt) or "yes")
    return questions


def test_own_code_is_refused_and_never_run(tmp_path: Path, asked: list[str]) -> None:
    mark, folder = tmp_path / "mark", tmp_path / "model"
    folder.mkdir()
    bring_code(folder, mark, "homemade")
    for read in (load_config, load, load_tokenizer):
        with pytest.raises(InputError, match=r"model needs its own code, which masformer does not run: only") as error:
            read(str(folder))
        assert "\n" not in str(error.value)
    assert (mark.exists(), asked) == (False, [])
    runpy.run_path(str(folder / "modeling_homemade.py"))
    assert mark.read_text() == "modeling"  # so the mark would be there


def test_a_known_type_with_own_code_is_read_without_it(
    llama: PreTrainedModel, tokenizer: Any, tmp_path: Path, asked: list[str]
) -> None:
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    bring_code(tmp_path / "model", tmp_path / "mark", "llama")
    assert run(["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--plan", f"full*{LAYERS}"]) == 0
    for folder in (str(tmp_path / "model"), str(tmp_path / "out")):
        assert isinstance(loaded := load(folder), LlamaForCausalLM)
        assert torch.equal(logits(loaded), logits(llama))
        assert load_tokenizer(folder)(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert ((tmp_path / "mark").exists(), asked) == (False, [])


# The hub


def as_snapshot(home: Path, name: str) -> Path:
    """The folder in the hub's cache for a model whose `main` is this one commit."""
    model, commit = home / "hub" / f"models--{name.replace('/', '--')}", "0123456789" * 4
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    (model / "snapshots" / commit).mkdir(parents=True)
    return model / "snapshots" / commit


def test_hub_ids_from_the_cache(llama: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    """Converted, unconverted and with its own code; by the command line too, whose input is closed."""
    plain, converted = as_snapshot(tmp_path, "owner/plain"), as_snapshot(tmp_path, "owner/converted")
    llama.save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    assert run(["convert", str(plain), str(converted), *LOCAL]) == 0
    bring_code(as_snapshot(tmp_path, "owner/homemade"), tmp_path / "mark", "homemade")
    code = """
        import json, sys, torch
        from masformer.cli import run
        from masformer.models.tokenizer import load_tokenizer
        from masformer.models.checkpoint import load, load_config
        ids = torch.tensor([json.loads(sys.argv[1])])
        report = {}
        for name in ("owner/plain", "owner/converted"):
            with torch.no_grad():
                last = load(name)(ids).logits[0, -1].tolist()
            report[name] = [str(load_config(name)[1]), last, load_tokenizer(name)("the fox").input_ids]
        commands = (["plan"], ["convert", sys.argv[2]], ["generate", "--prompt", "x"])
        report["codes"] = [run([first, "owner/homemade", *more]) for first, *more in commands]
        print(json.dumps(report))
    """
    ids = list(range(40))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), json.dumps(ids), str(tmp_path / "out")],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # nothing else: no question
    for name, folder in {"owner/plain": plain, "owner/converted": converted}.items():
        with torch.no_grad():
            last = load(str(folder))(torch.tensor([ids])).logits[0, -1].tolist()
        assert report[name] == [str(load_config(str(folder))[1]), last, tokenizer("the fox").input_ids]
    assert report["owner/plain"][0] != report["owner/converted"][0]
    assert report["codes"] == [3, 3, 3]
    assert done.stderr.count("owner/homemade needs its own code") == 3
    assert not (tmp_path / "mark").exists()
