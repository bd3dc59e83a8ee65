"""What the benchmarks share: interleaved times, and what a result depends on."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def interleaved(functions: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, dict[str, float]]:
    """Seconds of each: median, least and most of so many rounds, in which all take turns; a first one warms up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repetitions + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {
        name: {"median": statistics.median(found), "least": min(found), "most": max(found)}
        for name, found in times.items()
    }


def machine() -> dict[str, Any]:
    """What a result depends on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "commit": commit,
        "machine": platform.machine(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
