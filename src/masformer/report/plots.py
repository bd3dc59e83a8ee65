"""Plots as inline SVG: text and axes in the page's own colour, series in colours that hold on light and dark.

Series differ by marker and line style, groups of bars by hatching, never by colour alone. The result is a string
that starts with `<svg`; its ids are unique to its content, so that several fit into one page. The same numbers give
the same bytes under one version of matplotlib.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from masformer.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Each has at least 3:1 against white and against #16181d; told apart with the common colour blindnesses.
COLOURS = ("#0d7cc4", "#d55e00", "#009e73", "#b565a7", "#8a7a1f", "#7d7d85")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P")
HATCHES = ("", "////", "---", "xxx", "\\\\\\\\", "|||")  # those of dots and stars weigh 200 kB in an SVG
INK, PAPER = "#010203", "#fdfcfb"  # stand for the page's text colour and background until the SVG is written
SETTINGS: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "svg.hashsalt": "masformer",
    "svg.fonttype": "none",
    "hatch.linewidth": 0.8,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
LABELLED_BARS = 16  # more bars than this carry no number: the numbers would touch


def loss_by_position(series: Mapping[str, Sequence[tuple[float, float]]], *, ylabel: str = "loss (nats/token)") -> str:
    """Curves of (position in tokens, loss), lower is better; a logarithmic axis of positions when they span 16 times.

    Raises:
        ValueError: no series, or a series without points.
        InputError: matplotlib is not installed.
    """
    if not series or not all(series.values()):
        raise ValueError("loss_by_position needs at least one series, and a point in each")
    with _figure() as (figure, axes):
        for rank, (label, points) in enumerate(series.items()):
            style = {"color": _turn(COLOURS, rank), "linestyle": _turn(LINES, rank), "marker": _turn(MARKERS, rank)}
            axes.plot(*zip(*points, strict=True), label=label, markersize=4.5, linewidth=1.6, **style)
        _scale_positions(axes, [position for points in series.values() for position, _ in points])
        axes.set(xlabel="position in the document (tokens)", ylabel=ylabel)
        axes.grid(color=INK, alpha=0.15, linewidth=0.6)
        return _finish(figure, axes, list(series))


def bars(labels: Sequence[str], groups: Mapping[str, Sequence[float]], ylabel: str) -> str:
    """Bars side by side: for every label one of each group, with its number above where there is room.

    Raises:
        ValueError: no labels or groups, or a group with another number of values than there are labels.
        InputError: matplotlib is not installed.
    """
    wrong = {name: len(values) for name, values in groups.items() if len(values) != len(labels)}
    if not labels or not groups or wrong:
        raise ValueError(f"bars needs labels, and in every group a value for each of {len(labels)} labels; got {wrong}")
    width = 0.8 / len(groups)
    with _figure() as (figure, axes):
        for rank, (name, values) in enumerate(groups.items()):
            places = [place + (rank - (len(groups) - 1) / 2) * width for place in range(len(labels))]
            fill = {"color": _turn(COLOURS, rank), "hatch": _turn(HATCHES, rank), "edgecolor": PAPER}
            drawn = axes.bar(places, values, width, label=name, linewidth=0.5, **fill)
            if len(groups) * len(labels) <= LABELLED_BARS:
                axes.bar_label(drawn, labels=[_number(value) for value in values], padding=2, fontsize=8, color=INK)
        _label_bars(axes, labels)
        axes.set_ylabel(ylabel)
        axes.margins(y=0.12)
        return _finish(figure, axes, list(groups) if len(groups) > 1 else [])


def _turn(values: Sequence[Any], rank: int) -> Any:
    return values[rank % len(values)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _scale_positions(axes: Axes, positions: list[float]) -> None:
    if min(positions) > 0 and max(positions) >= 16 * min(positions):
        axes.set_xscale("log", base=2)
        low, high = math.ceil(math.log2(min(positions))), math.floor(math.log2(max(positions)))
        axes.set_xticks([2.0**power for power in range(low, high + 1, 1 + (high - low) // 8)])
        axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _label_bars(axes: Axes, labels: Sequence[str]) -> None:
    slanted = max(map(len, labels)) * len(labels) > 50
    axes.set_xticks(range(len(labels)), labels, rotation=30 if slanted else 0, ha="right" if slanted else "center")
    axes.tick_params(axis="x", length=0)


@contextlib.contextmanager
def _figure() -> Iterator[tuple[Figure, Axes]]:
    """A figure of its own, 5 by 3.3 inches, outside pyplot."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install 'masformer[demo]'") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the reader's matplotlibrc must not change the page
        matplotlib.rcParams.update(SETTINGS)
        figure = Figure(figsize=(5, 3.3), layout="constrained")
        yield figure, figure.add_subplot()


def _finish(figure: Figure, axes: Axes, names: Sequence[str]) -> str:
    if names:
        columns = max(1, min(len(names), 3, 60 // (max(map(len, names)) + 7)))  # the figure is 60 letters wide
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return _inline(stream.getvalue())


def _inline(svg: str) -> str:
    """The `<svg>` element alone: no prologue or metadata, the page's colours, no id that nothing refers to."""
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # matplotlib's style sheet names every element (*), which would reach the whole page
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = svg.replace("<svg ", '<svg style="stroke-linejoin: round; stroke-linecap: butt" ', 1)
    svg = svg.replace(INK, "currentColor").replace(PAPER, "var(--ground, #fff)")
    prefix = "p" + hashlib.sha256(svg.encode()).hexdigest()[:8]
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{prefix}{found[1]}"' if found[1] in used else "", svg)
    return re.sub(r'(href="|url\()#', rf"\1#{prefix}", svg).strip()
