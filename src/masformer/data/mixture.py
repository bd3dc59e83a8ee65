"""Several kinds of sequences in one stream, by weight.

    mixture = Mixture({"documents": (documents, 0.9), "recall": (recall, 0.1)}, seed=0)
    mixture.counts(1000)                      # {"documents": 897, "recall": 103}

Which part gives sequence i is drawn from (seed, i) alone, so it is the same on every rank and after every resume. The
weights count sequences, not tokens. All parts are built with the curriculum of the whole, which the mixture translates
for each: sequence i has the length that the curriculum gives for i, whichever part it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .seeds import generator
from .sequences import Lengths, Sequence, Sequences

BLOCK = 4096  # choices that are drawn together


class Mixture:
    """The sequences of several parts; see `Sequences`.

    Args:
        parts: by name, the sequences and their weight, of any positive scale. Every part begins at its own first
            sequence and leaves none out.

    Raises:
        InputError: no part, a weight that is not a positive number, parts of unlike lengths.
    """

    def __init__(self, parts: Mapping[str, tuple[Sequences, float]], *, seed: int) -> None:
        self.seed = seed
        self.weights = {name: float(weight) for name, (_, weight) in parts.items()}
        if not parts or not all(math.isfinite(weight) and weight > 0 for weight in self.weights.values()):
            raise InputError(f"a mixture needs parts with positive weights, got {self.weights}")
        lengths = {name: part.lengths for name, (part, _) in parts.items()}
        self.lengths: Lengths = next(iter(lengths.values()))
        if len(set(lengths.values())) > 1:
            raise InputError(f"the parts of a mixture need the same lengths, got {lengths}")
        shares = np.cumsum(list(self.weights.values()))
        self._borders = shares[:-1] / shares[-1]
        self._sums = [np.zeros(len(parts), np.int64)]
        self._drawn: tuple[int, NDArray[np.int64]] = (-1, self._sums[0])
        self.parts = {
            name: part.with_lengths(self._own_lengths(number)) for number, (name, (part, _)) in enumerate(parts.items())
        }

    def with_lengths(self, lengths: Lengths) -> Mixture:
        """The same with another curriculum."""
        parts = {name: (part.with_lengths(lengths), self.weights[name]) for name, part in self.parts.items()}
        return Mixture(parts, seed=self.seed)

    @property
    def identity(self) -> dict[str, Any]:
        parts = {name: {"weight": self.weights[name], **part.identity} for name, part in self.parts.items()}
        return {"seed": self.seed, "parts": parts}

    def sequence(self, index: int) -> Sequence:
        """Sequence `index`, from 0."""
        name = self.choice(index)
        return self.parts[name].sequence(self.counts(index)[name])

    def place(self, index: int) -> dict[str, Any]:
        """How many sequences of each part come before sequence `index`, and where its next one begins."""
        counts = self.counts(index)
        return {name: {"read": counts[name], **part.place(counts[name])} for name, part in self.parts.items()}

    def choice(self, index: int) -> str:
        """The name of the part that gives sequence `index`."""
        block, rest = divmod(index, BLOCK)
        return list(self.weights)[self._choices(block)[rest]]

    def counts(self, count: int) -> dict[str, int]:
        """How many of the first `count` sequences come from each part."""
        return dict(zip(self.weights, self._counted(count).tolist(), strict=True))

    def proportions(self, count: int) -> dict[str, float]:
        """Which share of the first `count` sequences comes from each part, to be compared with the weights."""
        return {name: number / max(1, count) for name, number in self.counts(count).items()}

    def _own_lengths(self, number: int) -> Lengths:
        """The curriculum in the count of one part; of two stages that begin at the same sequence, the later holds."""
        return tuple({int(self._counted(first)[number]): length for first, length in self.lengths}.items())

    def _counted(self, count: int) -> NDArray[np.int64]:
        """Sequences of each part among the first `count`; 10 ns each the first time, then remembered by blocks."""
        block, rest = divmod(count, BLOCK)
        while len(self._sums) <= block:
            self._sums.append(self._sums[-1] + self._bins(self._choices(len(self._sums) - 1)))
        return self._sums[block] + self._bins(self._choices(block)[:rest])

    def _bins(self, choices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.bincount(choices, minlength=len(self.weights))

    def _choices(self, block: int) -> NDArray[np.int64]:
        if self._drawn[0] != block:
            draws = generator("mixture", self.seed, block).random(BLOCK)
            self._drawn = (block, np.searchsorted(self._borders, draws, side="right"))
        return self._drawn[1]
