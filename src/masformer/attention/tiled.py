"""Local attention on the CPU: products of tiles that stay in the processor's cache, with a backward pass of its own.

A tile is ROWS queries of a chunk and the keys that any of them sees, so little more is multiplied than is seen; the
same tile of many chunks is one batched product. Keys are read where they lie, by strides: nothing is copied but the
sinks that stand in front. The softmax and its gradient are torch's fused ones; the backward pass makes the scores anew,
so that nothing is kept but queries, keys and values, and adds up the gradients of keys in float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROWS = 128
"""Queries of a tile: fewer make products too small, more multiply more that nobody sees (docs/performance.md)."""
MOST_SIZE = 2048
"""Of a block or window: torch's kernel is better at wider ones, which are nearly full attention."""
AT_ONCE = 2**20
"""Scores that exist at once, of a few chunks: they have to stay in the processor's cache."""


class Tile(NamedTuple):
    """The same place in each of `chunks` equal chunks.

    query, key: index of the first chunk's first query and key; those of the next chunk are `step` further on.
    rows, keys: how many of either a tile has, sinks apart.
    sinks: how many first keys of all stand in front.
    hidden: columns that not all rows see, and what hides them: `[rows, columns]` of 0 and minus infinity.
    """

    query: int
    key: int
    chunks: int
    step: int
    rows: int
    keys: int
    sinks: int
    hidden: tuple[tuple[int, int, Tensor], ...]


def hidden(mask: Tensor, dtype: torch.dtype) -> tuple[tuple[int, int, Tensor], ...]:
    """The columns of a mask `[rows, keys]` that hide something, run by run, as a `Tile` has them."""
    columns = (~mask.all(0)).nonzero()[:, 0].tolist()
    runs: list[list[int]] = []
    for column in columns:
        if runs and runs[-1][1] == column:
            runs[-1][1] += 1
        else:
            runs.append([column, column + 1])

    def hides(low: int, high: int) -> Tensor:
        return torch.zeros(len(mask), high - low, dtype=dtype).masked_fill_(~mask[:, low:high], -torch.inf)

    return tuple((low, high, hides(low, high)) for low, high in runs)


def is_fast(q: Tensor) -> bool:
    """Whether this processor multiplies such tensors in batches at speed."""
    if q.device.type != "cpu" or type(q) is not Tensor or torch.compiler.is_compiling():
        return False  # other kinds of tensors, as fake or distributed ones, have no strides to read by
    dtype = computed_in(q)
    return dtype in (torch.float32, torch.float64) or (dtype == torch.bfloat16 and has_bf16())


def computed_in(x: Tensor) -> torch.dtype:
    """Autocast has torch's own kernel compute in its type; float64 it leaves alone."""
    casts = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if casts else x.dtype


def has_bf16() -> bool:
    """Whether the processor has instructions for products of bfloat16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def tiled(q: Tensor, k: Tensor, v: Tensor, tiles: tuple[Tile, ...], scale: float) -> Tensor:
    """Attention in tiles, `[batch, heads, queries, value dim]`.

    Args:
        q: `[batch, heads, queries, dim]`; k, v: `[batch, kv_heads, keys, dim]`.
        tiles: every query once.
        scale: factor of the scores.
    """
    q, k, v = (x.to(computed_in(x)) for x in (q, k, v))
    with torch.autocast("cpu", enabled=False):
        out: Tensor = Tiled.apply(q, k, v, tiles, scale)
    return out


class Tiled(torch.autograd.Function):
    """`tiled` with its gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: tuple[Tile, ...], scale: float) -> Tensor:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        batch, heads, queries, _ = q.shape
        out = q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)
        for piece in _pieces(q, k, v, tiles, scale, scratch := Scratch(q.dtype)):
            rows = scratch("out", piece.chunks, piece.tile.rows, v.shape[3])
            _rows(out[piece.at], piece).copy_(torch.bmm(piece.weights(scratch), piece.v, out=rows))
        ctx.save_for_backward(q, k, v)
        ctx.tiles, ctx.scale = tiles, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        with torch.autocast("cpu", enabled=False):
            return Tiled.gradients(ctx, grad if grad.stride(-1) == 1 else grad.contiguous())

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v = ctx.saved_tensors
        dq = torch.empty_like(q)
        sums = torch.promote_types(q.dtype, torch.float32)
        dk, dv = (torch.zeros(x.shape, dtype=sums) for x in (k, v))
        for piece in _pieces(q, k, v, ctx.tiles, ctx.scale, scratch := Scratch(q.dtype)):
            weights, up = piece.weights(scratch), _rows(grad[piece.at], piece)
            _add(dv[piece.of], weights, up, piece, scratch)
            down = torch.bmm(up, piece.v.transpose(1, 2), out=scratch("up", *weights.shape))
            down = torch._softmax_backward_data(down, weights, -1, q.dtype, grad_input=scratch("down", *weights.shape))
            rows = torch.bmm(down, piece.k, out=scratch("out", *piece.q.shape))
            torch.mul(rows, ctx.scale, out=_rows(dq[piece.at], piece))
            _add(dk[piece.of], down, piece.q, piece, scratch)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


class Scratch:
    """Tensors by their name whose memory is used again for every piece: fresh memory costs more than a product."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.held: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self.held or self.held[name].numel() < size:
            self.held[name] = torch.empty(size, dtype=self.dtype)
        return self.held[name][:size].view(shape)


class Piece(NamedTuple):
    """A tile of as many chunks as fit at once, of one head.

    at: row of the batch and head. of: row of the batch and key head.
    first: which chunk is the first. chunks: how many.
    q: `[chunks, rows, dim]`, times the scale. k, v: `[chunks, sinks + keys, dim]`.
    """

    tile: Tile
    at: tuple[int, int]
    of: tuple[int, int]
    first: int
    chunks: int
    q: Tensor
    k: Tensor
    v: Tensor

    def weights(self, scratch: Scratch) -> Tensor:
        """`[chunks, rows, sinks + keys]`."""
        shape = self.chunks, self.tile.rows, self.k.shape[1]
        scores = torch.bmm(self.q, self.k.transpose(1, 2), out=scratch("scores", *shape))
        for low, high, hides in self.tile.hidden:
            scores[:, :, low + self.tile.sinks : high + self.tile.sinks] += hides
        return torch.softmax(scores, -1, out=scores)


def _pieces(
    q: Tensor, k: Tensor, v: Tensor, tiles: tuple[Tile, ...], scale: float, scratch: Scratch
) -> Iterator[Piece]:
    """Every tile of every head, a few chunks at a time; what the last one had is gone when the next one comes."""
    groups = q.shape[1] // k.shape[1]
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            at, of = (row, head), (row, head // groups)
            for tile in tiles:
                most = max(1, AT_ONCE // (tile.rows * (tile.sinks + tile.keys)))
                for first in range(0, tile.chunks, most):
                    piece = Piece(tile, at, of, first, min(most, tile.chunks - first), q, k, v)
                    rows = _rows(q[at], piece)
                    scaled = torch.mul(rows, scale, out=scratch("q", *rows.shape))
                    yield piece._replace(q=scaled, k=_keys(k[of], piece), v=_keys(v[of], piece))


def _view(x: Tensor, low: int, piece: Piece, length: int) -> Tensor:
    """`[chunks, length, ...]` of `[tokens, ...]`: what lies at `low` for the first chunk of all, as a view."""
    step = piece.tile.step * x.stride(0)
    offset = x.storage_offset() + low * x.stride(0) + piece.first * step
    return x.as_strided((piece.chunks, length, *x.shape[1:]), (step, *x.stride()), offset)


def _rows(x: Tensor, piece: Piece) -> Tensor:
    return _view(x, piece.tile.query, piece, piece.tile.rows)


def _keys(x: Tensor, piece: Piece) -> Tensor:
    seen = _view(x, piece.tile.key, piece, piece.tile.keys)
    if not piece.tile.sinks:
        return seen
    return torch.cat([x[: piece.tile.sinks].expand(piece.chunks, -1, -1), seen], 1)


def _add(total: Tensor, weights: Tensor, rows: Tensor, piece: Piece, scratch: Scratch) -> None:
    """Add `weights^T rows` of every chunk into `[keys of all, dim]`, where chunks overlap."""
    tile, step = piece.tile, piece.tile.step
    grad = torch.bmm(weights.transpose(1, 2), rows, out=scratch("keys", piece.chunks, weights.shape[2], rows.shape[2]))
    if tile.sinks:
        total[: tile.sinks] += grad[:, : tile.sinks].sum(0, dtype=total.dtype)
        grad = grad[:, tile.sinks :]
    if piece.chunks == 1:
        total[tile.key + piece.first * step :][: tile.keys] += grad[0]
        return
    for low in range(0, tile.keys, step):  # pieces of a step at one offset do not overlap
        length = min(step, tile.keys - low)
        _view(total, tile.key + low, piece, length).add_(grad[:, low : low + length])
