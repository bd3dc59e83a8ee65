"""`attend`: attention of new tokens over a span, whatever the batch looks like; exact, or refused."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..spans import Span
from . import varlen
from .blockwise import Document
from .segments import Piece, Segments, UnsupportedSpan
from .softmax import Softmax

FEW_QUERIES = 16
"""Up to so many new tokens per row, rows that differ are computed together under a mask (decoding)."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Span,
    *,
    scale: float | None = None,
    segments: Segments | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    eager: bool = False,
) -> Tensor:
    """Causal attention of the new tokens over `span`, in cost proportional to what the span shows.

    Args:
        q: `[batch, heads, queries, dim]`.
        k, v: `[batch, kv_heads, keys, dim]`, kv_heads dividing heads: all tokens so far, the queries' own last
            (behind them only where `segments` says that the queries stand earlier); or, where a bounded cache
            dropped some, the span's sinks followed by a run that ends with the queries.
        scale: factor of the scores, default dim ** -0.5.
        segments: documents and padding (`Segments.of`); default one document per row that ends with the queries.
        dropout: probability with which attention weights are dropped.
        softcap, sink_logits, eager: see `Softmax`; any of these leaves torch's kernels for a softmax written out.

    Returns:
        `[batch, heads, queries, value dim]`, zero where the query is padding.

    Raises:
        UnsupportedSpan: shapes or documents that do not fit, keys that the span needs and the cache has dropped.
    """
    _check_shapes(q, k, v)
    softmax = Softmax(scale, dropout, softcap, sink_logits, eager)
    segments = segments or Segments(seen=k.shape[2] - q.shape[2], new=q.shape[2])
    first = _first_held(q, k, span, segments)
    if first == 0:  # keys behind the last query are no token's: unused places of a preallocated buffer
        k, v = k[:, :, : segments.seen + segments.new], v[:, :, : segments.seen + segments.new]
    if varlen.takes(q, k, v, span, segments, softmax):
        return varlen.attend(q, k, v, span, segments, scale)
    if segments.pieces is None:
        _check_held(span, segments.seen, first)
        return Document(q, k, v, span, segments.seen, first, softmax).attend()
    for piece in segments.pieces:
        _check_held(span, piece.first - piece.begin, first - piece.begin)
    batch = _Batch(q, k, v, span, segments, segments.pieces, first, softmax)
    rows = [piece.row for piece in segments.pieces]
    few = segments.new <= FEW_QUERIES and len(rows) == len(set(rows))
    return batch.together() if few else batch.apart()


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    four = q.ndim == k.ndim == v.ndim == 4
    if not four or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise UnsupportedSpan(f"shapes do not fit: {shapes}; expected [batch, heads, tokens, dim]")
    if q.shape[1] % k.shape[1]:
        raise UnsupportedSpan(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if q.shape[2] < 1:
        raise UnsupportedSpan("attention needs at least one query")
    if q.shape[2] > k.shape[2]:
        raise UnsupportedSpan(f"{q.shape[2]} queries have only {k.shape[2]} keys: every query needs its own key")


def _first_held(q: Tensor, k: Tensor, span: Span, segments: Segments) -> int:
    """First column of the run of keys; the sinks stand before it where this is not 0."""
    queries, keys, total = q.shape[2], k.shape[2], segments.seen + segments.new
    if queries != segments.new or segments.batch_rows not in (None, q.shape[0]):
        raise UnsupportedSpan(
            f"documents were given for {segments.batch_rows or 'any'} rows of {segments.new} new tokens, "
            f"q has {q.shape[0]} rows of {queries}"
        )
    first = total + span.sinks - keys
    if keys >= total:
        return 0
    if first <= span.sinks or keys < span.sinks + queries:
        raise UnsupportedSpan(f"{keys} keys are not {span.sinks} sinks and a run up to token {total} ({span})")
    return first


def _check_held(span: Span, query: int, first: int) -> None:
    """Refuse if the earliest query (a position) sees a key before `first` that is no sink."""
    start = span.start(query)
    needed = start if start > span.sinks else 0
    if needed < first:
        raise UnsupportedSpan(f"{span} needs keys from position {needed}, the cache holds them from {first} on")


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Rows that differ in their documents or padding. `first`: column where the run of keys begins."""

    q: Tensor
    k: Tensor
    v: Tensor
    span: Span
    segments: Segments
    pieces: tuple[Piece, ...]
    first: int
    softmax: Softmax

    @property
    def slots(self) -> int:
        """How many places for sinks stand before the run."""
        return self.span.sinks if self.first else 0

    def together(self) -> Tensor:
        """All rows at once under a mask `[batch, 1, queries, keys]`: for a few queries of one document per row.

        Keys outside the row's document are cleared as well: NaN or infinity there would get through a mask.
        """
        device, seen, new = self.q.device, self.segments.seen, self.segments.new
        begins = self.segments.begins(device)
        real = begins >= 0
        query = torch.arange(seen, seen + new, device=device)
        begins = torch.where(real, begins, query)[:, :, None]
        key_position = torch.arange(self.first, seen + new, device=device) - begins
        position = query[:, None] - begins
        mask = (key_position >= 0) & (key_position <= position)
        mask &= (key_position >= self.span.unclamped_start(position)) | (key_position < self.span.sinks)
        if self.slots:  # a place holds a sink only once the run has dropped it
            dropped = begins + torch.arange(self.slots, device=device) < self.first
            mask = torch.cat([dropped, mask], dim=2)
        unseen = ~mask.any(1)[:, None, :, None]
        k, v = self.k.masked_fill(unseen, 0.0), self.v.masked_fill(unseen, 0.0)
        out = self.softmax.attend(self.q, k, v, mask=mask[:, None])
        return out.masked_fill(~real[:, None, :, None], 0.0)

    def apart(self) -> Tensor:
        """Document by document, so that no value of a neighbour is ever touched."""
        seen, end = self.segments.seen, self.segments.seen + self.segments.new
        parts: list[list[Tensor]] = [[] for _ in range(self.q.shape[0])]
        ends = [seen] * len(parts)

        def pad(row: int, column: int) -> None:
            if column > ends[row]:
                parts[row].append(self.q.new_zeros(1, self.q.shape[1], column - ends[row], self.v.shape[3]))

        for piece in self.pieces:
            pad(piece.row, piece.first)
            parts[piece.row].append(self._document(piece).attend())
            ends[piece.row] = piece.stop
        for row in range(len(parts)):
            pad(row, end)
        return torch.cat([torch.cat(row, dim=2) for row in parts])

    def _document(self, piece: Piece) -> Document:
        """One row's document with its own positions; keys of other documents are cut away."""
        row = slice(piece.row, piece.row + 1)
        dropped = max(0, self.first - piece.begin)  # how many of the document's first keys the run lacks
        shift = self.slots - self.first
        sinks = min(self.slots, dropped)

        def keys(x: Tensor) -> Tensor:
            run = x[row, :, max(self.first, piece.begin) + shift : piece.stop + shift]
            return torch.cat([x[row, :, :sinks], run], dim=2) if sinks else run

        return Document(
            self.q[row, :, piece.first - self.segments.seen : piece.stop - self.segments.seen],
            keys(self.k),
            keys(self.v),
            self.span,
            piece.first - piece.begin,
            dropped if dropped > self.slots else 0,
            self.softmax,
        )
