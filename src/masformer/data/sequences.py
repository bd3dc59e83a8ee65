"""What training reads: sequences of an exact length, of which the n-th is a function of n alone.

    stream = Stream(CorpusSequences(corpus, 8192, mode="packed", seed=0)).shard(rank, world)
    sequence = next(stream)                # endless
    stream.load_state(saved)               # where `saved` is what stream.state() gave, on any rank

A `Sequences` (documents in `packing.py`, recall items in `recall.py`, mixtures in `mixture.py`) holds no state, so
that the only state of a stream is one number, and resuming and seeking are the same thing.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Sequence as Listed
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptError, InputError
from ..files import difference

IGNORED = -100
"""The label of a token that is not to be predicted; transformers' and torch's own."""
FORMAT = 1

Ids = NDArray[np.int64]
Lengths = tuple[tuple[int, int], ...]
"""A curriculum: (index of the first sequence, tokens of each from there on), the first at index 0."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sequence:
    """Pieces of documents one after another, then padding. All arrays are `[length]`, int64.

    position_ids: 0 at the first token of every piece, counting by one; 0 in the padding.
    labels: `input_ids`, but -100 in the padding and at the first token of every piece: losses shift labels by one, so
        that label would be predicted from the neighbour document. It may be that nothing is left (pieces of one token).
    attention_mask: 1 where a token is real; None where all are, since packing is then told by `position_ids` alone.
    """

    input_ids: Ids
    position_ids: Ids
    labels: Ids
    attention_mask: Ids | None
    padding: int


class Sequences(Protocol):
    """Endless sequences by number; equal for equal `identity`."""

    @property
    def lengths(self) -> Lengths: ...

    @property
    def identity(self) -> dict[str, Any]:
        """JSON that says which sequences these are: corpus, seed, mode, lengths."""

    def sequence(self, index: int) -> Sequence: ...

    def place(self, index: int) -> dict[str, Any]:
        """JSON that says where sequence `index` begins; found by arithmetic, without reading tokens."""

    def with_lengths(self, lengths: Lengths) -> Self: ...


class Stream:
    """An iterator over sequences, or over every `world`-th of them, that can be put anywhere.

    All ranks have the same state: how many sequences all of them together have read, in step. So any rank's state
    serves every rank, and another number of ranks too if it divides that count.
    """

    def __init__(self, sequences: Sequences, rank: int = 0, world: int = 1) -> None:
        if not 0 <= rank < world:
            raise InputError(f"rank {rank} of {world} does not exist")
        self.sequences = sequences
        self.rank = rank
        self.world = world
        self.read = 0
        """Sequences that all ranks together have read: a multiple of `world`."""

    def shard(self, rank: int, world: int) -> Stream:
        """From the same place on, the sequences whose index is `rank` modulo `world`."""
        shard = Stream(self.sequences, rank, world)
        shard.seek(self.read)
        return shard

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Sequence:
        sequence = self.sequences.sequence(self.read + self.rank)
        self.read += self.world
        return sequence

    def seek(self, read: int) -> None:
        """Go on as if all ranks together had read so many sequences.

        Raises:
            InputError: a negative number, or one that is not a whole number of rounds of all ranks.
        """
        if read < 0 or read % self.world:
            raise InputError(f"{read} sequences are not a whole number of rounds of {self.world} ranks")
        self.read = read

    def state(self) -> dict[str, Any]:
        """JSON: what these sequences are, how many were read and where the next begins."""
        place = self.sequences.place(self.read)
        return {"format": FORMAT, "identity": self.sequences.identity, "read": self.read, "next": place}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; nothing changes where it is refused.

        Raises:
            InputError: a state of other sequences, with the first difference; a number of ranks that does not fit.
            CorruptError: no state, or one whose parts contradict each other.
        """
        if not isinstance(state, dict) or state.get("format") != FORMAT or set(state) != set(self.state()):
            raise CorruptError(f"this is no state of a data stream of format {FORMAT}")
        read = state["read"]
        if type(read) is not int or read < 0:
            raise CorruptError(f"the state of the data stream counts {read!r} sequences")
        other = difference(state["identity"], self.sequences.identity)
        if other:
            raise InputError(f"the state is of another data stream: {other}")
        if state["next"] != self.sequences.place(read):
            other = difference(state["next"], self.sequences.place(read))
            raise CorruptError(f"the state of the data stream contradicts itself at sequence {read}: {other}")
        self.seek(read)


def assemble(pieces: Listed[NDArray[Any]], length: int, pad_id: int | None = None) -> Sequence:
    """The sequence of these pieces; `pad_id` fills what they leave of `length`."""
    real = sum(map(len, pieces))
    ids = np.full(length, 0 if pad_id is None else pad_id, np.int64)
    positions = np.zeros(length, np.int64)
    labels = np.full(length, IGNORED, np.int64)
    begin = 0
    for piece in pieces:
        end = begin + len(piece)
        ids[begin:end] = piece
        positions[begin:end] = np.arange(len(piece))
        labels[begin + 1 : end] = piece[1:]
        begin = end
    mask = None if real == length else (np.arange(length) < real).astype(np.int64)
    return Sequence(ids, positions, labels, mask, length - real)


def checked_lengths(lengths: int | Listed[Listed[int]]) -> Lengths:
    """One length for all, or a curriculum of (first index, length), as a tuple.

    Raises:
        InputError: a curriculum that does not begin at 0 or is not ascending, or a length below 2 tokens.
    """
    stages = ((0, lengths),) if isinstance(lengths, int) else tuple((first, length) for first, length in lengths)
    firsts = [first for first, _ in stages]
    if not stages or firsts[0] != 0 or any(b <= a for a, b in itertools.pairwise(firsts)):
        raise InputError(f"the first indices of a length curriculum ascend from 0, got {firsts}")
    if min(length for _, length in stages) < 2:
        raise InputError(f"a sequence needs at least 2 tokens, got the lengths {[length for _, length in stages]}")
    return stages


def stage_at(lengths: Lengths, index: int) -> int:
    """The number of the curriculum's stage that holds sequence `index`."""
    return bisect.bisect_right(lengths, index, key=lambda stage: stage[0]) - 1


def length_at(lengths: Lengths, index: int) -> int:
    """How many tokens sequence `index` has."""
    return lengths[stage_at(lengths, index)][1]
