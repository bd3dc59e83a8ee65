"""More positions: by the formulas of their papers, in place as on loading, recorded, refused where they do not fit."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from masformer.errors import InputError
from masformer.models.checkpoint import load
from masformer.models.config import MasformerConfig
from masformer.models.convert import convert, is_converted, restore
from masformer.models.families import FAMILIES, decoder_of
from masformer.models.positions import (
    METHODS,
    ROPE_METHODS,
    TABLE_METHODS,
    check_positions,
    extend,
    extended_config,
    max_positions,
    methods_for,
)
from masformer.spans import Block, Full, SpanPlan, Window

OLD, NEW = 64, 160
FACTOR = NEW / OLD
HEAD, THETA = 16, 10_000.0
SIZES = {
    "vocab_size": 64,
    "hidden_size": 4 * HEAD,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": OLD,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WHERE_KNOWN = {
    "num_key_value_heads": 2,
    "head_dim": HEAD,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
"""Set in the families whose config has such a field."""
DEFAULT: dict[str, Any] = {"rope_type": "default", "rope_theta": THETA}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24}
OWN: dict[str, dict[str, Any]] = {
    "apertus": {"rope_parameters": DEFAULT},
    "cohere2": SLIDING,
    "exaone4": SLIDING,
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 24},
    "gpt_oss": SLIDING | {"rope_parameters": DEFAULT},
    "ministral": SLIDING,
    "ministral3": {
        "rope_parameters": DEFAULT | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": OLD // 2}
    },
    "mistral": {"sliding_window": 24},
    "mixtral": {"head_dim": None},
    "olmo3": SLIDING,
    "phi3": {"original_max_position_embeddings": OLD},
    "smollm3": {"no_rope_layers": [0, 1]},
}
EXCEPT = {"phi3": ("linear", "dynamic", "yarn"), "ministral3": ("yarn",)}
PARTIAL = {"glm4": 2, "gpt_neox": 4, "nemotron": 2, "phi": 2, "stablelm": 4}
"""Heads of which one dimension in so many is rotated."""
ROTARY = [name for name, family in FAMILIES.items() if not family.table]
TABLES = [name for name, family in FAMILIES.items() if family.table]
NESTED = ["gemma3_text", "olmo3"]
PAIRS = [
    (name, method)
    for name, family in FAMILIES.items()
    for method in (TABLE_METHODS if family.table else ROPE_METHODS)
    if method not in EXCEPT.get(name, ())
]


def config_of(name: str, **changes: Any) -> PreTrainedConfig:
    made = CONFIG_MAPPING[name]
    known = {field: value for field, value in WHERE_KNOWN.items() if field in made.__dataclass_fields__}
    return made(**copy.deepcopy({**SIZES, **known, **OWN.get(name, {}), **changes}))


def tiny(name: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(name, **changes), dtype=dtype).eval()


def same_from(config: PreTrainedConfig, model: PreTrainedModel) -> PreTrainedModel:
    """A new model of `config` with the weights of `model`."""
    made = AutoModelForCausalLM.from_config(config).eval()
    made.load_state_dict(model.state_dict())
    return made


def tokens(length: int) -> Tensor:
    return torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(0))


def logits(model: PreTrainedModel, length: int = NEW) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(length)).logits


def frequencies(model: PreTrainedModel, kind: str = "") -> Tensor:
    """RoPE frequencies, of a layer type where they differ by it."""
    name = f"{kind}_inv_freq" if kind else "inv_freq"
    rotary: Any = decoder_of(model).rotary_emb
    return getattr(rotary, name).double()


def rows(model: PreTrainedModel) -> Tensor:
    """The whole table of learned positions."""
    table = decoder_of(model).get_submodule(FAMILIES[model.config.model_type].table)
    assert isinstance(table, nn.Embedding)
    return table.weight.detach().clone()


def full_rope(config: PreTrainedConfig) -> dict[str, Any]:
    return config.rope_parameters["full_attention"] if config.model_type in NESTED else config.rope_parameters


def plain(dim: int, theta: float = THETA) -> Tensor:
    """RoPE: theta ** (-2 i / d), the frequencies of RoFormer."""
    return torch.tensor([theta ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected.to(got), rtol=1e-5, atol=0)


# Every family and method


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_in_place_is_what_the_extended_config_makes(name: str, method: str, tmp_path: Path) -> None:
    model = tiny(name)
    before, config = model.config.to_dict(), model.config
    longer = extended_config(config, NEW, method)
    assert model.config.to_dict() == before
    assert extend(model, NEW, method) is model
    assert model.config is config
    assert all(getattr(module, "config", config) is config for module in model.modules())
    assert config.to_dict() == longer.to_dict()
    assert config.extended_positions == {"method": method, "from": OLD, "to": NEW}
    assert max_positions(config) == NEW
    assert config.max_position_embeddings == (OLD if method == "dynamic" else NEW)

    made = same_from(longer, model)
    buffers = dict(made.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in model.named_buffers())
    expected = logits(model)
    assert expected.isfinite().all()
    assert torch.equal(logits(made), expected)

    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.extended_positions == config.extended_positions
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_methods_of_a_family(name: str) -> None:
    fitting = tuple(method for family, method in PAIRS if family == name)
    assert methods_for(config_of(name)) == fitting
    for method in METHODS.keys() - set(fitting):
        with pytest.raises(InputError, match=f"{method!r} cannot extend this {name}: choose {fitting[0]}"):
            extended_config(config_of(name), NEW, method)


@pytest.mark.parametrize(
    ("name", "method"), [("llama", "theta"), ("phi3", "theta"), ("opt", "tile"), ("gpt_neo", "tile")]
)
def test_generation_goes_past_the_old_maximum(name: str, method: str) -> None:
    model = extend(tiny(name), NEW, method)
    ids = tokens(OLD - 4)
    sizes: list[int] = []
    embedding: Any = model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    handle.remove()
    assert sizes == [OLD - 4, *[1] * 11]  # no prefill twice, as Phi-3 does at its original maximum
    for end in range(OLD - 4, OLD + 8):
        with torch.no_grad():
            assert model(input_ids=out[:, :end]).logits[0, -1].argmax() == out[0, end]


# Frequencies


@pytest.mark.parametrize("name", ROTARY)
def test_theta_is_the_ntk_aware_formula(name: str) -> None:
    """arXiv 2309.00071, section 3.1: b' = b * s ** (d / (d - 2)): the slowest frequency is divided by s."""
    model = tiny(name)
    kind = "full_attention" if name in NESTED else ""
    before, theta = frequencies(model, kind), full_rope(model.config)["rope_theta"]
    dim = 2 * len(before)
    assert dim == HEAD // PARTIAL.get(name, 1)
    close(before, plain(dim, theta))
    after = frequencies(extend(model, NEW, "theta"), kind)
    close(after, plain(dim, theta * FACTOR ** (dim / (dim - 2))))
    close(after[[0, -1]], before[[0, -1]] / torch.tensor([1, FACTOR]))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi"])
def test_linear_divides_every_frequency(name: str) -> None:
    """arXiv 2306.15595, equation 4: f'(x, m) = f(x, m L / L')."""
    model = tiny(name)
    before = frequencies(model)
    close(frequencies(extend(model, NEW, "linear")), before * OLD / NEW)


@pytest.mark.parametrize(("name", "dim"), [("llama", HEAD), ("phi", HEAD // 2)])
def test_yarn_interpolates_slow_frequencies_only(name: str, dim: int) -> None:
    """arXiv 2309.00071: pairs of over 32 turns in the old maximum are kept, of under one divided by s.

    Between them the paper's ramp is linear in the turns, that of its authors' code, which transformers follows, in the
    number of the pair, from the whole number below the first border to the one above the second.
    """
    old, new = 1024, 4096
    model = extend(tiny(name, max_position_embeddings=old), new, "yarn")
    freqs, after = plain(dim), frequencies(model)

    def border(turns: float) -> float:
        return dim * math.log(old / (2 * math.pi * turns)) / (2 * math.log(THETA))

    low, high = math.floor(border(32)), math.ceil(border(1))
    pairs = torch.arange(dim // 2)
    ramp = ((pairs - low) / (high - low)).clamp(0, 1)
    close(after, freqs * (1 - ramp) + freqs / 4 * ramp)
    turns = old * freqs / (2 * math.pi)
    assert (turns > 32).sum() == low + 1
    close(after[pairs <= low], freqs[pairs <= low])
    assert (turns < 1).any()
    close(after[pairs >= high], freqs[pairs >= high] / 4)
    rotary: Any = decoder_of(model).rotary_emb
    assert rotary.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize(("name", "dim"), [("llama", HEAD), ("gpt_neox", HEAD // 4)])
def test_dynamic_raises_theta_by_the_length_of_the_call(name: str, dim: int) -> None:
    """arXiv 2309.00071, dynamic scaling: NTK-aware with s = max(1, l / L) of each forward pass."""
    model = extend(tiny(name), NEW, "dynamic")
    for length in (OLD // 2, OLD, 100, NEW):
        logits(model, length)
        scale = max(1, length / OLD)
        close(frequencies(model), plain(dim, THETA * scale ** (dim / (dim - 2))))
    longest = frequencies(model)
    logits(model, 100)  # the model keeps the frequencies of the longest call
    assert torch.equal(frequencies(model), longest)
    parent = tiny(name)
    logits(model, OLD // 2)  # a short call takes the growth back
    assert torch.equal(logits(model, OLD), logits(parent, OLD))
    theta = extend(parent, NEW, "theta")
    torch.testing.assert_close(logits(model), logits(theta), rtol=1e-4, atol=1e-5)


def test_dynamic_prefill_and_decode_do_not_agree() -> None:
    """A fact about the parent itself, and why it is told: keys in a cache keep the frequencies of their call."""

    def decoded(method: str, length: int) -> tuple[Tensor, Tensor]:
        model, ids = extend(tiny(dtype=torch.float64), NEW, method), tokens(length)
        with torch.no_grad():
            cache = model(input_ids=ids[:, : length - 8], use_cache=True).past_key_values
            last = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(length - 8, length)]
        return torch.cat(last, dim=1), logits(model, length)[:, -8:]

    def gap(method: str, length: int) -> float:
        one_by_one, at_once = decoded(method, length)
        return float((one_by_one - at_once).abs().max())

    assert gap("theta", 100) < 1e-10
    assert gap("dynamic", OLD) < 1e-10
    assert gap("dynamic", 100) > 1e-3


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("method", ROPE_METHODS)
def test_sliding_layers_keep_their_rope(name: str, method: str) -> None:
    model = tiny(name)
    sliding, full = (frequencies(model, f"{kind}_attention") for kind in ("sliding", "full"))
    extend(model, NEW, method)
    logits(model)
    assert torch.equal(frequencies(model, "sliding_attention"), sliding)
    assert not torch.equal(frequencies(model, "full_attention"), full)
    assert model.config.rope_parameters["sliding_attention"]["rope_type"] == "default"


def test_frequencies_are_made_in_float32_whatever_the_model_was_cast_to() -> None:
    model = extend(tiny().to(torch.bfloat16), NEW, "linear")
    rotary: Any = decoder_of(model).rotary_emb
    assert rotary.inv_freq.dtype == torch.float32
    assert not rotary.training


# Once more, and upon parents that are scaled


def test_extending_twice_is_extending_once() -> None:
    for method in ("theta", "linear", "dynamic"):
        once, twice = extend(tiny(), NEW, method), extend(extend(tiny(), 100, method), NEW, method)
        torch.testing.assert_close(logits(twice), logits(once), rtol=1e-4, atol=1e-5)
        assert twice.config.extended_positions == {
            "method": method,
            "from": 100,
            "to": NEW,
            "before": {"method": method, "from": OLD, "to": 100},
        }


def test_a_longer_dynamic_starts_afresh() -> None:
    model = extend(tiny("gemma3_text"), 100, "dynamic")
    logits(model, 100)
    expected = logits(extend(tiny("gemma3_text"), NEW, "dynamic"), 80)
    assert torch.equal(logits(extend(model, NEW, "dynamic"), 80), expected)


def test_linear_factors_multiply() -> None:
    """As in Gemma 3, whose full layers have the linear factor 8."""
    rope = {kind: {"rope_type": "default", "rope_theta": THETA} for kind in ("sliding_attention", "full_attention")}
    rope["full_attention"] = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    config = config_of("gemma3_text", rope_parameters=rope)
    assert methods_for(config) == ("linear",)
    assert full_rope(extended_config(config, NEW, "linear"))["factor"] == 8 * FACTOR
    with pytest.raises(InputError, match="'yarn' cannot extend this gemma3_text: choose linear"):
        extended_config(config, NEW, "yarn")


def test_the_old_name_of_a_rope_type_does_not_outlive_it() -> None:
    config = config_of("llama", rope_parameters={"type": "default", "rope_theta": THETA})
    rope = extended_config(config, NEW, "linear").rope_parameters
    assert rope == {"rope_type": "linear", "rope_theta": THETA, "factor": FACTOR}


def test_hunyuan_calls_dynamic_what_is_fixed() -> None:
    """Its base is theta * alpha ** (d / (d - 2)) at any length: the base can be raised, no call would raise it."""
    rope = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": THETA}
    model = tiny("hunyuan_v1_dense", rope_parameters=rope)
    assert methods_for(model.config) == ("theta",)
    power = HEAD / (HEAD - 2)
    close(frequencies(model), plain(HEAD, THETA * 1000**power))
    extend(model, NEW, "theta")
    logits(model)
    close(frequencies(model), plain(HEAD, THETA * (1000 * FACTOR) ** power))

    model = extend(tiny("hunyuan_v1_dense", rope_parameters=rope | {"rope_type": "default"}), NEW, "dynamic")
    logits(model)
    close(frequencies(model), plain(HEAD, THETA * FACTOR**power))


SCALED: dict[str, dict[str, Any]] = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * (HEAD // 2),
        "long_factor": [4.0] * (HEAD // 2),
    },
}


@pytest.mark.parametrize("kind", SCALED)
def test_a_scaled_parent_is_refused(kind: str) -> None:
    config = config_of("llama", rope_parameters={"rope_type": kind, "rope_theta": THETA, **SCALED[kind]})
    assert methods_for(config) == ()
    for refuse in (lambda: extended_config(config, NEW, "theta"), lambda: check_positions(config, NEW)):
        with pytest.raises(InputError, match=rf"RoPE of this llama is scaled already \({kind}\)"):
            refuse()


def test_gpt_oss_comes_scaled() -> None:
    assert methods_for(CONFIG_MAPPING["gpt_oss"]()) == ()


def test_one_frequency_has_no_base_to_raise() -> None:
    assert methods_for(config_of("gpt_neox", hidden_size=32)) == ("linear", "yarn")


# Learned tables


@pytest.mark.parametrize("length", [OLD + 1, 2 * OLD, NEW])
@pytest.mark.parametrize("name", TABLES)
def test_tiling_repeats_the_table(name: str, length: int) -> None:
    model, first = tiny(name), FAMILIES[name].first_row
    short, before = logits(model, OLD), rows(model)
    after = rows(extend(model, length, "tile"))
    assert after.shape == (first + length, before.shape[1])
    assert torch.equal(after[: len(before)], before)
    assert all(torch.equal(after[first + i], before[first + i % OLD]) for i in range(length))
    assert torch.equal(logits(model, OLD), short)


@pytest.mark.parametrize("length", [OLD + 1, 2 * OLD - 1, NEW])
@pytest.mark.parametrize("name", TABLES)
def test_interpolation_spreads_the_table(name: str, length: int) -> None:
    model, first = tiny(name), FAMILIES[name].first_row
    before = rows(model)
    after = rows(extend(model, length, "interpolate"))
    assert after.shape == (first + length, before.shape[1])
    assert torch.equal(after[: first + 1], before[: first + 1])
    assert torch.equal(after[-1], before[-1])
    spread = nn.functional.interpolate(before[first:].double().T[None], size=length, mode="linear", align_corners=True)
    torch.testing.assert_close(after[first:], spread[0].T.float(), rtol=1e-6, atol=1e-6)
    if length == 2 * OLD - 1:  # rows that fall on rows are those rows
        assert torch.equal(after[first::2], before[first:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("method", TABLE_METHODS)
def test_a_table_keeps_what_it_is(method: str, dtype: torch.dtype) -> None:
    model = tiny("opt", dtype)
    table = decoder_of(model).embed_positions
    assert isinstance(table, nn.Embedding)
    table.requires_grad_(False)
    kind = type(table)
    extend(model, NEW, method)
    assert decoder_of(model).embed_positions is table
    assert type(table) is kind
    assert table.num_embeddings == NEW + 2
    assert (table.weight.dtype, table.weight.requires_grad) == (dtype, False)
    assert decoder_of(model).max_target_positions == NEW
    assert extend(tiny("gpt2"), NEW, method).transformer.wpe.weight.requires_grad


@pytest.mark.parametrize(("name", "method"), [("llama", "yarn"), ("gpt_neo", "interpolate")])
def test_another_device(name: str, method: str) -> None:
    model = extend(tiny(name).to("meta"), NEW, method)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


# Wrong input


@pytest.mark.parametrize("make", [extended_config, lambda config, *rest: extend(tiny(), *rest)])
def test_what_cannot_be_done_is_refused(make: Callable[..., Any]) -> None:
    config = config_of("llama")
    with pytest.raises(InputError, match=r"unknown method 'ntk'.*choose theta, linear, dynamic, yarn, tile or"):
        make(config, NEW, "ntk")
    with pytest.raises(InputError, match="'tile' cannot extend this llama: choose theta, linear, dynamic or yarn"):
        make(config, NEW, "tile")
    for length in (OLD, 1, 0, -5):
        with pytest.raises(InputError, match=f"{length} positions are not more than the model has now: it has {OLD}"):
            make(config, length, "theta")
    with pytest.raises(InputError, match="'bloom'"):
        extended_config(CONFIG_MAPPING["bloom"](), NEW, "theta")


def test_a_refusal_leaves_the_model_as_it_was() -> None:
    model = tiny()
    before, short = model.config.to_dict(), logits(model)
    with pytest.raises(InputError):
        extend(model, OLD, "theta")
    model.model.forward = model.model.forward
    with pytest.raises(InputError, match="forward was replaced"):
        extend(model, NEW, "theta")
    assert model.config.to_dict() == before
    assert torch.equal(logits(model), short)


def test_a_text_that_is_too_long_is_refused_with_the_remedy() -> None:
    config = config_of("llama", max_position_embeddings=2048)
    check_positions(config, 2048)
    with pytest.raises(InputError) as refused:
        check_positions(config, 4096)
    assert str(refused.value) == (
        "4,096 tokens are more than the model's 2,048 positions: "
        "extend it with convert --max-length 4096 --positions theta, linear, dynamic or yarn"
    )
    with pytest.raises(InputError, match="--max-length 65 --positions tile or interpolate"):
        check_positions(config_of("gpt2"), 65)
    with pytest.raises(InputError, match=r"--positions theta$"):
        check_positions(config_of("phi3"), 65)
    for method in ROPE_METHODS:
        longer = extended_config(config, 4096, method)
        check_positions(longer, 4096)
        with pytest.raises(InputError, match="4,097 tokens are more than the model's 4,096 positions"):
            check_positions(longer, 4097)


@pytest.mark.parametrize(
    ("rope", "most"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": OLD}, 4 * OLD),  # Qwen2.5's recipe
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": OLD // 4}, OLD),
        ({"rope_type": "dynamic", "factor": 2.0}, 2 * OLD),
        ({"rope_type": "linear", "factor": 2.0}, OLD),
    ],
)
def test_a_parent_that_comes_scaled_has_the_positions_of_its_scaling(rope: dict[str, Any], most: int) -> None:
    config = config_of("llama", rope_parameters={"rope_theta": THETA, **rope})
    assert max_positions(config) == most
    with torch.no_grad():
        convert(AutoModelForCausalLM.from_config(config), SpanPlan((Full(),) * 2))(input_ids=tokens(most))


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_left_padding_takes_no_positions_in_generation(name: str) -> None:
    model = convert(tiny(name), SpanPlan((Full(), Window(16))))
    ids, mask = tokens(OLD + 8), torch.ones(1, OLD + 8, dtype=torch.long)
    mask[:, :12] = 0
    with torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        alone = model.generate(input_ids=ids[:, 12:], max_new_tokens=4, do_sample=False)
        assert torch.equal(made[:, 12:], alone)
        if name == "opt":  # which makes its positions from the mask
            padded = model(input_ids=ids, attention_mask=mask).logits[:, 12:]
            torch.testing.assert_close(padded, model(input_ids=ids[:, 12:]).logits, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="65 tokens are more than"):
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6)


def test_no_maximum_is_no_limit() -> None:
    config = CONFIG_MAPPING["mamba"]()
    assert max_positions(config) is None
    check_positions(config, 10**9)


# Converted models


def test_the_record_travels_inside_a_converted_config() -> None:
    plan = SpanPlan((Full(), Block(16)))
    for name, method in PAIRS:
        config = extended_config(config_of(name), NEW, method)
        saved = json.loads(MasformerConfig.of(config, plan).to_json_string())
        read = MasformerConfig.from_dict(saved).parent_config()
        assert read.extended_positions == {"method": method, "from": OLD, "to": NEW}
        assert read.to_dict() == AutoConfig.for_model(**copy.deepcopy(config.to_dict())).to_dict()
        assert max_positions(read) == NEW


@pytest.mark.parametrize(("name", "method"), [("llama", "yarn"), ("gpt2", "tile")])
def test_converted_models_are_extended_alike(name: str, method: str, tmp_path: Path) -> None:
    plan = SpanPlan((Full(), Window(24)))
    expected = logits(convert(extend(tiny(name), NEW, method), plan))
    model = extend(convert(tiny(name), plan), NEW, method)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert is_converted(loaded)
    assert loaded.config.extended_positions == model.config.extended_positions
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(restore(model)), logits(extend(tiny(name), NEW, method)))
