"""Recall items as training sequences: facts hidden in other text, asked for at its end.

    recall = RecallSequences(tokenizer, corpus, 8192, seed=0, loss_on="answer")

An item has one to eight facts ("the call sign of the lighthouse is amber-falcon"), fewer where they would take more
than half of the tokens; they are all of one kind and some are never asked for. It ends with one to four questions.
Introductions, needles, questions and keys are drawn from many; none is the evaluation's (`needles.py`,
`tracing.py`), whose numbers have five or nine digits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence as Listed
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .corpus import Corpus, digest, fingerprint
from .items import without_space
from .seeds import generator
from .sequences import IGNORED, Lengths, Sequence, assemble, checked_lengths, length_at

MOST_FACTS, MOST_QUESTIONS = 8, 4

INTRODUCTIONS = (
    "",
    "The following text holds some remarks that do not belong to it. Keep them in mind.\n",
    "Read carefully: a few facts are scattered over these pages, and questions come at the end.\n",
    "Below is a long document. Somebody has put notes into it; you will need them later.\n",
    "Task: read everything, then answer from what was written.\n",
    "A reader left entries between the lines of this document.\n",
    "Long text with insertions. Look out for them.\n",
)
NEEDLES = (
    "\nNote: {name} is {key}.\n",
    "\nKeep in mind that {name} is {key}. Again: {name} is {key}.\n",
    "\nEntry: {name} = {key}\n",
    " By the way, {name} is {key}. ",
    "\n(Somebody wrote here: {name} is {key}.)\n",
    "\nFor the record, {name} has been set to {key}.\n",
    "\n*** {name}: {key} ***\n",
    " It was agreed that {name} would be {key}. ",
    '\n{{"{name}": "{key}"}}\n',
)
QUESTIONS = (
    "\nQuestion: what is {name}?\nAnswer:",
    "\nAccording to the text above, {name} is",
    "\nQ: {name}?\nA:",
    "\nWe have read that {name} is",
    "\nFrom the notes, give {name}:",
    "\nLooking back, one finds that {name} is",
    "\nRecall {name}. It is",
)
THINGS = (
    "access code", "badge", "call sign", "catalogue entry", "combination", "licence", "locker", "membership",
    "order reference", "parcel label", "reservation", "room", "secret word", "serial", "signal", "ticket",
)  # fmt: skip
OWNERS = (
    "the archive", "the bakery", "the boat house", "the brewery", "the castle", "the cellar", "the choir",
    "the clinic", "the east gate", "the ferry", "the garden", "the harbour office", "the kitchen", "the laboratory",
    "the library", "the lighthouse", "the mill", "the museum", "the night train", "the observatory", "the old bridge",
    "the print shop", "the quarry", "the school", "the south tower", "the stable", "the theatre", "the workshop",
    "Amara", "Bastien", "Chiara", "Dmitri", "Eleni", "Farid", "Greta", "Hiroshi", "Ingrid", "Jamal", "Katya", "Luca",
    "Mirela", "Nils", "Odette", "Priya", "Ruben", "Sanna", "Tomas", "Yusuf",
)  # fmt: skip
WORDS = (
    "acorn", "amber", "anchor", "apple", "arrow", "autumn", "basil", "beacon", "birch", "bronze", "candle", "canyon",
    "cedar", "cloud", "cobalt", "copper", "coral", "crane", "delta", "ember", "falcon", "fern", "flint", "forest",
    "galaxy", "garnet", "ginger", "glacier", "hazel", "heron", "honey", "indigo", "island", "ivory", "jasmine",
    "juniper", "lantern", "lemon", "lotus", "maple", "marble", "meadow", "mint", "nickel", "ocean", "olive", "onyx",
    "orchid", "otter", "panther", "pearl", "pepper", "pine", "quartz", "raven", "river", "saffron", "silver",
    "sparrow", "thunder", "tiger", "topaz", "velvet", "violet", "walnut", "willow", "winter", "zephyr",
)  # fmt: skip
DIGITS = (4, 6, 7, 8)
SHORTEST = 512
"""Tokens that hold an item with one fact and some filler, even with a token for every byte."""
LETTERS, SIGNS = "ABCDEFGHJKLMNPQRSTUVWXYZ", "23456789ABCDEFGHJKLMNPQRSTUVWXYZ"


Ids = list[int]


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """The texts of an item: `needles` stand in the filler in this order; `questions` with their answers follow it."""

    introduction: str
    needles: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]


class RecallSequences:
    """Recall items of an exact length; see `Sequences`. Sequence n is made from (seed, n) alone.

    Args:
        tokenizer: that of the corpus.
        corpus: what the facts are hidden in: a part of a random document, and the next ones where it is too short.
        lengths: tokens of every sequence, or a curriculum of (index of the first sequence, tokens).
        loss_on: "answer" gives labels to the tokens of the answers alone, "all" to every token but the first.

    Raises:
        InputError: another `loss_on`, lengths that cannot be or are below 512.
    """

    def __init__(
        self,
        tokenizer: Any,
        corpus: Corpus,
        lengths: int | Listed[Listed[int]],
        *,
        seed: int,
        loss_on: Literal["answer", "all"],
    ) -> None:
        if loss_on not in ("answer", "all"):
            raise InputError(f"the loss is on 'answer' or on 'all', got {loss_on!r}")
        self.tokenizer, self.corpus, self.seed, self.loss_on = tokenizer, corpus, seed, loss_on
        self.lengths = checked_lengths(lengths)
        if min(length for _, length in self.lengths) < SHORTEST:
            raise InputError(f"recall items need at least {SHORTEST} tokens, got the lengths {self.lengths}")

    def with_lengths(self, lengths: Lengths) -> RecallSequences:
        """The same with another curriculum."""
        return RecallSequences(self.tokenizer, self.corpus, lengths, seed=self.seed, loss_on=self.loss_on)

    @functools.cached_property
    def _tokenizer_mark(self) -> str:
        """Kept, since it takes a second for a large vocabulary."""
        return fingerprint(self.tokenizer)

    @property
    def identity(self) -> dict[str, Any]:
        wording = [INTRODUCTIONS, NEEDLES, QUESTIONS, THINGS, OWNERS, WORDS, DIGITS, LETTERS, SIGNS]
        return {
            "corpus": self.corpus.fingerprint,
            "tokenizer": self._tokenizer_mark,
            "wording": digest(wording)[:16],
            "seed": self.seed,
            "loss_on": self.loss_on,
            "lengths": [list(stage) for stage in self.lengths],
        }

    def place(self, index: int) -> dict[str, Any]:
        """Nothing: the index says all."""
        return {}

    def sequence(self, index: int) -> Sequence:
        """Sequence `index`, from 0: `length` tokens of one document, without padding."""
        length = length_at(self.lengths, index)
        random = generator("recall", self.seed, index)
        facts = int(random.integers(1, MOST_FACTS + 1))
        head, needles, questions = self._encoded(draw_item(random, facts))
        while (room := _room(length, head, needles, questions)) < length // 2 and facts > 1:
            facts -= 1
            head, needles, questions = self._encoded(draw_item(random, facts))
        filler = _filler(self.corpus, room, random)
        cuts = np.sort(random.integers(0, room + 1, len(needles)))
        parts: list[Any] = [head]
        for text, needle in zip(np.split(filler, cuts), [*needles, []], strict=True):
            parts += [text, needle]
        parts += [ids for pair in questions for ids in pair]
        return self._labelled(parts, questions, length)

    def _encoded(self, item: Item) -> tuple[Ids, list[Ids], list[tuple[Ids, Ids]]]:
        texts = [item.introduction, *item.needles, *(text for pair in item.questions for text in pair)]
        head, *ids = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        needles, rest = ids[: len(item.needles)], ids[len(item.needles) :]
        questions = [without_space(self.tokenizer, *pair) for pair in zip(rest[::2], rest[1::2], strict=True)]
        return head, needles, questions

    def _labelled(self, parts: list[Any], questions: list[tuple[Ids, Ids]], length: int) -> Sequence:
        sequence = assemble([np.concatenate([np.asarray(part, np.int64) for part in parts])], length)
        if self.loss_on == "all":
            return sequence
        labels = np.full(length, IGNORED, np.int64)
        end = length
        for question, answer in reversed(questions):
            labels[end - len(answer) : end] = answer
            end -= len(question) + len(answer)
        return dataclasses.replace(sequence, labels=labels)


def draw_item(random: np.random.Generator, facts: int) -> Item:
    """An item with so many facts, 1 to 8; the keys of an item are of one kind and all different."""
    thing, needle, question = (_pick(random, options) for options in (THINGS, NEEDLES, QUESTIONS))
    owners = [OWNERS[number] for number in random.choice(len(OWNERS), facts, replace=False)]
    names = [f"the {thing} of {owner}" for owner in owners]
    keys = _draw_keys(random, facts)
    asked = random.choice(facts, int(random.integers(1, min(MOST_QUESTIONS, facts) + 1)), replace=False)
    return Item(
        _pick(random, INTRODUCTIONS),
        tuple(needle.format(name=name, key=key) for name, key in zip(names, keys, strict=True)),
        tuple((question.format(name=names[number]), f" {keys[number]}") for number in asked),
    )


def _room(length: int, head: Ids, needles: list[Ids], questions: list[tuple[Ids, Ids]]) -> int:
    """Tokens that are left for the filler."""
    return length - len(head) - sum(map(len, needles)) - sum(len(ids) for pair in questions for ids in pair)


def _draw_keys(random: np.random.Generator, count: int) -> list[str]:
    kind = int(random.integers(3))
    size = int(_pick(random, DIGITS if kind == 0 else (2, 3)))
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[_draw_key(random, kind, size)] = None
    return list(keys)


def _draw_key(random: np.random.Generator, kind: int, size: int) -> str:
    if kind == 0:
        return str(random.integers(10 ** (size - 1), 10**size))
    if kind == 1:
        return "-".join(_pick(random, WORDS) for _ in range(size))
    return "-".join(_pick(random, LETTERS) + _pick(random, SIGNS) + _pick(random, SIGNS) for _ in range(size))


def _pick(random: np.random.Generator, options: Listed[Any]) -> Any:
    return options[int(random.integers(len(options)))]


def _filler(corpus: Corpus, room: int, random: np.random.Generator) -> NDArray[np.int64]:
    """So many tokens of the corpus without end tokens, from a random place on."""
    number = int(random.integers(len(corpus)))
    tail = 0 if corpus.eos is None else 1
    begin = int(random.integers(max(1, len(corpus.document(number)) - tail - room + 1)))
    parts = []
    while room:
        ids = corpus.document(number)
        part = ids[begin : min(begin + room, len(ids) - tail)].astype(np.int64)
        parts.append(part)
        number, begin, room = (number + 1) % len(corpus), 0, room - len(part)
    return np.concatenate(parts)
