"""Corpora of given lengths, without texts and without a disk."""

import numpy as np
from hypothesis import strategies as st

from masformer.data.corpus import Corpus, Counts


def made_corpus(sizes, *, eos=None, tokens=None):
    """Every token id occurs once, unless `tokens` are given: ids tell which token of which document it is."""
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    tokens = np.arange(offsets[-1], dtype=np.uint32) if tokens is None else tokens
    counts = Counts(len(sizes), int(offsets[-1]), max(sizes), 0, int(offsets[-1]) - 1)
    return Corpus(tokens, offsets, np.arange(len(sizes)), counts, eos, f"made of {sizes}")


class Unreadable:
    """Tokens that must not be looked at."""

    def __getitem__(self, key):
        raise AssertionError("tokens were read")


SIZES = st.lists(st.one_of(st.integers(1, 3), st.integers(1, 30)), min_size=1, max_size=9).filter(lambda s: max(s) > 1)


@st.composite
def curricula(draw, shortest=2, longest=12):
    """A curriculum of one to three stages, or a single length."""
    length = st.integers(shortest, longest)
    steps = draw(st.lists(st.tuples(st.integers(1, 9), length), max_size=2))
    first, stages = 0, [(0, draw(length))]
    for step, tokens in steps:
        first += step
        stages.append((first, tokens))
    return stages if len(stages) > 1 or draw(st.booleans()) else stages[0][1]
