"""What every generated task is made with: filler text, a tokenizer and a length, put together to an exact item.

Not the tasks themselves (`needles.py`, `tracing.py`), and not their choice (`generators.py`).

    filler = Filler.of(tokenizer, texts)                # None: the noise of LongLoRA and RULER
    setting = Setting(tokenizer, filler, 4096)
    item = setting.hide("passkey", head, [(0.5, needle)], setting.tail(question, [("", " 12345")]), random, only={})
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .items import Item, without_space

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The filler of LongLoRA (passkey_retrivial.py) and of RULER's noise haystack (niah.py), which puts it in lines."""

Ids = list[int]
Made = TypeVar("Made")


class TooShort(Exception):
    """The length cannot hold an item; `needs` tokens can."""

    def __init__(self, needs: int) -> None:
        super().__init__(needs)
        self.needs = needs


class Redraw(Exception):
    """What is asked for stands where it must not, or cannot be read: other names and values have to be drawn."""


class Filler:
    """Documents as token ids, tokenised when first needed and kept, with what else a tokenizer is asked only once."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self.tokenizer, self.texts = tokenizer, texts
        self._kept: dict[int, NDArray[np.int64]] = {}
        self._made: dict[str, Any] = {}

    @classmethod
    def of(cls, tokenizer: Any, texts: Sequence[str] | None) -> Filler:
        """Filler from these texts, or the synthetic noise, a line of five sentences again and again, for None."""
        return cls(tokenizer, [NOISE + "\n"] if texts is None else texts)

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """What `make` returns, which depends on the tokenizer alone: made when first needed and kept."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def document(self, number: int) -> NDArray[np.int64]:
        if number not in self._kept:
            self._kept[number] = np.array(encode(self.tokenizer, self.texts[number]), np.int64)
        return self._kept[number]

    def take(self, room: int, random: np.random.Generator) -> Ids:
        """Exactly `room` tokens: the start of a random document, going on with the next where it is too short.

        After the last document comes the first, so that even a short text fills any room.

        Raises:
            InputError: no text has a token.
        """
        number = int(random.integers(max(1, len(self.texts))))
        parts: list[NDArray[np.int64]] = []
        while room > 0:
            if len(parts) >= len(self.texts) and not any(map(len, parts)):
                raise InputError(f"the filler has no tokens: {len(self.texts)} texts, all of them empty")
            parts.append(self.document(number)[:room])
            room -= len(parts[-1])
            number = (number + 1) % len(self.texts)
        return [int(token) for part in parts for token in part]


@dataclasses.dataclass(frozen=True)
class Tail:
    """The end of an item: the question, and the answers at `parts`."""

    ids: Ids
    parts: list[tuple[int, int]]
    texts: tuple[str, ...]

    @property
    def asked(self) -> int:
        """Tokens before the first answer."""
        return self.parts[0][0]

    @property
    def answer(self) -> int:
        """Tokens from the first answer on."""
        return len(self.ids) - self.asked


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """A tokenizer, filler and the length of the items: prompt and room for the answer together."""

    tokenizer: Any
    filler: Filler
    length: int

    def encode(self, text: str) -> Ids:
        return encode(self.tokenizer, text)

    def encode_all(self, texts: Sequence[str]) -> list[Ids]:
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    @functools.cached_property
    def start(self) -> Ids:
        return beginning(self.tokenizer)

    def tail(self, question: str, answers: Iterable[tuple[str, str]]) -> Tail:
        """The question and its answers in order, each after what leads to it (", "); lone spaces are no part of one.

        Raises:
            Redraw: an answer that the tokenizer cannot spell.
        """
        ids, parts, texts = self.encode(question), [], []
        for lead, text in answers:
            answer = self.encode(text)
            if text.strip() not in self.tokenizer.decode(answer):
                raise Redraw
            ids, answer = without_space(self.tokenizer, ids + self.encode(lead), answer)
            parts.append((len(ids), len(ids) + len(answer)))
            texts.append(text.strip())
            ids = ids + answer
        return Tail(ids, parts, tuple(texts))

    def space(self, room: int | None, head: Ids, tail: Tail) -> int:
        """Tokens that are left between the beginning token, `head`, the question and `room` for the answer."""
        return self.length - len(self.start) - len(head) - tail.asked - (tail.answer if room is None else room)

    def hide(
        self,
        task: str,
        head: Ids,
        needles: Iterable[tuple[float, Ids]],
        tail: Tail,
        random: np.random.Generator,
        *,
        only: Mapping[str, int],
        room: int | None = None,
        depth: float | None = None,
    ) -> Item:
        """The head, filler with the needles at their places from 0 to 1, and the tail: `length` tokens with the room.

        Args:
            only: how often each of these texts must occur in the decoded prompt.
            room: tokens for the answers, those of the tail where None.

        Raises:
            TooShort: the parts alone are longer.
            Redraw: a text of `only` occurs more or less often.
        """
        placed = sorted(needles, key=lambda needle: needle[0])
        space = self.space(room, head, tail) - sum(len(ids) for _, ids in placed)
        if space < 0:
            raise TooShort(self.length - space)
        filler, done = self.filler.take(space, random), 0
        ids = self.start + head
        for place, needle in placed:
            cut = round(place * space)
            ids += filler[done:cut] + needle
            done = cut
        ids += filler[done:]
        item = self._finished(task, ids, tail, room, depth)
        self.check(item, only)
        return item

    def _finished(self, task: str, ids: Ids, tail: Tail, room: int | None, depth: float | None) -> Item:
        if room is not None and room < tail.answer:
            raise InputError(f"{task}: the answers take {tail.answer} tokens with this tokenizer, room is for {room}")
        parts = tuple((len(ids) + begin, len(ids) + end) for begin, end in tail.parts)
        return Item(task, tuple(ids + tail.ids), parts, tail.answer if room is None else room, tail.texts, depth)

    def check(self, item: Item, only: Mapping[str, int]) -> None:
        text = self.tokenizer.decode(list(item.prompt))
        if any(text.count(part) != times for part, times in only.items()):
            raise Redraw


def beginning(tokenizer: Any) -> Ids:
    """The special tokens that a tokenizer puts before every text by itself: mostly one or none, of GLM two."""
    marked = tokenizer("a", return_special_tokens_mask=True)
    special = sum(1 for _ in itertools.takewhile(bool, marked["special_tokens_mask"]))
    return list(marked["input_ids"][:special])


def encode(tokenizer: Any, text: str) -> Ids:
    return list(tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])


def room_for(pieces: Iterable[str]) -> int:
    """Tokens that hold these pieces with any tokenizer (one a byte, one more before each), and 16 for other words."""
    return 16 + sum(len(piece.encode()) + 1 for piece in pieces if piece)


def random_places(random: np.random.Generator, count: int) -> list[float]:
    """So many places in the filler, in order."""
    return sorted(random.random(count).tolist())


def pick(random: np.random.Generator, options: Sequence[Any], count: int) -> list[Any]:
    """So many different ones of the options, in random order."""
    return [options[int(number)] for number in random.choice(len(options), count, replace=False)]
