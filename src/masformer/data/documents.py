"""Long documents from the user's own files: text, or one JSON object a line, or a folder of both.

    documents = read_documents(Path("speeches.jsonl"), limit=20)

Text only: tokenising, cutting and packing happen elsewhere.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from masformer.errors import InputError


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One text and the name it is reported under."""

    id: str
    text: str


def read_documents(path: Path | str, *, limit: int | None = None) -> list[Document]:
    """Documents in the order of the file, or of the sorted file names.

    Args:
        path: a `.txt` file (one document, named after the file), a `.jsonl` file (field `text`; the id is field
            `id`, else `FILE:LINE`), or a folder with such files at its top level. UTF-8 throughout.
        limit: how many documents to read at most; the rest is not looked at.

    Raises:
        InputError: nothing there, no document, an empty one, one that is not UTF-8, a line without a string `text`.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise InputError(f"the limit of documents must be at least 1, got {limit}")
    try:
        documents = list(itertools.islice(_documents(path), limit))
    except OSError as error:
        raise InputError(f"cannot read {error.filename or path}: {error.strerror}") from error
    if not documents:
        raise InputError(f"{path} holds no documents: give a .txt file, a .jsonl file or a folder of these")
    return documents


def _documents(path: Path) -> Iterator[Document]:
    if path.is_dir():
        for file in sorted(path.iterdir()):
            if file.is_file() and file.suffix.lower() in READERS and not file.name.startswith("."):
                yield from READERS[file.suffix.lower()](file)
    elif path.suffix.lower() in READERS or not path.exists():
        yield from READERS.get(path.suffix.lower(), _read_text)(path)  # opening a missing file says so
    else:
        raise InputError(f"{path} is neither .txt nor .jsonl nor a folder of these")


def _read_text(file: Path) -> Iterator[Document]:
    text = _decoded(file.read_bytes(), str(file))
    yield _checked(Document(file.stem, text.replace("\r\n", "\n")), str(file))


def _read_lines(file: Path) -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _from_line(line, f"{file}, line {number}", f"{file.name}:{number}")


READERS = {".txt": _read_text, ".jsonl": _read_lines}


def _from_line(line: bytes, where: str, default_id: str) -> Document:
    try:
        record: Any = json.loads(_decoded(line, where))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where} is not JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise InputError(f'{where} is not a JSON object with a string "text"')
    name = record.get("id", default_id)
    if not isinstance(name, str | int):
        raise InputError(f'{where} has an "id" that is neither a string nor a number: {name!r}')
    return _checked(Document(str(name), record["text"]), where)


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}") from error


def _checked(document: Document, where: str) -> Document:
    if not document.text.strip():
        raise InputError(f"document {document.id!r} is empty ({where})")
    try:
        document.text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair, which no tokenizer takes
        raise InputError(f"document {document.id!r} has half a surrogate pair at {error.start} ({where})") from error
    return document
