"""Synthetic long-range tasks: seeded, with exact answers, built to an exact length in tokens.

So far the passkey task of LongLoRA (passkey_retrivial.py in its repository), with any text as filler in place
of its repeated sentences.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from ..errors import InputError

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt and the only right way to go on, as token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    depth: float
    """Where the needle stands in the filler: 0 at its start, 1 at its end."""
    key: str


def passkeys(tokenizer: Any, fillers: Sequence[str], length: int, depths: Sequence[float], seed: int) -> list[Item]:
    """One passkey item per filler text and depth; prompt and answer together have exactly `length` tokens.

    Raises:
        InputError: a length that the question alone fills, or a filler that is too short for it.
    """
    generator = random.Random(seed)
    keys = [str(generator.randint(10_000, 99_999)) for _ in range(len(fillers) * len(depths))]
    places = [(filler, depth) for filler in fillers for depth in depths]
    return [_passkey(tokenizer, *place, key, length) for place, key in zip(places, keys, strict=True)]


def _passkey(tokenizer: Any, filler: str, depth: float, key: str, length: int) -> Item:
    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    head, needle, question = encode(INTRODUCTION), encode(NEEDLE.format(key=key)), encode(QUESTION)
    question, answer = without_space(tokenizer, question, encode(f" {key}"))
    room = length - sum(map(len, (head, needle, question, answer)))
    text = encode(filler)
    if room < 1:
        raise InputError(f"a passkey item needs more than {length - room} tokens, length is {length}")
    if len(text) < room:
        raise InputError(f"the filler has {len(text)} tokens, a passkey item of {length} tokens needs {room}")
    cut = round(depth * room)
    return Item(tuple(head + text[:cut] + needle + text[cut:room] + question), tuple(answer), depth, key)


def without_space(tokenizer: Any, question: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
    """The same tokens, a lone space before the answer counted to the question: it tests no memory."""
    spaces = 0
    while not tokenizer.decode(answer[spaces : spaces + 1]).strip():
        spaces += 1
    return question + answer[:spaces], answer[spaces:]
