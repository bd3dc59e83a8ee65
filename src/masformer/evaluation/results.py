"""The folder of an evaluation: what was measured so far, one line an item, so that a killed run goes on.

    with Run.open(Path("runs/eval"), facts) as run:
        if key not in run.done:
            run.add([record])
    facts, records = read_run(Path("runs/eval"))

`run.json` says how the numbers were made, `results.jsonl` holds them. A record is on the disk before the next item
is begun; the rest of a line that was cut off is dropped. Needs neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from ..errors import CorruptError, InputError
from ..files import append, difference, disk_errors, locked, replace, whole_lines

FACTS, RECORDS, PART = "run.json", "results.jsonl", "run.json.part"
FORMAT = 1
KEY = ("model", "suite", "task", "length", "item")
"""The fields that say which item of which model a record is of."""
SAME = ("format", "versions", "device", "settings")
"""Facts in which the two halves of a run must agree; models can be added."""

Record = dict[str, Any]
Key = tuple[Any, ...]


def key_of(record: Record) -> Key:
    return tuple(record.get(name) for name in KEY)


class Run:
    """An evaluation that is written: see the module. `facts` has the fields of `SAME`, `commands`, and by their names
    `models`, each with `plan`, `identity` and, by length, `cost`.

    done: keys of the records that are there already.
    """

    def __init__(self, folder: Path, records: Iterable[Record]) -> None:
        self.folder = folder
        self.done: set[Key] = {key_of(record) for record in records}

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path, facts: dict[str, Any], *, compared: bool = False) -> Iterator[Self]:
        """Begin a run, or go on with the one that is there; no other process can until the block ends.

        Args:
            compared: whether models are measured against the first one, which must then be the run's first, too.

        Raises:
            InputError: a folder with something else in it, with other settings or versions, or with another model of
                the same name; one that another process writes to.
            CorruptError: records that were changed.
        """
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            found = {file.name for file in folder.iterdir() if file.name != RECORDS or file.stat().st_size}
            if FACTS not in found and found - {PART}:
                raise InputError(f"{folder} is not empty and holds no evaluation: name a new folder")
            handle = locked(folder / RECORDS)
        with os.fdopen(handle, "rb"):
            with disk_errors(folder):
                joined = _joined(folder, json.loads(json.dumps({"format": FORMAT, **facts})), compared)
                run = cls(folder, _parsed(folder / RECORDS, whole_lines(folder / RECORDS)))
                replace(folder / FACTS, json.dumps(joined, indent=1, ensure_ascii=False) + "\n")
            yield run

    def add(self, records: list[Record]) -> None:
        """Write records to the disk, all of a call in one piece."""
        lines = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        append(self.folder / RECORDS, lines)
        self.done |= {key_of(record) for record in records}


def read_run(folder: Path) -> tuple[dict[str, Any], list[Record]]:
    """The facts and the records of an evaluation; what follows the last whole line is left out.

    Raises:
        InputError: no evaluation.
        CorruptError: a line that is no record, or facts that cannot be read.
    """
    try:
        content = (folder / FACTS).read_bytes()
        lines = (folder / RECORDS).read_bytes()
    except OSError as error:
        raise InputError(f"{folder} holds no evaluation: {Path(error.filename).name}: {error.strerror}") from error
    try:
        facts = json.loads(content)
        if facts["format"] != FORMAT:
            raise InputError(f"{folder} is of format {facts['format']}, this program reads {FORMAT}")
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise CorruptError(f"{folder / FACTS} is damaged: delete the folder and evaluate again") from error
    return facts, _parsed(folder / RECORDS, lines)


def _parsed(file: Path, content: bytes) -> list[Record]:
    records: dict[Key, Record] = {}
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
            key = key_of(record)
        except (ValueError, RecursionError, AttributeError) as error:
            raise CorruptError(f"{file}, line {number} is damaged: delete it, the item is measured again") from error
        if key in records:
            raise CorruptError(f"{file}, line {number} repeats an item: delete one of the two lines")
        records[key] = record
    return list(records.values())


def _joined(folder: Path, facts: dict[str, Any], compared: bool) -> dict[str, Any]:
    """The facts of this call and of those before it."""
    if not (folder / FACTS).exists():
        return facts
    before, _ = read_run(folder)
    for name in SAME:
        old, new = before[name], facts[name]
        if isinstance(old, dict):  # what only one of the two calls used cannot differ
            new = old | new
            old = new | old
        if what := difference(old, new, name):
            raise InputError(f"{folder} holds another evaluation ({what}): name a new folder")
    first = next(iter(before["models"]))
    if compared and next(iter(facts["models"])) != first:
        raise InputError(f"{folder} compares models with {first}: name it first here too, or name a new folder")
    models = dict(before["models"])
    for label, model in facts["models"].items():
        known = models.get(label, model)
        for name in ("plan", "identity"):
            if what := difference(known[name], model[name], f"{name} of {label}"):
                raise InputError(f"{folder} holds another model of this name ({what}): name a new folder")
        models[label] = {**known, **model, "cost": known["cost"] | model["cost"]}
    commands = before["commands"] + [c for c in facts["commands"] if c not in before["commands"]]
    merged = {name: before[name] | facts[name] for name in ("versions", "settings")}
    return {**facts, **merged, "models": models, "commands": commands}
