"""Documents tokenised once and kept on disk.

    corpus = Corpus.build("speeches.jsonl", tokenizer, Path("cache"), eos=True)   # found again the second time
    training, held_out = corpus.split(0.05, seed=0)
    training.document(0)                                                          # its token ids

A corpus is a folder with `tokens.bin` (all documents one after another, uint16 or uint32), `offsets.bin` (int64, where
each begins, and the end) and `manifest.json`; little-endian throughout. It appears complete or not at all, under a
name made from what is in it: the content of the source files (not their paths or dates: a folder that was copied is
found again, and a file that was changed with its date set back is not mistaken for the old one; hashing takes a
hundredth of the time of tokenising), the tokenizer's vocabulary and settings, and whether an end token was added.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptError, InputError
from ..files import digest, disk_errors, put, read_manifest, sha256, write_manifest
from .documents import Document, Source, iter_documents
from .seeds import generator

FORMAT = 1
TOKENS, OFFSETS = "tokens.bin", "offsets.bin"
BATCH = 1 << 20  # characters that are tokenised in one call: some 50 MB of encodings

Documents = Source | Path | str | Sequence[Document]


@dataclasses.dataclass(frozen=True, slots=True)
class Counts:
    """What a corpus holds: `empty` documents gave no token and were passed over; `highest` is the largest id."""

    documents: int = 0
    tokens: int = 0
    longest: int = 0
    empty: int = 0
    highest: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Token ids of documents, read from disk as they are asked for.

    tokens: `[tokens of the folder]`, memory-mapped. offsets: `[documents of the folder + 1]`, int64.
    members: which documents of the folder this corpus (perhaps one side of a split) has, ascending.
    lengths: tokens of each of these, at least 1.
    eos: the id that ends every document, None where none was added.
    fingerprint: the same for the same token ids in the same documents, wherever they lie.
    """

    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    members: NDArray[np.int64]
    counts: Counts
    eos: int | None
    fingerprint: str

    @classmethod
    def build(
        cls,
        documents: Documents,
        tokenizer: Any,
        folder: Path | str,
        *,
        eos: bool,
        progress: Callable[[Counts], None] | None = None,
    ) -> Corpus:
        """The corpus of these documents: the one that lies in `folder` already, or a new one.

        Args:
            documents: a source as in `documents.py`, read as a stream, or documents in memory. Of a hub id without a
                revision, what was found the first time is used again.
            tokenizer: a fast tokenizer. No special tokens are added, but what looks like one in a text becomes one.
            folder: the cache; every corpus is a folder of its own inside it.
            eos: whether the tokenizer's end token is put behind every document.
            progress: called with the counts so far after every batch.

        Raises:
            InputError: documents that cannot be read, or without any token; no fast tokenizer; no end token.
            CorruptError: a corpus of this name that is damaged.
            ResourceError: the disk is full.
        """
        end = _end_token(tokenizer, eos)
        about = {"format": FORMAT, "source": _described(documents), "tokenizer": fingerprint(tokenizer), "eos": end}
        target = Path(folder).absolute() / digest(about)[:16]
        if not target.exists():
            batches = _token_ids(_texts(documents), tokenizer, end)
            with (
                disk_errors(target),
                tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=_made(folder)) as made,
            ):
                built = Path(made, "built")
                built.mkdir()
                _write(built, about, batches, _room(tokenizer), progress)
                with contextlib.suppress(FileExistsError):  # of another process; it is checked when it is opened
                    put(built, target)
        return cls.open(target)

    @classmethod
    def open(
        cls, folder: Path | str, *, documents: Documents | None = None, tokenizer: Any = None, verify: bool = False
    ) -> Corpus:
        """The corpus in a folder that `build` made. Sizes are always checked.

        Args:
            documents, tokenizer: where given, the corpus must be made from these.
            verify: whether the SHA-256 sums are checked too, which reads everything.

        Raises:
            CorruptError: a folder that is incomplete, damaged, or made from something else.
        """
        folder = Path(folder)
        manifest = _manifest(folder)
        about, counts = manifest["about"], Counts(**manifest["counts"])
        if tokenizer is not None and about["tokenizer"] != fingerprint(tokenizer):
            raise CorruptError(f"{folder} was made with another tokenizer")
        if documents is not None and about["source"] != _described(documents):
            raise CorruptError(f"{folder} was made from other documents")
        tokens = _mapped(folder / TOKENS, manifest["dtype"], counts.tokens)
        offsets = _mapped(folder / OFFSETS, "<i8", counts.documents + 1)
        if verify:
            _verify(folder, manifest["sha256"])
        if offsets[0] != 0 or offsets[-1] != len(tokens) or np.any(offsets[1:] <= offsets[:-1]):
            raise CorruptError(f"{folder / OFFSETS} does not fit {TOKENS}: delete the folder and build it again")
        members = np.arange(counts.documents)
        return cls(tokens, offsets, members, counts, about["eos"], digest(manifest["sha256"]))

    def __len__(self) -> int:
        return len(self.members)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self.offsets[self.members + 1] - self.offsets[self.members]

    def document(self, number: int) -> NDArray[Any]:
        """The token ids of one document, 0 to `len(corpus) - 1`."""
        member = self.members[number]
        return self.tokens[self.offsets[member] : self.offsets[member + 1]]

    def split(self, held_out: int | float, seed: int) -> tuple[Corpus, Corpus]:
        """Training and held-out documents, drawn at random; no document is on both sides.

        Args:
            held_out: how many documents, or which part of them (a float between 0 and 1, rounded, at least one).

        Raises:
            InputError: a number that leaves one side without a document.
        """
        total = len(self)
        count = held_out if isinstance(held_out, int) else max(1, round(held_out * total)) if 0 < held_out < 1 else 0
        if not 1 <= count < total:
            raise InputError(f"cannot hold out {held_out} of {total} documents: both sides need at least one")
        order = generator("split", seed).permutation(total)
        return self._part(order[count:]), self._part(order[:count])

    def _part(self, chosen: NDArray[np.int64]) -> Corpus:
        members = self.members[np.sort(chosen)]
        mark = digest([self.fingerprint, hashlib.sha256(members.astype("<i8").tobytes()).hexdigest()])
        part = dataclasses.replace(self, members=members, fingerprint=mark)
        lengths = part.lengths
        counts = Counts(len(members), int(lengths.sum()), int(lengths.max()), highest=self.counts.highest)
        return dataclasses.replace(part, counts=counts)


def fingerprint(tokenizer: Any) -> str:
    """The same for two tokenizers that encode alike: vocabulary, merges, normalisation, special tokens.

    Raises:
        InputError: a tokenizer without the Rust implementation, whose settings cannot be read.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{type(tokenizer).__name__} is not a fast tokenizer: corpora need one")
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {name: value for name, value in settings.items() if name not in ("truncation", "padding")}  # of a past call
    return digest([kept, bool(getattr(tokenizer, "split_special_tokens", False))])


def _end_token(tokenizer: Any, eos: bool) -> int | None:
    if eos and tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end token to put behind documents: build the corpus without")
    return int(tokenizer.eos_token_id) if eos else None


def _room(tokenizer: Any) -> str:
    return "<u2" if max(tokenizer.get_vocab().values()) < 2**16 else "<u4"


def _texts(documents: Documents) -> Iterable[Document]:
    if isinstance(documents, Source | Path | str):
        return iter_documents(documents, allow_empty=True)
    return documents


def _described(documents: Documents) -> dict[str, Any]:
    """What tells one source from another: the content of files, the name of a hub's data set."""
    if not isinstance(documents, Source | Path | str):
        return {"documents": digest([document.text for document in documents])}
    source = documents if isinstance(documents, Source) else Source(documents)
    if source.on_hub():
        return {name: value for name, value in dataclasses.asdict(source).items() if name != "streaming"}
    try:
        files = [[file.suffix.lower(), sha256(file)] for file in source.files()]
    except OSError as error:
        raise InputError(f"cannot read {error.filename or source.path}: {error.strerror}") from error
    return {"files": digest(files), "limit": source.limit}


def _token_ids(documents: Iterable[Document], tokenizer: Any, end: int | None) -> Iterator[list[list[int]]]:
    """Batch by batch, the ids of each document; an empty list for one without text."""
    tail = [] if end is None else [end]
    for batch in _batches(documents):
        texts = [document.text if document.text.strip() else "" for document in batch]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        yield [[*ids, *tail] if ids else [] for ids in encoded]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text) + 100  # so that many tiny documents end a batch too
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(
    folder: Path,
    about: dict[str, Any],
    batches: Iterable[list[list[int]]],
    dtype: str,
    progress: Callable[[Counts], None] | None,
) -> None:
    counts = Counts()
    with (folder / TOKENS).open("wb") as tokens, (folder / OFFSETS).open("wb") as offsets:
        offsets.write(np.zeros(1, "<i8").tobytes())
        for batch in batches:
            full = [np.array(ids, dtype) for ids in batch if ids]
            for ids in full:
                tokens.write(ids.tobytes())
            lengths = np.array([len(ids) for ids in full], "<i8")
            offsets.write((counts.tokens + np.cumsum(lengths, dtype="<i8")).tobytes())
            counts = Counts(
                counts.documents + len(full),
                counts.tokens + int(lengths.sum()),
                max(counts.longest, int(lengths.max(initial=0))),
                counts.empty + len(batch) - len(full),
                max([counts.highest, *(int(ids.max()) for ids in full)]),
            )
            if progress:
                progress(counts)
    if not counts.tokens:
        raise InputError(f"there is no token in these documents: all {counts.empty} are empty")
    sums = {name: sha256(folder / name) for name in (TOKENS, OFFSETS)}
    write_manifest(folder, {"about": about, "dtype": dtype, "counts": dataclasses.asdict(counts), "sha256": sums})


def _made(folder: Path | str) -> Path:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder).absolute()


def _manifest(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    if manifest["about"]["format"] != FORMAT:
        raise CorruptError(f"{folder} has format {manifest['about']['format']}, this version reads {FORMAT}")
    return manifest


def _mapped(file: Path, dtype: str, count: int) -> NDArray[Any]:
    size = file.stat().st_size if file.is_file() else -1
    if size != count * np.dtype(dtype).itemsize:
        raise CorruptError(f"{file} is missing or has the wrong size: delete the folder and build it again")
    return np.memmap(file, dtype, mode="r")


def _verify(folder: Path, sums: dict[str, str]) -> None:
    for name, recorded in sums.items():
        if sha256(folder / name) != recorded:
            raise CorruptError(f"{folder / name} has another SHA-256 than recorded: delete the folder, build it again")
