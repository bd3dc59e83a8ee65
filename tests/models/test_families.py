"""The matrix: every supported family passes the same proofs, each on a tiny random model of its own.

docs/families.md is made of this file (`make docs`), so it cannot claim what is not proved here.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPTNeoForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from masformer.errors import InputError
from masformer.models.cache import SpanCache
from masformer.models.convert import convert, is_converted, plan_of, restore
from masformer.models.families import FAMILIES, attention_modules, family_of, native_plan, shape_of
from masformer.models.gpt_neo import with_attention_types
from masformer.spans import Block, Full, PlanError, Span, SpanPlan, Window, cost, layout

from .helpers import FULL, MIXED, close, config_of, dense_masks, logits, state, tiny, tokens

EAGER = ("gemma2", "gpt_neo", "gpt_oss")
"""Families whose own attention makes its weights in float32 whatever the dtype, so that they are compared to 1e-5."""


def bar(family: str) -> float:
    return 2e-5 if family in EAGER else 1e-10


def wide(family: str, **changes: Any) -> dict[str, Any]:
    """Changes to the config after which the parent sees everything, its native windows being longer than any input."""
    config = config_of(family)
    windows = {name: 512 for name in ("sliding_window", "window_size") if getattr(config, name, None)}
    return windows | changes


def all_full(family: str, folder: Path) -> None:
    """an all-full plan changes no bit, in float32 and bfloat16, and `restore` leaves the parent"""
    for dtype in (torch.float32, torch.bfloat16):
        model, ids = tiny(family, dtype, **wide(family)), tokens(40, batch=2)
        before, expected = state(model), logits(model, ids)
        convert(model, FULL)
        assert torch.equal(logits(model, ids), expected)
        assert is_converted(model)
        restore(model)
        assert state(model) == before
        assert torch.equal(logits(model, ids), expected)


def native(family: str, folder: Path) -> None:
    """the plan that the parent has by itself gives the parent's logits"""
    model, ids = tiny(family), tokens(40, batch=2)
    expected = logits(model, ids)
    plan = plan_of(model)
    assert plan == native_plan(model.config)
    convert(model, plan)
    close(logits(model, ids), expected, bar(family))


def mixed(family: str, folder: Path) -> None:
    """a mixed plan gives the logits of the parent in float64 under explicit masks"""
    model, ids = tiny(family, **wide(family)), tokens(40, batch=2)
    with dense_masks(model, MIXED, 40):
        expected = logits(model, ids)
    assert not torch.allclose(expected, logits(model, ids), atol=1e-3)
    convert(model, MIXED)
    close(logits(model, ids), expected, bar(family))


def decoding(family: str, folder: Path) -> None:
    """prefill = chunked prefill = decoding token by token, from caches no longer than their spans"""
    model, ids = convert(tiny(family), MIXED), tokens(30, batch=2)
    expected = logits(model, ids)
    for sizes in ([1] * 30, [11, 6, 1, 1, 5, 6], [29, 1]):
        cache, at = SpanCache(MIXED), 0
        for size in sizes:
            got = logits(model, ids[:, at : at + size], past_key_values=cache)
            close(got, expected[:, at : at + size], 1e-10)
            at += size
        held = [layer.keys.shape[2] for layer in cache.span_layers]
        assert held == [span.cache_length(30) for span in MIXED]


def left_padding(family: str, folder: Path) -> None:
    """a row behind left padding gives what it gives alone, in prefill and in `generate`"""
    model, pad = convert(tiny(family), MIXED), 7
    rows = tokens(20, batch=2)
    rows[0, :pad] = 0
    mask = (torch.arange(20) >= torch.tensor([[pad], [0]])).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = logits(model, rows, attention_mask=mask, position_ids=positions)
    close(got[:1, pad:], logits(model, rows[:1, pad:]), 1e-10)
    close(got[1:], logits(model, rows[1:]), 1e-10)
    out = model.generate(rows, attention_mask=mask, max_new_tokens=8, do_sample=False)
    alone = model.generate(rows[:1, pad:], max_new_tokens=8, do_sample=False)
    assert torch.equal(out[:1, pad:], alone)


def packing(family: str, folder: Path) -> None:
    """packed documents give what each gives alone, with and without a mask of ones and a cache"""
    model, lengths = convert(tiny(family), MIXED), (9, 1, 14)
    ids = tokens(sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    expected = torch.cat([logits(model, part) for part in ids.split(lengths, dim=1)], dim=1)
    for kwargs in ({}, {"use_cache": False}, {"attention_mask": torch.ones_like(ids)}):
        close(logits(model, ids, position_ids=positions, **kwargs), expected, 1e-10)


def saving(family: str, folder: Path) -> None:
    """a saved conversion loads with the same logits, and the parent's own class refuses the folder"""
    model, ids = convert(tiny(family, torch.float32), MIXED), tokens(30, batch=2)
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert plan_of(loaded) == MIXED
    # from_pretrained gives mixtures of experts another kernel than the class itself does, with its own rounding.
    loaded.config._experts_implementation = model.config._experts_implementation
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    parent = type(tiny(family))
    with pytest.raises(Exception):  # noqa: B017  # each class says it in its own words
        parent.from_pretrained(folder)


def beams(family: str, folder: Path) -> None:
    """beam search with bounded caches finds what it finds without a cache"""
    model, ids = convert(tiny(family), MIXED), tokens(13, batch=2)
    settings = {"num_beams": 3, "max_new_tokens": 9, "do_sample": False, "length_penalty": 0.0}
    got, expected = (
        model.generate(ids, use_cache=use_cache, return_dict_in_generate=True, output_scores=True, **settings)
        for use_cache in (True, False)
    )
    assert torch.equal(got.sequences, expected.sequences)
    close(got.sequences_scores, expected.sequences_scores, 1e-6)


def gradients(family: str, folder: Path) -> None:
    """gradients are those of the parent under explicit masks, with gradient checkpointing too"""
    model, ids = tiny(family, **wide(family)), tokens(24, batch=2)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}

    with dense_masks(model, MIXED, 24):
        expected = gradients()
    convert(model, MIXED)
    plain = gradients()
    model.activation_checkpointing_enable()
    model.train()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys() == expected.keys()
    for name, value in plain.items():
        close(value, expected[name], bar(family) * 10)
        close(checkpointed[name], value, 1e-10)


def lora(family: str, folder: Path) -> None:
    """a LoRA step trains the adapter alone; the adapter reloads onto a converted base"""
    model, ids = convert(tiny(family, torch.float32), MIXED), tokens(24)
    model.save_pretrained(folder / "base")
    parts = attention_modules(model)[0].named_modules()
    linear = {name.split(".")[-1] for name, part in parts if getattr(part, "weight", torch.zeros(1)).ndim == 2}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=sorted(linear), init_lora_weights=False))
    before = {name: x.detach().clone() for name, x in adapted.named_parameters()}
    optimizer = torch.optim.SGD([x for x in adapted.parameters() if x.requires_grad], lr=0.1)
    adapted(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    changed = {name for name, x in adapted.named_parameters() if not torch.equal(x, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    adapted.save_pretrained(folder / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
    assert plan_of(loaded.get_base_model()) == MIXED
    close(logits(loaded.eval(), ids), logits(adapted.eval(), ids), 0)


def costs(family: str, folder: Path) -> None:
    """`masformer plan` counts the parameters, the matrix products and the KV bytes of the real model"""
    model, length = tiny(family, torch.float32, attn_implementation="eager"), 16
    shape = shape_of(model.config, kv_dtype_bytes=4)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter:
        logits(model, tokens(length), use_cache=False)
    square = 4 * shape.heads * shape.head_dim * length**2 * shape.layers  # eager attention computes all pairs
    linear = 2 * length * (shape.linear_parameters + shape.head_parameters)
    assert counter.get_total_flops() == pytest.approx(linear + square, rel=2e-3)  # the rest are the angles of RoPE
    convert(model, MIXED)
    cache = SpanCache(MIXED)
    logits(model, tokens(25), past_key_values=cache)
    assert cache.held_bytes() == cost(shape, MIXED, 25).kv_bytes_held


def compiled(family: str, folder: Path) -> None:
    """`torch.compile` traces it as one graph (fullgraph) and gives the same logits, at several lengths"""
    model = convert(tiny(family, torch.float32), MIXED)
    if hasattr(model.config, "num_experts_per_tok"):  # the plain loop over experts cannot be traced, theirs neither
        model.set_experts_implementation("grouped_mm")
    torch.compiler.reset()
    run = torch.compile(model, backend="eager", fullgraph=True)
    for length in (40, 25):
        ids = tokens(length, batch=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on tracing an autograd function
            got = logits(run, ids, use_cache=False)
        close(got, logits(model, ids, use_cache=False), 0)


PROOFS: dict[str, Callable[[str, Path], None]] = {
    "all full": all_full,
    "native": native,
    "mixed": mixed,
    "decoding": decoding,
    "left padding": left_padding,
    "packing": packing,
    "saving": saving,
    "beams": beams,
    "gradients": gradients,
    "LoRA": lora,
    "compile": compiled,
    "cost": costs,
}


TRACED = ("gemma2", "gpt2", "gpt_neo", "llama", "mixtral", "opt")
"""Families that are traced in every run; tracing takes seconds, so the others are left to the slow tests."""


def cases() -> list[Any]:
    slow = {(family, "compile") for family in FAMILIES if family not in TRACED}
    pairs = [(family, proof) for family in sorted(FAMILIES) for proof in PROOFS]
    return [pytest.param(*pair, marks=pytest.mark.slow if pair in slow else ()) for pair in pairs]


@pytest.mark.parametrize(("family", "proof"), cases())
def test_family(family: str, proof: str, tmp_path: Path) -> None:
    PROOFS[proof](family, tmp_path)


# What is not supported is refused


OTHERS = {"t5", "bert", "clip_text_model", "gemma4_assistant", "gpt-sw3"}
"""Not decoders alone; a config that has no default; another name of gpt2."""


@pytest.mark.parametrize("kind", sorted((set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) | OTHERS) - set(FAMILIES)))
def test_every_other_type_is_refused_by_name(kind: str) -> None:
    """No causal language model that transformers knows is accepted without the matrix above."""
    if kind == "gpt-sw3":
        assert CONFIG_MAPPING[kind] is CONFIG_MAPPING["gpt2"]
        return
    config = CONFIG_MAPPING[kind]() if kind != "gemma4_assistant" else object.__new__(CONFIG_MAPPING[kind])
    with pytest.raises(InputError) as caught:
        family_of(config)
    said = str(caught.value)
    assert said.startswith(f"model type {config.model_type!r} ")
    assert ", ".join(sorted(FAMILIES)) in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("bloom", "ALiBi"),
        ("mpt", "ALiBi"),
        ("falcon", "computes its attention itself"),
        ("gptj", "computes its attention itself"),
        ("codegen", "computes its attention itself"),
        ("xglm", "computes its attention itself"),
        ("mamba", "keeps a state"),
        ("jamba", "keeps a state"),
        ("t5", "is an encoder-decoder"),
        ("bert", "proved"),
    ],
)
def test_the_reason(kind: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        family_of(CONFIG_MAPPING[kind]())


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("gpt2", "add_cross_attention"),
        ("gemma2", "use_bidirectional_attention"),
        ("gemma3_text", "use_bidirectional_attention"),
    ],
)
def test_variants_of_a_family_that_spans_do_not_fit(family: str, field: str) -> None:
    with pytest.raises(InputError, match=f"has {field}=True"):
        family_of(config_of(family, **{field: True}))


@pytest.mark.parametrize("family", EAGER)
def test_families_that_write_attention_out_are_bit_equal_to_512_tokens_and_close_beyond(family: str) -> None:
    model = tiny(family, torch.float32, **wide(family, **dict.fromkeys(wide(family), 2048)))
    short, long = tokens(512), tokens(700)
    expected = logits(model, short), logits(model, long)
    convert(model, FULL)
    assert torch.equal(logits(model, short), expected[0])
    close(logits(model, long), expected[1], 2e-4)


def test_gpt_neo_writes_its_layout_into_attention_types() -> None:
    """Stock transformers then computes what the converted model does."""
    plan = SpanPlan((Full(), Full(), Window(5), Full()))
    model, ids = tiny("gpt_neo", torch.float32), tokens(40)
    config = with_attention_types(model.config, plan)
    assert (config.attention_layers, config.window_size) == (["global", "global", "local", "global"], 5)
    assert native_plan(config) == plan
    assert native_plan(model.config) != plan
    stock = GPTNeoForCausalLM(copy.deepcopy(config)).eval()
    stock.load_state_dict(model.state_dict())
    assert torch.equal(logits(convert(model, plan), ids), logits(stock, ids))
    layout_plan = layout("gpt-neo", 4)
    assert native_plan(with_attention_types(config, layout_plan)) == layout_plan
    assert native_plan(with_attention_types(config, FULL)) == FULL


@pytest.mark.parametrize("span", [Block(4), Window(4, sinks=1)], ids=str)
def test_gpt_neo_has_no_word_for_other_spans(span: Span) -> None:
    with pytest.raises(PlanError, match="GPT-Neo"):
        with_attention_types(config_of("gpt_neo"), SpanPlan((Full(), span, Full(), Full())))
    with pytest.raises(PlanError, match="GPT-Neo"):
        with_attention_types(config_of("gpt_neo"), SpanPlan((Full(), Window(2), Window(3), Full())))


def test_the_page_of_families_is_what_is_proved() -> None:
    from .families_page import page

    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    assert text == page(), "run make docs"
