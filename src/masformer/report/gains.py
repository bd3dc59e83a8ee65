"""What a model gains and loses against its reference, in words, tables and pictures: quality and cost.

conclusions(tables.overview(results))
"""

from __future__ import annotations

from collections.abc import Sequence

from . import tables
from .page import Figure, Section, Table, interval, number
from .places import both, read_documents
from .plots import bars, trade_off, undominated
from .runs import Results

MB = 1e6
GFLOP = 1e9
COST_BARS = {"KV cache held": ("MB", "kv_bytes", MB), "attention of a prefill": ("GFLOP", "attention_flops", GFLOP)}


def conclusions(rows: Sequence[tables.Overview]) -> list[str]:
    """A sentence or two for every model that is compared with another: what was gained and what was lost."""
    by_name = {row.model: row for row in rows}
    words = [_conclusion(row, by_name[row.reference]) for row in rows if row.model != row.reference]
    return [text for text in words if text]


def _conclusion(row: tables.Overview, reference: tables.Overview) -> str:
    paid = (
        _share(row.kv_bytes, reference.kv_bytes, "less", "KV cache"),
        _share(row.attention_flops, reference.attention_flops, "fewer", "FLOPs of attention"),
    )
    gains, quality = " and ".join(filter(None, paid)), []
    if row.difference is not None:
        quality.append(f"its loss is {_change(row.difference)}")
    if row.recall is not None and row.reference_recall is not None:
        found, before = (number(score.value, 1, percent=True) for score in (row.recall, row.reference_recall))
        quality.append(f"it finds {found} of the recall items, {reference.model} {before}")
    words = [f"{row.model} needs {gains} than {reference.model} at {row.cost_length:,} tokens."] if gains else []
    if quality:
        text = "; ".join(quality)
        words.append(f"{text[0].upper()}{text[1:]}." if gains else f"{row.model} against {reference.model}: {text}.")
    return " ".join(words)


def _share(own: int | None, before: int | None, less: str, what: str) -> str:
    """`72.9 % less KV cache`; nothing where it is the same."""
    if own is None or not before or own == before:
        return ""
    return f"{number(abs(1 - own / before), 1, percent=True)} {less if own <= before else 'more'} {what}"


def _change(change: tables.Estimate) -> str:
    """`0.120 nats per token higher (95 % interval +0.100 to +0.140)`, with a doubt where that includes 0."""
    amount = f"{number(abs(change.value))} nats per token {'higher' if change.value > 0 else 'lower'}"
    if change.low is None or change.high is None:
        return f"{amount} (on one document, so without an interval)"
    doubt = ", which may be chance" if change.low <= 0 <= change.high else ""
    return f"{amount} (95 % interval {interval(change.low, change.high, sign=True)}{doubt})"


def overview_section(results: Results, rows: Sequence[tables.Overview]) -> Section | None:
    if not rows:
        return None
    read = {row.model: row.loss_length for row in rows if row.loss_length}
    documents = read_documents(results, read, max(read.values())) if read else "documents"
    paid = f"{_cost_length(rows):,} tokens" if _cost_length(rows) else "the longest length"
    cells = [
        [
            row.model,
            both(row.nats)[0],
            both(row.difference, sign=True)[0],
            both(row.recall, 1, percent=True)[0],
            number(row.recall_items or None, 0),
            number(row.kv_bytes and row.kv_bytes / MB, 1),
            number(row.attention_flops and row.attention_flops / GFLOP, 1),
            f"{len(row.full_layers)}/{row.layers}",
            row.plan,
        ]
        for row in rows
    ]
    headers = ["model", "nats/token", "difference", "recall", "recall items"]
    headers += ["KV, MB", "attention, GFLOP", "full layers", "plan"]
    caption = (
        f"Every model in a row. Loss of {documents}, its difference to the reference ({rows[0].model}) where it read "
        "the same; recall over the items of all tasks and lengths that the reference was measured on too; KV cache "
        f"held, and forward FLOPs of attention, for {paid}"
    )
    drawn = results.drawn
    words = conclusions([row for row in rows if row.model in drawn])
    return Section("What was gained and lost", words, [Table(headers, cells, caption)])


def cost_section(results: Results, drawn: Sequence[tables.Overview]) -> Section | None:
    rows = tables.cost(results)
    if not rows:
        return None
    cells = [
        [
            row.model,
            f"{row.length:,}",
            number(row.pairs / 1e6, 1),
            number(row.attention_flops / GFLOP, 1),
            number(row.prefill_flops / GFLOP, 1),
            number(row.training_flops / GFLOP, 1),
            number(row.decode_flops / GFLOP, 3),
            number(row.kv_bytes / MB, 2),
            number(row.kv_peak / MB, 2),
            number(row.saved, 1, percent=True),
        ]
        for row in rows
    ]
    headers = ["model", "length", "M pairs", "attention, GFLOP", "prefill, GFLOP", "training, GFLOP", "decode, GFLOP"]
    headers += ["KV held, MB", "KV peak, MB", "KV saved"]
    words = [
        "Counted for one document, not timed. Prefill is one forward, attention its part in the layers' attention; "
        "training adds the backward; decode is one more token. KV held is what the cache keeps after the document, KV "
        "peak the most alive during a prefill in one go; saved is against the reference."
    ]
    return Section("Cost and memory", words, [Table(headers, cells, "What each model costs")], _cost_bars(drawn))


def _cost_bars(overview: Sequence[tables.Overview]) -> list[Figure]:
    figures = []
    for name, (unit, field, scale) in COST_BARS.items():
        paid = {row.model: getattr(row, field) / scale for row in overview if row.cost_length is not None}
        if paid:
            caption = f"{name[0].upper()}{name[1:]} at {_cost_length(overview):,} tokens, {unit}"
            svg = bars(list(paid), {name: list(paid.values())}, f"{name} ({unit})")
            figures.append(Figure(f"{caption}, as in the table", svg=svg, caption=caption))
    return figures


def _cost_length(overview: Sequence[tables.Overview]) -> int:
    return next((row.cost_length for row in overview if row.cost_length), 0)


def trade_offs_section(overview: Sequence[tables.Overview]) -> Section | None:
    """Quality against the KV cache and against the FLOPs of attention, where two models can be compared."""
    figures = []
    for quality, unit, more in (("nats", "loss (nats/token)", False), ("recall", "recall (share right)", True)):
        for name, (cost_unit, field, scale) in COST_BARS.items():
            points = {
                row.model: (getattr(row, field) / scale, found.value)
                for row in overview
                if (found := getattr(row, quality)) is not None and row.cost_length is not None
            }
            if len(points) < 2:
                continue
            svg = trade_off(points, f"{name} ({cost_unit})", unit, more=more)
            better = "Left and up" if more else "Left and down"
            caption = f"{unit[0].upper()}{unit[1:]} against {name}. {better} is better"
            best = ", ".join(undominated(points, more=more))
            figures.append(Figure(f"{caption}; beaten by none: {best}", svg=svg, caption=caption))
    words = [
        f"Costs are those of {_cost_length(overview):,} tokens. The dashed line joins the models that no other one "
        "here beats in both; it does not take the intervals into account."
    ]
    return Section("Quality against cost", words, figures=figures) if figures else None
