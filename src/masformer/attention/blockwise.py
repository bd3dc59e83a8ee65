"""Local attention on `scaled_dot_product_attention`, by folding time into blocks.

The queries are cut into chunks of c tokens; every chunk meets only the keys from L before its start to its
own end, and the sinks. Chunks are folded into the batch, so one call computes them all with one mask of
c x (sinks + L + c), and no tensor grows with length x length. What does not fit the pattern, the first
chunks (whose keys would start before the document, or among the sinks) and the last, partial one, is
computed apart, densely over the few keys that it sees.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spans import Block, Span, Window
from .reference import visible
from .softmax import Softmax
from .tiled import MOST_SIZE, ROWS, Tile, hidden, is_fast, tiled

LEAST_CHUNK = 64
"""Chunks are not shorter than this: tiny spans would make too many tiny products."""
MOST_CHUNK = 512
"""Queries under one mask are not more than this: the mask of a wide span stays small beside its keys."""

FEW_TOKENS = 256
"""Up to so many tokens with no more than one whole chunk among them go in one call: three would be slower."""


def chunk_and_reach(span: Span) -> tuple[int, int]:
    """Chunk length c and reach L of a local span: a chunk that starts at x sees no key before x - L.

    Chunks of a Block start at multiples of its size, so that each has the same mask.
    """
    if isinstance(span, Block):
        return span.size * max(1, LEAST_CHUNK // span.size), span.lookback * span.size
    assert isinstance(span, Window)
    return min(max(span.size, LEAST_CHUNK), MOST_CHUNK), span.size - 1


class Part(NamedTuple):
    """Queries at positions low to high - 1 in `chunks` equal chunks, and the keys that the first chunk meets.

    The first chunk's keys begin at position `begin`, index `key_low`; the last chunk's end before `key_high`.
    Later chunks meet the same number of keys, as much further on. `sinks`: whether the sinks stand in front.
    """

    low: int
    high: int
    chunks: int
    begin: int
    key_low: int
    key_high: int
    sinks: bool

    @property
    def width(self) -> int:
        """Queries in a chunk."""
        return (self.high - self.low) // self.chunks

    @property
    def keys(self) -> int:
        """Keys that a chunk meets, sinks apart."""
        return self.key_high - self.key_low - (self.chunks - 1) * self.width


class Take(torch.autograd.Function):
    """Cut keys (or values) into what each part meets; parts overlap.

    Written out so that the gradients of the overlaps are added up in float32 at least: autograd would round
    every partial sum to bfloat16. `[batch, heads, keys, dim]` to one `[batch * chunks, heads, keys', dim]` a part.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sinks: int, parts: tuple[Part, ...]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.dtype, ctx.sinks, ctx.parts = x.shape, x.dtype, sinks, parts
        return tuple(_take(x, sinks if part.sinks else 0, part) for part in parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        batch, heads, keys, dim = ctx.shape
        room = max(part.width for part in ctx.parts)  # the last, partial step of `_give_back` may look past the end
        total = grads[0].new_zeros(batch, heads, keys + room, dim, dtype=torch.promote_types(ctx.dtype, torch.float32))
        for part, grad in zip(ctx.parts, grads, strict=True):
            _give_back(total, grad.unflatten(0, (batch, part.chunks)), ctx.sinks if part.sinks else 0, part)
        return total[:, :, :keys].to(ctx.dtype), None, None


def _take(x: Tensor, sinks: int, part: Part) -> Tensor:
    run = x[:, :, part.key_low : part.key_high]
    # A run that is one chunk stays a view; so do chunks of a single row.
    folded = run.unfold(2, part.keys, part.width) if part.chunks > 1 else run.transpose(2, 3)[:, :, None]
    folded = folded.permute(0, 2, 1, 4, 3)
    if sinks:
        first = x[:, None, :, :sinks].expand(-1, part.chunks, -1, -1, -1)
        folded = torch.cat([first, folded], dim=3)
    return folded.flatten(0, 1)


def _give_back(total: Tensor, grad: Tensor, sinks: int, part: Part) -> None:
    """Add the gradient `[batch, chunks, heads, sinks + keys, dim]` of one part into `[batch, heads, keys, dim]`."""
    if sinks:
        total[:, :, :sinks] += grad[:, :, :, :sinks].sum(1, dtype=total.dtype)
        grad = grad[:, :, :, sinks:]
    if part.chunks == 1:
        total[:, :, part.key_low : part.key_high] += grad[:, 0]
        return
    # Windows overlap, but pieces of a chunk's width at one offset do not.
    for offset in range(0, part.keys, part.width):
        piece = grad[:, :, :, offset : offset + part.width].transpose(1, 2)
        low = part.key_low + offset
        target = total[:, :, low : low + part.chunks * part.width].unflatten(2, (part.chunks, part.width))
        target[:, :, :, : piece.shape[3]] += piece


@dataclasses.dataclass(frozen=True)
class Document:
    """Consecutive tokens of one document, the same in every row of the batch.

    Shapes: q `[batch, heads, queries, dim]`, k and v `[batch, kv_heads, keys, dim]`. The queries stand at
    positions `start` and up and are the last of the keys; the keys stand at positions `first` and up, after
    the sinks (positions 0 to sinks - 1) where first > 0.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    span: Span
    start: int
    first: int
    softmax: Softmax

    @property
    def end(self) -> int:
        return self.start + self.q.shape[2]

    def attend(self) -> Tensor:
        """`[batch, heads, queries, value dim]`."""
        everything = self.span.start(self.end - 1) <= self.span.sinks
        if everything and self._at_once(self.q.shape[2]):
            return self._everything()
        in_tiles = self._in_tiles()
        parts = self._runs(self.start, self.end) if everything else self._parts(in_tiles)
        if in_tiles:
            tiles = tuple(tile for part in parts for tile in self._tiles(part))
            return tiled(self.q, self.k, self.v, tiles, self.softmax.factor(self.q))
        keys = Take.apply(self.k, self.span.sinks, parts)
        values = Take.apply(self.v, self.span.sinks, parts)
        outs = [self._part(part, k, v) for part, k, v in zip(parts, keys, values, strict=True)]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)

    def _at_once(self, queries: int) -> bool:
        """Whether so many queries may meet all their keys in one call that needs no mask: torch's kernels tile it."""
        return queries <= MOST_CHUNK or not self.softmax.written_out

    def _everything(self) -> Tensor:
        """Every query sees all keys before it: the call that an unconverted model makes, bit for bit."""
        queries, mask = self.q.shape[2], None
        if self.start and queries > 1:
            device = self.q.device
            mask = visible(
                self.span, torch.arange(self.start, self.end, device=device), torch.arange(self.end, device=device)
            )
        causal = mask is None and queries > 1
        return self.softmax.attend(self.q, self.k, self.v, mask=mask, causal=causal)

    def _parts(self, in_tiles: bool) -> tuple[Part, ...]:
        """The queries in order: those before the first whole chunk, the whole chunks, the rest."""
        chunk, reach = chunk_and_reach(self.span)
        if in_tiles and isinstance(self.span, Window):
            chunk = ROWS  # the keys of neighbouring tiles lie together
        body = min(self.end, self._body_start(chunk, reach))
        chunks = (self.end - body) // chunk
        if chunks <= 1 and self.end - self.start <= FEW_TOKENS:
            return (self._run(self.start, self.end),)
        if chunk > MOST_CHUNK and (
            reach or self.span.sinks or self.softmax.written_out
        ):  # one chunk alone is enough work, its mask too large
            return self._runs(self.start, self.end)
        tail = body + chunks * chunk
        folded = (self._chunks(body, chunks, chunk, reach),) if chunks else ()
        return (*self._runs(self.start, body), *folded, *self._runs(tail, self.end))

    def _body_start(self, chunk: int, reach: int) -> int:
        """The first query from which whole chunks see `reach` keys that are held and are not sinks."""
        least = max(self.start, self.first + reach, self.span.sinks + reach)
        return -(-least // chunk) * chunk if isinstance(self.span, Block) else least

    def _index(self, position: int) -> int:
        """Where the key of a position stands, beside the sinks in front."""
        return position - self.first + (self.span.sinks if self.first else 0)

    def _run(self, low: int, high: int) -> Part:
        """Queries low to high - 1 together, over exactly the keys that some of them see."""
        begin = self.span.start(low)
        begin = begin if begin > self.span.sinks else 0
        return Part(low, high, 1, begin, self._index(begin), self._index(high), bool(begin and self.span.sinks))

    def _runs(self, low: int, high: int) -> tuple[Part, ...]:
        """Queries low to high - 1: as one run where that needs no mask, else in runs that keep it small."""
        if low >= high:
            return ()
        if self._at_once(high - low) and self._is_causal(run := self._run(low, high)):
            return (run,)
        edges = [*range(low, high, MOST_CHUNK), high]
        return tuple(self._run(*edge) for edge in itertools.pairwise(edges))

    def _is_causal(self, part: Part) -> bool:
        """Whether each query of the part sees all of its keys up to its own, and the part has no others."""
        start = self.span.start(part.low + part.width - 1)
        return not part.sinks and part.begin == part.low and start <= (part.begin or self.span.sinks)

    def _chunks(self, low: int, chunks: int, chunk: int, reach: int) -> Part:
        """`chunks` whole chunks from query low on, each with `reach` keys before it."""
        high = low + chunks * chunk
        return Part(low, high, chunks, low - reach, self._index(low - reach), self._index(high), bool(self.span.sinks))

    def _part(self, part: Part, k: Tensor, v: Tensor) -> Tensor:
        batch, width = self.q.shape[0], part.width
        q = self.q[:, :, part.low - self.start : part.high - self.start]
        q = q.unflatten(2, (part.chunks, width)).transpose(1, 2).flatten(0, 1)
        if self._is_causal(part) or width == part.chunks == 1:  # a single query sees all the keys that were taken
            out = self.softmax.attend(q, k, v, causal=width > 1)
        else:
            out = self.softmax.attend_grouped(q, k, v, mask=self._mask(part, k.shape[2]))
        return out.unflatten(0, (batch, part.chunks)).transpose(1, 2).flatten(2, 3)

    def _in_tiles(self) -> bool:
        """Whether tiles do it faster than torch's kernel."""
        local = isinstance(self.span, Block | Window) and self.span.size <= MOST_SIZE
        return (
            local
            and self.q.shape[2] > FEW_TOKENS
            and not self.softmax.dropout
            and not self.softmax.written_out
            and is_fast(self.q)
        )

    def _tiles(self, part: Part) -> Iterator[Tile]:
        """A part's chunks cut into tiles, each with the keys that any of its queries sees."""
        sinks = self.span.sinks if part.sinks else 0
        among = part.begin < self.span.sinks and not sinks  # sinks stand among the keys
        for low in range(part.low, part.low + part.width, ROWS):
            high = min(low + ROWS, part.low + part.width)
            begin = part.begin if among else max(part.begin, self.span.unclamped_start(low))
            rows, keys = torch.arange(low, high), torch.arange(begin, high)
            yield Tile(
                query=low - self.start,
                key=part.key_low + begin - part.begin,
                chunks=part.chunks,
                step=part.width,
                rows=len(rows),
                keys=len(keys),
                sinks=sinks,
                hidden=hidden(visible(self.span, rows, keys), self.q.dtype),
            )

    def _mask(self, part: Part, keys: int) -> Tensor:
        """`[width, keys]`: which keys each query of a chunk sees; the same for all chunks of the part."""
        device = self.q.device
        sinks = self.span.sinks if part.sinks else 0
        positions = torch.arange(part.begin, part.begin + keys - sinks, device=device)
        mask = visible(self.span, torch.arange(part.low, part.low + part.width, device=device), positions)
        return F.pad(mask, (sinks, 0), value=True)
