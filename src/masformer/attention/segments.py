"""Which document each token of a batch belongs to.

Columns count tokens of a batch row from 0, padding included, over all calls that share a cache; positions
count from the first token of the document. A row is: left padding, one or more documents, right padding.
Made once per forward from the 2-D padding mask and the position ids, and shared by all layers.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from ..spans import Span


class UnsupportedSpan(ValueError):
    """Something that local attention cannot honour: the message names the value and what is possible."""


class Piece(NamedTuple):
    """A run of new tokens of one document: columns `first` to `stop` (exclusive) of `row`."""

    row: int
    begin: int
    """Column of the document's first token."""
    first: int
    stop: int


class Row(NamedTuple):
    """What later tokens of a row need to know."""

    begin: int
    """Column where the newest document began; the next column where no token has come yet."""
    position: int | None
    """Position id that the next token of this document must have, None before its first token."""
    closed: bool
    """Whether right padding was seen: no real token may follow."""
    low: int
    """Column of the row's first real token, the next column where none has come yet."""


@dataclasses.dataclass(frozen=True)
class Segments:
    """The new tokens of one forward: columns `seen` to `seen + new` of every row, cut into documents."""

    seen: int = 0
    new: int = 0
    pieces: tuple[Piece, ...] | None = None
    """None where every row is a single document that began at column 0, without padding."""
    rows: tuple[Row, ...] | None = None
    """None where `pieces` never were."""
    position: int | None = None
    """As `Row.position`, while `rows` is None."""
    reach: int = dataclasses.field(default=0, compare=False)
    """One more than the largest position id of the new tokens."""

    @classmethod
    def of(
        cls,
        batch: int,
        new: int,
        *,
        previous: Segments | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Segments:
        """Cut `new` tokens per row into documents.

        Args:
            previous: what the call before returned, where a cache holds its tokens.
            attention_mask: `[batch, seen + new]`, 1 where a token is real; all ones is the same as None.
            position_ids: `[batch or 1, new]`; a position 0 that does not continue starts a new document.

        Raises:
            UnsupportedSpan: a mask of another shape or with padding between real tokens, positions that jump.
        """
        seen = previous.seen + previous.new if previous else 0
        mask = _checked_mask(attention_mask, batch, seen + new)
        positions = _checked_positions(position_ids, batch, new)
        if mask is None and (previous is None or previous.rows is None):
            expected = previous.position if previous and seen else None
            start = _single_start(positions, expected, seen)
            if start is not None:
                _refuse_negative(start)
                return cls(seen, new, position=start + new, reach=start + new)
        ranges = None if attention_mask is None else _real_ranges(mask, batch, seen + new)
        return _cut(batch, seen, new, previous, ranges, positions)

    @property
    def batch_rows(self) -> int | None:
        """How many rows the documents were recorded for; None where every row is alike."""
        return None if self.rows is None else len(self.rows)

    def first_needed(self, span: Span) -> int:
        """The first column, beside sinks, that any later token can see: what lies before may be dropped.

        0 while the start is not beyond the sinks: until then the sinks stand among the other keys.
        """
        begins = {0} if self.rows is None else {row.begin for row in self.rows}
        sinks = span.sinks
        starts = {begin: span.start(self.seen + self.new - begin) for begin in begins}
        needed = min(begin + (start if start > sinks else 0) for begin, start in starts.items())
        return needed if needed > sinks else 0

    def begins(self, device: torch.device) -> Tensor:
        """Column where the document of each new token begins, -1 for padding: `[batch, new]`, long."""
        assert self.pieces is not None
        assert self.rows is not None
        begins = torch.full((len(self.rows), self.new), -1, dtype=torch.long)
        for row, begin, first, stop in self.pieces:
            begins[row, first - self.seen : stop - self.seen] = begin
        return begins.to(device)

    def select(self, indices: list[int]) -> Segments:
        """The same with rows picked by index, as beam search reorders them."""
        if self.rows is None:
            return self
        return dataclasses.replace(self, pieces=None, rows=tuple(self.rows[index] for index in indices))

    def crop(self, tokens: int) -> Segments:
        """The state after the newest `tokens` columns were taken back.

        Raises:
            UnsupportedSpan: if that would take back the start of a document.
        """
        length = self.seen + self.new - tokens
        if length < 0:
            raise UnsupportedSpan(f"cannot take back {tokens} tokens: only {self.seen + self.new} are held")
        position = None if self.position is None else self.position - tokens
        if self.rows is None:
            return Segments(length, 0, position=position)
        if any(row.begin > length or row.closed for row in self.rows):
            raise UnsupportedSpan(f"cannot take back {tokens} tokens: a document or its padding starts among them")
        rows = (row._replace(position=None if row.position is None else row.position - tokens) for row in self.rows)
        return Segments(length, 0, rows=tuple(rows))


def _checked_mask(mask: Tensor | None, batch: int, columns: int) -> Tensor | None:
    """The mask as booleans on the CPU, or None where nothing is masked."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise UnsupportedSpan(f"attention_mask is a {type(mask).__name__}: local attention takes a 2-D padding mask")
    if mask.ndim != 2 or tuple(mask.shape) != (batch, columns):
        raise UnsupportedSpan(
            f"attention_mask has shape {tuple(mask.shape)}: local attention takes a padding mask of shape "
            f"{(batch, columns)} (one entry per token so far), not a ready-made mask over pairs"
        )
    mask = mask.bool()
    return None if bool(mask.all()) else mask.cpu()


def _checked_positions(positions: Tensor | None, batch: int, new: int) -> Tensor | None:
    if positions is None:
        return None
    if positions.ndim != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != new:
        raise UnsupportedSpan(f"position_ids have shape {tuple(positions.shape)}, expected {(batch, new)}")
    return positions


def _single_start(positions: Tensor | None, expected: int | None, seen: int) -> int | None:
    """The position id of the first new token if every row just goes on by one, else None."""
    if positions is None:
        return seen if expected in (None, seen) else None
    rising = positions - torch.arange(positions.shape[1], device=positions.device)
    first = int(rising[0, 0])
    if expected not in (None, first) or (expected is None and seen > 0):
        return None
    return first if bool((rising == first).all()) else None


def _cut(
    batch: int,
    seen: int,
    new: int,
    previous: Segments | None,
    ranges: list[tuple[int, int]] | None,
    positions: Tensor | None,
) -> Segments:
    """The general case: row by row, on the CPU. `ranges`: the columns that the mask of this call calls real."""
    start = Row(0, None, False, 0) if not seen else Row(0, previous.position if previous else seen, False, 0)
    before = (previous.rows if previous else None) or (start,) * batch
    if len(before) != batch:
        raise UnsupportedSpan(f"the cache holds {len(before)} rows, the batch has {batch}")
    ids = torch.arange(seen, seen + new)[None] if positions is None else positions.cpu()
    ids = ids.expand(batch, -1)
    pieces: list[Piece] = []
    rows = []
    reach = 0
    for index in range(batch):
        row = before[index]
        lo, hi = ranges[index] if ranges is not None else (row.low, seen + new)
        if seen and lo != row.low and min(lo, row.low) < seen:
            raise UnsupportedSpan(
                f"row {index}: the mask of this call begins at column {lo}, that of earlier calls at {row.low}"
            )
        cut, row = _cut_row(index, row, seen, seen + new, lo, hi, ids[index])
        pieces += cut
        rows.append(row)
        if cut:
            real = ids[index, cut[0].first - seen : cut[-1].stop - seen]
            _refuse_negative(int(real.min()))
            reach = max(reach, int(real.max()) + 1)
    return Segments(seen, new, tuple(pieces), tuple(rows), reach=reach)


def _refuse_negative(position: int) -> None:
    if position < 0:
        raise UnsupportedSpan(f"position_ids begin at {position}: positions count from 0")


def _real_ranges(mask: Tensor | None, batch: int, columns: int) -> list[tuple[int, int]]:
    """Of each row; the whole row where the mask is None, which is how `_checked_mask` writes all ones."""
    return [(0, columns) if mask is None else _real_range(mask[index], index) for index in range(batch)]


def _real_range(mask: Tensor, index: int) -> tuple[int, int]:
    """First and last-plus-one real column of a row; an empty range at the end where there is none."""
    real = mask.nonzero()[:, 0]
    if len(real) == 0:
        return len(mask), len(mask)
    lo, hi = int(real[0]), int(real[-1]) + 1
    if hi - lo != len(real):
        raise UnsupportedSpan(
            f"row {index} has padding between real tokens (columns {lo} to {hi - 1}): pad on the left or on the right"
        )
    return lo, hi


def _cut_row(index: int, row: Row, seen: int, end: int, lo: int, hi: int, ids: Tensor) -> tuple[list[Piece], Row]:
    """Cut the columns `seen` to `end` of one row, of which `lo` to `hi` are real, at the starts of documents."""
    started = row.position is not None
    first, stop = max(lo, seen), min(hi, end)
    if first >= stop:
        closed = row.closed or started
        return [], Row(row.begin if started else end, row.position, closed, row.low if started else end)
    if row.closed or (started and first > seen):
        raise UnsupportedSpan(f"row {index} has real tokens after right padding: pad on the left to go on")
    values = ids[first - seen : stop - seen]
    jumps = (torch.nonzero(values[1:] - values[:-1] != 1)[:, 0] + 1).tolist()
    if started and int(values[0]) != row.position:
        jumps = [0, *jumps]
    for jump in jumps:
        if int(values[jump]) != 0:
            before = int(values[jump - 1]) if jump else (row.position or 0) - 1
            raise UnsupportedSpan(
                f"row {index}: position_ids go from {before} to {int(values[jump])}; inside a document they count by "
                "one, and a new document starts at 0"
            )
    begins = [first + jump for jump in jumps]
    if not jumps or jumps[0] != 0:
        begins = [row.begin if started else first, *begins]
    edges = [max(begin, first) for begin in begins] + [stop]
    pieces = [Piece(index, begin, edges[i], edges[i + 1]) for i, begin in enumerate(begins)]
    return pieces, Row(begins[-1], int(values[-1]) + 1, stop < end, row.low if started else first)
