"""One item of a long-range task: token ids, where the answers stand in them, and what to look for in generated text."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """A prompt and the right way to go on.

    task: its name.
    ids: prompt and answers as the model sees them when the answers are given (teacher forcing).
    parts: where the answers stand: ids[start:end] of each, in order; the prompt ends where the first begins.
    room: tokens kept for the answer: the prompt and these are exactly as long as was asked for.
    references: texts that an answer in words must hold, in any order; empty where the parts are no words.
    depth: where the fact that is asked for stands in the filler, 0 at its start, 1 at its end; None without one place.
    """

    task: str
    ids: tuple[int, ...]
    parts: tuple[tuple[int, int], ...]
    room: int
    references: tuple[str, ...] = ()
    depth: float | None = None

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.ids[: self.parts[0][0]]

    @property
    def length(self) -> int:
        """Tokens of the prompt and the room for its answer."""
        return self.parts[0][0] + self.room


def without_space(tokenizer: Any, question: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
    """The same tokens, a lone space before the answer counted to the question: it tests no memory."""
    spaces = 0
    while not tokenizer.decode(answer[spaces : spaces + 1]).strip():
        spaces += 1
    return question + answer[:spaces], answer[spaces:]
