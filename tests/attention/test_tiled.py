"""Attention in tiles, which CPUs take for more than a few tokens, against the dense reference."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from masformer.attention import Segments, attend, tiled
from masformer.attention.reference import reference
from masformer.spans import parse_span

SPANS = [
    "block:128",
    "block:48",
    "block:16:sinks=3",
    "block:200:sinks=5",
    "block:700",
    "block:700:sinks=1",
    "block:96:lookback=2",
    "block:640:lookback=1:sinks=2",
    "window:1",
    "window:30",
    "window:128",
    "window:257:sinks=4",
    "window:700:sinks=9",
    "window:1200",
]


@pytest.fixture
def taken(monkeypatch):
    """How often tiles were taken."""
    calls = []
    pieces = tiled._pieces
    monkeypatch.setattr(tiled, "_pieces", lambda *given: calls.append(1) or pieces(*given))
    return calls


def made(heads, kv_heads, queries, keys, dtype=torch.float64, batch=2, dim=16):
    """q, k and v as a layer hands them on: views of `[batch, tokens, heads, dim]`."""
    torch.manual_seed(keys)
    sizes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    return [torch.randn(batch, n, h, dim, dtype=dtype).transpose(1, 2).requires_grad_() for n, h in sizes]


@pytest.mark.parametrize("tokens", [257, 640, 1111])
@pytest.mark.parametrize("span", SPANS)
def test_output_and_gradients_are_the_references(span, tokens, taken):
    span, given = parse_span(span), made(4, 2, tokens, tokens)
    out, expected = attend(*given, span), reference(*given, span)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    up = torch.randn_like(expected)
    for got, right in zip(torch.autograd.grad(out, given, up), torch.autograd.grad(expected, given, up), strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-11)
    assert taken or span.visible(tokens - 1) == tokens  # where all is seen the parent's call is made


@pytest.mark.parametrize("span", SPANS)
def test_a_later_part_of_a_document_has_the_same_rows(span, taken):
    span, (q, k, v) = parse_span(span), made(4, 2, 1500, 1500)
    whole = reference(q, k, v, span)
    for start, end in itertools.pairwise([0, 400, 1041, 1500]):
        out = attend(q[:, :, start:end], k[:, :, :end], v[:, :, :end], span)
        torch.testing.assert_close(out, whole[:, :, start:end], rtol=0, atol=1e-12)
        needed = span.start(start) if span.start(start) > span.sinks else 0
        if needed:  # a bounded cache holds the sinks and what is seen from here on
            held = [torch.cat([x[:, :, : span.sinks], x[:, :, needed:end]], 2) for x in (k, v)]
            bounded = attend(q[:, :, start:end], *held, span, segments=Segments(seen=start, new=end - start))
            torch.testing.assert_close(bounded, out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spread", [1, 3])
@pytest.mark.parametrize("span", ["block:128", "block:512:sinks=4", "window:200", "window:200:sinks=4"])
def test_bfloat16_is_as_near_to_the_truth_as_eager_attention_whose_scores_are_rounded_too(span, spread, monkeypatch):
    span = parse_span(span)
    exact = made(4, 2, 1500, 1500, dim=64)
    exact[0] = (exact[0] * spread).detach().requires_grad_()
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in half]
    up = torch.randn(2, 4, 1500, 64).bfloat16()
    right = reference(*exact, span)
    truth = [right, *torch.autograd.grad(right, exact, up.double())]

    def errors(**how):
        out = attend(*half, span, **how)
        got = [out, *torch.autograd.grad(out, half, up)]
        return [float(((a.double() - b).norm() / b.norm()).detach()) for a, b in zip(got, truth, strict=True)]

    monkeypatch.setattr(tiled, "has_bf16", lambda: True)
    ours, eager = errors(), errors(eager=True)
    assert all(a < 1.2 * b for a, b in zip(ours, eager, strict=True)), (ours, eager)


def test_memory_is_that_of_a_few_tiles(monkeypatch):
    """No scores of more than AT_ONCE pairs, or one tile, exist at a time, whatever the length."""
    sizes = []
    make = tiled.Scratch.__call__
    monkeypatch.setattr(
        tiled.Scratch,
        "__call__",
        lambda self, name, *shape: sizes.append(torch.Size(shape).numel()) or make(self, name, *shape),
    )
    given = made(1, 1, 20_000, 20_000, torch.float32, batch=1)
    attend(*given, parse_span("window:512:sinks=4")).sum().backward()
    assert max(sizes) <= tiled.AT_ONCE


def test_torchs_kernels_are_kept_where_tiles_do_not_do_the_same(taken):
    q, k, v = (x.float() for x in made(2, 2, 600, 600))
    span = parse_span("window:100")
    attend(q, k, v, span, dropout=0.1)
    attend(q, k, v, span, softcap=30.0)
    attend(q.half(), k.half(), v.half(), span)
    attend(q[:, :, -200:], k, v, span)
    assert not taken
    attend(q, k, v, span)
    assert taken


@pytest.mark.parametrize("mixed", [False, True])
def test_autocast_computes_in_its_type_as_torchs_kernel_does(mixed, taken, monkeypatch):
    monkeypatch.setattr(tiled, "has_bf16", lambda: True)
    q, k, v = (x.detach().float().requires_grad_() for x in made(4, 2, 600, 600))
    span = parse_span("window:100:sinks=2")
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, v.bfloat16() if mixed else v, span)
        out.float().square().sum().backward()
    assert taken
    assert out.dtype == torch.bfloat16
    assert q.grad.dtype == k.grad.dtype == v.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), reference(q, k, v, span), rtol=0, atol=0.05)


def test_tensors_of_other_kinds_go_to_torchs_kernels(taken):
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 2, 600, 16) for _ in range(3))
        assert attend(q, k, v, parse_span("window:100")).shape == q.shape
    assert not taken


def test_tiles_hold_no_more_than_the_borders_of_their_masks():
    q, k, v = made(1, 1, 8192, 8192, torch.float32, batch=1)
    tiles = attend(q, k, v, parse_span("window:2048")).grad_fn.tiles
    held = sum(hides.untyped_storage().nbytes() for tile in tiles for _, _, hides in tile.hidden)
    assert held < 16 * 2 * 128 * 128 * 4 * 2


def test_wide_spans_are_left_to_torchs_kernel(taken):
    attend(*made(1, 1, 4096, 4096, torch.float32, batch=1), parse_span("window:3000"))
    assert not taken
