"""torch's flash attention for sequences of several lengths, which CUDA takes, against the dense reference.

On the CPU its function is played by one written out as its documentation says; tests marked gpu run the real one.
"""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from masformer.attention import Segments, attend, varlen
from masformer.attention.reference import reference, visible
from masformer.attention.softmax import Softmax
from masformer.spans import Full, Window, parse_span

from .cases import rms

SPANS = ["block:64", "block:100", "window:1", "window:50", "window:5000", "full"]

# Rows of left padding, lengths of documents, right padding: all of 300 tokens.
BATCHES = {
    "one document": [(0, [300], 0)],
    "two alike": [(0, [300], 0), (0, [300], 0)],
    "packed": [(0, [64, 1, 130, 105], 0)],
    "packed in two ways": [(0, [128, 172], 0), (0, [7, 200, 93], 0)],
    "padded": [(37, [263], 0), (0, [300], 0), (0, [201], 99)],
    "packed and padded": [(10, [70, 150], 70), (0, [299], 1)],
    "a row of padding": [(300, [], 0), (0, [100, 200], 0)],
}


def emulated(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """`torch.nn.attention.varlen.varlen_attn`, one sequence after another."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    groups = query.shape[1] // key.shape[1]
    assert groups == 1 or enable_gqa
    outs = []
    borders = zip(itertools.pairwise(cu_seq_q.tolist()), itertools.pairwise(cu_seq_k.tolist()), strict=True)
    for (low, high), (key_low, key_high) in borders:
        assert 0 < high - low <= max_q
        assert 0 < key_high - key_low <= max_k
        q = query[low:high].transpose(0, 1)
        k, v = (x[key_low:key_high].transpose(0, 1).repeat_interleave(groups, 0) for x in (key, value))
        # Position of each query counted so that the last one stands beside the last key.
        back = (
            torch.arange(high - low)[:, None] + (key_high - key_low) - (high - low) - torch.arange(key_high - key_low)
        )
        left, right = (float("inf") if size < 0 else size for size in window_size)
        scores = (q @ k.transpose(1, 2)) * (query.shape[2] ** -0.5 if scale is None else scale)
        scores = scores.masked_fill((back > left) | (-back > right), float("-inf"))
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outs)


@pytest.fixture
def taken(monkeypatch):
    """The emulation in the place of the kernel, for tensors of any dtype on the CPU; the settings of its calls."""
    calls = []

    def noted(*given, **settings):
        calls.append(settings)
        return emulated(*given, **settings)

    monkeypatch.setattr(varlen, "kernel", lambda: (noted, frozenset(inspect.signature(emulated).parameters)))
    monkeypatch.setattr(varlen, "_is_fast", lambda *given: True)
    varlen.sequences.cache_clear()
    return calls


def where(batch) -> tuple[Tensor, Tensor]:
    """Document (-1 for padding) and position of every token, `[batch, tokens]`."""
    documents = [[-1] * a + [i for i, n in enumerate(ns) for _ in range(n)] + [-1] * b for a, ns, b in batch]
    positions = [[0] * a + [p for n in ns for p in range(n)] + [0] * b for a, ns, b in batch]
    return torch.tensor(documents), torch.tensor(positions)


def made(batch, heads=4, kv_heads=2, dtype=torch.float64, dim=16, device="cpu"):
    """q, k and v as a layer hands them on, the documents of their tokens, and the same as a model tells them."""
    documents, positions = where(batch)
    rows, tokens = documents.shape
    torch.manual_seed(tokens)
    given = [
        torch.randn(rows, tokens, h, dim, dtype=torch.float64).to(device, dtype).transpose(1, 2).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]
    found = Segments.of(rows, tokens, attention_mask=(documents >= 0).long(), position_ids=positions)
    return given, {"documents": documents.to(device), "positions": positions.to(device)}, found


def with_gradients(out: Tensor, given: list[Tensor], up: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, given, up)]


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("span", SPANS)
def test_output_and_gradients_are_the_references(span, batch, taken):
    span, (given, documents, segments) = parse_span(span), made(batch)
    expected = reference(*given, span, **documents)
    up = torch.randn_like(expected)
    got = with_gradients(attend(*given, span, segments=segments), given, up)
    for ours, right in zip(got, with_gradients(expected, given, up), strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-11)
    everything = segments.pieces is None and span.start(299) == 0
    assert len(taken) == (0 if everything else 1)  # where all is seen, the parent's call is made


def test_scale_and_heads_are_handed_on(taken):
    for kv_heads, shared in ((4, None), (1, True)):
        given, documents, segments = made(BATCHES["packed"], kv_heads=kv_heads)
        out = attend(*given, Window(9), scale=0.3, segments=segments)
        torch.testing.assert_close(out, reference(*given, Window(9), scale=0.3, **documents), rtol=0, atol=1e-12)
        assert taken.pop() == {"scale": 0.3, "window_size": (8, 0)} | ({"enable_gqa": True} if shared else {})


def test_a_torch_that_shares_heads_unasked_is_not_asked(taken, monkeypatch):
    monkeypatch.setattr(varlen, "kernel", lambda: (lambda q, k, v, *edges, **settings: taken.append(settings) or q, ()))
    given, _, segments = made(BATCHES["packed"])
    attend(*given, Full(), segments=segments)
    assert taken == [{"scale": None, "window_size": (-1, 0)}]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("span", SPANS)
def test_padding_poisons_nothing(span, value, taken):
    span, (given, documents, segments) = parse_span(span), made(BATCHES["packed and padded"])
    padding = (documents["documents"] < 0)[:, None, :, None]
    spoilt = [x.detach().masked_fill(padding, value).requires_grad_() for x in given]
    expected = attend(*given, span, segments=segments)
    up = torch.randn_like(expected)
    right = with_gradients(expected, given, up)
    got = with_gradients(attend(*spoilt, span, segments=segments), spoilt, up.masked_fill(padding, value))
    assert all(map(torch.equal, got, right))
    assert not any(bool(x.masked_select(padding).any()) for x in got)
    assert len(taken) == 2


def test_no_copy_is_made_of_what_a_layer_hands_on(taken):
    (q, _, _), _, segments = made(BATCHES["packed in two ways"])
    found = varlen.sequences(64, segments, 2, q.device)
    packed = found.pack(q)
    assert packed.data_ptr() == q.data_ptr()
    assert found.unpack(packed, 2, 300).data_ptr() == q.data_ptr()
    assert found.pack(q.transpose(2, 3).contiguous().transpose(2, 3)).stride(2) == 1


def test_documents_are_cut_into_blocks_once_for_all_layers(taken):
    given, _, segments = made(BATCHES["packed in two ways"])
    for span in ("block:100", "window:50", "full", "block:100"):
        attend(*given, parse_span(span), segments=segments)
    assert varlen.sequences.cache_info().misses == 2
    found = varlen.sequences(100, segments, 2, torch.device("cpu"))
    assert found.edges.tolist() == [0, 100, 128, 228, 300, 307, 407, 507, 600]
    assert (found.longest, found.real) == (100, None)


def test_training_after_inference_of_the_same_documents(taken):
    given, _, segments = made(BATCHES["packed and padded"])
    with torch.inference_mode():
        attend(*given, Full(), segments=segments)
    torch.autograd.grad(attend(*given, Full(), segments=segments).sum(), given)
    assert varlen.sequences.cache_info().misses == 1


def takes(given, span="block:64", segments=None, **softmax):
    segments = segments or Segments(0, given[0].shape[2])
    return varlen.takes(*given, parse_span(span), segments, Softmax(**softmax))


def test_what_is_taken(taken):
    given, _, packed = made(BATCHES["packed"])
    alone = [x.detach() for x in given]
    assert all(takes(alone, span) for span in ("block:64", "block:299", "window:1", "window:299"))
    assert not any(takes(alone, span) for span in ("full", "block:300", "window:300", "block:63"))
    assert not any(takes(alone, span) for span in ("block:64:sinks=1", "block:64:lookback=1", "window:9:sinks=1"))
    assert takes(alone, "full", packed)
    assert takes(alone, "block:300", packed)
    assert not takes(alone, segments=Segments(1, 299))
    assert not takes(alone, "full", made([(300, [], 0)])[2])  # padding alone
    assert not takes(alone, dropout=0.1)
    assert not takes(alone, softcap=30.0)
    assert not takes(alone, sink_logits=torch.zeros(4))
    assert not takes(alone, eager=True)


def test_no_more_sequences_than_the_kernels_grid_has(taken, monkeypatch):
    given = made(BATCHES["two alike"])[0]
    assert takes(given)
    monkeypatch.setattr(varlen, "MOST_SEQUENCES", 9)  # five blocks in each of two rows
    assert not takes(given)


@pytest.fixture
def anywhere(monkeypatch):
    """The kernel is here, whatever the device."""
    monkeypatch.setattr(varlen, "_has_kernel", lambda device: True)


def tensors(dtype=torch.bfloat16, dim=16, value_dim=None):
    return [torch.zeros(1, 2, 300, d, dtype=dtype) for d in (dim, dim, value_dim or dim)]


@pytest.mark.usefixtures("anywhere")
def test_tensors_that_are_taken():
    assert takes(tensors())
    assert takes(tensors(torch.float16, dim=256))
    assert not takes(tensors(torch.float32))
    assert not takes(tensors(torch.float64))
    assert not takes(tensors(dim=12))
    assert not takes(tensors(dim=264))
    assert not takes(tensors(value_dim=32))
    q, k, v = tensors()
    assert not takes([q, k, v.half()])
    assert not takes([q, k, torch.nn.Parameter(v)])
    with FakeTensorMode():
        assert not takes(tensors())


@pytest.mark.usefixtures("anywhere")
def test_not_while_compiling(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not takes(tensors())


@pytest.mark.usefixtures("anywhere")
def test_autocast_decides_the_type(monkeypatch):
    kinds = []
    monkeypatch.setattr(
        varlen, "kernel", lambda: (lambda q, k, v, *edges, **how: kinds.append({q.dtype, v.dtype}) or q, ())
    )
    q, k, v = (x.requires_grad_() for x in tensors(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        assert takes([q, k, v.half()])
        assert not takes(tensors(torch.float64))
        attend(q, k, v.half(), parse_span("block:64")).float().sum().backward()
    assert kinds == [{torch.bfloat16}]
    assert q.grad.dtype == torch.float32


def test_not_on_the_cpu():
    assert not takes(tensors())


def test_torch_takes_what_is_handed_to_it():
    compute, known = varlen.kernel()
    assert {"scale", "window_size"} <= known
    ours = [name for name in inspect.signature(emulated).parameters if name in known]
    assert [name for name in inspect.signature(compute).parameters if name in ours] == ours


def dense(q, k, v, span, documents, positions):
    """torch's attention under a mask over all pairs, in the dtype of what is given."""
    real = documents >= 0
    mask = visible(span, positions, positions) & (documents[:, :, None] == documents[:, None, :])
    mask |= torch.eye(documents.shape[1], dtype=torch.bool, device=q.device)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    return out.masked_fill(~real[:, None, :, None], 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("span", SPANS)
def test_the_kernel_is_as_near_to_the_truth_as_dense_attention_in_its_type(span, batch, dim, dtype):
    span, (half, documents, segments) = parse_span(span), made(batch, dtype=dtype, dim=dim, device="cuda")
    up = torch.randn(half[0].shape, dtype=dtype, device="cuda")
    exact = [x.detach().double().requires_grad_() for x in half]
    truth = with_gradients(reference(*exact, span, **documents), exact, up.double())
    other = with_gradients(dense(*half, span, **documents), half, up)
    assert takes(half, str(span), segments) == (segments.pieces is not None or span.start(299) > 0)
    got = with_gradients(attend(*half, span, segments=segments), half, up)
    for name, ours, theirs, right in zip(("out", "dq", "dk", "dv"), got, other, truth, strict=True):
        error, plain = rms(ours, right), rms(theirs, right)
        assert error <= 2 * plain + 1e-3, f"{name}: {error:.3e}, dense {plain:.3e}"


@pytest.mark.gpu
def test_the_kernel_never_reads_padding():
    half, documents, segments = made(BATCHES["packed and padded"], dtype=torch.bfloat16, dim=64, device="cuda")
    padding = (documents["documents"] < 0)[:, None, :, None]
    spoilt = [x.detach().masked_fill(padding, float("nan")).requires_grad_() for x in half]
    for span in map(parse_span, SPANS):
        out = attend(*spoilt, span, segments=segments)
        assert all(bool(x.isfinite().all()) for x in with_gradients(out, spoilt, torch.ones_like(out)))
