"""Local attention on CUDA: torch's flash attention for sequences of several lengths, all of a batch in one call.

Blocks see nothing of each other, and neither do documents: each is a sequence of its own to the kernel, which has no
mask and skips what is not seen. A window is the kernel's own. Only for calls that begin their documents, as training
and the first prefill do: afterwards a block's keys are more than its queries.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spans import Block, Full, Span, Window
from .segments import Segments
from .softmax import Softmax
from .tiled import computed_in

LEAST_BLOCK = 64
"""Size of the smallest block: others fill no tile of the kernel, whose backward pass holds 128 rows more for each."""
MOST_SEQUENCES = 65_535
"""In one call: a dimension of the kernel's grid."""
MOST_DIM = 256


class Sequences(NamedTuple):
    """What the kernel takes for sequences: whole documents, or their blocks.

    edges: where each begins among the real tokens of the batch, and their end: int32.
    longest: tokens of the longest.
    real: index of the real tokens in the flattened batch, None where all are.
    """

    edges: Tensor
    longest: int
    real: Tensor | None

    def pack(self, x: Tensor) -> Tensor:
        """`[real tokens, heads, dim]` of `[batch, heads, tokens, dim]`; what a layer makes is seldom copied."""
        x = x.transpose(1, 2).flatten(0, 1)
        if self.real is not None:
            return x.index_select(0, self.real)
        return x if x.stride(2) == 1 else x.contiguous()

    def unpack(self, x: Tensor, batch: int, tokens: int) -> Tensor:
        """The way back, with zeros for padding."""
        if self.real is not None:
            x = x.new_zeros(batch * tokens, *x.shape[1:]).index_copy(0, self.real, x)
        return x.unflatten(0, (batch, tokens)).transpose(1, 2)


def takes(q: Tensor, k: Tensor, v: Tensor, span: Span, segments: Segments, softmax: Softmax) -> bool:
    """Whether `attend` here does what the span asks for, on this device, and better than what is there otherwise.

    Not where one document in a row sees all of itself: that is the parent's call, which stays as it is.
    """
    return (
        _is_fast(q, k, v)
        and not softmax.dropout
        and not softmax.written_out
        and segments.seen == 0
        and (segments.pieces is not None or span.start(segments.new - 1) > 0)
        and _is_plain(span)
        and 0 < len(_lengths(_step(span), segments, q.shape[0])) <= MOST_SEQUENCES
    )


def attend(q: Tensor, k: Tensor, v: Tensor, span: Span, segments: Segments, scale: float | None) -> Tensor:
    """Attention of tokens that begin their documents, `[batch, heads, tokens, dim]`; see `takes`.

    Args:
        q: `[batch, heads, tokens, dim]`; k, v: `[batch, kv_heads, tokens, dim]`, of the same tokens.
        scale: factor of the scores, default dim ** -0.5.
    """
    batch, heads, tokens, _ = q.shape
    found = sequences(_step(span), segments, batch, q.device)
    compute, known = kernel()
    settings: dict[str, Any] = {"scale": scale, "window_size": _window(span)}
    if heads != k.shape[1] and "enable_gqa" in known:
        settings["enable_gqa"] = True
    q, k, v = (found.pack(x.to(computed_in(x))) for x in (q, k, v))
    out: Tensor = compute(q, k, v, found.edges, found.edges, found.longest, found.longest, **settings)
    return found.unpack(out, batch, tokens)


@functools.cache
def kernel() -> tuple[Callable[..., Any], frozenset[str]]:
    """torch's function and the names of what it takes: 2.10 has no windows, and to 2.11 heads share keys unasked.

    Imported late: the compiler comes with it, which takes seconds.
    """
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # training could not save a tensor that was made inside inference_mode
def sequences(step: int | None, segments: Segments, batch: int, device: torch.device) -> Sequences:
    """Documents cut every `step` tokens, or whole; made once for all layers that a forward runs through."""
    lengths = _lengths(step, segments, batch)
    edges = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    real = None
    if sum(lengths) < batch * segments.new:
        rows = [(piece.row * segments.new, piece.first, piece.stop) for piece in segments.pieces or ()]
        real = torch.cat([torch.arange(row + first, row + stop) for row, first, stop in rows]).to(device)
    return Sequences(edges.to(device), max(lengths), real)


@functools.lru_cache(maxsize=16)
def _lengths(step: int | None, segments: Segments, batch: int) -> tuple[int, ...]:
    """Tokens of each sequence: of documents cut every `step` tokens, or of whole ones."""
    whole = [segments.new] * batch if segments.pieces is None else [p.stop - p.first for p in segments.pieces]
    return tuple(min(step or n, n - low) for n in whole for low in range(0, n, step or n))


def _is_plain(span: Span) -> bool:
    """Whether the span is one that the kernel knows."""
    match span:
        case Block():
            return span.size >= LEAST_BLOCK and not span.lookback and not span.sinks
        case Window():
            return not span.sinks
    return isinstance(span, Full)


def _step(span: Span) -> int | None:
    return span.size if isinstance(span, Block) else None


def _window(span: Span) -> tuple[int, int]:
    """How many tokens before and after its own a query sees, -1 for all."""
    return (span.size - 1 if isinstance(span, Window) else -1, 0)


def _is_fast(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel takes such tensors."""
    dim = q.shape[3]
    return (
        not torch.compiler.is_compiling()
        and _has_kernel(q.device)
        and torch.backends.cuda.flash_sdp_enabled()  # torch's own switch, which its `sdpa_kernel` turns, too
        and all(type(x) is Tensor for x in (q, k, v))  # other kinds, as distributed ones, are not the kernel's
        and {computed_in(x) for x in (q, k, v)} in ({torch.float16}, {torch.bfloat16})
        and v.shape[3] == dim <= MOST_DIM
        and dim % 8 == 0
    )


@functools.lru_cache(maxsize=16)
def _has_kernel(device: torch.device) -> bool:
    """Whether this torch has the kernel for this device: NVIDIA's from Ampere on."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and "window_size" in kernel()[1]
    )
