"""The pictures of docs/performance.md, from the committed results.

python -m benchmarks.plots [--results benchmarks/results] [--out docs/performance]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from masformer.report.plots import COLOURS, LINES, MARKERS, drawing

from .op import BLOCKS, CAUSAL, MASKED, WINDOWS

SHOWN = ("block:512", "window:512", "block:512:sinks=4", CAUSAL, MASKED, WINDOWS, BLOCKS)
PROGRAMS = {"native": "Ministral, windows", "windows": "windows of 512", "blocks": "blocks of 512"}
WHAT = {"training": "training", "prefill": "prefill", "decode": "decoding"}


def curves(series: Mapping[str, Sequence[tuple[float, float]]], title: str, ylabel: str, path: Path) -> None:
    """Both axes logarithmic: what grows with the length rises by 45 degrees."""
    with drawing(6.4, 4.6) as (figure, axes):
        for rank, (name, points) in enumerate(series.items()):
            turn = rank + rank // len(COLOURS)  # the seventh shares its colour with the first, but nothing else
            style = {"color": COLOURS[rank % len(COLOURS)], "marker": MARKERS[turn % len(MARKERS)]}
            axes.loglog(*zip(*points, strict=True), label=name, linestyle=LINES[turn % len(LINES)], **style)
        places = sorted({x for points in series.values() for x, _ in points})
        axes.set_xticks(places, [f"{int(x) // 1024}k" for x in places])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.minorticks_off()
        axes.set(xlabel="tokens", ylabel=ylabel, title=title)
        axes.grid(alpha=0.2, linewidth=0.6)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path, metadata={"Date": None})


def speedups(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Bars: how many times as fast as the parent."""
    groups = [(what, length) for what in WHAT for length in sorted({r["length"] for r in rows if r["what"] == what})]
    found = {(row["what"], row["length"], row["program"]): row["speedup"] for row in rows}
    with drawing(7.4, 3.6) as (figure, axes):
        for rank, (program, words) in enumerate(PROGRAMS.items()):
            heights = [(at, found.get((*group, program))) for at, group in enumerate(groups)]
            drawn = [(at + 0.27 * (rank - 1), height) for at, height in heights if height is not None]
            if not drawn:
                continue
            bars = axes.bar(*zip(*drawn, strict=True), 0.25, label=words, color=COLOURS[rank])
            axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(groups)), [f"{WHAT[what]}\n{length // 1024}k" for what, length in groups])
        axes.set(ylabel="times the parent's speed", title=title)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/performance"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    op, memory, model = (json.loads((given.results / f"{name}.json").read_text()) for name in ("op", "memory", "model"))
    both = [row for row in op["results"] if row["what"] == "forward and backward"]
    for dtype in ("float32", "bfloat16"):
        rows = [row for row in both if row["dtype"] == dtype]
        series = {
            name: [(row["length"], row["seconds"]["median"] * 1e3) for row in rows if row["op"] == name]
            for name in SHOWN
        }
        kept = {name: points for name, points in series.items() if points}
        curves(kept, f"one layer, forward and backward, {dtype}", "milliseconds", given.out / f"op-{dtype}.svg")
    grown = {
        row["op"]: [(n, one["bytes"] / 2**20) for n, one in zip(row["lengths"], row["rows"], strict=True)]
        for row in memory["results"]
        if row["op"] in SHOWN
    }
    curves(grown, "one layer, forward and backward, float32", "peak, MiB above the inputs", given.out / "memory.svg")
    title = f"SmolLM2-135M's shape, 4 of 30 layers full, {model['dtype']}, {model['threads']} threads"
    speedups(model["results"], title, given.out / "model.svg")


if __name__ == "__main__":
    main()
