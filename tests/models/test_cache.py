"""Caches bounded by their spans: exact at every border, never longer than the closed form, memory released."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from masformer.attention import UnsupportedSpan
from masformer.models.cache import SpanCache
from masformer.models.convert import applied, convert, plan_of
from masformer.spans import Block, Full, Span, SpanPlan, Window

from .helpers import FEW, HEAD_DIM, KV_HEADS, MIXED, close, logits, tiny, tokens

SPANS: list[Span] = [
    *(Block(size, lookback, sinks) for size in (1, 2, 3, 16) for lookback in (0, 1, 2) for sinks in (0, 1, 4)),
    *(Window(size, sinks) for size in (1, 2, 5, 16) for sinks in (0, 1, 4)),
    Full(),
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Three layers: enough to mix spans, short enough for a thousand cases."""
    return tiny("qwen3", num_hidden_layers=3)


def pieces_of(r: random.Random, length: int) -> list[int]:
    """Prefill pieces and decode steps, in any order."""
    pieces: list[int] = []
    while (rest := length - sum(pieces)) > 0:
        kind = r.choice(["decode", "any", "block"])
        pieces += {
            "decode": [1] * min(rest, r.randint(1, 4)),
            "any": [r.randint(1, rest)],
            "block": [min(rest, r.choice([2, 3, 16, 17]))],
        }[kind]
    return pieces


def check_held(cache: SpanCache, plan: SpanPlan, n: int, batch: int = 1) -> None:
    """Keys of every layer and bytes of storage are those of the closed form, not one more."""
    expected = [span.cache_length(n) for span in plan]
    assert [layer.keys.shape[2] for layer in cache.layers] == expected
    assert [layer.values.shape[2] for layer in cache.layers] == expected
    assert cache.held_bytes() == sum(expected) * batch * KV_HEADS * HEAD_DIM * 2 * 8
    assert cache.get_seq_length() == n


def run(model: PreTrainedModel, ids: Tensor, pieces: list[int], cache: Any = None, check: bool = True) -> Tensor:
    plan = plan_of(model)
    cache = SpanCache(plan) if cache is None else cache
    out = []
    for piece in ids.split(pieces, dim=1):
        out.append(logits(model, piece, past_key_values=cache))
        if check:
            check_held(cache, plan, cache.get_seq_length(), len(ids))
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("chunk", range(20))
def test_1000_random_chunkings(chunk: int, model: PreTrainedModel) -> None:
    for seed in range(50 * chunk, 50 * chunk + 50):
        r = random.Random(seed)
        plan = SpanPlan(tuple(r.choice(SPANS) for _ in range(3)))
        ids = tokens(r.randint(2, r.choice([8, 20, 52])), seed=seed)
        pieces = pieces_of(r, ids.shape[1])
        with applied(model, plan):
            difference = (run(model, ids, pieces) - logits(model, ids, use_cache=False)).abs().max().item()
            assert difference <= 1e-10, (seed, str(plan), pieces)


@pytest.mark.parametrize(
    "span", [Block(1), Block(2), Block(3), Block(16), Block(3, 1, 2), Window(1), Window(5, 2)], ids=str
)
def test_every_border(span: Span, model: PreTrainedModel) -> None:
    """Every split of a prompt in two, then one token; and the whole one token at a time."""
    length = 21
    ids = tokens(length)
    with applied(model, SpanPlan((span,) * 3)):
        expected = logits(model, ids, use_cache=False)
        for border in range(1, length - 1):
            close(run(model, ids, [border, length - 1 - border, 1]), expected)
        close(run(model, ids, [1] * length), expected)


@pytest.mark.parametrize("family", FEW)
def test_chunks_longer_than_a_fold(family: str) -> None:
    model, ids = convert(tiny(family), SpanPlan((Block(70), Full(), Window(65, 3), Block(16, 2, 1)))), tokens(700)
    close(run(model, ids, [300, 1, 290, 1, 1, 107]), logits(model, ids, use_cache=False))


def test_a_batch() -> None:
    model, ids = convert(tiny(), MIXED), tokens(40, batch=3)
    close(run(model, ids, [17, 1, 1, 21]), logits(model, ids, use_cache=False))


def test_inputs_embeds() -> None:
    model, ids = convert(tiny(), MIXED), tokens(30)
    expected, cache = logits(model, ids), SpanCache(MIXED)
    embeddings = model.get_input_embeddings()(ids)
    with torch.no_grad():
        parts = [model(inputs_embeds=x, past_key_values=cache).logits for x in embeddings.split([20, 1, 9], dim=1)]
    close(torch.cat(parts, dim=1), expected)


def test_the_model_makes_its_own_cache() -> None:
    model, ids = convert(tiny(), MIXED), tokens(30)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :20]).past_key_values
        out = model(input_ids=ids[:, 20:], past_key_values=cache)
    assert type(cache) is SpanCache
    assert out.past_key_values is cache
    check_held(cache, MIXED, 30)
    close(out.logits, logits(model, ids)[:, 20:])


@pytest.mark.parametrize("with_config", [False, True])
def test_the_usual_idiom(with_config: bool) -> None:
    """`DynamicCache()` and `DynamicCache(config=...)`, held by the user, become bounded."""
    model, ids = convert(tiny("mistral", sliding_window=6), MIXED), tokens(30)
    cache = DynamicCache(config=model.config) if with_config else DynamicCache()
    close(run(model, ids, [20, 1, 9], cache), logits(model, ids, use_cache=False))
    assert isinstance(cache, SpanCache)
    check_held(cache, MIXED, 30)


def test_reset() -> None:
    model, ids = convert(tiny(), MIXED), tokens(30)
    cache = SpanCache(MIXED)
    first = run(model, ids, [20, 10], cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(run(model, ids, [20, 10], cache), first)


def test_a_copied_prefix_serves_twice() -> None:
    model, ids = convert(tiny(), MIXED), tokens(30)
    prefix = SpanCache(MIXED)
    logits(model, ids[:, :17], past_key_values=prefix)
    for seed in (1, 2):
        both = torch.cat([ids[:, :17], tokens(8, seed=seed)], dim=1)
        cache = copy.deepcopy(prefix)
        close(logits(model, both[:, 17:], past_key_values=cache), logits(model, both)[:, 17:])
        check_held(cache, MIXED, 25)
    check_held(prefix, MIXED, 17)


# Left padding


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and position ids of rows of different lengths."""
    length = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (length - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (length - row.shape[1], 0)) for row in rows])
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("with_positions", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_left_padded_batches_in_chunks(seed: int, with_positions: bool, model: PreTrainedModel) -> None:
    """Each row equals the same row alone; held keys are those of the longest need among the rows, and sinks.

    Without position ids the columns stand for positions: rotary angles are relative, but transformers computes
    them in float32.
    """
    bar = 1e-10 if with_positions else 1e-5
    r = random.Random(seed)
    plan = SpanPlan(tuple(r.choice(SPANS) for _ in range(3)))
    rows = [tokens(r.randint(1, 40), seed=3 * seed + row) for row in range(3)]
    ids, mask, positions = left_padded(rows)
    length, cache, out = ids.shape[1], SpanCache(plan), []
    with applied(model, plan):
        end = 0
        for piece in pieces_of(r, length):
            end += piece
            where = {"position_ids": positions[:, end - piece : end]} if with_positions else {}
            out.append(
                logits(model, ids[:, end - piece : end], past_key_values=cache, attention_mask=mask[:, :end], **where)
            )
            real = [max(0, end - (length - row.shape[1])) for row in rows]
            for layer, span in zip(cache.layers, plan, strict=True):
                assert layer.keys.shape[2] <= max(span.cache_length(n) for n in real) + span.sinks
        got = torch.cat(out, dim=1)
        one_shot = logits(model, ids, attention_mask=mask, position_ids=positions, use_cache=False)
        for index, row in enumerate(rows):
            expected = logits(model, row, use_cache=False)[0]
            assert (got[index, -row.shape[1] :] - expected).abs().max() <= bar, (seed, str(plan))
            assert (one_shot[index, -row.shape[1] :] - expected).abs().max() <= 1e-10, (seed, str(plan))
    assert cache.held_bytes() == sum(x.keys.numel() for x in cache.layers) * 2 * 8


def test_right_padding_then_more_tokens_is_refused() -> None:
    model, ids = convert(tiny(), MIXED), tokens(12, batch=2)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    cache = SpanCache(MIXED)
    got = logits(model, ids, attention_mask=mask, past_key_values=cache)
    close(got[:1, :9], logits(model, ids[:1, :9]))
    close(got[1:], logits(model, ids[1:]))
    longer = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
    with pytest.raises(UnsupportedSpan, match="row 0"):
        logits(model, ids[:, :1], attention_mask=longer, past_key_values=cache)


# generate()


def generate(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    kwargs = {"max_new_tokens": 20, "do_sample": False, **kwargs}
    return model.generate(ids, output_logits=True, output_scores=True, return_dict_in_generate=True, **kwargs)


def same(one: Any, two: Any) -> None:
    assert torch.equal(one.sequences, two.sequences)
    for name in ("logits", "scores"):
        for x, y in zip(getattr(one, name), getattr(two, name), strict=True):
            finite = x.isfinite()
            assert torch.equal(finite, y.isfinite())
            close(x[finite], y[finite])


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "sampled beams": {"do_sample": True, "num_beams": 3},
    "many samples": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FEW)
def test_generate_equals_generate_without_a_cache(family: str, way: str) -> None:
    model = convert(tiny(family), MIXED)
    ids, mask, _ = left_padded([tokens(13), tokens(6, seed=1), tokens(11, seed=2)])
    for inputs in ({"ids": tokens(13)}, {"ids": ids, "attention_mask": mask}):
        got = generate(model, **inputs, **WAYS[way])
        same(got, generate(model, **inputs, **WAYS[way], use_cache=False))
        assert got.sequences.shape[1] == 33


@pytest.mark.parametrize("family", FEW)
def test_generate_in_a_padded_batch_equals_each_row_alone(family: str) -> None:
    model, rows = convert(tiny(family), MIXED), [tokens(13), tokens(6, seed=1), tokens(11, seed=2)]
    ids, mask, _ = left_padded(rows)
    got = generate(model, ids, attention_mask=mask)
    for index, row in enumerate(rows):
        alone = generate(model, row)
        assert torch.equal(got.sequences[index, 13:], alone.sequences[0, row.shape[1] :])
        for x, y in zip(got.logits, alone.logits, strict=True):
            close(x[index], y[0])


@pytest.mark.parametrize("size", [1, 4, 7, 50])
def test_generate_with_prefill_chunks(size: int) -> None:
    model = convert(tiny(), MIXED)
    ids, mask, _ = left_padded([tokens(30), tokens(19, seed=1)])
    same(generate(model, ids, attention_mask=mask, prefill_chunk_size=size), generate(model, ids, attention_mask=mask))


@pytest.mark.parametrize("plan", [MIXED, SpanPlan((Window(3),) * 4), SpanPlan((Block(4, 0, 1),) * 4)], ids=str)
def test_prompt_lookup(plan: SpanPlan) -> None:
    model = convert(tiny(), plan)
    ids = tokens(6).repeat(1, 5)  # repetition, so that lookups succeed
    for tokens_ahead in (2, 5):
        got = generate(model, ids, prompt_lookup_num_tokens=tokens_ahead, max_new_tokens=30)
        same(got, generate(model, ids, max_new_tokens=30, use_cache=False))


def test_assisted_decoding() -> None:
    model, assistant = convert(tiny(), MIXED), convert(tiny(seed=0, num_hidden_layers=2), SpanPlan((Window(3), Full())))
    for helper in (assistant, tiny(seed=0, num_hidden_layers=2), copy.deepcopy(model)):
        got = generate(model, tokens(12), assistant_model=helper, max_new_tokens=15)
        same(got, generate(model, tokens(12), use_cache=False, max_new_tokens=15))


def test_generate_goes_on_with_a_cache() -> None:
    model, ids = convert(tiny(), MIXED), tokens(14)
    for cache in (SpanCache(MIXED), DynamicCache(), DynamicCache(config=model.config)):
        first = generate(model, ids, past_key_values=cache, max_new_tokens=6)
        assert isinstance(first.past_key_values, SpanCache)
        check_held(first.past_key_values, MIXED, 19)
        more = torch.cat([first.sequences, tokens(5, seed=1)], dim=1)
        second = generate(model, more, past_key_values=first.past_key_values, max_new_tokens=6)
        same(second, generate(model, more, use_cache=False, max_new_tokens=6))


def test_generate_from_embeddings() -> None:
    model, ids = convert(tiny(), MIXED), tokens(14)
    embeddings = model.get_input_embeddings()(ids).detach()
    got = model.generate(inputs_embeds=embeddings, max_new_tokens=12, do_sample=False)
    assert torch.equal(got, generate(model, ids, max_new_tokens=12).sequences[:, 14:])


def test_generate_holds_no_more_than_the_spans() -> None:
    model = convert(tiny(), MIXED)
    for way in ({}, {"prefill_chunk_size": 5}):
        check_held(generate(model, tokens(60), **way).past_key_values, MIXED, 79)
    beams = generate(model, tokens(60), num_beams=3).past_key_values
    check_held(beams, MIXED, 79, batch=3)


# Rows picked, repeated and reordered


@pytest.mark.parametrize("padded", [False, True])
def test_reorder_select_repeat(padded: bool) -> None:
    model = convert(tiny(), MIXED)
    rows = [tokens(18, seed=s) for s in range(3)]
    if padded:
        rows = [row[:, :n] for row, n in zip(rows, (18, 7, 12), strict=True)]
    ids, mask, positions = left_padded(rows)
    where = {"attention_mask": mask, "position_ids": positions} if padded else {}

    def filled() -> SpanCache:
        cache = SpanCache(MIXED)
        logits(model, ids, past_key_values=cache, **where)
        return cache

    changes: dict[str, tuple[Any, list[int]]] = {
        "reorder": (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        "select": (lambda c: c.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        "select by booleans": (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        "repeat": (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    }
    for name, (change, kept) in changes.items():
        cache = filled()
        change(cache)
        more = tokens(9, batch=len(kept), seed=9)
        longer = torch.cat([mask[kept], torch.ones_like(more)], dim=1)
        got, end = [], 18
        for piece in more.split([1, 1, 7], dim=1):
            end += piece.shape[1]
            kwargs = {
                "attention_mask": longer[:, :end],
                "position_ids": longer.cumsum(1)[:, end - piece.shape[1] : end] - 1,
            }
            got.append(logits(model, piece, past_key_values=cache, **(kwargs if padded else {})))
        for index, row in enumerate(kept):
            whole = torch.cat([rows[row], more[index : index + 1]], dim=1)
            expected = logits(model, whole, use_cache=False)[0, -9:]
            assert (torch.cat(got, dim=1)[index] - expected).abs().max() <= 1e-10, (name, index)
        if not padded:
            check_held(cache, MIXED, 27, batch=len(kept))


# Taking tokens back


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_crop_while_recording(seed: int, padded: bool, model: PreTrainedModel) -> None:
    r = random.Random(seed)
    plan = SpanPlan(tuple(r.choice(SPANS) for _ in range(3)))
    rows = [tokens(20, seed=seed), tokens(r.randint(8, 20) if padded else 20, seed=seed + 100)]
    ids, mask, positions = left_padded(rows)
    cache, n = SpanCache(plan), 20
    with applied(model, plan):
        logits(
            model, ids, past_key_values=cache, **({"attention_mask": mask, "position_ids": positions} if padded else {})
        )
        cache.activate_past_recording()
        for step in range(5):
            candidates = tokens(r.randint(1, 6), batch=2, seed=seed + 200 + step)
            ids = torch.cat([ids, candidates], dim=1)
            mask = torch.cat([mask, torch.ones_like(candidates)], dim=1)
            where = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, n:]} if padded else {}
            got = logits(model, candidates, past_key_values=cache, **where)
            for index, row in enumerate(rows):
                whole = ids[index : index + 1, 20 - row.shape[1] :]
                expected = logits(model, whole, use_cache=False)[0, -candidates.shape[1] :]
                assert (got[index] - expected).abs().max() <= 1e-10, (seed, step, str(plan))
            kept = r.randint(1, candidates.shape[1])
            cache.crop(-(candidates.shape[1] - kept))
            n += kept
            ids, mask = ids[:, :n], mask[:, :n]
            assert cache.get_seq_length() == n
            if not padded:
                assert [layer.keys.shape[2] for layer in cache.layers] == [span.cache_length(n) for span in plan]


def test_crop_without_recording() -> None:
    """Fine where nothing was let go that is needed again, refused otherwise."""
    ids = tokens(30)
    full = convert(tiny(), SpanPlan((Full(), Block(100), Window(100), Full())))
    cache = SpanCache(plan_of(full))
    logits(full, ids, past_key_values=cache)
    cache.crop(-10)
    assert cache.get_seq_length() == 20
    close(logits(full, ids[:, 20:], past_key_values=cache), logits(full, ids)[:, 20:])
    model = convert(tiny(), SpanPlan((Block(4),) * 4))
    cache = SpanCache(plan_of(model))
    logits(model, ids, past_key_values=cache)
    cache.crop(-2)  # tokens 28 and 29 began a block
    close(logits(model, ids[:, 28:], past_key_values=cache), logits(model, ids)[:, 28:])
    with pytest.raises(UnsupportedSpan, match=r"cannot take back 3 tokens: block:4 has let go of keys"):
        cache.crop(-3)


def test_a_refused_crop_changes_nothing() -> None:
    model, ids = convert(tiny(), SpanPlan((Full(), Window(4), Full(), Window(4)))), tokens(30)
    cache = SpanCache(plan_of(model))
    logits(model, ids[:, :20], past_key_values=cache)
    with pytest.raises(UnsupportedSpan, match="cannot take back 3 tokens"):
        cache.crop(-3)
    check_held(cache, plan_of(model), 20)
    close(logits(model, ids[:, 20:], past_key_values=cache), logits(model, ids)[:, 20:])


def test_crop_releases_memory() -> None:
    model, ids = convert(tiny(), MIXED), tokens(200)
    cache = SpanCache(MIXED)
    cache.activate_past_recording()
    logits(model, ids, past_key_values=cache)
    cache.crop(-190)
    check_held(cache, MIXED, 10)


def test_crop_takes_negative_numbers() -> None:
    model = convert(tiny(), MIXED)
    cache = SpanCache(MIXED)
    logits(model, tokens(20), past_key_values=cache)
    with pytest.raises(ValueError, match="negative number, got 3"):
        cache.crop(3)
    check_held(cache, MIXED, 20)


# Refusals


def test_cache_of_another_plan() -> None:
    model = convert(tiny(), MIXED)
    with pytest.raises(UnsupportedSpan, match="made for another plan"):
        logits(model, tokens(9), past_key_values=SpanCache(SpanPlan((Full(),) * 4)))
    cache = SpanCache(MIXED)
    logits(model, tokens(9), past_key_values=cache)
    convert(model, SpanPlan((Window(3),) * 4))
    with pytest.raises(UnsupportedSpan, match="made for another plan"):
        logits(model, tokens(1), past_key_values=cache)


def test_used_dynamic_cache() -> None:
    parent = tiny()
    cache = DynamicCache()
    logits(parent, tokens(9), past_key_values=cache)
    model = convert(parent, MIXED)
    with pytest.raises(UnsupportedSpan, match="already holds 9 tokens"):
        logits(model, tokens(1), past_key_values=cache)
    with pytest.raises(UnsupportedSpan, match="already holds 9 tokens"):
        model.generate(tokens(12), past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("used", [False, True])
def test_span_cache_in_an_unconverted_model(used: bool) -> None:
    cache = SpanCache(MIXED)
    if used:
        logits(convert(tiny(), MIXED), tokens(9), past_key_values=cache)
    with pytest.raises(UnsupportedSpan, match="belongs to a converted model"):
        logits(tiny(), tokens(1), past_key_values=cache)


def test_static_cache() -> None:
    model = convert(tiny(), MIXED)
    with pytest.raises(UnsupportedSpan, match="StaticCache cannot honour spans"):
        logits(model, tokens(3), past_key_values=StaticCache(config=model.config, max_cache_len=8))


def test_subclasses_of_dynamic_cache() -> None:
    class Mine(DynamicCache):
        pass

    with pytest.raises(UnsupportedSpan, match="a Mine cannot honour spans"):
        logits(convert(tiny(), MIXED), tokens(3), past_key_values=Mine())


def test_tuples_are_no_caches() -> None:
    with pytest.raises(UnsupportedSpan, match="a tuple cannot honour spans"):
        logits(convert(tiny(), MIXED), tokens(3), past_key_values=((torch.zeros(1), torch.zeros(1)),))


def test_a_batch_of_another_size() -> None:
    model = convert(tiny(), MIXED)
    cache = SpanCache(MIXED)
    logits(model, tokens(9, batch=2), past_key_values=cache)
    with pytest.raises(UnsupportedSpan, match="2 rows"):
        logits(model, tokens(1, batch=3), past_key_values=cache)


def test_a_forward_that_failed_is_noticed() -> None:
    """A cache whose layers stopped half-way must not go on as if nothing had happened."""
    model, ids = convert(tiny(), MIXED), tokens(30)
    cache = SpanCache(MIXED)
    logits(model, ids[:, :20], past_key_values=cache)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[2].self_attn.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model, ids[:, 20:21], past_key_values=cache)
    handle.remove()
    with pytest.raises(UnsupportedSpan):
        logits(model, ids[:, 20:21], past_key_values=cache)
