"""Conversions as checkpoints of families that stock software knows: what is refused, and that proofs can fail."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from masformer.errors import InputError
from masformer.models import export as exporting
from masformer.models import stock
from masformer.models.checkpoint import load_config
from masformer.models.convert import convert
from masformer.models.export import export, native_config
from masformer.models.proof import _judged, check_vllm, prove, prove_in_vllm, questions
from masformer.spans import SpanPlan

from .helpers import config_of, tiny

PLAN = SpanPlan.parse("window:24,full,window:24,full")
FAMILIES = ("llama", "mistral", "ministral", "qwen2", "qwen3", "gpt_neo")
VLLM = Path(os.environ.get("MASFORMER_VLLM", Path(__file__).parents[2] / ".venv-vllm/bin/python"))


def saved(folder, family="llama", plan=PLAN, **changes):
    """A tiny conversion on disk, and its expected answers with the questions."""
    model = convert(tiny(family, torch.float32, **changes), plan, check=False)
    model.save_pretrained(folder)
    asked = questions(model.config, 24)
    return str(folder), asked, stock.answers(model, asked["prompts"])


def config_in(folder):
    return json.loads((folder / "config.json").read_text())


def edit(folder, **changes):
    (folder / "config.json").write_text(json.dumps(config_in(folder) | changes))


@pytest.fixture
def unproved(monkeypatch):
    """Exports are written and not proved."""
    monkeypatch.setattr(exporting, "prove", lambda *_: None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_native_model_gives_what_the_conversion_gives(family, tmp_path, unproved):
    source, asked, expected = saved(tmp_path / "in", family)
    export(source, tmp_path / "out", "transformers")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert config_in(tmp_path / "out")["architectures"] == [type(native).__name__]
    got = stock.answers(native, asked["prompts"])
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-5)
    assert list((tmp_path / "out").glob("*.safetensors"))
    assert not list((tmp_path / "out").glob("*.bin"))


def test_a_fresh_process_without_this_package_proves_an_export(tmp_path):
    source, _, _ = saved(tmp_path / "in")
    proof = export(source, tmp_path / "out", "vllm").proof
    assert proof.software == "MinistralForCausalLM"
    assert proof.error < 5e-6
    assert (proof.tokens, proof.same, proof.generated) == (3 * 24 + 5, 32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_is_proved_in_a_fresh_process(family, dtype, tmp_path):
    convert(tiny(family, dtype), PLAN, check=False).save_pretrained(tmp_path / "in")
    exported = export(str(tmp_path / "in"), tmp_path / "out", "transformers")
    assert exported.proof.error < 5e-6
    assert config_in(tmp_path / "out")["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    "changes", [{"layer_types": ["full_attention"] * 4}, {"sliding_window": 23}, {"sliding_window": 25}]
)
def test_other_spans_are_far_outside_the_tolerance(changes, tmp_path, unproved):
    source, asked, expected = saved(tmp_path / "in")
    export(source, tmp_path / "out", "transformers")
    edit(tmp_path / "out", **changes)
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    got = stock.answers(native, asked["prompts"])
    error = (got["logits.1"] - expected["logits.1"]).abs().max() / expected["logits.1"].abs().max()
    assert error > 1e-2


def test_a_folder_that_differs_is_refused_in_a_fresh_process(tmp_path, unproved):
    source, asked, expected = saved(tmp_path / "in")
    export(source, tmp_path / "out", "transformers")
    edit(tmp_path / "out", sliding_window=25)
    with pytest.raises(InputError, match="differs from its source in MinistralForCausalLM, so it is refused: logits"):
        prove(tmp_path / "out", asked, expected)


def test_a_folder_that_does_not_load_is_refused(tmp_path):
    _, asked, expected = saved(tmp_path / "in")
    with pytest.raises(InputError, match=r"transformers cannot load the export: \w+Error: .*masformer"):
        prove(tmp_path / "in", asked, expected)  # a conversion is no export: stock transformers refuses its type


@pytest.mark.parametrize("error", [2e-4, float("nan"), float("inf")])
def test_a_difference_beyond_the_tolerance_is_refused_and_nan_is_one(error):
    asked = {"prompts": [[3, 4]]}
    with pytest.raises(InputError, match=r"apart, 0\.0001 is allowed"):
        _judged("a class", asked, [0.0, error, 1e-7], 1e-4, 16)
    assert _judged("a class", asked, [0.0, 1e-7], 1e-4, 16).error == 1e-7


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("full*4", "no local layers, so there is nothing to export: convert it first"),
        ("full*2,block:8*2", "block:8 cannot be exported, native layers know windows alone: train the last phase"),
        ("full*2,window:8:sinks=2*2", "window:8:sinks=2 cannot be exported, native layers have no sinks"),
        ("full*2,window:8,window:12", "window:8 and window:12 cannot be exported together"),
        ("full*2,window:1*2", "window:1 cannot be exported: the caches of transformers would hold all"),
    ],
)
@pytest.mark.parametrize("target", ["transformers", "vllm"])
def test_spans_without_a_native_form_are_refused(plan, words, target):
    with pytest.raises(InputError, match=words) as caught:
        native_config(config_of("llama"), SpanPlan.parse(plan), target)
    assert "\n" not in str(caught.value)
    if ":8" in plan:
        assert "recipes/smollm2-windows.yaml" in str(caught.value)
        assert "vLLM plugin" in str(caught.value)


@pytest.mark.parametrize(
    ("family", "target", "words"),
    [
        ("gpt_neox", "transformers", "would prefill with full attention; masformer.load runs the conversion"),
        ("gpt_neox", "vllm", "would prefill with full attention"),
        ("olmo3", "transformers", "a layer's type changes its positions too"),
        ("gpt2", "transformers", "only llama, mistral, ministral, qwen2, qwen3, gpt_neo have a native form"),
        ("qwen2", "vllm", "whose own qwen2 reads no layer types"),
        ("qwen3", "vllm", "whose own qwen3 reads no layer types"),
        ("gpt_neo", "vllm", "has no such class"),
        ("llama", "sglang", "exports are for transformers and vllm, not for 'sglang'"),
    ],
)
def test_families_that_a_target_would_not_honour_are_refused(family, target, words):
    with pytest.raises(InputError, match=words):
        native_config(config_of(family), PLAN, target)


@pytest.mark.parametrize("name", ["attention_bias", "mlp_bias"])
def test_a_llama_with_biases_is_refused(name):
    with pytest.raises(InputError, match=f"llama with {name} cannot be exported"):
        native_config(config_of("llama", **{name: True}), PLAN, "transformers")


def test_quantised_weights_are_refused():
    config = config_of("llama")
    config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(InputError, match="quantised weights cannot be exported"):
        native_config(config, PLAN, "transformers")


def test_weights_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    source, _, _ = saved(tmp_path / "in")
    monkeypatch.setattr(exporting, "native_config", lambda *_: native_config(config_of("qwen3"), PLAN, "transformers"))
    with pytest.raises(InputError, match="the weights do not fit a qwen3"):
        export(source, tmp_path / "out", "transformers")


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "RoPE of type 'dynamic'"),
        (
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "partial_rotary_factor in its RoPE",
        ),
    ],
)
def test_positions_that_vllm_computes_otherwise_are_refused_for_it_alone(rope, words):
    config = config_of("llama", rope_parameters=rope)
    with pytest.raises(InputError, match=words):
        native_config(config, PLAN, "vllm")
    assert native_config(config, PLAN, "transformers").rope_parameters == config.rope_parameters


def test_a_llama_for_vllm_is_a_ministral_whose_architecture_is_llama():
    config = config_of("llama", tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    config.auto_map = {"AutoModelForCausalLM": "own.Code"}
    config.extended_positions = {"method": "theta"}
    native = native_config(config, PLAN, "vllm")
    assert native.model_type == "ministral"
    assert native.architectures == ["LlamaForCausalLM"]
    assert native.layer_types == ["sliding_attention", "full_attention"] * 2
    assert (native.sliding_window, native.head_dim) == (24, 8)
    assert native.extended_positions == {"method": "theta"}
    assert not hasattr(native, "auto_map")
    for name in (
        "tie_word_embeddings",
        "rope_parameters",
        "rms_norm_eps",
        "bos_token_id",
        "eos_token_id",
        "vocab_size",
    ):
        assert getattr(native, name) == getattr(config, name)
    assert config.model_type == "llama"


def test_a_qwen_is_refused_by_software_that_goes_by_the_number_of_layers():
    native = native_config(config_of("qwen2"), PLAN, "transformers")
    assert native.use_sliding_window
    assert native.max_window_layers == 0


def test_a_model_with_few_positions_is_asked_fewer_tokens():
    lengths = [len(prompt) for prompt in questions(config_of("llama", max_position_embeddings=64), 24)["prompts"]]
    assert lengths == [24 - 8, 64 - 16]
    with pytest.raises(InputError, match="too few for a proof"):
        questions(config_of("llama", max_position_embeddings=16), 24)


def test_the_compared_positions_are_spread_and_hold_the_last_one():
    assert stock.positions(5).tolist() == [0, 1, 2, 3, 4]
    many = stock.positions(12_293)
    assert (many[0], many[-1], len(many)) == (0, 12_292, stock.MOST)
    assert many.diff().min() > 0


def test_an_interpreter_that_cannot_be_run_or_has_no_vllm_is_refused_before_any_work(tmp_path):
    with pytest.raises(InputError, match="cannot be run: No such file or directory"):
        export("nowhere", tmp_path / "out", "vllm", vllm=str(tmp_path / "python"))
    empty = tmp_path / "python"
    empty.write_text("#!/bin/sh\nexit 1\n")
    empty.chmod(0o755)
    with pytest.raises(InputError, match="has no vLLM: make an environment"):
        check_vllm(str(empty))
    assert not (tmp_path / "out").exists()


def test_the_error_that_vllm_died_of_is_the_reason(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\necho '(EngineCore pid=1) ERROR 1-1 ValueError: no such class' >&2\n"
        "echo 'RuntimeError: Engine core initialization failed. See root cause above.' >&2\nexit 1\n"
    )
    python.chmod(0o755)
    asked = questions(config_of("llama"), 24)
    with pytest.raises(InputError, match="vLLM cannot load the export: ValueError: no such class"):
        prove_in_vllm(tmp_path, asked, {}, str(python))


def reply(tmp_path, expected, asked, change=0.0):
    """An interpreter that answers as vLLM would that computes what is expected, but for one number."""
    found = []
    for number, prompt in enumerate(asked["prompts"]):
        rows = expected[f"logits.{number}"].log_softmax(-1)
        tokens = expected[f"tokens.{number}"]
        steps = expected[f"steps.{number}"].log_softmax(-1)[torch.arange(stock.NEW), tokens]
        prompt_logs = rows[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
        found.append({"prompt": prompt_logs.tolist(), "tokens": tokens.tolist(), "steps": steps.tolist()})
    found[-1]["prompt"][-1] += change
    (tmp_path / "reply.json").write_text(json.dumps({"found": found, "texts": []}))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncp {tmp_path}/reply.json "$5"\n')
    python.chmod(0o755)
    return str(python)


def test_the_log_probabilities_of_vllm_are_held_against_the_source(tmp_path):
    _, asked, expected = saved(tmp_path / "in")
    proof = prove_in_vllm(tmp_path, asked, expected, reply(tmp_path, expected, asked))
    assert (proof.software, proof.same, proof.generated) == ("vLLM", 32, 32)
    assert proof.error < 1e-5
    with pytest.raises(InputError, match="differs from its source in vLLM, so it is refused: log-probabilities"):
        prove_in_vllm(tmp_path, asked, expected, reply(tmp_path, expected, asked, 0.01))


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_vllm_serves_an_export_and_other_spans_are_found_out_by_it(tmp_path):
    wide = {"hidden_size": 128, "head_dim": 32}  # vLLM's attention knows no heads of width 8
    source, asked, expected = saved(tmp_path / "in", **wide)
    proof = export(source, tmp_path / "out", "vllm", vllm=str(VLLM)).vllm
    assert proof is not None
    assert proof.error < 5e-4
    assert proof.same == proof.generated
    for changes in ({"sliding_window": 25}, {"layer_types": ["full_attention"] * 4}):
        edit(tmp_path / "out", **changes)
        with pytest.raises(InputError, match="differs from its source in vLLM"):
            prove_in_vllm(tmp_path / "out", asked, expected, str(VLLM))


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_vllm_refuses_a_qwen_in_its_own_class_and_serves_it_through_that_of_transformers(tmp_path, unproved):
    source, asked, expected = saved(tmp_path / "in", "qwen3", hidden_size=128, head_dim=32)
    export(source, tmp_path / "out", "transformers")
    with pytest.raises(InputError, match="AssertionError: Sliding window for some but all layers is not supported"):
        prove_in_vllm(tmp_path / "out", asked, expected, str(VLLM))
    assert prove_in_vllm(tmp_path / "out", asked, expected, str(VLLM), classes="transformers").error < 5e-4


def test_the_plan_of_an_export_is_read_back_from_its_own_layer_types(tmp_path, unproved):
    source, _, _ = saved(tmp_path / "in")
    export(source, tmp_path / "out", "transformers")
    assert load_config(str(tmp_path / "out"))[1] == PLAN
