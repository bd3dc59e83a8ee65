"""What engines reserve, against the engines: transformers' cache, and vLLM's functions in its own environment."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from masformer.cli import run
from masformer.models.export import native_config
from masformer.models.families import class_of, shape_of
from masformer.serving.reserved import (
    VLLM_CPU,
    VLLM_DEFAULTS,
    VLLM_GPU,
    VLLM_H100,
    Vllm,
    transformers,
    transformers_reason,
    vllm,
    vllm_blocks,
    vllm_reason,
    vllm_span,
)
from masformer.spans import GPT_NEO_1_3B, Full, PlanError, SpanPlan, cost, parse_span

from ..cli import conftest as cli
from ..cli.conftest import answer, refusal
from ..models.helpers import config_of, tokens

VLLM = Path(os.environ.get("MASFORMER_VLLM", Path(__file__).parents[2] / ".venv-vllm/bin/python"))
parent, loud_again = cli.parent, cli._loud_again  # fixtures
SCRIPT = Path(__file__).with_name("vllm_reserved.py")
SMALL = Vllm("small", page=32, batched=100, batches=1)

PLANS = {
    "4 of 24": "full*4,block:1024*20",
    "4 of 24, windows": "full*4,window:1024*20",
    "8 of 30": "full*8,window:512*22",
    "1 of 2": "full,window:300",
    "7 of 13, padded": "full*6,window:300*7",
    "1 of 9": "window:100*8,full",
    "5 of 12": "full*5,window:64*7",
    "all full": "full*12",
    "all window": "window:128*5",
    "all block": "block:256*5",
    "mixed windows": "full*3,window:128*6,window:1000*7",
    "mixed, no full": "window:128*2,window:1024*4",
    "block and window": "full*2,block:256*3,window:300*3",
    "block and window, no full": "block:256*2,window:300*3",
    "lookback": "full*2,block:128:lookback=3*4",
    "lookback like a window": "window:512*2,block:128:lookback=3*2,full*2",
}
LENGTHS = (1, 15, 129, 2048, 8192, 131_071)


def shape(layers):
    return dataclasses.replace(GPT_NEO_1_3B, layers=layers)


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_vllm_itself_reserves_as_much_to_the_byte():
    wanted = [
        (SpanPlan.parse(text), length, settings)
        for text in PLANS.values()
        for length in LENGTHS
        for settings in (*VLLM_DEFAULTS, SMALL)
    ]
    said = ask(wanted)
    assert said["defaults"] == {
        "version": "0.32.0",
        "cpu": True,
        "hybrid": True,
        "batched": VLLM_CPU.batched,
        "chunked_allowed": True,
    }
    for (plan, length, settings), found in zip(wanted, said["found"], strict=True):
        blocks, layers = vllm_blocks(plan, length, settings)
        ours = vllm(shape(len(plan)), plan, length, settings)
        here = f"{plan} at {length} on {settings.name}"
        expected = {"bytes": ours.kv_bytes, "blocks": blocks, "layers": layers, "page_sizes": 1}
        assert found["on"] == expected, here
        check_off(plan, found["off"], ours, here)


def check_off(plan, off, ours, here):
    """With the hybrid manager off: full length if a layer is full, and plans that vLLM refuses (docs/engines.md)."""
    kinds = {vllm_span(span) for span in plan}
    if Full() not in kinds and len(kinds) > 1:
        assert "Failed to promote" in off["refused"], here
    elif len({kind.kind for kind in kinds}) < len(kinds):
        assert "must have the same window size" in off["refused"], here
    else:
        assert off["bytes"] == (ours.kv_bytes if len(kinds) == 1 else ours.full_bytes), here


def ask(wanted):
    spans = {
        span: [kind.kind, kind.size] if (kind := vllm_span(span)).is_local else ["full"]
        for plan, *_ in wanted
        for span in plan
    }
    cases = [
        {
            "spans": [spans[span] for span in plan],
            "length": length,
            "page": settings.page,
            "in_flight": settings.in_flight,
            "layout": ("LBHNC", "BLHNC")[number % 2],
            "kv_heads": GPT_NEO_1_3B.kv_heads,
            "head_dim": GPT_NEO_1_3B.head_dim,
        }
        for number, (plan, length, settings) in enumerate(wanted)
    ]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    run = subprocess.run(
        [str(VLLM), str(SCRIPT), json.dumps(cases)], capture_output=True, text=True, env=quiet, timeout=800, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_a_reservation_by_hand():
    plan = SpanPlan.parse("full*8,window:512*22")
    # 22 windows are 3 groups of 8; a window keeps 511 tokens and 4,096 in flight, in 288 pages and one more.
    assert vllm_blocks(plan, 8192, VLLM_GPU) == (512 + 3 * 289, 8)
    assert vllm_blocks(plan, 8192, VLLM_H100) == (512 + 3 * 513, 8)  # all is in flight: more than full attention
    assert vllm_blocks(plan, 8192, VLLM_CPU) == (64 + 3 * 21, 8)
    got = vllm(shape(30), plan, 8192, VLLM_CPU)
    page = 128 * GPT_NEO_1_3B.kv_bytes_per_key
    assert (got.kv_bytes, got.full_bytes) == (127 * 8 * page, 64 * 30 * page)
    assert got.ideal_bytes == cost(shape(30), plan, 8192).kv_bytes_peak


@pytest.mark.parametrize(
    ("span", "kept"),
    [
        ("full", "full"),
        ("window:8", "window:8"),
        ("block:8", "block:8"),
        ("block:8:lookback=2", "window:24"),
    ],
)
def test_vllm_has_a_spec_that_keeps_what_a_span_sees(span, kept):
    ours, its = parse_span(span), vllm_span(parse_span(span))
    assert str(its) == kept
    assert all(its.sees(t, s) for t in range(60) for s in range(t + 1) if ours.sees(t, s))


@pytest.mark.parametrize("span", ["window:8:sinks=1", "block:8:lookback=2:sinks=1"])
def test_sinks_are_refused_for_vllm(span):
    with pytest.raises(PlanError, match=f"{span} cannot be served by vLLM: none of its attention back ends sees"):
        vllm(shape(2), SpanPlan.parse(f"full,{span}"), 100)


def test_the_reason_names_what_costs():
    words = vllm_reason(SpanPlan.parse("full*8,window:512*22"), plugin=False)
    assert "4,096 (GPU), 16,384 (GPU such as H100), 2,048 (CPU)" in words
    assert "groups of 8 layers need 2 layers of padding" in words
    assert "plugin" not in words
    assert "reserve the full length, in whole pages" in vllm_reason(SpanPlan.parse("full*2"), plugin=False)
    assert "served through this package's plugin" in vllm_reason(SpanPlan.parse("block:8*2"), plugin=True)


@pytest.mark.parametrize("length", [1, 5, 6, 7, 40])
@pytest.mark.parametrize("family", ["ministral", "gpt_neo"])
def test_stock_transformers_holds_as_much(family, length):
    plan = SpanPlan.parse("window:6,full,window:6,full")
    config = native_config(config_of(family), plan, "transformers")
    model = class_of(config)(config).eval()
    cache = plan if family == "ministral" else SpanPlan.parse("full*4")
    decoding, prefill = transformers(shape_of(config, kv_dtype_bytes=4), plan, length, cache)

    def measured(pieces):
        held = None
        with torch.no_grad():
            for ids in pieces:
                held = model(input_ids=ids, past_key_values=held, use_cache=True).past_key_values
        kept = [tensor for layer in held.layers for tensor in (layer.keys, layer.values)]
        return sum(x.nbytes for x in kept), sum(x.untyped_storage().nbytes() for x in kept)

    seen, alive = measured(tokens(length).split(1, dim=1))
    assert alive == decoding.kv_bytes
    assert seen == (decoding.ideal_bytes if cache == plan else decoding.full_bytes)
    seen, alive = measured([tokens(length)])
    assert alive == prefill.kv_bytes == prefill.full_bytes
    assert seen == (decoding.ideal_bytes if cache == plan else decoding.full_bytes)


def test_this_packages_cache_holds_the_ideal():
    plan = SpanPlan.parse("full,block:64:sinks=2*3")
    for row in transformers(shape(4), plan, 1000, None):
        assert row.kv_bytes == row.ideal_bytes < row.full_bytes
    assert "No native form (no blocks)" in transformers_reason(plan, None, "no blocks")


def test_a_plan_for_another_model_is_refused():
    for reserve in (vllm, lambda *given: transformers(*given, cache=None)):
        with pytest.raises(PlanError, match="the plan is for 2 layers, the model has 24"):
            reserve(GPT_NEO_1_3B, SpanPlan.parse("full*2"), 10)
        with pytest.raises(PlanError, match="length must be"):
            reserve(GPT_NEO_1_3B, SpanPlan.parse("full*24"), 0)


MIXED = ["--layout", "masformer", "--full", "0,2", "--window", "8", "--length", "3000"]


def test_the_command_line_tells_what_vllm_reserves(parent, capsys):
    facts = answer(capsys, "plan", parent, *MIXED, "--engine", "vllm")
    rows = facts["engine"]["reserved"]
    assert [row["engine"] for row in rows] == [settings.name for settings in VLLM_DEFAULTS]
    assert {row["ideal_bytes"] for row in rows} == {facts["planned"]["kv_bytes_peak"]}
    assert rows[0]["kv_bytes"] > rows[2]["kv_bytes"]
    assert "plugin" not in facts["engine"]["reason"]
    assert "engine" not in answer(capsys, "plan", parent, *MIXED)
    blocks = answer(capsys, "plan", parent, "--layout", "local", "--block", 32, "--engine", "vllm")["engine"]
    assert "served through this package's plugin" in blocks["reason"]
    assert [row["engine"] for row in blocks["reserved"]] == [it.name for it in VLLM_DEFAULTS if it.page == 16]


def test_what_vllm_cannot_serve_is_refused(parent, capsys, tmp_path):
    assert "window:8:sinks=2 cannot be served by vLLM" in refusal(
        capsys, 3, "plan", parent, *MIXED, "--sinks", 2, "--engine", "vllm"
    )
    line = refusal(capsys, 3, "plan", parent, "--layout", "local", "--block", 24, "--engine", "vllm")
    assert "its blocks do not begin where pages of 16 tokens do" in line
    config_of("gpt_neo").save_pretrained(tmp_path)
    line = refusal(capsys, 3, "plan", tmp_path, "--layout", "local", "--window", 8, "--engine", "vllm")
    assert "vLLM cannot serve a converted gpt_neo: a gpt_neo cannot be exported for vLLM, which has no such" in line


@pytest.mark.parametrize(
    ("flags", "name", "words"),
    [
        (MIXED, "transformers", "A sliding layer's cache is a view"),
        ([*MIXED, "--sinks", 2], "masformer", "No native form (window:8:sinks=2 cannot be exported"),
        ([], "transformers", "Full layers hold all tokens."),
    ],
)
def test_the_command_line_tells_what_transformers_holds(parent, capsys, flags, name, words):
    engine = answer(capsys, "plan", parent, *flags, "--engine", "transformers")["engine"]
    assert [row["engine"] for row in engine["reserved"]] == [f"{name}, decoding", f"{name}, one-shot prefill"]
    assert engine["reason"].startswith(words)


def test_the_table_stands_below_the_cost(parent, capsys):
    assert run(["plan", str(parent), *MIXED, "--engine", "vllm"]) == 0
    out = capsys.readouterr().out
    assert out.index("KV peak during prefill") < out.index("vllm, CPU") < out.index("vLLM 0.32: a local layer reserves")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nowhere", "--engine", "sglang"], "unknown engine 'sglang': choose one of transformers, vllm"),
        (["--layers", "4", "--layout", "local", "--engine", "vllm"], "--engine needs MODEL"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(capsys, flags, words):
    assert words in refusal(capsys, 2, "plan", *flags)
