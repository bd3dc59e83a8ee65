"""Peak memory and time of a forward and backward through one layer, by length: local ones must grow linearly.

    python -m benchmarks.memory [--out benchmarks/results/memory.json]

Linux only: the peak is the operating system's (VmHWM in /proc/self/status, set back just before), above what the
process held with the inputs made. Output and gradients are counted. Each length runs in a process of its own, and
the time is that of a second pass. What is measured, and on which tensors, is that of `benchmarks.op` in float32: full
attention on torch's own kernel up to 16k, and the package local-attention beside ours.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .measure import machine
from .op import CAUSAL, check, made, plain_ops, run

LENGTHS = (4096, 8192, 16384, 32768, 65536)
FULL_UP_TO = 16384


def one(name: str, length: int) -> dict[str, float]:
    """Run in the child: bytes at the peak above the inputs, and seconds of a second pass."""
    op = plain_ops()[name][0]
    given, up = made(length, torch.float32)
    small = [x[:, :, :1024].detach().requires_grad_() for x in given]
    run(op, small, up[:, :, :1024])  # loads the kernels before the peak is noted
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    run(op, given, up)
    peak = resident("VmHWM") - before
    started = time.perf_counter()
    run(op, given, up)
    return {"seconds": time.perf_counter() - started, "bytes": peak}


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def exponent(lengths: list[int], values: list[float]) -> float:
    """Slope of log(value) over log(length), by least squares."""
    x, y = [math.log(n) for n in lengths], [math.log(value) for value in values]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def measure(name: str) -> dict[str, Any]:
    lengths = [n for n in LENGTHS if name != CAUSAL or n <= FULL_UP_TO]
    rows = []
    for length in lengths:
        child = [sys.executable, "-m", "benchmarks.memory", "--one", name, str(length)]
        rows.append(json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout))
        print(f"{name:28} {length:7,} {rows[-1]['bytes'] / 2**20:9.1f} MiB {rows[-1]['seconds']:8.3f} s", flush=True)
    growth = {what: exponent(lengths, [row[what] for row in rows]) for what in ("bytes", "seconds")}
    print(f"{name:28} grows as T^{growth['bytes']:.2f} in memory, T^{growth['seconds']:.2f} in time\n", flush=True)
    return {"op": name, "lengths": lengths, "rows": rows, "exponents": growth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.json"))
    parser.add_argument("--one", nargs=2, metavar=("OP", "LENGTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one[0], int(arguments.one[1]))))
        return
    check()
    results = [measure(name) for name in plain_ops()]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
