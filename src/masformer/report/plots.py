"""Plots as inline SVG: text and axes in the page's own colour, series in colours that hold on light and dark.

Series differ by marker and line style, groups of bars by hatching, never by colour alone. The result is a string
that starts with `<svg`; its ids are unique to its content, so that several fit into one page. The same numbers give
the same bytes under one version of matplotlib.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import math
import re
import warnings
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
    "text.parse_math": False,  # a label with a dollar is a label
    "hatch.linewidth": 0.8,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
LABELLED_BARS = 16  # more bars than this carry no number: the numbers would touch
LABELLED_POINTS = 8  # more points than this are told apart by a legend alone
WIDE = 4  # from this ratio of the largest place to the smallest on, an axis may be logarithmic
CROWDED = 40  # a curve with more points than this has no markers
SLANTED: dict[str, Any] = {"rotation": 30, "ha": "right"}
Point = tuple[float, float] | tuple[float, float, float | None, float | None]
Box = tuple[float, float, float, float]


def loss_by_position(series: Mapping[str, Sequence[tuple[float, float]]], *, ylabel: str = "loss (nats/token)") -> str:
    """Curves of (position in tokens, loss), lower is better; a logarithmic axis of positions when they span 4 times.

    Raises:
        ValueError: no series, or a series without points.
        InputError: matplotlib is not installed.
    """
    if not series or not all(series.values()):
        raise ValueError("loss_by_position needs at least one series, and a point in each")
    return lines(series, "position in the document (tokens)", ylabel, wide=True)


def lines(
    series: Mapping[str, Sequence[Point]],
    xlabel: str,
    ylabel: str,
    *,
    order: Sequence[str] = (),
    wide: bool = False,
    marks: Mapping[float, str] | None = None,
    zero: bool = False,
) -> str:
    """Curves of (x, y), or of (x, y, low, high) with error bars where low is known.

    Args:
        order: labels of all plots of the page, so that a label has the same style in each of them.
        wide: the x axis is logarithmic where it spans 4 times.
        marks: words at places of the x axis, instead of numbers.
        zero: draw the line y = 0.

    Raises:
        ValueError: no series, or a series without points.
        InputError: matplotlib is not installed.
    """
    if not series or not all(series.values()):
        raise ValueError("lines needs at least one series, and a point in each")
    with drawing() as (figure, axes):
        if zero:
            axes.axhline(0, color=INK, linewidth=0.8)
        for label, points in series.items():
            _curve(axes, label, points, _rank(label, order or list(series)))
        places = [point[0] for points in series.values() for point in points]
        if marks is not None:
            slanted = len("  ".join(marks.values())) > 45
            axes.set_xticks(list(marks), list(marks.values()), **(SLANTED if slanted else {}))
        elif wide:
            _scale_positions(axes, places)
        else:
            axes.xaxis.set_major_locator(_whole_numbers())
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(color=INK, alpha=0.15, linewidth=0.6)
        return as_svg(figure, axes, list(series))


def _curve(axes: Axes, label: str, points: Sequence[Point], rank: int) -> None:
    turn = rank + rank // len(COLOURS)  # the seventh series shares its colour with the first, but no line style
    style = {"color": _turn(COLOURS, rank), "linestyle": _turn(LINES, turn), "marker": _turn(MARKERS, rank)}
    if len(points) > CROWDED:
        style["marker"] = ""
    places, values = [float(point[0]) for point in points], [float(point[1]) for point in points]
    axes.plot(places, values, label=short(label), markersize=4.5, linewidth=1.6, **style)
    for point in points:
        if len(point) == 4 and point[2] is not None and point[3] is not None:
            ends = [point[2], point[3]]
            axes.plot([point[0]] * 2, ends, color=style["color"], linewidth=1, marker="_", markersize=5)


def trade_off(points: Mapping[str, tuple[float, float]], xlabel: str, ylabel: str, *, more: bool = False) -> str:
    """Labelled points of (cost, quality); a line joins those that no other point beats in both.

    Args:
        more: a higher quality is better; else a lower one is.

    Raises:
        ValueError: no points.
        InputError: matplotlib is not installed.
    """
    if not points:
        raise ValueError("trade_off needs at least one point")
    with drawing() as (figure, axes):
        best = sorted(points[label] for label in undominated(points, more=more))
        axes.plot(*zip(*best, strict=True), color=INK, alpha=0.5, linewidth=1.2, linestyle="--")
        for rank, (label, (x, y)) in enumerate(points.items()):
            style = {"color": _turn(COLOURS, rank), "marker": _turn(MARKERS, rank)}
            axes.plot([x], [y], label=short(label), linestyle="", markersize=7, **style)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.margins(0.12, 0.15)
        axes.grid(color=INK, alpha=0.15, linewidth=0.6)
        _label_points(figure, axes, [(short(label, 24), point) for label, point in points.items()], best)
        return as_svg(figure, axes, list(points) if len(points) > LABELLED_POINTS else [])


def undominated(points: Mapping[str, tuple[float, float]], *, more: bool = False) -> list[str]:
    """The labels whose point no other beats: none costs at most as much and is at least as good, and not the same."""
    sign = -1 if more else 1
    costs = {label: (x, sign * y) for label, (x, y) in points.items()}
    return [
        label
        for label, (x, y) in costs.items()
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in costs.values())
    ]


def _label_points(
    figure: Figure, axes: Axes, points: Sequence[tuple[str, tuple[float, float]]], line: Sequence[tuple[float, float]]
) -> None:
    """Each label beside its point where it covers least of the line, of points and of labels; none of too many."""
    if len(points) > LABELLED_POINTS:
        return
    notes = [axes.annotate(label, point, (0, 0), textcoords="offset points", fontsize=9) for label, point in points]
    figure.draw_without_rendering()
    places = [tuple(axes.transData.transform(point)) for _, point in points]
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    taken += [(x - 2, y - 2, x + 2, y + 2) for x, y in _along(axes.transData.transform(line))]
    for note, (x, y) in zip(notes, places, strict=True):
        extent = note.get_window_extent()
        tried = list(_beside(x, y, extent.width, extent.height))
        bad = [sum(_area(box, other) for other in taken) + _beyond(box, axes.get_window_extent()) for box in tried]
        chosen = tried[bad.index(min(bad))]
        taken.append(chosen)
        note.set_position(((chosen[0] - x) * 72 / figure.dpi, (chosen[1] + 2 - y) * 72 / figure.dpi))


def _beside(x: float, y: float, width: float, height: float) -> Iterator[Box]:
    """Where a label may stand: right, left, above, below, and at the corners, all in pixels."""
    for dx, dy in ((9, 0), (-9, 0), (0, 9), (0, -9), (7, 7), (-7, 7), (7, -7), (-7, -7)):
        left = x + dx - (width if dx < 0 else width / 2 if dx == 0 else 0)
        low = y + dy - (height if dy < 0 else height / 2 if dy == 0 else 0)
        yield left, low, left + width, low + height


def _along(corners: Any) -> Iterator[tuple[float, float]]:
    """Points of a line, a few pixels apart."""
    for (x, y), (u, v) in itertools.pairwise(corners):
        steps = max(1, int(math.hypot(u - x, v - y) / 4))
        for step in range(steps):
            yield x + (u - x) * step / steps, y + (v - y) * step / steps


def _area(one: Box, other: Box) -> float:
    """Where two boxes cover each other."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def _beyond(box: Box, frame: Any) -> float:
    """How much of a box lies outside the frame; worse than covering as much."""
    inside = _area(box, (frame.x0, frame.y0, frame.x1, frame.y1))
    return 3 * ((box[2] - box[0]) * (box[3] - box[1]) - inside)


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
    with drawing() as (figure, axes):
        for rank, (name, values) in enumerate(groups.items()):
            places = [place + (rank - (len(groups) - 1) / 2) * width for place in range(len(labels))]
            fill = {"color": _turn(COLOURS, rank), "hatch": _turn(HATCHES, rank), "edgecolor": PAPER}
            drawn = axes.bar(places, values, width, label=short(name), linewidth=0.5, **fill)
            if len(groups) * len(labels) <= LABELLED_BARS:
                axes.bar_label(drawn, labels=[_number(value) for value in values], padding=2, fontsize=8, color=INK)
        _label_bars(axes, labels)
        axes.set_ylabel(ylabel)
        axes.margins(y=0.12)
        return as_svg(figure, axes, list(groups) if len(groups) > 1 else [])


def layer_bars(values: Sequence[float], full: Sequence[Sequence[int]], marked: Sequence[Sequence[int]]) -> str:
    """A small picture with a bar for every layer, pale where the layer is in none of `full`.

    Args:
        full: layers of each fill; one that is in several has the first. marked: layers of each sign above the bars.

    Raises:
        ValueError: no values.
        InputError: matplotlib is not installed.
    """
    if not values:
        raise ValueError("layer_bars needs at least one layer")
    with drawing(3.4, 1.9 + 0.1 * len(marked)) as (figure, axes):
        filled = [
            next((rank for rank, layers in enumerate(full) if place in layers), None) for place in range(len(values))
        ]
        for place, (value, rank) in enumerate(zip(values, filled, strict=True)):
            if rank is None:
                axes.bar([place], [value], 0.8, color=COLOURS[-1], alpha=0.45)
            else:
                fill = {"color": _turn(COLOURS, rank), "hatch": _turn(HATCHES, rank), "edgecolor": PAPER}
                axes.bar([place], [value], 0.8, linewidth=0, **fill)
        for rank, layers in enumerate(marked):
            height = [1.05 + 0.09 * rank] * len(layers)
            sign = {"marker": _turn(MARKERS, rank), "color": _turn(COLOURS, rank), "linestyle": ""}
            axes.plot(list(layers), height, transform=axes.get_xaxis_transform(), clip_on=False, markersize=4, **sign)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set(xlabel="layer", xlim=(-0.8, len(values) - 0.2))
        axes.xaxis.set_major_locator(_whole_numbers())
        axes.yaxis.set_major_locator(_few_numbers())
        return as_svg(figure, axes, [])


def short(label: str, letters: int = 48) -> str:
    """One line of at most so many letters; the middle of a longer label is left out."""
    label = " ".join("".join(letter if letter.isprintable() else " " for letter in label).split())
    half = (letters - 1) // 2
    label = label if len(label) <= letters else f"{label[:half]}…{label[-half:]}"
    return label if not label.startswith("_") else f"\u200b{label}"  # matplotlib hides what begins with _


def _rank(label: str, order: Sequence[str]) -> int:
    return order.index(label) if label in order else len(order)


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6, integer=True)


def _few_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4)


def _turn(values: Sequence[Any], rank: int) -> Any:
    return values[rank % len(values)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _scale_positions(axes: Axes, positions: list[float]) -> None:
    if min(positions) > 0 and max(positions) >= WIDE * min(positions):
        axes.set_xscale("log", base=2)
        low, high = math.ceil(math.log2(min(positions))), math.floor(math.log2(max(positions)))
        axes.set_xticks([2.0**power for power in range(low, high + 1, 1 + (high - low) // 8)])
        axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _label_bars(axes: Axes, labels: Sequence[str]) -> None:
    slanted = max(map(len, labels)) * len(labels) > 50
    axes.set_xticks(range(len(labels)), [short(label, 32) for label in labels], **(SLANTED if slanted else {}))
    axes.tick_params(axis="x", length=0)


@contextlib.contextmanager
def drawing(width: float = 4.4, height: float = 3.1) -> Iterator[tuple[Figure, Axes]]:
    """A figure of its own, in inches, outside pyplot."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install 'masformer[eval]'") from error
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the reader's fonts draw the text
        matplotlib.rcdefaults()  # the reader's matplotlibrc must not change the page
        matplotlib.rcParams.update(SETTINGS)
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def as_svg(figure: Figure, axes: Axes, names: Sequence[str]) -> str:
    """The figure with a legend for `names`, if there are any, as an `<svg>` element."""
    if names:
        longest = max(len(short(name)) for name in names)
        columns = max(1, min(len(names), 3, 52 // (longest + 7)))  # the figure is 52 letters wide
        rows = -(-len(names) // columns)
        figure.set_figheight(figure.get_figheight() + 0.21 * (rows - 1))  # a long legend must not press the axes flat
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
