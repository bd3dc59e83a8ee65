"""Documents of a corpus as training sequences, in a new order every epoch.

    sequences = CorpusSequences(corpus, [(0, 2048), (1000, 8192)], mode="packed", seed=0)
    sequences.totals(5000)                  # what the first 5,000 sequences hold

"packed": documents one after another, cut at the borders of sequences. What is left of a cut document begins the next
sequence as a piece of its own, whose positions count from 0 again: it does not see its earlier part. Nothing is
dropped or padded; epochs follow each other inside a sequence.

"single": one piece of one document per sequence, its end padded on the right. A last piece of one token has nothing
to predict and is dropped.

Everything is arithmetic on the lengths of documents: a document is worth so many units (tokens, or pieces), sequences
take a fixed number of them, and an epoch has the same total in any order.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Listed
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .corpus import Corpus
from .seeds import generator
from .sequences import Lengths, Sequence, assemble, checked_lengths, length_at, stage_at

Mode = Literal["packed", "single"]


class Place(NamedTuple):
    """Where a sequence begins: a token of the document whose turn it is in the order of the epoch."""

    epoch: int
    turn: int
    offset: int


class Run(NamedTuple):
    """Sequences of one length that follow each other."""

    length: int
    sequences: int
    begin: Place
    end: Place


class Piece(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of a document."""

    document: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, slots=True)
class Totals:
    """What a run of sequences holds. tokens + padded = the sum of their lengths; tokens - pieces can be predicted.

    documents: documents begun, counted again in every epoch. dropped: tokens that were passed over.
    """

    documents: int
    tokens: int
    pieces: int
    dropped: int
    padded: int


class CorpusSequences:
    """The sequences of a corpus; see `Sequences` and the modes above.

    Args:
        lengths: tokens of every sequence, or a curriculum of (index of the first sequence, tokens).
        pad_id: what fills a sequence of mode "single"; needed only there.

    Raises:
        InputError: another mode, lengths that cannot be, no pad id, or no document of two tokens.
    """

    def __init__(
        self,
        corpus: Corpus,
        lengths: int | Listed[Listed[int]],
        *,
        mode: Mode,
        seed: int,
        pad_id: int | None = None,
    ) -> None:
        if mode not in ("packed", "single"):
            raise InputError(f"the mode is 'packed' or 'single', got {mode!r}")
        if mode == "single" and pad_id is None:
            raise InputError("mode 'single' needs a pad_id")
        self.corpus, self.mode, self.seed, self.pad_id = corpus, mode, seed, pad_id
        self.lengths = checked_lengths(lengths)
        self._sizes = corpus.lengths
        if self._sizes.max() < 2:
            raise InputError("no document of the corpus has two tokens: there is nothing to predict")
        self._cache: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._stages = self._stage_places()

    def with_lengths(self, lengths: Lengths) -> CorpusSequences:
        """The same with another curriculum."""
        return CorpusSequences(self.corpus, lengths, mode=self.mode, seed=self.seed, pad_id=self.pad_id)

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "corpus": self.corpus.fingerprint,
            "mode": self.mode,
            "seed": self.seed,
            "lengths": [list(stage) for stage in self.lengths],
        }

    def place(self, index: int) -> dict[str, Any]:
        """Epoch, turn of the document in the epoch's order, the document itself and the token in it."""
        place = self._place(index)
        document = int(self._order(place.epoch)[place.turn])
        return {"epoch": place.epoch, "turn": place.turn, "document": document, "offset": place.offset}

    def sequence(self, index: int) -> Sequence:
        """Sequence `index`, from 0."""
        pieces = [self.corpus.document(p.document)[p.start : p.stop] for p in self.pieces(index)]
        return assemble(pieces, length_at(self.lengths, index), self.pad_id)

    def pieces(self, index: int) -> Iterator[Piece]:
        """What sequence `index` is made of."""
        epoch, turn, offset = self._place(index)
        left = length_at(self.lengths, index)
        while left:
            document = int(self._order(epoch)[turn])
            stop = min(offset + left, int(self._sizes[document]))
            yield Piece(document, offset, stop)
            left = left - (stop - offset) if self.mode == "packed" else 0
            epoch, turn = (epoch, turn + 1) if turn + 1 < len(self._sizes) else (epoch + 1, 0)
            offset = 0

    def totals(self, count: int) -> Totals:
        """What the first `count` sequences hold, by arithmetic."""
        runs = list(self._runs(count))
        place = runs[-1].end
        passed = self._before(self._sizes, place) + place.offset
        begun = self._before(self._sizes > (self.mode == "single"), place) + (place.offset > 0)
        if self.mode == "packed":
            return Totals(begun, passed, count + self._begun_inside(runs), 0, 0)
        dropped = sum(self._dropped(run) for run in runs)
        room = sum(run.length * run.sequences for run in runs)
        return Totals(begun, passed - dropped, count, dropped, room - (passed - dropped))

    def _runs(self, count: int) -> Iterator[Run]:
        """The first `count` sequences, cut where their length changes."""
        begin = Place(0, 0, 0)
        for stage, (first, length) in enumerate(self.lengths):
            if first > count:
                break
            last = stage + 1 == len(self.lengths) or self.lengths[stage + 1][0] > count
            end = self._place(count) if last else self._stages[stage + 1]
            yield Run(length, (count if last else self.lengths[stage + 1][0]) - first, begin, end)
            begin = end

    def _before(self, values: NDArray[Any], place: Place) -> int:
        """The sum over all documents before the place's own, one value per document."""
        return place.epoch * int(values.sum()) + int(values[self._order(place.epoch)[: place.turn]].sum())

    def _begun_inside(self, runs: list[Run]) -> int:
        """Packed: documents that begin neither at the border of a sequence nor behind the last one."""
        edges = np.cumsum([0, *(run.length * run.sequences for run in runs)])
        steps = np.array([run.length for run in runs])
        found = 0
        for epoch in range(runs[-1].end.epoch + 1):
            starts = epoch * int(self._sizes.sum()) + self._ends(epoch, 0)[:-1]
            starts = starts[starts < edges[-1]]
            inside = np.searchsorted(edges, starts, side="right") - 1
            found += int(((starts - edges[inside]) % steps[inside] != 0).sum())
        return found

    def _dropped(self, run: Run) -> int:
        """Single: last pieces of one token among the documents that were passed in these sequences."""
        begin, end = run.begin, run.end
        tails = self._sizes % run.length == 1
        found = self._before(tails, end) - self._before(tails, begin)
        if begin.offset and begin[:2] != end[:2]:  # the first document was entered in the middle
            document = self._order(begin.epoch)[begin.turn]
            rest = int(self._sizes[document]) - begin.offset
            found += int(rest % run.length == 1) - int(tails[document])
        return found

    def _place(self, index: int) -> Place:
        stage = stage_at(self.lengths, index)
        first, length = self.lengths[stage]
        return self._advance(self._stages[stage], index - first, length)

    def _stage_places(self) -> list[Place]:
        """Where each stage of the curriculum begins."""
        places = [self._advance(Place(0, 0, 0), 0, self.lengths[0][1])]
        for (first, length), (after, _) in itertools.pairwise(self.lengths):
            places.append(self._advance(places[-1], after - first, length))
        return places

    def _advance(self, place: Place, sequences: int, length: int) -> Place:
        """The place behind so many sequences: always that of a token to be read, never a document's end."""
        step, scale = (length, 1) if self.mode == "packed" else (1, length)
        rest = int(self._units(self._sizes[self._order(place.epoch)[place.turn]] - place.offset, length))
        need = sequences * step
        if need < rest:
            return place._replace(offset=place.offset + need * scale)
        ends = self._ends(place.epoch, length)
        epochs, ahead = divmod(int(ends[place.turn + 1]) + need - rest, int(ends[-1]))
        ends = self._ends(place.epoch + epochs, length)
        turn = int(np.searchsorted(ends, ahead, side="right")) - 1
        return Place(place.epoch + epochs, turn, (ahead - int(ends[turn])) * scale)

    def _units(self, tokens: Any, length: int) -> Any:
        return tokens if self.mode == "packed" else tokens // length + (tokens % length > 1)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return self._cached(epoch, -1)

    def _ends(self, epoch: int, length: int) -> NDArray[np.int64]:
        """Units before each document in the order of the epoch, and in the whole epoch: `[documents + 1]`."""
        return self._cached(epoch, 0 if self.mode == "packed" else length)

    def _cached(self, epoch: int, length: int) -> NDArray[np.int64]:
        key = (epoch, length)
        if key not in self._cache:
            if len(self._cache) >= 8:  # an epoch in use, the next, a stage's beginning: orders and ends of each
                del self._cache[next(iter(self._cache))]
            if length < 0:
                self._cache[key] = generator("epoch", self.seed, epoch).permutation(len(self._sizes))
            else:
                units = self._units(self._sizes[self._order(epoch)], length)
                self._cache[key] = np.concatenate([[0], np.cumsum(units)])
        return self._cache[key]
