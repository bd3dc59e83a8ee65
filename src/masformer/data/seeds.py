"""Random numbers that depend on what they are for and nothing else: no state is carried from one use to the next."""

from __future__ import annotations

import zlib

import numpy as np

from ..errors import InputError


def generator(purpose: str, seed: int, number: int = 0) -> np.random.Generator:
    """A counter-based generator of its own for every purpose, seed and number (an epoch, say, or a sequence).

    Raises:
        InputError: a seed outside 0 to 2**32 - 1.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"a seed lies between 0 and {2**32 - 1:,}, got {seed}")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([zlib.crc32(purpose.encode()), seed, number])))
