"""Long documents from the user's own files, or from a data set on the Hugging Face hub.

    documents = read_documents(Path("speeches.jsonl"), limit=20)         # a list, none of them empty
    for document in iter_documents(Source("owner/name", split="train")):   # a stream, of any size
        ...

Text only: tokenising, cutting and packing happen elsewhere.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError

KINDS = ".txt, .jsonl or .parquet"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One text and the name it is reported under."""

    id: str
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where documents come from.

    path: a `.txt` file (one document, named after the file), a `.jsonl` or `.parquet` file (field `text`; the id is
        field `id`, else `FILE:NUMBER`), a folder with such files at its top level, or a hub id `owner/name` with the
        same fields. UTF-8 throughout. A `Path`, and a string that names something on the disk, is never a hub id.
    limit: how many documents to read at most; the rest is not looked at.
    config, split, revision: of a hub id only. Without a revision, it is whatever the hub holds at the time.
    streaming: whether a hub id is read over the network as it goes, or downloaded first.
    """

    path: str | Path
    limit: int | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = True

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError(f"the limit of documents must be at least 1, got {self.limit}")

    def on_hub(self) -> bool:
        """Whether the path is read as a hub id."""
        if not isinstance(self.path, str) or Path(self.path).suffix.lower() in READERS:
            return False
        return bool(HUB_ID.fullmatch(self.path)) and not Path(self.path).exists()

    def files(self) -> list[Path]:
        """The files of a path that is no hub id, in the order in which they are read.

        Raises:
            InputError: one file of another kind.
            OSError: nothing there.
        """
        path = Path(self.path)
        if path.is_dir():
            files = sorted(path.iterdir())
            return [f for f in files if f.suffix.lower() in READERS and f.is_file() and not f.name.startswith(".")]
        path.stat()
        if path.suffix.lower() not in READERS:
            raise InputError(f"{path} is not {KINDS}, nor a folder of these")
        return [path]


def read_documents(source: Source | Path | str, *, limit: int | None = None) -> list[Document]:
    """All documents of a source, in the order of the file, or of the sorted file names.

    Args:
        limit: that of `Source`, for a source given by its path.

    Raises:
        InputError: as `iter_documents`.
    """
    return list(iter_documents(source if isinstance(source, Source) else Source(source, limit)))


def iter_documents(source: Source | Path | str, *, allow_empty: bool = False) -> Iterator[Document]:
    """The same one by one: never more than some megabytes of a source are in memory.

    Args:
        allow_empty: whether documents without text are handed out, for a caller that counts them.

    Raises:
        InputError: nothing there, no document, an empty one, one that is not UTF-8, a line without a string `text`,
            a hub id that cannot be reached or loaded, a package that is missing. All of them as the documents are
            taken, not when the call returns.
    """
    source = source if isinstance(source, Source) else Source(source)
    found = 0
    try:
        for document, where in itertools.islice(_documents(source), source.limit):
            found += 1
            yield _checked(document, where, allow_empty)
    except OSError as error:
        raise InputError(
            f"cannot read {error.filename or source.path}: {error.strerror or _one_line(error)}"
        ) from error
    if not found:
        raise InputError(f"{source.path} holds no documents: give {KINDS}, or a folder of these")


Located = tuple[Document, str]
"""A document and the place that an error names."""


def _documents(source: Source) -> Iterator[Located]:
    if source.on_hub():
        yield from _read_hub(source)
    else:
        for file in source.files():
            yield from READERS[file.suffix.lower()](file)


def _read_text(file: Path) -> Iterator[Located]:
    text = _decoded(file.read_bytes(), str(file))
    yield Document(file.stem, text.replace("\r\n", "\n")), str(file)


def _read_lines(file: Path) -> Iterator[Located]:
    for record, where, name in json_lines(file):
        yield _from_record(record, where, name), where


def json_lines(file: Path) -> Iterator[tuple[Any, str, str]]:
    """What each line of a file holds, empty lines passed over; the place that an error names; and `FILE:LINE`.

    Raises:
        InputError: a line that is not UTF-8 or JSON.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{file}, line {number}"
                yield _parsed(line, where), where, f"{file.name}:{number}"


def _read_parquet(file: Path) -> Iterator[Located]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"reading {file} needs pyarrow: pip install 'masformer[train]'") from error
    try:
        with parquet.ParquetFile(file) as table:
            columns = [name for name in ("text", "id") if name in table.schema_arrow.names]
            batches = table.iter_batches(batch_size=16, columns=columns)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                where = f"{file}, row {number}"
                yield _from_record(row, where, f"{file.name}:{number}"), where
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as parquet ({_one_line(error)})") from error


def _read_hub(source: Source) -> Iterator[Located]:
    try:
        import datasets
    except ImportError as error:
        message = f"there is no file or folder {source.path}; to read a hub id of that name: pip install"
        raise InputError(f"{message} 'masformer[train]'") from error
    options = {"split": source.split, "revision": source.revision, "streaming": source.streaming}
    rows = _loaded(source, lambda: iter(datasets.load_dataset(str(source.path), source.config, **options)))
    for number in itertools.count(1):
        row = _loaded(source, lambda: next(rows, None))
        if row is None:
            return
        where = f"{source.path}, row {number}"
        yield _from_record(row, where, f"{source.path}:{number}"), where


def _loaded(source: Source, load: Callable[[], Any]) -> Any:
    """What `load` returns; whatever datasets and the hub's client raise becomes one line."""
    try:
        return load()
    except Exception as error:  # they share no base class, and a broken row of a stream can raise anything
        message = f"cannot load the data set {source.path} from the hub, and no file or folder has this name"
        raise InputError(f"{message} ({_one_line(error)})") from error


READERS: dict[str, Callable[[Path], Iterator[Located]]] = {
    ".txt": _read_text,
    ".jsonl": _read_lines,
    ".parquet": _read_parquet,
}


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(_decoded(line, where))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where} is not JSON ({error})") from error


def _from_record(record: Any, where: str, default_id: str) -> Document:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise InputError(f'{where} has no string "text"')
    name = default_id if record.get("id") is None else record["id"]
    if not isinstance(name, str | int):
        raise InputError(f'{where} has an "id" that is neither a string nor a number: {name!r}')
    return Document(str(name), record["text"])


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}") from error


def _checked(document: Document, where: str, allow_empty: bool) -> Document:
    if not allow_empty and not document.text.strip():
        raise InputError(f"document {document.id!r} is empty ({where})")
    try:
        document.text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair, which no tokenizer takes
        raise InputError(f"document {document.id!r} has half a surrogate pair at {error.start} ({where})") from error
    return document


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
