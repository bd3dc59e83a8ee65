"""Peak memory and time of a forward and backward through one local layer, by length: both must grow linearly.

    python -m benchmarks.memory [--out benchmarks/results/memory.json]

Linux only: the peak is the operating system's (VmHWM in /proc/self/status, set back just before), above what the
process held with the inputs made. Output and gradients are counted. Each length runs in a process of its own, and
the time is that of a second pass. Full attention on torch's own kernel stands beside, up to 16k.
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

LENGTHS = (4096, 8192, 16384, 32768, 65536)
SPANS = ("block:512", "block:256:lookback=1", "window:512", "window:512:sinks=4", "full")
FULL_UP_TO = 16384
HEADS, KV_HEADS, DIM = 8, 4, 64


def one(span_text: str, length: int) -> dict[str, float]:
    """Run in the child: bytes at the peak above the inputs, and seconds of a second pass."""
    import torch

    from masformer.attention import attend
    from masformer.spans import parse_span

    torch.manual_seed(0)
    q = torch.randn(1, HEADS, length, DIM, requires_grad=True)
    k, v = (torch.randn(1, KV_HEADS, length, DIM, requires_grad=True) for _ in range(2))
    small = [x[:, :, :64].detach().requires_grad_() for x in (q, k, v)]
    attend(*small, parse_span(span_text)).sum().backward()  # loads the kernels before the peak is noted
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    attend(q, k, v, parse_span(span_text)).sum().backward()
    peak = resident("VmHWM") - before
    started = time.perf_counter()
    attend(q, k, v, parse_span(span_text)).sum().backward()
    return {"seconds": time.perf_counter() - started, "bytes": peak}


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def check() -> None:
    """Refuse to measure what is wrong: every span against the reference, at an odd length."""
    import torch

    from masformer.attention import attend
    from masformer.attention.reference import reference
    from masformer.spans import parse_span

    q, k, v = (torch.randn(1, 2, 1500, 16, dtype=torch.float64) for _ in range(3))
    for text in SPANS:
        error = (attend(q, k, v, parse_span(text)) - reference(q, k, v, parse_span(text))).abs().max()
        if not error < 1e-12:
            sys.exit(f"{text} is wrong by {error}: nothing was measured")


def exponent(lengths: list[int], values: list[float]) -> float:
    """Slope of log(value) over log(length), by least squares."""
    x, y = [math.log(n) for n in lengths], [math.log(value) for value in values]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def measure(span: str) -> dict[str, Any]:
    lengths = [n for n in LENGTHS if span != "full" or n <= FULL_UP_TO]
    rows = []
    for length in lengths:
        child = [sys.executable, "-m", "benchmarks.memory", "--one", span, str(length)]
        rows.append(json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout))
        print(f"{span:24} {length:7,} {rows[-1]['bytes'] / 2**20:9.1f} MiB {rows[-1]['seconds']:8.3f} s", flush=True)
    growth = {name: exponent(lengths, [row[name] for row in rows]) for name in ("bytes", "seconds")}
    print(f"{span:24} grows as T^{growth['bytes']:.2f} in memory, T^{growth['seconds']:.2f} in time\n", flush=True)
    return {"span": span, "lengths": lengths, "rows": rows, "exponents": growth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.json"))
    parser.add_argument("--one", nargs=2, metavar=("SPAN", "LENGTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one[0], int(arguments.one[1]))))
        return
    check()
    import torch

    from .measure import machine

    print(
        f"forward and backward, {HEADS} heads, {KV_HEADS} key heads, dim {DIM}, fp32, {torch.get_num_threads()} threads"
    )
    results = [measure(span) for span in SPANS]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
