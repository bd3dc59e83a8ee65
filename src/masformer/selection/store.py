"""What was measured, kept by what it was measured on: a search that was cut off, or is widened, measures only the rest.

with Store.open(Path("runs/select/measured.jsonl")) as store:
    if key not in store:
        store.put({key: value})
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from ..errors import CorruptError
from ..files import append, disk_errors, locked, whole_lines


class Store(dict[str, Any]):
    """JSON values by key; those that are `put` are on the disk when the call returns, if the store has a file."""

    file: Path | None = None

    @classmethod
    @contextlib.contextmanager
    def open(cls, file: Path) -> Iterator[Self]:
        """The store in a file, which no other process can use until the block ends; a torn last line is dropped.

        Raises:
            InputError: another process has it, or the place cannot be written.
            CorruptError: a line that is no entry.
        """
        with disk_errors(file):
            handle = locked(file)
        with os.fdopen(handle, "rb"):
            store = cls()
            store.file = file
            for number, line in enumerate(whole_lines(file).splitlines(), start=1):
                try:
                    [key, value] = found = json.loads(line)
                    if not isinstance(found, list) or not isinstance(key, str):
                        raise ValueError(line)
                except (ValueError, RecursionError, TypeError) as error:
                    raise CorruptError(f"{file}, line {number} is damaged: delete it, it is measured again") from error
                store[key] = value
            yield store

    def put(self, values: Mapping[str, Any]) -> None:
        if self.file is not None:
            lines = (json.dumps([key, value], allow_nan=False) + "\n" for key, value in values.items())
            append(self.file, "".join(lines))
        self.update(values)
