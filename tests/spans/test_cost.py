"""Costs: arithmetic by hand, sums token by token, and the setting of the paper."""

import dataclasses
import json
import random
from pathlib import Path

import pytest

from masformer.spans import (
    GPT_NEO_1_3B,
    Block,
    Flops,
    Full,
    ModelShape,
    PlanCost,
    PlanError,
    Span,
    SpanPlan,
    Window,
    chunked_prefill_kv_peak,
    cost,
    layout,
    paper_setting,
    savings,
)

TINY = ModelShape(
    layers=2, hidden=4, heads=2, kv_heads=1, head_dim=3, linear_parameters=10, head_parameters=8, parameters=20
)
DOCS = Path(__file__).parents[2] / "docs"


def shape_of(layers: int) -> ModelShape:
    return dataclasses.replace(TINY, layers=layers)


def test_by_hand() -> None:
    # Pairs: 6 of the full layer, 1 + 2 + 1 of the blocks; 4 * 3 * 2 = 24 FLOPs a pair; 2 * 1 * 3 * 2 = 12 bytes a key.
    # After 3 tokens the layers hold 3 and 1 keys, after 2 tokens 2 and 0; the token at 3 sees 4 and 2.
    assert cost(TINY, SpanPlan((Full(), Block(2))), 3) == PlanCost(
        length=3,
        attention_pairs=10,
        training_flops=Flops(attention=720, other=324),
        prefill_flops=Flops(attention=240, other=76),
        decode_flops=Flops(attention=144, other=36),
        kv_bytes_held=4 * 12,
        kv_bytes_peak=4 * 12,
        prefill_kv_peak=6 * 12,
    )


def test_chunked_prefill_by_hand() -> None:
    # Pieces 0-1 and 2: the layers hold 2, 2 + 2; then 2 + 1 (and 0 of the blocks), 3 + 1.
    assert chunked_prefill_kv_peak(TINY, SpanPlan((Full(), Block(2))), 3, chunk=2) == 4 * 12


def test_a_border_of_blocks_releases_the_cache() -> None:
    at_border, before = (cost(TINY, SpanPlan((Block(4),) * 2), length) for length in (8, 7))
    assert (at_border.kv_bytes_held, before.kv_bytes_held) == (0, 2 * 3 * 12)
    assert at_border.kv_bytes_peak == 2 * 3 * 12
    assert at_border.decode_flops.attention == 2 * 24


def seen(span: Span, t: int) -> list[int]:
    return [position for position in range(t + 1) if span.sees(t, position)]


def simulated_prefill(plan: SpanPlan, length: int, chunk: int) -> int:
    """The most keys alive, running every piece through every layer with lists of held keys."""
    held: list[list[int]] = [[] for _ in plan]
    peak = 0
    for begin in range(0, length, chunk):
        end = min(begin + chunk, length)
        for layer, span in enumerate(plan):
            held[layer] = held[layer] + list(range(begin, end))
            peak = max(peak, sum(map(len, held)))
            held[layer] = [position for position in held[layer] if position in seen(span, end)]
    return peak


def random_plan(draw: random.Random) -> SpanPlan:
    def span() -> Span:
        return draw.choice(
            [
                Full(),
                Block(draw.randint(1, 5), lookback=draw.randint(0, 2), sinks=draw.randint(0, 4)),
                Window(draw.randint(1, 6), sinks=draw.randint(0, 4)),
            ]
        )

    return SpanPlan(tuple(span() for _ in range(draw.randint(1, 4))))


@pytest.mark.parametrize("seed", range(60))
def test_against_a_sum_over_tokens(seed: int) -> None:
    draw = random.Random(seed)
    plan, length = random_plan(draw), draw.randint(1, 33)
    shape = shape_of(len(plan))
    result = cost(shape, plan, length)
    rows = [sum(len(seen(span, t)) for span in plan) for t in range(length + 1)]
    held = [row - len(plan) for row in rows]
    assert result.attention_pairs == sum(rows[:-1])
    assert result.prefill_flops == Flops(24 * sum(rows[:-1]), sum(2 * 10 for _ in range(length)) + 2 * 8)
    assert result.training_flops == Flops(3 * 24 * sum(rows[:-1]), sum(3 * 2 * 18 for _ in range(length)))
    assert result.decode_flops == Flops(24 * rows[-1], 2 * 18)
    assert result.kv_bytes_held == result.kv_bytes_read == 12 * held[-1]
    assert result.kv_bytes_peak == 12 * max(held)
    assert result.prefill_kv_peak == 12 * simulated_prefill(plan, length, length)
    chunk = draw.randint(1, length + 2)
    assert chunked_prefill_kv_peak(shape, plan, length, chunk) == 12 * simulated_prefill(plan, length, chunk), chunk


@pytest.mark.parametrize("length", range(1, 32))
def test_blocks_of_different_sizes_peak_together_at_their_common_period(length: int) -> None:
    plan = SpanPlan((Block(2), Block(5), Block(3), Block(3, sinks=1)))
    held = [sum(n % size for size in (2, 5, 3, 3)) + (n >= 3) for n in range(length + 1)]
    assert cost(shape_of(4), plan, length).kv_bytes_peak == 12 * max(held)
    for chunk in range(1, length + 1):
        expected = 12 * simulated_prefill(plan, length, chunk)
        assert chunked_prefill_kv_peak(shape_of(4), plan, length, chunk) == expected, chunk


def test_a_chunked_prefill_needs_less_than_a_one_shot_one() -> None:
    plan = layout("masformer", 24)
    one_shot = cost(GPT_NEO_1_3B, plan, 8192).prefill_kv_peak
    assert chunked_prefill_kv_peak(GPT_NEO_1_3B, plan, 8192, chunk=8192) == one_shot
    # The full layers' 4 * 8192 keys, the last piece at one layer, and what the other local layers hold.
    assert chunked_prefill_kv_peak(GPT_NEO_1_3B, plan, 8192, chunk=1024) == (4 * 8192 + 1024) * 8192
    assert one_shot == (4 * 8192 + 8192) * 8192


@pytest.mark.parametrize(
    ("length", "block", "full", "saved"),
    [
        (8192, 1024, 2, 0.802),
        (8192, 1024, 4, 0.729),
        (8192, 1024, 8, 0.583),
        (8192, 512, 8, 0.625),
        (32_768, 1024, 4, 0.807),
        (131_072, 1024, 12, 0.496),
    ],
)
def test_pairs_saved_are_one_minus_p_times_one_minus_r(length: int, block: int, full: int, saved: float) -> None:
    parent, mixed = (
        cost(GPT_NEO_1_3B, plan, length)
        for plan in (layout("full", 24), layout("masformer", 24, full=full, local=Block(block)))
    )
    assert savings(parent, mixed).attention_pairs == pytest.approx(saved, abs=6e-4)
    assert saved == pytest.approx((1 - full / 24) * (1 - block / length), abs=6e-4)


def test_the_paper_setting() -> None:
    parent, mixed = paper_setting()
    saved = savings(parent, mixed)
    assert parent.attention_pairs == 24 * (8192 * 8193 // 2)
    assert mixed.attention_pairs == 4 * (8192 * 8193 // 2) + 20 * 8 * (1024 * 1025 // 2)
    assert round(saved.attention_pairs, 3) == 0.729
    assert round(saved.training_flops, 3) == 0.171


def test_the_shape_of_gpt_neo() -> None:
    # The embedding of 50,257 words and 2,048 positions; the layers; the final norm: 1,315,575,808 in transformers.
    assert GPT_NEO_1_3B.parameters == 1_315_575_808
    assert GPT_NEO_1_3B.heads * GPT_NEO_1_3B.head_dim == GPT_NEO_1_3B.hidden
    assert GPT_NEO_1_3B.kv_bytes_per_key == 8192


def test_the_numbers_in_the_guide_are_those_of_the_code() -> None:
    text = (DOCS / "cost.md").read_text(encoding="utf-8")
    parent, mixed = paper_setting()
    saved = savings(parent, mixed)

    def tera(flops: Flops, unit: float = 1e12) -> str:
        return f"{flops.total / unit:.2f} ({flops.attention / unit:.2f})"

    rows = [
        f"| {parent.attention_pairs:,} | {mixed.attention_pairs:,} | {saved.attention_pairs:.1%} |",
        f"| {tera(parent.training_flops)} | {tera(mixed.training_flops)} | {saved.training_flops:.1%} |",
        f"| {tera(parent.prefill_flops)} | {tera(mixed.prefill_flops)} | {saved.prefill_flops:.1%} |",
        f"| {tera(parent.decode_flops, 1e9)} | {tera(mixed.decode_flops, 1e9)} | {saved.decode_flops:.1%} |",
        *(
            f"| {getattr(parent, name) / 2**20:.1f} | {getattr(mixed, name) / 2**20:.1f} | {getattr(saved, name):.1%} |"
            for name in ("kv_bytes_held", "kv_bytes_peak", "prefill_kv_peak")
        ),
    ]
    chunked = chunked_prefill_kv_peak(GPT_NEO_1_3B, layout("masformer", 24), 8192, chunk=1024)
    share = parent.training_flops.attention / parent.training_flops.total
    rows += [f"at most {chunked / 2**20:.0f} MiB", f"compute {24 * 8192**2:,} pairs", f"Attention is {share:.1%} of"]
    for row in rows:
        assert row.replace("%", " %") in text, row


def test_json_form() -> None:
    result = cost(TINY, SpanPlan((Full(), Block(2))), 3)
    written = json.loads(json.dumps(result.to_json()))
    assert written["training_flops"] == {"attention": 720, "other": 324, "total": 1044}
    assert written["kv_bytes_read"] == written["kv_bytes_held"] == 48
    assert set(written) == {field.name for field in dataclasses.fields(PlanCost)} | {"kv_bytes_read"}
    assert savings(result, result).to_json() == dict.fromkeys(savings(result, result).to_json(), 0.0)


def test_savings_compare_one_model_at_one_length() -> None:
    plan = SpanPlan((Full(), Full()))
    with pytest.raises(PlanError, match="at 4 tokens with one at 5"):
        savings(cost(TINY, plan, 4), cost(TINY, plan, 5))
    with pytest.raises(PlanError, match="two models"):
        savings(cost(TINY, plan, 4), cost(dataclasses.replace(TINY, linear_parameters=11), plan, 4))


def test_savings_of_a_parent_that_holds_nothing() -> None:
    blocks = cost(TINY, SpanPlan((Block(4),) * 2), 4)
    assert savings(blocks, blocks).kv_bytes_held == 0.0
    with pytest.raises(PlanError, match="kv_bytes_held is 0 at 4 tokens"):
        savings(blocks, cost(TINY, SpanPlan((Full(),) * 2), 4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": 0}, "layers must be .* got 0"),
        ({"head_dim": -64}, "head_dim must be .* got -64"),
        ({"hidden": 4.0}, r"hidden must be .* got 4\.0"),
        ({"kv_dtype_bytes": True}, "kv_dtype_bytes must be .* got True"),
        ({"heads": 6, "kv_heads": 4}, "6 heads cannot share 4 KV heads"),
        ({"parameters": 17}, "17 parameters are fewer than the 18"),
    ],
)
def test_a_shape_that_cannot_be_is_named(change: dict, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        dataclasses.replace(TINY, **change)


def test_a_plan_length_or_chunk_that_does_not_fit_is_named() -> None:
    with pytest.raises(PlanError, match="plan is for 3 layers, the model has 2"):
        cost(TINY, layout("full", 3), 8)
    with pytest.raises(PlanError, match=r"length must be .* got 0"):
        cost(TINY, layout("full", 2), 0)
    with pytest.raises(PlanError, match=r"chunk must be .* got 0"):
        chunked_prefill_kv_peak(TINY, layout("full", 2), 8, chunk=0)
