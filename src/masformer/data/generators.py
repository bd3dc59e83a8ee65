"""Long-range recall tasks by name: seeded items with exact answers, built to an exact length for any tokenizer.

    filler = Filler.of(tokenizer, texts)
    items = make_items("niah_multikey", tokenizer, length=4096, count=10, filler=filler, seed=0)

Definitions follow the sources that `TASKS` names; deviations are said where a task is built (`needles.py`,
`tracing.py`). Scores are no part of this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from . import needles, tracing
from .filler import Filler, Redraw, Setting, TooShort
from .items import Item
from .seeds import generator

__all__ = ["DEPTHS", "TASKS", "Filler", "Task", "make_items"]

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
TRIES = 50
"""Draws of names and values for one item before the filler or the tokenizer is blamed."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A kind of item.

    asks: what is wanted, in a line.
    source: paper or code that defines it.
    build: makes one item; its third argument is the depth, or None where no single place is asked for.
    placed: the fact asked for stands at a depth.
    chance: share of right answers of a guesser who sees the question only, 0 where practically none.
    """

    name: str
    asks: str
    source: str
    build: Callable[[Setting, np.random.Generator, Any], Item]
    placed: bool = False
    chance: float = 0.0


LISTED = (
    Task("passkey", "a number told once", "dvlab-research/LongLoRA passkey_retrivial.py", needles.passkey, True),
    Task("niah_single", "the number of a name", "NVIDIA/RULER niah.py, niah_single", needles.niah_single, True),
    Task(
        "niah_multikey",
        "the number of one of four names",
        "NVIDIA/RULER niah.py, niah_multikey_1",
        needles.niah_multikey,
        True,
    ),
    Task(
        "niah_multivalue",
        "all four numbers of a name",
        "NVIDIA/RULER niah.py, niah_multivalue",
        needles.niah_multivalue,
    ),
    Task(
        "niah_multiquery", "the numbers of four names", "NVIDIA/RULER niah.py, niah_multiquery", needles.niah_multiquery
    ),
    Task(
        "kv_retrieval",
        "the value of a key in a JSON object",
        "nelson-liu/lost-in-the-middle make_kv_retrieval_data.py; princeton-nlp/HELMET JSON KV",
        needles.kv_retrieval,
        True,
    ),
    Task("mqar", "the token after each key", "HazyResearch/zoology associative_recall.py", needles.mqar),
    Task(
        "variable_tracking",
        "the five variables that have a value",
        "NVIDIA/RULER variable_tracking.py",
        tracing.variable_tracking,
    ),
    Task(
        "common_words",
        "the ten words most often in a list",
        "NVIDIA/RULER common_words_extraction.py",
        tracing.common_words,
    ),
    Task(
        "frequent_words",
        "the three words most often in a text",
        "NVIDIA/RULER freq_words_extraction.py",
        tracing.frequent_words,
    ),
    Task(
        "babi_1",
        "where a person is",
        "bAbI qa1 as in booydar/babilong",
        tracing.babi_1,
        True,
        chance=1 / len(tracing.LOCATIONS),
    ),
    Task(
        "babi_2",
        "where a thing is that was carried",
        "bAbI qa2 as in booydar/babilong",
        tracing.babi_2,
        chance=1 / len(tracing.LOCATIONS),
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in LISTED}


def make_items(
    task: str,
    tokenizer: Any,
    *,
    length: int,
    count: int,
    filler: Filler,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
) -> list[Item]:
    """So many items of a task; prompt and room for the answer have exactly `length` tokens.

    Item n depends on the task, the length, the seed, n, the tokenizer, the filler and its depth, on nothing else;
    its depth is depths[n % len(depths)] where the task has one place.

    Raises:
        InputError: an unknown task, a length that is too short, a depth outside 0 to 1, a count below 1, filler
            of another tokenizer, without tokens or one that holds whatever is drawn.
    """
    if task not in TASKS:
        raise InputError(f"no task {task!r}, the tasks are {', '.join(TASKS)}")
    if count < 1:
        raise InputError(f"at least one item, got a count of {count}")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise InputError(f"depths lie between 0 and 1, one at least, got {list(depths)}")
    if filler.tokenizer is not tokenizer:
        raise InputError("the filler was made with another tokenizer")
    setting, items, needs = Setting(tokenizer, filler, length), [], 0
    for number in range(count):
        random = generator(f"task {task} {length}", seed, number)
        depth = depths[number % len(depths)] if TASKS[task].placed else None
        try:
            items.append(_drawn(TASKS[task], setting, random, depth))
        except TooShort as error:
            needs = max(needs, error.needs)
    if needs:
        raise InputError(f"{task} needs at least about {needs} tokens, length is {length}")
    return items


def _drawn(task: Task, setting: Setting, random: np.random.Generator, depth: float | None) -> Item:
    for _ in range(TRIES):
        try:
            return task.build(setting, random, depth)
        except Redraw:
            continue
    raise InputError(
        f"{task.name}: in {TRIES} tries no name or value was drawn that the filler does not hold "
        "and that the tokenizer reads back as it was"
    )
