"""How the command line speaks: exit codes, one-line errors, JSON, progress, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from .errors import InputError, MasformerError
from .spans import PlanError

INTERRUPTED = 130
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)

# typer carries its own copy of click from one version on, so the base of its errors has no public name.
USAGE_ERROR = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


class UsageError(typer.BadParameter):
    """A command line that cannot be meant: the message stands alone."""

    def format_message(self) -> str:
        return self.message


def at_least(least: int) -> Callable[[typer.CallbackParam, float | None], float | None]:
    """A check for an option's number; typer's own does not name the value."""

    def check(option: typer.CallbackParam, value: float | None) -> float | None:
        if value is not None and not value >= least:  # also refuses NaN
            raise UsageError(f"{option.opts[0]} must be at least {least}, got {value}")
        return value

    return check


def exit_code(error: BaseException) -> int:
    """What the documented exit codes say of an error; 1 is a defect of this program."""
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return INTERRUPTED
    if isinstance(error, USAGE_ERROR):
        return 2
    if isinstance(error, MasformerError):
        return error.exit_code
    if _out_of_resources(error):
        return 5
    if isinstance(error, (PlanError, OSError, *_loaded("masformer.attention", "UnsupportedSpan"))):
        return 3
    return 1


def _loaded(module: str, name: str) -> tuple[type, ...]:
    """An exception class of a module, if that is loaded: only then can it have been raised."""
    return (getattr(sys.modules[module], name),) if module in sys.modules else ()


def _out_of_resources(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, *_loaded("torch", "OutOfMemoryError"))):
        return True
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return True
    # torch on the CPU and safetensors have no class of their own for these.
    return any(words in str(error) for words in ("can't allocate memory", "No space left on device"))


def message(error: BaseException, code: int) -> str:
    if code == INTERRUPTED:
        return "interrupted"
    text = error.format_message() if isinstance(error, USAGE_ERROR) else str(error)  # type: ignore[attr-defined]
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(text.split()) or type(error).__name__
    if code == 5 and not isinstance(error, MasformerError):
        text = f"out of memory or disk space ({text[:300]})"
    if code == 1:
        text = f"internal error, please report it: {type(error).__name__}: {text} (--debug shows where)"
    return f"error: {text}"


def refuse_used(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} is not empty: name a new folder, or empty it first")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: name a new folder")
    _existing_parent(out)


def _existing_parent(target: Path) -> Path:
    parent = target.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{parent} does not exist: make it first")
    return parent


def write_whole(target: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file or folder beside `target`, then rename it: all of it is there, or nothing."""
    part = _existing_parent(target) / f".{target.absolute().name}.part-{os.getpid()}"
    try:
        write(part)
        for file in part.glob("*") if part.is_dir() else ():
            file.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
        part.replace(target)  # also onto an empty folder
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def progress(words: str, tokens: int) -> Iterator[Callable[[int], None]]:
    """A bar with tokens/s and time left on stderr, if that is a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    speed = TextColumn("{task.fields[speed]} tokens/s")
    columns = (TextColumn("{task.description}"), BarColumn(), speed, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(words, total=tokens, speed="-")

        def advance(done: int) -> None:
            bar.advance(task, done)
            rate = bar.tasks[0].speed
            bar.update(task, speed=f"{rate:,.0f}" if rate else "-")

        yield advance


def say(words: object) -> None:
    print(words, file=sys.stderr)


def print_json(facts: dict[str, Any]) -> None:
    print(json.dumps(facts, ensure_ascii=False, allow_nan=False))
