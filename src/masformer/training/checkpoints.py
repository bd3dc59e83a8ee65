"""The checkpoints of a training: folders that are whole or not there at all.

    with Checkpoints(run, identity) as checkpoints:
        last = checkpoints.newest(print)                      # None where there is none yet
        ...
        with checkpoints.writing(step, facts) as folder:      # every rank has written its files before this ends
            save_file(tensors, folder / "model.safetensors")

`checkpoint-300` holds the files that were written and `manifest.json` with their sizes and SHA-256 sums. A process may
be killed at any moment: the newest whole checkpoint is never lost. What is not finished lies in `.scratch`; a
checkpoint that another one of the same step is about to replace lies in `.replaced` until that one has its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from ..errors import CorruptError, InputError
from ..files import MANIFEST, described, difference, disk_errors, locked, put, read_manifest, sync, write_manifest

FORMAT = 1
NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
LOCK, SCRATCH, REPLACED = ".lock", ".scratch", ".replaced"
FIELDS = {"format": int, "step": int, "identity": dict, "facts": dict, "files": dict}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder whose every byte is what was written.

    identity: what the training is made of; another one cannot go on from here.
    facts: what was handed in beside the files.
    """

    folder: Path
    step: int
    identity: dict[str, Any]
    facts: dict[str, Any]


def verify(folder: Path) -> Checkpoint:
    """The checkpoint in this folder, which is read from its first byte to its last.

    Raises:
        CorruptError: a folder that is incomplete, damaged, mixed with another step, or no checkpoint at all.
    """
    try:
        manifest, files = _opened(folder)
        recorded = manifest["files"]
        for name in sorted(files.keys() | recorded.keys()):
            if name not in recorded:
                raise CorruptError(f"{folder} is not as it was written, delete it: {name!r} was added")
            if name not in files:
                raise CorruptError(f"{folder} is not as it was written, delete it: {name!r} is missing")
            if recorded[name] != described(files[name]):
                raise CorruptError(f"{folder} is not as it was written, delete it: {name!r} has other bytes")
    except OSError as error:
        raise CorruptError(f"{folder} cannot be read: {error.filename}: {error.strerror}") from error
    return Checkpoint(folder, manifest["step"], manifest["identity"], manifest["facts"])


class Checkpoints:
    """The checkpoints in one run folder, which belongs to this process until the `with` block ends.

    Of several ranks only one has this object; the others write into the folder that it hands out.

    Args:
        run: the folder, made if need be.
        identity: JSON that tells this training from others: recipe, model, plan, data.
        keep: how many whole checkpoints stay; older ones are deleted.

    Raises:
        InputError: another process has the folder, or it cannot be written; `keep` below 1.
    """

    def __init__(self, run: Path, identity: dict[str, Any], keep: int = 2) -> None:
        if keep < 1:
            raise InputError(f"a training keeps at least 1 checkpoint, got keep={keep}")
        self.run, self.keep = run, keep
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._whole: set[int] = set()  # steps that this process wrote or verified
        with disk_errors(run):
            run.mkdir(parents=True, exist_ok=True)
            self._lock = locked(run / LOCK)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def newest(self, say: Callable[[str], None]) -> Checkpoint | None:
        """The newest whole checkpoint, None where there is none at all; `say` gets a line for each passed over.

        Raises:
            CorruptError: there are checkpoints, and none is whole.
            InputError: the newest whole one is of another training.
        """
        with disk_errors(self.run):
            self._tidy()
            steps = self._steps()
        for step in steps:
            try:
                found = verify(self._folder(step))
            except CorruptError as error:
                self._whole.discard(step)
                say(f"passed over: {error}")
                continue
            other = difference(found.identity, self.identity)
            if other:
                raise InputError(f"{found.folder} is of another training, name another folder: {other}")
            self._whole.add(step)
            return found
        if steps:
            names = ", ".join(self._folder(step).name for step in steps)
            raise CorruptError(f"no checkpoint in {self.run} is whole, name another folder: {names}")
        return None

    @contextlib.contextmanager
    def writing(self, step: int, facts: dict[str, Any]) -> Iterator[Path]:
        """An empty folder to fill, `.scratch/checkpoint-STEP`; it becomes the checkpoint when the block ends.

        Everything is written to the disk, read back and compared before it gets its name, and only then is an older
        checkpoint deleted or one of the same step replaced. If the block raises, all is as before.

        Args:
            facts: JSON to be kept beside the files.

        Raises:
            ResourceError: the disk is full.
            InputError: the folder cannot be written.
            CorruptError: the disk gave other bytes back than it was given.
        """
        target = self._folder(step)
        with disk_errors(target):
            try:
                self._tidy()
                built = self.run / SCRATCH / target.name
                built.mkdir(parents=True)
                yield built
                files = {name: described(file) for name, file in _listed(built).items()}
                about = {"format": FORMAT, "step": step, "identity": self.identity, "facts": facts}
                write_manifest(built, {**about, "files": files})
                sync(built)
                _forget(built)
                verify(built)
                if os.path.lexists(target):
                    (self.run / REPLACED).mkdir()
                    target.rename(self.run / REPLACED / target.name)
                put(built, target)
            finally:
                self._tidy()
            self._whole.add(step)
        with disk_errors(self.run):
            self._rotate()

    def _folder(self, step: int) -> Path:
        return self.run / f"checkpoint-{step}"

    def _steps(self) -> list[int]:
        """Steps of whatever has the name of a checkpoint, the newest first."""
        names = filter(None, (NAME.fullmatch(path.name) for path in self.run.iterdir()))
        return sorted((int(name[1]) for name in names), reverse=True)

    def _tidy(self) -> None:
        """Put back what was to be replaced and was not, and delete what is not finished."""
        replaced = self.run / REPLACED
        for path in replaced.iterdir() if replaced.is_dir() else ():
            if not os.path.lexists(self.run / path.name):
                path.rename(self.run / path.name)
        for rest in (replaced, self.run / SCRATCH):
            if rest.exists():
                shutil.rmtree(rest)

    def _rotate(self) -> None:
        """Delete what is older than the `keep` newest that are known to be whole; what is not ours stays."""
        kept = sorted(step for step in self._whole if self._folder(step).is_dir())[-self.keep :]
        if len(kept) < self.keep:
            return
        old = [self._folder(step) for step in self._steps() if step < kept[0]]
        scratch = self.run / SCRATCH
        scratch.mkdir()
        for folder in filter(self._is_ours, old):
            folder.rename(scratch / folder.name)  # first, so that never half a checkpoint has its name
        self._tidy()

    def _is_ours(self, folder: Path) -> bool:
        try:
            return bool(_opened(folder)[0]["identity"] == self.identity)
        except CorruptError:
            return False


def _opened(folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """The manifest of a checkpoint, and its other files by their names; what is in these is not looked at."""
    name = NAME.fullmatch(folder.name)
    if not name or folder.is_symlink() or not folder.is_dir():
        raise CorruptError(f"{folder} is no folder of the name checkpoint-STEP: delete it or give it another name")
    files = _listed(folder)
    manifest = read_manifest(folder)
    if manifest.get("format") != FORMAT:
        raise CorruptError(f"{folder} has format {manifest.get('format')!r}, this version reads {FORMAT}")
    if {field: type(value) for field, value in manifest.items()} != FIELDS:
        raise CorruptError(f"{folder / MANIFEST} is damaged: delete the folder")
    if manifest["step"] != int(name[1]):
        raise CorruptError(f"{folder} holds step {manifest['step']}: delete it or give it its name back")
    del files[MANIFEST]
    return manifest, files


def _listed(folder: Path) -> dict[str, Path]:
    """Every file in the folder and below, by its path from there; nothing is followed out of it."""
    found = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise CorruptError(f"{folder} is not as it was written, delete it: {path.name!r} is no plain file")
        if stat.S_ISREG(mode):
            found[path.relative_to(folder).as_posix()] = path
    return found


def _forget(folder: Path) -> None:
    """Let the system forget what it remembers of the files, so that the disk is asked when they are read again."""
    for file in _listed(folder).values() if hasattr(os, "posix_fadvise") else ():
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
