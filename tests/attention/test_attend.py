"""`attend` against the oracle: values, gradients, locality, what stays out of reach, memory, refusals."""

import itertools
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from masformer.attention import Segments, UnsupportedSpan, attend, blockwise
from masformer.attention.reference import reference
from masformer.spans import Block, Full, Span, Window

from .cases import check, documents, inputs, largest, random_case, segments, with_gradients

SPANS: list[Span] = [
    Full(),
    Block(1),
    Block(3),
    Block(4, lookback=1),
    Block(2, lookback=3, sinks=1),
    Block(5, sinks=7),
    Block(3, lookback=1, sinks=2),
    Window(1),
    Window(2),
    Window(5),
    Window(1, sinks=1),
    Window(3, sinks=2),
    Window(4, sinks=9),
    Window(11),
]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fold short sequences too, so that a dozen tokens take every path that thousands take."""
    monkeypatch.setattr(blockwise, "LEAST_CHUNK", 2)
    monkeypatch.setattr(blockwise, "MOST_CHUNK", 4)
    monkeypatch.setattr(blockwise, "FEW_TOKENS", 0)


def draw(heads: int, kv_heads: int, length: int, dim: int = 4, *, seed: int = 0, batch: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, length, dim), (batch, kv_heads, length, dim), (batch, kv_heads, length, dim)]
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


# Random cases


@pytest.mark.parametrize("chunk", range(10))
def test_500_random_cases(chunk: int) -> None:
    for seed in range(50 * chunk, 50 * chunk + 50):
        check(random_case(seed))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("chunk", range(4))
def test_random_cases_in_small_chunks(chunk: int) -> None:
    for seed in range(100_000 + 50 * chunk, 100_050 + 50 * chunk):
        check(random_case(seed))


def count_in_all_chunks(folder: Path, name: str, chunk: int, misses: int) -> int:
    """Note the misses of one chunk; return those of all chunks that ran so far, in every worker."""
    (folder / f"{name}-{chunk}.json").write_text(json.dumps(misses))
    return sum(json.loads(file.read_text()) for file in folder.glob(f"{name}-*.json"))


@pytest.fixture
def shared_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """One folder per test run, whether or not xdist spreads it over workers."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if hasattr(request.config, "workerinput") else base


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(40))
def test_10_000_random_cases(chunk: int, shared_folder: Path) -> None:
    misses = [seed for seed in range(250 * chunk, 250 * chunk + 250) if check(random_case(seed))]
    total = count_in_all_chunks(shared_folder, "ours", chunk, len(misses))
    print(f"bfloat16, largest error above 2 x dense + 1e-2: {misses} here, {total} in all chunks so far")
    assert total <= 10


def torch_in(way: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full causal attention by torch alone, with a kernel and a way to serve several query heads by one key head."""
    kernel, groups = way.split()
    if groups == "repeated":
        k, v = (x[:, :, None].expand(-1, -1, q.shape[1] // x.shape[1], -1, -1).flatten(1, 2) for x in (k, v))
    length = q.shape[2]
    mask = torch.ones(length, length, dtype=torch.bool).tril() if kernel == "masked" else None
    return scaled_dot_product_attention(q, k, v, mask, is_causal=kernel == "causal", enable_gqa=groups == "grouped")


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(10))
def test_torch_misses_the_bfloat16_bar_against_itself(chunk: int, shared_folder: Path) -> None:
    """torch judged against torch as `check` judges ours: the same cases, with one document and a Full span.

    It is why bfloat16 is judged by the root mean square. Measured on 10,000 cases (torch 2.13, CPU): the causal
    kernel against the masked one, 0 misses; key heads repeated before the call, as ours are, against torch's
    `enable_gqa`, 13; and `enable_gqa` against repeated heads, 125. The order in which the gradients of a shared
    key head are added up decides, not the attention.
    """
    pairs = {
        "kernels": ("causal grouped", "masked grouped"),
        "repeated": ("causal repeated", "masked grouped"),
        "grouped": ("masked grouped", "causal repeated"),
    }
    misses = dict.fromkeys(pairs, 0)
    for seed in range(1000 * chunk, 1000 * chunk + 1000):
        r = random_case(seed)
        case = type(r)(Full(), torch.bfloat16, r.heads, r.kv_heads, r.dim, ((0, (r.length,), 0),) * len(r.rows), seed)
        *qkv, grad = inputs(case)
        exact = with_gradients(lambda q, k, v: reference(q, k, v, Full()), [x.double() for x in qkv], grad.double())
        errors = {
            way: [largest(x, e) for x, e in zip(with_gradients(partial(torch_in, way), qkv, grad), exact, strict=True)]
            for way in {way for pair in pairs.values() for way in pair}
        }
        for name, (judged, bar) in pairs.items():
            misses[name] += any(x > 2 * y + 1e-2 for x, y in zip(errors[judged], errors[bar], strict=True))
    total = {name: count_in_all_chunks(shared_folder, name, chunk, count) for name, count in misses.items()}
    print(f"torch against torch, largest error above 2 x + 1e-2: {misses} here, {total} in all chunks so far")
    assert total["kernels"] <= 10
    assert total["repeated"] <= 40
    assert total["repeated"] < total["grouped"]


# Borders and shapes


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 127, 128, 129, 257, 331])
def test_lengths_across_every_border(length: int) -> None:
    spans = [
        Block(1),
        Block(64),
        Block(7, 2, 3),
        Block(128, 1),
        Block(16, sinks=400),
        Window(1),
        Window(64),
        Window(65, 5),
    ]
    q, k, v = draw(2, 1, length)
    for span in spans:
        close(attend(q, k, v, span), reference(q, k, v, span))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("span", SPANS, ids=str)
def test_every_short_length_in_small_chunks(span: Span) -> None:
    for length in range(1, 26):
        q, k, v = draw(2, 1, length, seed=length)
        close(attend(q, k, v, span), reference(q, k, v, span))


@pytest.mark.parametrize("length", [20, 300])
@pytest.mark.parametrize("span", [Full(), Block(70, 1, 3), Block(3), Window(70, 3), Window(3)], ids=str)
def test_groups_scale_and_value_width(span: Span, length: int) -> None:
    q, k, _ = draw(6, 2, length, batch=2)
    v, grad = draw(6, 2, length, 9, batch=2)[2], draw(6, 2, length, 9, batch=2, seed=1)[0]
    got = with_gradients(lambda q, k, v: attend(q, k, v, span, scale=1.0), (q, k, v), grad)
    expected = with_gradients(lambda q, k, v: reference(q, k, v, span, scale=1.0), (q, k, v), grad)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_keys_behind_the_last_query_are_not_touched(packed: bool) -> None:
    """The unused slots of a preallocated cache."""
    q, k, v = draw(2, 1, 40)
    positions = torch.cat([torch.arange(15), torch.arange(25)]) if packed else torch.arange(40)
    where = Segments.of(1, 40, position_ids=positions[None])
    longer = [torch.cat([x, torch.full_like(x, float("nan"))], dim=2) for x in (k, v)]
    for span in (Full(), Block(4, 1, 1), Window(3, 1)):
        assert torch.equal(attend(q, *longer, span, segments=where), attend(q, k, v, span, segments=where))


@pytest.mark.parametrize("span", [Full(), Block(70, 1, 3), Window(70, 3)], ids=str)
def test_transposed_inputs(span: Span) -> None:
    """As transformers hands them over: `[batch, tokens, heads, dim]` transposed, so that they are not contiguous."""
    tensors = draw(4, 2, 300, batch=2)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    assert not any(x.is_contiguous() for x in turned)
    grad = torch.ones(2, 4, 300, 4, dtype=torch.float64)
    for got, expected in zip(
        with_gradients(lambda q, k, v: attend(q, k, v, span), turned, grad),
        with_gradients(lambda q, k, v: reference(q, k, v, span), tensors, grad),
        strict=True,
    ):
        close(got, expected)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("seen", [0, 1, 2, 5, 6, 12, 13])
def test_new_tokens_after_a_cache(span: Span, seen: int) -> None:
    """The last queries alone, over all keys and over what a bounded cache would still hold."""
    for new in (1, 2, 7, 20):
        q, k, v = draw(2, 1, seen + new, seed=new)
        q = q[:, :, seen:]
        expected = reference(q, k, v, span)
        close(attend(q, k, v, span), expected)
        start = span.start(seen)
        if start > span.sinks:
            held = [torch.cat([x[:, :, : span.sinks], x[:, :, start:]], dim=2) for x in (k, v)]
            assert held[0].shape[2] == span.cache_length(seen) + new
            close(attend(q, *held, span, segments=Segments(seen, new)), expected)


def test_dropout_drops_weights_and_keeps_their_mean() -> None:
    torch.manual_seed(0)
    q, k, _ = draw(4, 4, 512, batch=4)
    for span in (Full(), Block(128), Window(128, 2)):
        out = attend(q, k, torch.ones_like(k), span, dropout=0.5)
        assert out.std() > 0.01
        assert abs(out.mean().item() - 1) < 0.01


# Gradients


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("length", [1, 6, 13])
def test_gradcheck(span: Span, length: int) -> None:
    leaves = [x.requires_grad_() for x in draw(2, 1, length, 2, seed=length)]
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, span), leaves)


@pytest.mark.usefixtures("small_chunks")
def test_gradcheck_of_packed_and_padded_rows() -> None:
    mask = torch.tensor([[0, 0, 0] + [1] * 17, [1] * 20])
    positions = torch.tensor([[0, 0, 0, *range(12), *range(5)], [*range(4), *range(16)]])
    where = Segments.of(2, 20, attention_mask=mask, position_ids=positions)
    leaves = [x.requires_grad_() for x in draw(2, 1, 20, 2, batch=2)]
    for span in (Full(), Block(3, 1, 1), Window(4, 2)):
        assert torch.autograd.gradcheck(lambda q, k, v, s=span: attend(q, k, v, s, segments=where), leaves)


def jacobian_support(q: Tensor, k: Tensor, v: Tensor, span: Span, where: Segments | None) -> tuple[Tensor, Tensor]:
    """Which keys and which values have a gradient that is not exactly 0 for each query: `[queries, keys]` each."""
    k, v = k.clone().requires_grad_(), v.clone().requires_grad_()
    out = attend(q, k, v, span, segments=where).sum((0, 1, 3))
    rows = [torch.autograd.grad(x, (k, v), retain_graph=True) for x in out]
    return tuple(torch.stack([row[i].abs().sum((0, 1, 3)) != 0 for row in rows]) for i in (0, 1))  # type: ignore[return-value]


@pytest.mark.parametrize("span", [*SPANS, Block(64), Block(64, 1, 2), Window(64), Window(70, 3)], ids=str)
@pytest.mark.parametrize("small", [False, True])
def test_gradient_is_zero_exactly_where_nothing_is_seen(
    span: Span, small: bool, request: pytest.FixtureRequest
) -> None:
    if small:
        request.getfixturevalue("small_chunks")
    length = 21 if small or len(str(span)) < 8 else 290
    seen = torch.tensor([[span.sees(t, s) for s in range(length)] for t in range(length)])
    keys, values = jacobian_support(*draw(2, 1, length), span, None)
    assert torch.equal(values, seen)
    assert not bool((keys & ~seen).any())
    # A query that sees one key only gives it all the weight, whatever that key is.
    assert bool(keys[seen & (seen.sum(1, keepdim=True) > 1)].all())


@pytest.mark.parametrize("length", [14, 40])
@pytest.mark.parametrize("span", [Full(), Block(4, 1, 1), Window(3, 1)], ids=str)
def test_gradient_never_crosses_documents(span: Span, length: int) -> None:
    """Both ways to compute rows that differ: a few tokens under a mask, more of them document by document."""
    left, first = 2, 5
    positions = torch.tensor([[0] * left + [*range(first), *range(length - left - first)]])
    mask = (torch.arange(length) >= left).long()[None]
    where = Segments.of(1, length, attention_mask=mask, position_ids=positions)
    document = torch.tensor([-1] * left + [0] * first + [1] * (length - left - first))
    seen = torch.tensor([[span.sees(t, s) for s in positions[0].tolist()] for t in positions[0].tolist()])
    seen &= (document[:, None] == document) & (document >= 0)
    assert torch.equal(jacobian_support(*draw(2, 1, length), span, where)[1], seen)


# What never reaches an output, not even as NaN


def poisoned(k: Tensor, v: Tensor, columns: Any, value: float) -> tuple[Tensor, Tensor]:
    k, v = k.clone(), v.clone()
    k[:, :, columns], v[:, :, columns] = value, value
    return k, v


def check_poison(span: Span, length: int, value: float) -> None:
    """Padding, document 0 and document 1 in a row: what spoils one leaves the others as they are, bit for bit."""
    left, first = 2, 5
    positions = torch.tensor([[0] * left + [*range(first), *range(length - left - first)]])
    mask = (torch.arange(length) >= left).long()[None]
    where = Segments.of(1, length, attention_mask=mask, position_ids=positions)
    q, k, v = draw(2, 1, length)
    clean = attend(q, k, v, span, segments=where)
    padding, zero, one = slice(0, left), slice(left, left + first), slice(left + first, None)
    for spoilt, kept in ((padding, zero), (padding, one), (zero, one), (one, zero)):
        got = attend(q, *poisoned(k, v, spoilt, value), span, segments=where)
        assert torch.equal(got[:, :, kept], clean[:, :, kept]), (spoilt, kept)


NEIGHBOUR_SPANS = [Full(), Block(4, 1, 1), Block(64), Window(3, 1), Window(64)]


@pytest.mark.parametrize("value", [1e4, 1e30])
@pytest.mark.parametrize("length", [14, 40, 300])
@pytest.mark.parametrize("span", NEIGHBOUR_SPANS, ids=str)
def test_finite_neighbours_and_padding_change_no_bit(span: Span, length: int, value: float) -> None:
    check_poison(span, length, value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("length", [40, 300])
@pytest.mark.parametrize("span", NEIGHBOUR_SPANS, ids=str)
def test_neighbours_and_padding_cannot_poison(span: Span, length: int, value: float) -> None:
    check_poison(span, length, value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("span", NEIGHBOUR_SPANS, ids=str)
def test_neighbours_and_padding_cannot_poison_a_few_tokens_either(span: Span, value: float) -> None:
    check_poison(span, 14, value)


@pytest.mark.parametrize(
    ("span", "first_safe"),
    [(Block(64), 64), (Block(64, 1), 128), (Window(64), 191), (Window(64, 2), 193), (Block(70, 0, 2), 140)],
    ids=str,
)
def test_poison_out_of_reach(span: Span, first_safe: int) -> None:
    """A NaN in a key that no query of a chunk sees never enters that chunk.

    It does not hold within a chunk, where keys beyond the span of one query and within that of another are
    masked, not cut: a weight of 0 times NaN is NaN. With finite values nothing leaks there (the gradient is 0).
    """
    q, k, v = draw(2, 1, 400)
    clean = attend(q, k, v, span)
    got = attend(q, *poisoned(k, v, slice(span.sinks, span.sinks + 1), float("nan")), span)
    assert torch.equal(got[:, :, first_safe:], clean[:, :, first_safe:])
    assert got[:, :, span.sinks].isnan().all()


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_finite_values_out_of_span_change_no_bit(span: Span) -> None:
    length, t = 41, 37
    q, k, v = (x.float() for x in draw(2, 1, length))
    clean = attend(q, k, v, span)
    hidden = [s for s in range(length) if not span.sees(t, s)]
    got = attend(q, *poisoned(k, v, hidden, 1e4), span)
    assert torch.equal(got[:, :, t], clean[:, :, t])


# Memory


class LargestTensor(TorchDispatchMode):
    """Notes the largest storage, in elements, behind any tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


def largest_tensor(compute: Any, length: int, dtype: torch.dtype = torch.float32) -> int:
    leaves = [x.to(dtype).requires_grad_() for x in draw(4, 2, length, 8)]
    with LargestTensor() as recorder:
        compute(*leaves).sum().backward()
    return recorder.elements


def test_recorder_sees_a_dense_matrix() -> None:
    assert largest_tensor(lambda q, k, v: reference(q, k, v, Window(8)), 256) >= 4 * 256 * 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("span", [Block(64), Block(64, 1), Block(3, sinks=2), Window(64, sinks=4), Window(5)], ids=str)
def test_no_tensor_grows_with_length_squared(span: Span, dtype: torch.dtype) -> None:
    """Forward and backward: nothing larger than a few times what the inputs hold."""
    length, inputs_hold = 4096, 4096 * 4 * 8
    elements = largest_tensor(lambda q, k, v: attend(q, k, v, span), length, dtype)
    assert elements <= 6 * inputs_hold
    assert elements < length * length / 20
    packed = Segments.of(1, length, position_ids=torch.cat([torch.arange(1000), torch.arange(length - 1000)])[None])
    elements = largest_tensor(lambda q, k, v: attend(q, k, v, span, segments=packed), length, dtype)
    assert elements <= 6 * inputs_hold


def test_wide_windows_keep_masks_small() -> None:
    elements = largest_tensor(lambda q, k, v: attend(q, k, v, Window(3000)), 8192)
    assert elements <= 1024 * (1024 + 3000) < 8192 * 8192 / 16


@pytest.mark.parametrize("span", [Block(2048, sinks=4), Block(2048, 1), Window(2048, 4)], ids=str)
def test_long_spans_keep_masks_small(span: Span) -> None:
    """Not span x span, with sinks and with a look-back either; and still right."""
    length = 6000
    elements = largest_tensor(lambda q, k, v: attend(q, k, v, span), length)
    inputs_hold = length * 4 * 8
    assert elements <= max(512 * 2 * (2 * 2048 + 512 + 4), 6 * inputs_hold) < length * length / 7
    q, k, v = draw(1, 1, length)
    assert (attend(q, k, v, span) - reference(q, k, v, span)).abs().max() < 1e-12


# Refusals


def test_more_queries_than_keys() -> None:
    q, k, v = draw(1, 1, 8)
    with pytest.raises(UnsupportedSpan, match="8 queries have only 4 keys"):
        attend(q, k[:, :, :4], v[:, :, :4], Window(3))
    with pytest.raises(UnsupportedSpan, match="shapes do not fit"):
        attend(q[0, 0], k, v, Full())


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (((1, 2, 5, 4), (1, 2, 5, 3), (1, 2, 5, 4)), ["(1, 2, 5, 4)", "(1, 2, 5, 3)"]),
        (((1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 6, 4)), ["(1, 2, 6, 4)"]),
        (((2, 2, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4)), ["(2, 2, 5, 4)"]),
        (((1, 3, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4)), ["3 query heads", "2 key heads"]),
        (((1, 2, 0, 4), (1, 2, 5, 4), (1, 2, 5, 4)), ["at least one query"]),
        (((1, 5, 4), (1, 5, 4), (1, 5, 4)), ["(1, 5, 4)"]),
    ],
)
def test_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...], said: list[str]) -> None:
    with pytest.raises(UnsupportedSpan) as error:
        attend(*(torch.zeros(shape) for shape in shapes), Window(2))  # type: ignore[arg-type]
    assert all(part in str(error.value) for part in said), error.value


def test_documents_of_another_batch() -> None:
    where = Segments.of(2, 6, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]] * 2))
    q, k, v = draw(2, 1, 6, batch=3)
    with pytest.raises(UnsupportedSpan, match=r"2 rows of 6 new tokens.*3 rows of 6"):
        attend(q, k, v, Window(2), segments=where)
    with pytest.raises(UnsupportedSpan, match=r"2 rows of 6 new tokens.*2 rows of 5"):
        attend(q[:2, :, :5], k[:2], v[:2], Window(2), segments=where)


def test_keys_that_the_cache_has_dropped() -> None:
    q, k, v = draw(2, 1, 20)
    with pytest.raises(UnsupportedSpan, match="window:8 needs keys from position 9, the cache holds them from 12 on"):
        attend(q[:, :, 16:], k[:, :, 12:], v[:, :, 12:], Window(8), segments=Segments(16, 4))
    with pytest.raises(UnsupportedSpan, match="full needs keys from position 0"):
        attend(q[:, :, 16:], k[:, :, 12:], v[:, :, 12:], Full(), segments=Segments(16, 4))
    with pytest.raises(UnsupportedSpan, match="5 keys are not 2 sinks and a run up to token 20"):
        attend(q[:, :, 16:], k[:, :, :5], v[:, :, :5], Window(8, sinks=2), segments=Segments(16, 4))


def test_unsupported_span_is_a_value_error() -> None:
    assert issubclass(UnsupportedSpan, ValueError)


def test_bounded_cache_of_rows_with_different_starts() -> None:
    """Decoding a left-padded batch from sinks and a run: each row has its own positions."""
    r = random.Random(0)
    for span, new in itertools.product((Window(3, 2), Block(4, 0, 1), Window(2), Block(3, 1)), (1, 3, 20)):
        total, begins = 24 + new, [0, r.randint(1, 9), 12]
        mask = torch.stack([(torch.arange(total) >= begin).long() for begin in begins])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        before = Segments.of(3, 24, attention_mask=mask[:, :24], position_ids=positions[:, :24])
        where = Segments.of(3, new, previous=before, attention_mask=mask, position_ids=positions[:, 24:])
        q, k, v = draw(2, 1, total, batch=3)
        expected = reference(q[:, :, 24:], k, v, span, documents=mask - 1, positions=positions)
        first = before.first_needed(span)
        assert first > span.sinks
        held = []
        for x in (k, v):
            sinks = torch.stack([x[row, :, begin : begin + span.sinks] for row, begin in enumerate(begins)])
            held.append(torch.cat([sinks, x[:, :, first:]], dim=2))
        close(attend(q[:, :, 24:], *held, span, segments=where), expected)


def test_documents_of_a_case_round_trip() -> None:
    """The cases hand documents to `attend` as a model does; make sure that they arrive."""
    for seed in range(50):
        case = random_case(seed)
        numbers, _ = documents(case)
        pieces = segments(case).pieces
        got = torch.full_like(numbers, -1)
        for row, begin, first, stop in pieces if pieces is not None else ():
            assert begin == first
            got[row, first:stop] = numbers[row, first]
        expected = torch.zeros_like(numbers) if pieces is None else got
        assert torch.equal(expected, numbers)
