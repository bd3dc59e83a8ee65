"""Accuracy by length and depth as a small inline SVG: the number stands in every cell, so colour only helps.

heat_map({(0.1, 1024): 1.0, (0.9, 1024): 0.4})
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from . import tables
from .page import Figure, Section, Table, interval, number
from .plots import INK, Point, as_svg, drawing, lines
from .runs import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# cividis, from low to high: told apart with the common colour blindnesses, and by lightness alone
STOPS = ((0.0, 0.135, 0.305), (0.34, 0.366, 0.433), (0.589, 0.577, 0.468), (0.817, 0.745, 0.369), (0.995, 0.909, 0.218))
DARK, LIGHT = "#010101", "#ffffff"
POSITION = "position in the document (tokens)"
INCHES = (0.62, 0.36)  # of a cell
Row = TypeVar("Row", tables.Recall, tables.Bucket)


def heat_map(scores: Mapping[tuple[float | None, int], float]) -> str:
    """Cells of (depth, length) with a score from 0 to 1, lengths to the right, depths downwards; None: no depth.

    A cell that is missing has a dash and no colour.

    Raises:
        ValueError: no scores.
        InputError: matplotlib is not installed.
    """
    if not scores:
        raise ValueError("heat_map needs at least one score")
    lengths = sorted({length for _, length in scores})
    depths = sorted({depth for depth, _ in scores}, key=lambda depth: -1.0 if depth is None else depth)
    size = (max(2.2, 0.9 + INCHES[0] * len(lengths)), max(1.0, 0.75 + INCHES[1] * len(depths)))
    with drawing(*size) as (figure, axes):
        for row, depth in enumerate(depths):
            for column, length in enumerate(lengths):
                _cell(axes, column, row, scores.get((depth, length)))
        axes.set(xlim=(-0.5, len(lengths) - 0.5), ylim=(len(depths) - 0.5, -0.5), xlabel="length (tokens)")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), ["all" if depth is None else f"{depth:g}" for depth in depths])
        axes.set_ylabel("" if depths == [None] else "depth")
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        return as_svg(figure, axes, [])


def colour(score: float) -> tuple[float, float, float]:
    """The ground of a cell: red, green and blue from 0 to 1."""
    place = min(max(score, 0.0), 1.0) * (len(STOPS) - 1)
    first = min(int(place), len(STOPS) - 2)
    share = place - first
    red, green, blue = ((1 - share) * a + share * b for a, b in zip(STOPS[first], STOPS[first + 1], strict=True))
    return red, green, blue


def ink_on(ground: tuple[float, float, float]) -> str:
    """White or nearly black, whichever contrasts more (relative luminance, WCAG 2.2)."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in ground]
    luminance = sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return DARK if luminance > 0.18 else LIGHT


def _cell(axes: Axes, column: int, row: int, score: float | None) -> None:
    from matplotlib.patches import Rectangle

    corner = (column - 0.48, row - 0.47)
    if score is None:
        axes.add_patch(Rectangle(corner, 0.96, 0.94, fill=False, edgecolor=INK, alpha=0.3, linewidth=0.6))
        axes.text(column, row, "\u2013", ha="center", va="center", color=INK)
        return
    ground = colour(score)
    axes.add_patch(Rectangle(corner, 0.96, 0.94, facecolor=ground, edgecolor="none"))
    axes.text(column, row, f"{score:.2f}", ha="center", va="center", color=ink_on(ground))


def both(estimate: tables.Estimate | None, digits: int = 3, *, sign: bool = False, percent: bool = False) -> list[str]:
    """Two cells: a mean, and its interval."""
    if estimate is None:
        return [number(None), number(None)]
    span = interval(estimate.low, estimate.high, digits, sign=sign, percent=percent)
    return [number(estimate.value, digits, sign=sign, percent=percent), span]


def spread(estimates: Iterable[tables.Estimate | None]) -> str:
    """What a caption says of intervals."""
    if any(estimate is not None and estimate.low is not None for estimate in estimates):
        return "with 95 % intervals over documents"
    return "without intervals, for one document gives none"


def read_documents(results: Results, labels: Iterable[str], length: int) -> str:
    """What the suite `loss` read: `documents of 4,096 tokens`, or whole ones in windows."""
    return " or ".join(
        f"documents of {length:,} tokens"
        if stride is None
        else f"whole documents in windows of {length:,} tokens, {stride:,} apart"
        for stride in dict.fromkeys(results.models[label].stride for label in labels)
    )


def recall_section(results: Results) -> Section | None:
    rows = tables.recall(results)
    if not rows:
        return None
    figures, order = [], {label: rank for rank, label in enumerate(results.models)}
    for task, label in sorted(
        {(row.task or "", row.model) for row in _drawn(results, rows)}, key=lambda pair: (pair[0], order[pair[1]])
    ):
        cells = [row for row in rows if (row.model, row.task) == (label, task) and row.length is not None]
        scores = {(row.depth, row.length or 0): row.score.value for row in cells}
        worst = min(cells, key=lambda row: row.score.value)
        lowest = f"lowest {worst.score.value:.2f} at {worst.length:,} tokens"
        alt = f"Heat map of {task} by length and depth, {label}: {lowest}; numbers in the table"
        figures.append(Figure(alt, svg=heat_map(scores), caption=f"{task}: {label}", small=True))
    by_length = tables.recall(results, by=("task", "length"))
    words = [
        "The share of items that were answered right, by how long the text is and at which depth the answer stands "
        "(0 is the beginning). Intervals are Wilson's; log p is the mean log-probability of the whole answer in nats, "
        "rank the mean place of its tokens, 1 being the best."
    ]
    made = [_recall_table(by_length, "Recall by task and length")]
    if any(row.depth is not None for row in rows):
        made.append(_recall_table(rows, "Recall by task, length and depth", depth=True))
    return Section("Recall", words, made, figures)


def _recall_table(rows: Sequence[tables.Recall], caption: str, *, depth: bool = False) -> Table:
    cells = [
        [
            row.model,
            row.task or "all",
            f"{row.length:,}" if row.length is not None else number(None),
            *([number(None) if row.depth is None else f"{row.depth:g}"] if depth else []),
            f"{row.items:,}",
            *both(row.score, 1, percent=True),
            number(row.log_probability, 2),
            number(row.rank, 1),
        ]
        for row in rows
    ]
    headers = [
        "model",
        "task",
        "length",
        *(["depth"] if depth else []),
        "items",
        "right",
        "95 % interval",
        "log p",
        "rank",
    ]
    return Table(headers, cells, caption)


def by_position(
    results: Results, rows: Sequence[tables.Bucket], what: str, unit: str, *, differences: bool = True
) -> tuple[list[Figure], list[Table]]:
    """Curves of the means and of the differences by position, and a table of each."""
    if not rows:
        return [], []
    order = results.drawn
    length, longest = _longest(_drawn(results, rows))
    documents = f"documents of {length:,} tokens"
    if what == "loss":
        documents = read_documents(results, (row.model for row in longest), length)
    where = f"by position, {documents}"
    svg = lines(_curves(longest), POSITION, f"{what} ({unit})", order=order, wide=True)
    figures = [Figure(f"{what} {where}; numbers in the table", svg=svg, caption=f"Mean {what} {where}")]
    made = [_pivot(rows, results, f"Mean {what} in {unit} by position, and how many tokens were counted")]
    if differences and (changes := _differences(longest)):
        svg = lines(changes, POSITION, "difference (nats/token)", order=order, wide=True, zero=True)
        found = (row.difference for row in longest)
        alt = f"Difference to the reference {where}; numbers in the table"
        caption = f"Difference to the reference {where}, {spread(found)}; above 0 is worse"
        figures.append(Figure(alt, svg=svg, caption=caption))
        made.append(_pivot(rows, results, "Difference to the reference by position", differences=True))
    return figures, made


def repeats_section(results: Results) -> Section | None:
    rows = tables.loss_by_repeat(results)
    if not rows:
        return None
    length, longest = _longest(_drawn(results, rows))
    documents = read_documents(results, (row.model for row in longest), length)
    starts = sorted({(row.high == 0, row.low) for row in longest})
    place = {start: float(rank) for rank, start in enumerate(starts)}
    marks = {place[row.high == 0, row.low]: _ticks(row) for row in longest}
    points = {
        label: [(place[r.high == 0, r.low], r.mean) for r in longest if r.model == label] for label in results.models
    }
    series = {label: found for label, found in points.items() if found}
    axis = "tokens since the 3-gram was last seen, at least"
    svg = lines(series, axis, "loss (nats/token)", order=results.drawn, marks=marks)
    caption = f"Mean loss by distance to the last occurrence, {documents}"
    made = [_pivot(rows, results, "Mean loss in nats/token by distance to the last occurrence of the token's 3-gram")]
    if any(row.difference for row in rows):
        made.append(_pivot(rows, results, "Difference to the reference by that distance", differences=True))
    words = [
        "A token whose last three tokens stood in the document before can be copied by a model that sees that far. "
        "Where the distance exceeds a local span, only full layers see it; never, a dash "
        "in the tables, means that it stood nowhere before."
    ]
    return Section(
        "Loss by repeat distance", words, made, [Figure(f"{caption}; numbers in the table", svg=svg, caption=caption)]
    )


def _ticks(bucket: tables.Bucket) -> str:
    if not bucket.high:
        return "never"
    return f"{bucket.low // 1024}k" if bucket.low >= 1024 and bucket.low % 1024 == 0 else str(bucket.low)


def _position(bucket: tables.Bucket) -> str:
    """A cell that sorts by where the bucket begins, `never` last."""
    if not bucket.high:
        return number(None)
    return f"{bucket.low:,}" if bucket.high - bucket.low <= 1 else f"{bucket.low:,} to {bucket.high - 1:,}"


def _drawn(results: Results, rows: Sequence[Row]) -> list[Row]:
    """The rows of the models that pictures are about, if there are any."""
    drawn = results.drawn
    return [row for row in rows if row.model in drawn] or list(rows)


def _longest(rows: Sequence[tables.Bucket]) -> tuple[int, list[tables.Bucket]]:
    """The rows at the longest length, and it."""
    longest = max(row.length for row in rows)
    return longest, [row for row in rows if row.length == longest]


def _pivot(rows: Sequence[tables.Bucket], results: Results, caption: str, *, differences: bool = False) -> Table:
    """A row for every length and bucket, a column for every model: means, or differences to the reference."""
    if differences:
        compared = {row.model for row in rows if row.difference}
        rows = [row for row in rows if row.model in compared]
        return _wide(rows, results, caption, lambda row: both(row.difference, sign=True)[0])
    return _wide(rows, results, caption, lambda row: number(row.mean))


def agreement_table(rows: Sequence[tables.Bucket], results: Results) -> Table:
    """How often the most probable token is the same, by position."""
    caption = "Agreement on the most probable token by position"
    return _wide(rows, results, caption, lambda row: number(row.agreement, 1, percent=True))


def _wide(rows: Sequence[tables.Bucket], results: Results, caption: str, cell: Callable[[tables.Bucket], str]) -> Table:
    by_place: dict[tuple[int, int, int], dict[str, tables.Bucket]] = {}
    for row in rows:
        by_place.setdefault((row.length, row.high == 0, row.low), {})[row.model] = row
    models = [label for label in results.models if any(row.model == label for row in rows)]
    body = []
    for (length, *_), found in sorted(by_place.items()):
        some = next(iter(found.values()))
        cells = [cell(found[label]) if label in found else number(None) for label in models]
        body.append([_position(some), *cells, f"{length:,}", f"{some.tokens:,}"])
    return Table(["place", *models, "length", "tokens"], body, caption)


def _middle(bucket: tables.Bucket) -> float:
    return math.sqrt(max(bucket.low, 1) * max(bucket.high, 1))


def _curves(rows: Sequence[tables.Bucket]) -> dict[str, list[tuple[float, float]]]:
    """Means by position; before 16 there are few tokens and no plan differs."""
    kept = [row for row in rows if row.low >= 16] or rows
    return {
        label: [(_middle(r), r.mean) for r in kept if r.model == label]
        for label in dict.fromkeys(r.model for r in kept)
    }


def _differences(rows: Sequence[tables.Bucket]) -> dict[str, list[Point]]:
    points: dict[str, list[Point]] = {}
    for row in rows:
        if row.difference and row.low >= 16:
            change = row.difference
            points.setdefault(row.model, []).append((_middle(row), change.value, change.low, change.high))
    return points


def fidelity_section(results: Results) -> Section | None:
    rows = tables.fidelity(results)
    if not rows:
        return None
    cells = [
        [
            row.model,
            f"{row.length:,}",
            f"{row.documents:,}",
            f"{row.tokens:,}",
            *both(row.kl, 4),
            *both(row.agreement, 1, percent=True),
        ]
        for row in rows
    ]
    headers = [
        "model",
        "length",
        "documents",
        "tokens",
        "KL, nats",
        "95 % interval",
        "agreement",
        "95 % interval of it",
    ]
    buckets = tables.fidelity_by_position(results)
    figures, more = by_position(results, buckets, "KL", "nats/token", differences=False)
    if buckets:
        more.append(agreement_table(buckets, results))
    words = [
        "How far the predictions are from those of the first model of the run: KL(first, model) per token, and how "
        "often both find the same token most probable. Lower KL is closer; it says nothing of which one is right."
    ]
    return Section(
        "Fidelity by position", words, [Table(headers, cells, "Fidelity over all positions"), *more], figures
    )
