"""Folders of converted models: exact when loaded with this package, refused without it, refused when damaged."""

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPTJConfig, PreTrainedModel

from masformer.attention import UnsupportedSpan
from masformer.errors import CorruptError, InputError
from masformer.models.checkpoint import MasformerForCausalLM, load, load_config
from masformer.models.convert import convert, is_converted, plan_of, restore
from masformer.models.families import class_of
from masformer.spans import Full, SpanPlan, Window

from .helpers import FEW, MIXED, config_of, logits, state, tiny, tokens


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted Llama, never to be changed."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    convert(tiny(dtype=torch.float32), MIXED).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("family", FEW)
def test_round_trip(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, ids = convert(tiny(family, dtype), MIXED), tokens(30)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), load(str(tmp_path))):
        assert isinstance(loaded, class_of(config_of(family)))
        assert is_converted(loaded)
        assert plan_of(loaded) == MIXED
        assert loaded.dtype == dtype
        assert not loaded.training
        assert torch.equal(logits(loaded, ids), expected)
        assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
    assert load_config(str(tmp_path))[1] == MIXED
    assert load_config(str(tmp_path))[0].model_type == family


def test_saving_again_gives_the_same_folder(saved: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(tmp_path)
    names = sorted(file.name for file in saved.iterdir())
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes(), name


def test_tied_weights(tmp_path: Path) -> None:
    model = convert(tiny(tie_word_embeddings=True), MIXED)
    model.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert torch.equal(logits(loaded, tokens(20)), logits(model, tokens(20)))


def test_shards(tmp_path: Path) -> None:
    model = convert(tiny(), MIXED)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(str(tmp_path)), tokens(20)), logits(model, tokens(20)))


def test_the_generation_config_is_kept(tmp_path: Path) -> None:
    model = convert(tiny(), MIXED)
    model.generation_config.eos_token_id = [7, 9]
    model.save_pretrained(tmp_path)
    for loaded in (load(str(tmp_path)), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert loaded.generation_config.eos_token_id == [7, 9]
        ids = tokens(9)
        assert torch.equal(loaded.generate(ids, max_new_tokens=9), model.generate(ids, max_new_tokens=9))


def test_dtype_on_loading(saved: Path) -> None:
    assert load(str(saved), dtype=torch.float64).dtype == torch.float64
    assert AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_loading_information(saved: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert is_converted(model)
    assert not info["missing_keys"]


def test_a_restored_model_saves_as_its_parent(tmp_path: Path) -> None:
    model = restore(convert(tiny(), MIXED))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    loaded = load(str(tmp_path))
    assert not is_converted(loaded)
    assert torch.equal(logits(loaded, tokens(20)), logits(model, tokens(20)))


@pytest.mark.parametrize("arguments", [{}, {"max_shard_size": "20KB"}, {"save_original_format": False}])
def test_saving_changes_nothing(arguments: dict[str, Any], tmp_path: Path) -> None:
    model, ids = convert(tiny(), MIXED), tokens(20)
    model.save_pretrained(tmp_path / "first")  # transformers notes dtype and class in the config when it saves
    before, expected = state(model), logits(model, ids)
    model.save_pretrained(tmp_path / "second", **arguments)
    assert state(model) == before
    assert plan_of(model) == MIXED
    assert torch.equal(logits(model, ids), expected)


def test_saving_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = convert(tiny(), MIXED)
    model.save_pretrained(tmp_path / "first")
    before = state(model)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path / "second")
    assert state(model) == before
    config = tmp_path / "second" / "config.json"
    assert not config.exists() or json.loads(config.read_text())["model_type"] == "masformer"


def test_saving_takes_what_transformers_takes(tmp_path: Path) -> None:
    """By position too: `save_pretrained(folder, is_main_process)`; another process than the main one writes nothing."""
    model = convert(tiny(), MIXED)
    model.save_pretrained(tmp_path / "main", True)
    assert plan_of(load(str(tmp_path / "main"))) == MIXED
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "config.json").exists()
    weights = {name: x + 1 for name, x in model.state_dict().items()}
    model.save_pretrained(tmp_path / "given", state_dict=weights)
    assert torch.equal(load(str(tmp_path / "given")).lm_head.weight, model.lm_head.weight + 1)


def test_what_config_json_says(saved: Path) -> None:
    content = json.loads((saved / "config.json").read_text())
    assert content["model_type"] == "masformer"
    assert content["architectures"] == ["MasformerForCausalLM"]
    assert content["parent_type"] == "llama"
    assert content["plan"] == str(MIXED)
    assert "model_type" not in content["parent"]  # a parent class would take a nested config of its own type
    assert AutoConfig.from_pretrained(saved).plan == str(MIXED)


# Without the package


def in_a_fresh_process(script: str, *arguments: str) -> dict[str, Any]:
    code = "import json, sys\n" + textwrap.dedent(script) + "\nprint(json.dumps(report))"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_software_that_does_not_know_the_package_refuses(saved: Path, tmp_path: Path) -> None:
    folders = {"llama": str(saved)}
    for family in ("mistral", "qwen2", "qwen3"):
        convert(tiny(family), MIXED).save_pretrained(tmp_path / family)
        folders[family] = str(tmp_path / family)
    report = in_a_fresh_process(
        """
        import transformers
        report = {}
        names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
        for family, folder in json.loads(sys.argv[1]).items():
            causal = getattr(transformers, names[family] + "ForCausalLM")
            bare = getattr(transformers, names[family] + "Model")
            auto = (transformers.AutoModelForCausalLM, transformers.AutoModel, transformers.AutoConfig)
            for cls in (*auto, causal, bare):
                try:
                    cls.from_pretrained(folder)
                    report[family + " " + cls.__name__] = "loaded"
                except Exception as error:
                    report[family + " " + cls.__name__] = type(error).__name__ + ": " + str(error)[:200]
        report["imported"] = "masformer" in sys.modules
        """,
        json.dumps(folders),
    )
    assert not report.pop("imported")
    assert len(report) == 20
    assert not [name for name, what in report.items() if what == "loaded"]
    assert all("masformer" in what for name, what in report.items() if "Auto" in name), report


def test_the_parent_class_refuses_with_the_package_too(saved: Path) -> None:
    with pytest.raises(Exception, match=r"multiple|divi|heads|masformer|mismatch"):
        class_of(config_of("llama")).from_pretrained(saved)


def test_import_masformer_is_enough(saved: Path) -> None:
    report = in_a_fresh_process(
        """
        import masformer
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        import torch
        ids = torch.tensor([json.loads(sys.argv[2])])
        with torch.no_grad():
            report = {"logits": model(ids).logits[0, -1].tolist()}
        """,
        str(saved),
        json.dumps(tokens(20)[0].tolist()),
    )
    assert report["logits"] == logits(load(str(saved)), tokens(20))[0, -1].tolist()


# Refusals


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("cls", [AutoModelForCausalLM, MasformerForCausalLM], ids=lambda cls: cls.__name__)
def test_another_attention_implementation(saved: Path, implementation: str, cls: Any) -> None:
    with pytest.raises(InputError, match=f"'{implementation}' would ignore the spans"):
        cls.from_pretrained(saved, attn_implementation=implementation)


def test_our_own_attention_implementation_may_be_named(saved: Path) -> None:
    assert plan_of(AutoModelForCausalLM.from_pretrained(saved, attn_implementation="masformer")) == MIXED


def test_a_model_built_from_the_config_alone_has_the_spans(saved: Path) -> None:
    """Random weights, but neither its parent nor a shell without layers."""
    config = AutoConfig.from_pretrained(saved)
    model = AutoModelForCausalLM.from_config(config)
    assert is_converted(model)
    assert plan_of(model) == config.span_plan()


def test_the_decoder_alone_is_not_saved_as_its_parent(tmp_path: Path) -> None:
    model = convert(tiny(), MIXED)
    try:
        model.model.save_pretrained(tmp_path)
    except (UnsupportedSpan, InputError):
        assert not (tmp_path / "config.json").exists()
    else:
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "masformer"


@pytest.mark.parametrize("kept", [0, 7, 300, -1, -4000])
def test_truncated_weights(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CorruptError) as error:
        load(str(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_are_not_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_text("<html>404</html>" * 100)
    with pytest.raises(CorruptError):
        load(str(folder))


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CorruptError, match=str(folder)):
        load(str(folder))


def test_a_missing_shard(tmp_path: Path) -> None:
    convert(tiny(), MIXED).save_pretrained(tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(CorruptError):
        load(str(tmp_path))


def resave(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "model.layers.2.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(NORM), "1 missing keys.*layers.2.input_layernorm"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "1 unexpected keys.*extra"),
        (lambda tensors: tensors.update({NORM: torch.zeros(3)}), "layers.2.input_layernorm"),
    ],
    ids=["missing", "extra", "reshaped"],
)
def test_tensors_that_do_not_fit(folder: Path, change: Callable[[dict[str, Any]], Any], said: str) -> None:
    resave(folder, change)
    for read in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CorruptError, match=said):
            read(str(folder))


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("full*3", "the plan has 3 layers, the model has 4"),
        ("window:0*4", "window size must be a whole number of at least 1, got 0"),
        ("banana*4", "unknown span 'banana'"),
        ("", "bad plan"),
        (None, "bad plan"),
        (4, "bad plan"),
        (["full"] * 4, "bad plan"),
    ],
    ids=str,
)
def test_an_edited_plan(folder: Path, plan: Any, said: str) -> None:
    edit(folder, lambda content: content.update(plan=plan))
    for read in (load, load_config):
        with pytest.raises(CorruptError, match=said):
            read(str(folder))


def test_a_plan_that_was_removed(folder: Path) -> None:
    edit(folder, lambda content: content.pop("plan"))
    with pytest.raises(CorruptError, match="bad plan"):
        load(str(folder))


@pytest.mark.parametrize("kind", ["nonsense", "", None, 3])
def test_unknown_parent_type(folder: Path, kind: Any) -> None:
    edit(folder, lambda content: content.update(parent_type=kind))
    for read in (load, load_config):
        with pytest.raises(CorruptError, match=f"names the parent type {kind!r}, which is not known"):
            read(str(folder))


def test_a_parent_type_that_is_not_supported(folder: Path) -> None:
    edit(folder, lambda content: content.update(parent_type="gpt2"))
    with pytest.raises((CorruptError, InputError)):
        load(str(folder))


@pytest.mark.parametrize("parent", [None, {}, [], "llama", {"num_hidden_layers": "four"}], ids=str)
def test_an_edited_parent(folder: Path, parent: Any) -> None:
    edit(folder, lambda content: content.update(parent=parent))
    with pytest.raises(CorruptError) as error:
        load(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "{", "not json", "\x00\x01", "[1, 2]", "{}", '{"plan": "full*4"}', "null", "[" * 99999]
)
def test_a_config_that_is_not_one(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    for read in (load, load_config):
        with pytest.raises(CorruptError, match=r"config\.json") as error:
            read(str(folder))
        assert "\n" not in str(error.value)


def test_a_config_in_another_encoding(folder: Path) -> None:
    (folder / "config.json").write_bytes(b'{"model_type": "\xff\xfe"}')
    with pytest.raises(CorruptError, match="is not JSON"):
        load(str(folder))


def test_a_foreign_model_type(folder: Path) -> None:
    edit(folder, lambda content: content.update(model_type="no-such-model"))
    with pytest.raises((CorruptError, InputError), match="no-such-model"):
        load(str(folder))


def test_a_converted_config_dressed_as_its_parent(folder: Path) -> None:
    """Someone changes the model type back: the sizes at the top are refused, never a full model."""
    edit(folder, lambda content: content.update(model_type="llama", architectures=["LlamaForCausalLM"]))
    with pytest.raises((CorruptError, InputError)):
        load(str(folder))


def test_weights_of_another_model(folder: Path, tmp_path: Path) -> None:
    tiny("qwen2", torch.float32).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(CorruptError, match="unexpected keys"):
        load(str(folder))


@pytest.mark.parametrize("name", ["nowhere", "a/b/c"])
def test_no_folder(tmp_path: Path, name: str) -> None:
    for read in (load, load_config):
        with pytest.raises(InputError, match=name):
            read(str(tmp_path / name))


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is not a folder"):
        load(str(tmp_path / "file"))


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        load(str(tmp_path))


def test_a_hub_id_without_a_network() -> None:
    with pytest.raises(InputError, match="nobody/nothing") as error:
        load("nobody/nothing")
    assert "\n" not in str(error.value)


def test_an_unsupported_family(tmp_path: Path) -> None:
    GPTJConfig().save_pretrained(tmp_path)
    for read in (load, load_config):
        with pytest.raises(InputError, match="model type 'gptj' computes its attention itself"):
            read(str(tmp_path))


def test_unconverted_folders_load_as_they_are(tmp_path: Path) -> None:
    model: PreTrainedModel = tiny("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    model.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert not is_converted(loaded)
    expected = SpanPlan((Full(), Full(), Window(8), Window(8)))
    assert plan_of(loaded) == load_config(str(tmp_path))[1] == expected


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "gpt_neox"])
def test_masks_that_older_transformers_saved_are_not_weights(family: str, tmp_path: Path) -> None:
    model = tiny(family, torch.float32)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    where = {"gpt2": "h.0.attn", "gpt_neo": "transformer.h.0.attn.attention", "gpt_neox": "gpt_neox.layers.0.attention"}
    tensors |= {
        f"{where[family]}.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        f"{where[family]}.masked_bias": torch.tensor(-1e9),
    }
    save_file(tensors, file, {"format": "pt"})
    assert torch.equal(load(str(tmp_path))(tokens(9)).logits, model(tokens(9)).logits)
