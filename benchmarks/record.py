"""Rows that are kept as they come, within the time that is left, and how a call is timed on a GPU."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from masformer.training.meter import spread

GUESS = 10.0
"""Seconds that a row may take of which none like it was measured."""

Measured = dict[str, Any]


class Record:
    """The results so far, in a file that is written at every row, and the time that is left."""

    def __init__(self, path: Path, deadline: float, **facts: Any) -> None:
        self.path, self.deadline, self.began = path, deadline, time.perf_counter()
        self.results: dict[str, Any] = {
            **facts,
            "check": [],
            "op": [],
            "training": [],
            "skipped": [],
            "complete": False,
        }
        self.took: dict[tuple[str, ...], float] = {}

    def row(self, section: str, kind: tuple[str, ...], row: Measured, measure: Callable[[], Measured]) -> Measured:
        """Measure and note one row, if one of this kind, four times as long as the last one, still fits."""
        expected = 4 * self.took.get(kind, GUESS / 4)
        started = time.perf_counter()
        if started - self.began + expected > self.deadline:
            self.results["skipped"].append({"section": section, **row})
            found = {"failed": "no time left"}
        else:
            found = attempted(measure)
            self.took[kind] = time.perf_counter() - started
            self.results[section].append({**row, **found})
        self.write()
        return found

    def write(self) -> None:
        self.results["seconds"] = time.perf_counter() - self.began
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.results, indent=1) + "\n")


def attempted(measure: Callable[[], Measured]) -> Measured:
    """What was measured, or why not."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        found = {"failed": "out of memory"}
    except RuntimeError as error:
        found = {"failed": str(error).splitlines()[0]}
    free()
    return found


def free() -> None:
    """Give back GPU memory that nothing holds; slow."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Of one call."""
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1e3


def timed(function: Callable[[], Any], device: torch.device, rounds: int) -> Measured:
    """Seconds of so many calls, fewer of slow ones; a first call warms up."""
    function()
    times = [seconds(function, device)]
    times += [seconds(function, device) for _ in range(min(rounds, 2 + int(1 / times[0])) - 1)]
    return {"seconds": summary(times)}


def summary(times: list[float]) -> dict[str, float]:
    return {**spread(times), "calls": len(times)}


def say(start: str, found: Measured, *names: str) -> None:
    if "failed" in found:
        print(start, found["failed"], flush=True)
        return
    numbers = "  ".join(f"{name} {found[name]:,.2f}" for name in names if found.get(name) is not None)
    print(f"{start} {found['seconds']['median'] * 1e3:10.2f} ms  {numbers}", flush=True)
