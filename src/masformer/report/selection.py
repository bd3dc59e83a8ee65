"""What selections found: which layers every method keeps full, how that measures, and whether it holds.

    selection_sections(read_results([Path("runs/select")]))

Held-out numbers are those of the evaluation in the folder; a plan that was trained is compared with the trained parent.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..selection.outcome import TRAINED
from . import tables
from .choices import Budget, Choice, Selection
from .gains import conclusions
from .page import Figure, Section, Table, number
from .places import both, read_documents
from .plots import layer_bars
from .runs import Results

FILLS = ("solid", "hatched", "striped", "crossed", "hatched the other way", "striped upright")
SIGNS = ("circles", "squares", "triangles", "diamonds", "triangles upside down", "crosses")
"""The words for `plots.HATCHES` and `plots.MARKERS`."""
DRAWN = "Further down, sentences and pictures are of the parent, all local and the chosen plans; the tables have all."
FEWEST = 3  # plans; fewer have no order that could hold
Overviews = Mapping[str, tables.Overview]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What a selection's plans measured on held-out data, by label of the plan: as chosen, and after the training.

    log_probability: by label of the evaluation. documents: what the loss was read of.
    """

    before: dict[str, tables.Overview]
    after: dict[str, tables.Overview]
    log_probability: dict[str, float | None]
    documents: str


def held_out(results: Results, selection: Selection) -> HeldOut:
    """As far as it was measured."""
    own = results.alone(selection.name)
    ending = f", {TRAINED}"
    for label, model in own.models.items():
        wanted = selection.parent.label + (ending if label.endswith(ending) else "")
        own.models[label] = dataclasses.replace(model, reference=wanted if wanted in own.models else label)
    rows = {row.model: row for row in tables.overview(own)}
    labels = dict.fromkeys(choice.label for choice in selection.choices())
    lengths = {label: row.loss_length for label, row in rows.items() if row.loss_length}
    return HeldOut(
        {label: rows[label] for label in labels if label in rows},
        {label: rows[label + ending] for label in labels if label + ending in rows},
        {row.model: row.log_probability for row in tables.recall(own, by=())},
        read_documents(own, lengths, max(lengths.values())) if lengths else "",
    )


def selection_sections(results: Results) -> list[Section]:
    """Two sections for every selection: the choices, and the scores by layer if a method gives any."""
    made = []
    for selection in results.selections:
        name = f": {selection.name}" if len(results.selections) > 1 else ""
        choices = _choices(selection, held_out(results, selection), name)
        if len(results.drawn) < len(results.models):
            choices = dataclasses.replace(choices, paragraphs=[*choices.paragraphs, DRAWN])
        made.append(choices)
        if selection.scores:
            made.append(_scores(selection, name))
    return made


def _choices(selection: Selection, tried: HeldOut, name: str) -> Section:
    words = [_asked(selection, tried)]
    free = {name: dataclasses.replace(row, kv_bytes=None, attention_flops=None) for name, row in tried.after.items()}
    for budget in selection.budgets:
        why = (
            f"measures best on the {selection.compared_on}" if budget.limit is None else "keeps to it at the least cost"
        )
        best = f"{budget.words}: {budget.chosen} {why}."
        words.append(f"{best} {_gained(selection, budget, tried.before)}".rstrip())
        words += filter(None, (_gained(selection, budget, free), _kept(budget, tried)))
    made = [_table(selection, budget, tried) for budget in selection.budgets]
    made += _agreement(selection, tried)
    plans = "\n".join(f"{budget.words}: --plan {budget.best.plan}" for budget in selection.budgets)
    return Section(f"Which layers stay full{name}", words, made, verbatim=[plans] if plans else [])


def _asked(selection: Selection, tried: HeldOut) -> str:
    items = selection.parent.items
    local = " or ".join(selection.local)
    probes = f"{_count(items, 'recall item')} and {_count(selection.probes - items, 'document')}"
    compared = "these" if selection.compared_on == "probes" else "checks, other recall items and documents"
    words = [
        f"Some layers of {selection.source} stay as they are, the others get {local}. The methods chose by the probes, "
        f"{probes} of {selection.length:,} tokens ({selection.made}), and are compared on "
        f"{compared}. A plan's nats are the mean per token of the answers plus that of the "
        "documents, and the plan of the fewest is chosen."
    ]
    if any(budget.limit is not None for budget in selection.budgets):
        words.append("Under a budget of nats it is the cheapest plan that keeps to it.")
    if tried.before:
        words.append("Held-out data had no say.")
    else:
        words.append("Nothing was tried on held-out data yet.")
    if tried.after:
        steps = _count(selection.train_steps, "step")
        words.append(f"Each plan was then trained for {steps}, and is compared with the parent trained as long.")
    return " ".join(words)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def _gained(selection: Selection, budget: Budget, rows: Overviews) -> str:
    """What the chosen plan gains and loses against the parent, as far as both were measured."""
    labels = dict.fromkeys((selection.parent.label, budget.best.label))
    return " ".join(conclusions([rows[label] for label in labels])) if rows.keys() >= labels.keys() else ""


def _kept(budget: Budget, tried: HeldOut) -> str:
    """Whether the training kept the order of the plans; nothing without one."""
    if not tried.after:
        return ""
    plans, *found = _correlations(budget, _quality(tried.before), _quality(tried.after))
    known = [
        f"by {what} {number(value, 2, sign=True)}"
        for what, value in zip(("loss", "recall"), found, strict=True)
        if value is not None
    ]
    if not known:
        return f"Of {_count(plans, 'plan')} no order can be compared before and after the training."
    return (
        f"Rank correlation of the {_count(plans, 'plan')} on held-out data before and after the training: "
        f"{', '.join(known)} (Spearman's; +1 is the same order, 0 none)."
    )


def _table(selection: Selection, budget: Budget, tried: HeldOut) -> Table:
    rows = {"parent": selection.parent, "all local": selection.shortest}
    by_nats = sorted(budget.plans, key=lambda method: budget.plans[method].nats)
    rows |= {f"{method}, chosen" if method == budget.chosen else method: budget.plans[method] for method in by_nats}
    sizes = len(selection.local) > 1
    headers = ["method", "full layers", *(["spans"] if sizes else [])]
    headers += [f"{selection.compared_on}: nats", "of recall", "of documents", "KL", "KV saved", "FLOPs saved"]
    columns = [_measured(selection)]
    for when, found in (("", tried.before), (TRAINED, tried.after)):
        if found:
            headers += _headers(when)
            columns.append(_on_held_out(tried, found, f", {when}" if when else ""))
    cells = [
        [
            method,
            listed(choice.plan.full_layers),
            *([tables.in_short(choice.plan)] if sizes else []),
            *(cell for column in columns for cell in column(choice)),
        ]
        for method, choice in rows.items()
    ]
    caption = (
        f"{budget.words}: what each method chose, the fewest nats first. KL is from the parent on the "
        f"{selection.compared_on}, savings are those of KV cache at its largest and of attention up to "
        f"{selection.length:,} tokens"
    )
    if tried.documents:
        caption += f", held-out loss is that of {tried.documents}, its difference is to the parent"
    return Table(headers, cells, caption)


def _headers(when: str) -> list[str]:
    first = f"{when or 'held-out'}: nats/token"
    after = f", {when}" if when else ""
    names = ("difference", "95 % interval of it", "recall", "95 % interval", "log p")
    return [first, *(f"{name}{after}" for name in names)]


def _measured(selection: Selection) -> Callable[[Choice], list[str]]:
    def cells(choice: Choice) -> list[str]:
        parent = selection.parent
        paid = (choice.kv_bytes, parent.kv_bytes), (choice.attention_flops, parent.attention_flops)
        saved = [1 - own / before if before else None for own, before in paid]
        measured = [number(value) for value in (choice.nats, choice.recall, choice.documents, choice.kl)]
        return measured + [number(share, 1, percent=True) for share in saved]

    return cells


def _on_held_out(tried: HeldOut, rows: Overviews, ending: str) -> Callable[[Choice], list[str]]:
    def cells(choice: Choice) -> list[str]:
        row = rows.get(choice.label)
        if row is None:
            return [number(None)] * len(_headers(""))
        log_probability = tried.log_probability.get(choice.label + ending)
        compared = [*both(row.difference, sign=True), *both(row.recall, 1, percent=True)]
        return [both(row.nats)[0], *compared, number(log_probability, 2)]

    return cells


def listed(layers: Sequence[int]) -> str:
    """`0, 4 to 7, 9`; a dash for none."""
    runs = [list(run) for _, run in itertools.groupby(layers, key=lambda layer: layer - layers.index(layer))]
    words = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(words) or number(None)


Quality = dict[str, tuple[float | None, float | None]]
"""By label: a loss, and a share of wrong answers; less is better of both."""


def _quality(rows: Overviews) -> Quality:
    return {
        label: (row.nats.value if row.nats else None, 1 - row.recall.value if row.recall else None)
        for label, row in rows.items()
    }


def _agreement(selection: Selection, tried: HeldOut) -> list[Table]:
    """Rank correlations between what the plans of a budget measured here and there."""
    before, after = _quality(tried.before), _quality(tried.after)
    cells = []
    for budget in selection.budgets:
        own: Quality = {label: (choice.nats, choice.nats) for label, choice in budget.distinct.items()}
        pairs = {f"{selection.compared_on} and held-out": (own, before)}
        if after:
            pairs |= {f"{selection.compared_on} and trained": (own, after), "held-out and trained": (before, after)}
        for words, (one, other) in pairs.items():
            plans, *found = _correlations(budget, one, other)
            if any(value is not None for value in found):
                cells.append([budget.words, words, f"{plans:,}", *(number(value, 2, sign=True) for value in found)])
    caption = (
        "How far two orders of the distinct plans of a budget agree: Spearman's rank correlation, +1 for the same "
        f"order, 0 for none; a dash where all are equal. On the {selection.compared_on} the order is that of the nats"
    )
    headers = ["budget", "orders", "plans", "by loss", "by recall"]
    return [Table(headers, cells, caption)] if cells else []


def _correlations(budget: Budget, one: Quality, other: Quality) -> tuple[int, float | None, float | None]:
    """How many distinct plans of the budget are in both, and the rank correlations by loss and by recall."""
    shared = [label for label in budget.distinct if label in one and label in other]
    loss, recall = (spearman([(one[label][part], other[label][part]) for label in shared]) for part in range(2))
    return len(shared), loss, recall


def spearman(pairs: Iterable[tuple[float | None, float | None]]) -> float | None:
    """The correlation of ranks, those of ties averaged; None of fewer than three pairs, or where all are equal."""
    known = [(x, y) for x, y in pairs if x is not None and y is not None]
    if len(known) < FEWEST:
        return None
    xs, ys = (ranks([pair[part] for pair in known]) for part in range(2))
    if len(set(xs)) == 1 or len(set(ys)) == 1:
        return None
    return statistics.correlation(xs, ys)


def ranks(values: Sequence[float]) -> list[float]:
    """From 1 for the lowest; equal values share the mean of their places."""
    order = sorted(values)
    return [order.index(value) + (order.count(value) + 1) / 2 for value in values]


def _scores(selection: Selection, name: str) -> Section:
    budgets = sorted(selection.budgets, key=lambda budget: len(budget.best.plan.full_layers))
    figures = []
    for method, values in selection.scores.items():
        own = [budget.plans[method].plan.full_layers if method in budget.plans else () for budget in budgets]
        svg = layer_bars(values, own, [budget.best.plan.full_layers for budget in budgets])
        highest = sorted(range(len(values)), key=lambda layer: -values[layer])[:4]
        alt = f"Scores of {method} by layer, highest at {listed(sorted(highest))}; numbers in the table"
        figures.append(Figure(alt, svg=svg, caption=method, small=True))
    fills = [
        f"{_turn(FILLS, rank)} {f'from that of {each.words} on' if rank else f'under the budget of {each.words}'}"
        for rank, each in enumerate(budgets)
    ]
    signs = [f"{_turn(SIGNS, rank)} with {each.words} ({each.chosen})" for rank, each in enumerate(budgets)]
    words = [
        "What each layer is worth to a method: the highest stay full. Every method has a unit of its own.",
        f"Bars of layers that the method keeps full are {', '.join(fills)}; pale ones stay local. Signs above the bars "
        f"show the full layers of the plan that was chosen in the end: {', '.join(signs)}.",
    ]
    columns = [[number(value, _digits(values)) for value in values] for values in selection.scores.values()]
    columns += [
        ["full" if n in each.best.plan.full_layers else "local" for n in range(len(each.best.plan))] for each in budgets
    ]
    headers = ["layer", *selection.scores, *(f"chosen with {each.words}" for each in budgets)]
    rows = [[str(layer), *cells] for layer, cells in enumerate(zip(*columns, strict=True))]
    return Section(
        f"Scores by layer{name}", words, [Table(headers, rows, "Scores by layer, and what was chosen")], figures
    )


def _turn(values: Sequence[str], rank: int) -> str:
    return values[rank % len(values)]


def _digits(values: Sequence[float]) -> int:
    """As many as show four figures of the largest."""
    largest = max(map(abs, values))
    return min(max(3 - math.floor(math.log10(largest)), 0), 9) if largest else 3
