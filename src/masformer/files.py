"""Folders of files that are whole or not there at all.

with disk_errors(target):
    ...                                       # fill the folder `built`, which lies beside `target`
    write_manifest(built, {"format": 1, ...})
    put(built, target)
read_manifest(target)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from .errors import CorruptError, InputError, MasformerError, ResourceError

if sys.platform != "win32":
    import fcntl

MANIFEST = "manifest.json"
READ = (".jinja", ".json", ".model", ".safetensors", ".txt")
"""What a model's files end with, as far as anything loads them; not the state of an optimiser, nor a README."""
LOADED = (".bin", ".json", ".safetensors")
"""Of what was added to a model's files later, this might be loaded in their place."""
WAYS_OUT = f"copy the folder again, or delete {MANIFEST} if the change is yours"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def described(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as manifests have them."""
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def digest(value: Any) -> str:
    """The SHA-256 of a value's canonical JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def difference(found: Any, expected: Any, name: str = "") -> str:
    """The first place where two JSON values differ, and both values; empty where they are equal."""
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = [*expected, *(key for key in found if key not in expected)]
        parts = (difference(found.get(key), expected.get(key), f"{name}.{key}".strip(".")) for key in keys)
        return next(filter(None, parts), "")
    return "" if found == expected else f"{name} is {found!r} in the state and {expected!r} here"


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest.json`, which must not be there yet: JSON with a digest of itself as its last field."""
    with (folder / MANIFEST).open("xb") as stream:
        stream.write(_encoded(json.loads(json.dumps(manifest))))


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` was given, as JSON gives it back.

    Raises:
        CorruptError: no manifest, or one of which a single byte is another.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise CorruptError(f"{folder} is not complete, delete it: {MANIFEST}: {error.strerror}") from error
    with contextlib.suppress(ValueError, RecursionError, AttributeError, TypeError, KeyError):
        manifest: Any = json.loads(content)
        manifest.pop("digest")
        if content == _encoded(manifest):
            return dict(manifest)
    raise CorruptError(f"{folder / MANIFEST} is damaged: delete the folder")


def _encoded(manifest: dict[str, Any]) -> bytes:
    return json.dumps({**manifest, "digest": digest(manifest)}, indent=1).encode()


def seal(folder: Path) -> None:
    """Write a manifest of a finished model's files, for `check_files`."""
    files = sorted(path for path in folder.iterdir() if path.suffix in READ)
    write_manifest(folder, {"format": 1, "files": {path.name: described(path) for path in files}})


def check_files(folder: Path, *names: str) -> None:
    """Compare a model's files with the manifest beside them, if there is one: those of these names, or all.

    Raises:
        CorruptError: a file that is missing or has other bytes than were written, or a damaged manifest.
    """
    if not is_ours(folder / MANIFEST):
        return
    try:
        recorded = read_manifest(folder)["files"]
    except CorruptError as error:
        raise CorruptError(f"{folder / MANIFEST} is damaged: copy the folder again") from error
    found = [name for name in recorded if name.endswith(READ)]
    known = {*recorded, MANIFEST}
    if added := [path.name for path in folder.iterdir() if path.suffix in LOADED and path.name not in known]:
        raise CorruptError(f"{folder / min(added)} was not there when {MANIFEST} was written: {WAYS_OUT}")
    for name in names or found:
        if name in recorded and (not (folder / name).is_file() or described(folder / name) != recorded[name]):
            raise CorruptError(f"{folder / name} is not what was written, {MANIFEST} has another SHA-256: {WAYS_OUT}")


def is_ours(file: Path) -> bool:
    """Whether a manifest, damaged or not, is one of a model's files; others may use the name for their own."""
    try:
        content = json.loads(file.read_bytes())
    except OSError:
        return False
    except (ValueError, RecursionError):
        return True
    return isinstance(content, dict) and bool({"digest", "files"} & content.keys())


def sync(folder: Path) -> None:
    """Wait until a folder and everything in it is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put(built: Path, target: Path) -> None:
    """Give a finished folder its name, once all of it is on the disk; both names are on one file system.

    Raises:
        FileExistsError: a folder that is not empty has this name; it is left as it is.
        OSError: the disk refused; then `target` is what it was, unless only the waiting for the new name failed.
    """
    sync(built)
    try:
        built.rename(target)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
    _sync(target.parent)


def locked(file: Path) -> int:
    """A handle of `file` under a lock that ends with the handle, or with this process, however it ends.

    Raises:
        InputError: another process has it.
    """
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    if sys.platform != "win32":
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if isinstance(error, BlockingIOError):
                raise InputError(
                    f"another process writes into {file.parent}: wait for its end or name another folder"
                ) from error
            raise
    return handle


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Inside, `target` is written: what the disk refuses becomes an error of one line.

    Raises:
        ResourceError: the disk, or what may be used of it, is full.
        InputError: a place that cannot be written for another reason.
    """
    try:
        yield
    except MasformerError:
        raise
    except Exception as error:
        # safetensors reports a full disk by its own exception, which is no OSError
        if getattr(error, "errno", None) in FULL or any(os.strerror(number) in str(error) for number in FULL):
            raise ResourceError(f"cannot write {target}: the disk is full; free some space") from error
        if isinstance(error, OSError):
            raise InputError(f"cannot write {error.filename or target}: {error.strerror or error}") from error
        raise


def append(file: Path, text: str) -> None:
    """Put text at the end of a file; it is on the disk when the call returns.

    Raises:
        ResourceError, InputError: as `disk_errors`.
    """
    with disk_errors(file.parent), file.open("a", encoding="utf-8") as stream:
        _settle(stream, text)


def replace(file: Path, text: str) -> None:
    """Make a file of text, whole or as it was, by way of `NAME.part`.

    Raises:
        ResourceError, InputError: as `disk_errors`.
    """
    part = file.with_name(f"{file.name}.part")
    with disk_errors(file.parent):
        with part.open("w", encoding="utf-8") as stream:
            _settle(stream, text)
        part.replace(file)


def _settle(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()
    os.fsync(stream.fileno())


def whole_lines(file: Path) -> bytes:
    """The lines of a file; a last one that was cut off is taken away, so that the next one begins a line."""
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)
    return content[:whole]
