"""The report of runs: which sections the page has, in which order, and their words.

    write_report([Path("runs/eval"), Path("runs/recovery")], Path("report.html"))

A section is there only if there are numbers for it. Numbers come from `tables`, pictures from `plots`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from . import tables
from .page import Figure, Section, Table, interval, number, write_page
from .picture import plan_svg
from .places import both, by_position, fidelity_section, read_documents, recall_section, repeats_section, spread
from .plots import Point, bars, lines, trade_off, undominated
from .runs import Results, Training, caveats, counts, disagreements, harness_rows, read_results

MB = 1e6
GFLOP = 1e9
CURVE = 60  # points of a training curve; of more steps, means of neighbours are drawn
LEAD = "lead-75"
ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write one self-contained page about evaluation and training runs, and give back its path.

    Raises:
        InputError: a folder that is no run or holds no result; jinja2 or matplotlib is not installed; a page that
            cannot be written.
        CorruptError: a run that is damaged.
        ResourceError: the disk is full.
    """
    results = read_results(runs)
    return write_page(out, title=title(results), sections=sections(results))


def title(results: Results) -> str:
    """What the page is about."""
    if not results.models:
        return "Training: " + ", ".join(training.name for training in results.trainings)
    first, *others = results.models
    if not others:
        return f"Evaluation of {first}"
    return f"{first} against {others[0] if len(others) == 1 else f'{len(others)} other models'}"


def sections(results: Results) -> list[Section]:
    """All sections for which there are numbers."""
    overview = tables.overview(results)
    made = [
        _overview(results, overview),
        _plans(results),
        _loss(results),
        repeats_section(results),
        recall_section(results),
        _summary(results),
        fidelity_section(results),
        _cost(results, overview),
        _trade_offs(overview),
        _training(results),
        _harness(results),
        _notes(results),
        _how(results),
    ]
    return [section for section in made if section is not None]


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


def _overview(results: Results, rows: Sequence[tables.Overview]) -> Section | None:
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
    return Section("What was gained and lost", conclusions(rows), [Table(headers, cells, caption)])


def _plans(results: Results) -> Section | None:
    figures = []
    for label, model in results.models.items():
        full = ", ".join(map(str, model.plan.full_layers)) or "none"
        caption = f"{label}: {tables.in_short(model.plan)}. Full layers: {full}."
        if len(model.plan.full_layers) < len(model.plan):
            figures.append(Figure(f"Plan of {caption}", svg=plan_svg(model.plan, title=label), caption=caption))
    words = [
        "Each row is a layer; a bar covers what the last token sees. A model without a picture is full everywhere."
    ]
    return Section("The plans", words, figures=figures) if figures else None


def _loss(results: Results) -> Section | None:
    rows = tables.loss(results)
    if not rows:
        return None
    cells = [
        [
            row.model,
            f"{row.length:,}",
            f"{row.documents:,}",
            f"{row.tokens:,}",
            *both(row.nats),
            number(row.perplexity, 2),
            number(row.bits_per_byte),
            *both(row.difference, sign=True),
        ]
        for row in rows
    ]
    headers = ["model", "length", "documents", "tokens", "nats/token", "95 % interval", "perplexity", "bits/byte"]
    caption = "Loss over all positions. The difference to the reference is over the documents that both read"
    made = [Table([*headers, "difference", "95 % interval of it"], cells, caption)]
    words = ["Lower is better. Intervals resample documents; that of the difference resamples pairs."]
    if all(row.documents == 1 for row in rows):
        words = ["Lower is better. One document was read, so no interval is given."]
    figures, more = by_position(results, tables.loss_by_position(results), "loss", "nats/token")
    return Section("Loss by position", words, made + more, figures)


def _summary(results: Results) -> Section | None:
    rows = tables.summary(results)
    if not rows:
        return None
    figures = []
    for name in ("rouge1", "rougeL"):
        series: dict[str, list[Point]] = {}
        for row in rows:
            score = row.scores[name]
            series.setdefault(row.model, []).append((row.length, score.value, score.low, score.high))
        lead = {row.length: value for row in rows if (value := row.lead[name]) is not None}
        if lead:
            series[LEAD] = [*sorted(lead.items())]
        svg = lines(series, "input (tokens)", ROUGE[name], order=[*results.models, LEAD], wide=True)
        found = (row.scores[name] for row in rows)
        caption = f"{ROUGE[name]} by input length, {spread(found)}; higher is better"
        figures.append(Figure(f"{caption}; numbers in the table", svg=svg, caption=caption))
    cells = [
        [
            row.model,
            f"{row.length:,}",
            f"{row.documents:,}",
            f"{row.cut:,}",
            *(cell for name in tables.ROUGES for cell in (*both(row.scores[name]), number(row.lead[name]))),
        ]
        for row in rows
    ]
    scores = [cell for name in ROUGE.values() for cell in (name, f"{name}, 95 % interval", f"{name} of {LEAD}")]
    table = Table(
        ["model", "input", "documents", "cut", *scores], cells, "Summaries; cut: inputs longer than the length"
    )
    words = [
        f"Generated summaries against those that people wrote. {LEAD} takes the first 75 words of the document instead."
    ]
    return Section("Summaries by input length", words, [table], figures, _texts(results))


def _texts(results: Results) -> list[str]:
    """The summaries of one document at the longest length."""
    records = [record for record in results.records["summary"] if record.get("text")]
    if not records:
        return []
    last = max(record["length"] for record in records)
    longest = [record for record in records if record["length"] == last]
    item = min(record["item"] for record in longest)
    shown = [record for record in longest if record["item"] == item]
    return [f"{r['model']}, {r['document']}, {last:,} tokens:\n{str(r['text']).strip()}" for r in shown]


def _cost(results: Results, overview: Sequence[tables.Overview]) -> Section | None:
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
    return Section("Cost and memory", words, [Table(headers, cells, "What each model costs")], _cost_bars(overview))


COST_BARS = {"KV cache held": ("MB", "kv_bytes", MB), "attention of a prefill": ("GFLOP", "attention_flops", GFLOP)}


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


def _trade_offs(overview: Sequence[tables.Overview]) -> Section | None:
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
        "beats in both; it does not take the intervals into account."
    ]
    return Section("Quality against cost", words, figures=figures) if figures else None


def _training(results: Results) -> Section | None:
    if not results.trainings:
        return None
    curves = {
        f"Training loss (means of neighbouring steps where there are more than {CURVE})": {
            run.name: _thinned(run.curve("nats")) for run in results.trainings
        },
        **{
            f"Held-out loss, {kind}": {run.name: run.curve(f"eval_{kind}_loss") for run in results.trainings}
            for kind in sorted({kind for run in results.trainings for kind in run.kinds})
        },
    }
    figures = []
    for name, series in curves.items():
        known = {label: points for label, points in series.items() if points}
        if known:
            order = [run.name for run in results.trainings]
            svg = lines(known, "step", "loss (nats/token)", order=order)
            figures.append(Figure(f"{name} by step; its ends are in the table", svg=svg, caption=name))
    cells = [row for run in results.trainings for row in _training_rows(run)]
    headers = ["run", "loss", "steps", "at the first", "at the last", "difference"]
    caption = "Losses in nats/token at the first and last step where they were measured"
    facts = [
        f"{run.name}: {run.words}, {run.tokens:,} tokens in {len(run.steps):,} steps"
        + (f", {number(run.speed, 0)} tokens/s in the median" if run.speed is not None else "")
        + "."
        for run in results.trainings
    ]
    return Section("Training", facts, [Table(headers, cells, caption)], figures)


def _training_rows(run: Training) -> list[list[str]]:
    curves = {"training": run.curve("nats"), **{kind: run.curve(f"eval_{kind}_loss") for kind in run.kinds}}
    rows = []
    for kind, points in curves.items():
        if points:
            (_, first), (step, last) = points[0], points[-1]
            rows.append([run.name, kind, f"{step:,}", number(first), number(last), number(last - first, sign=True)])
    return rows


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `CURVE` points: means of as many neighbours each."""
    size = -(-len(points) // CURVE) or 1
    groups = [points[begin : begin + size] for begin in range(0, len(points), size)]
    return [(statistics.fmean(x for x, _ in group), statistics.fmean(y for _, y in group)) for group in groups]


def _harness(results: Results) -> Section | None:
    cells = [
        [
            record["model"],
            row["task"],
            row["metric"],
            number(row["value"], 4),
            number(row["stderr"], 4),
            number(row["items"], 0),
        ]
        for record in results.records.get("lm-eval", [])
        for row in harness_rows(record)
    ]
    headers = ["model", "task", "metric", "value", "standard error", "items"]
    words = ["Measured by lm-eval, EleutherAI's harness; the standard error is its own."]
    return Section("lm-eval", words, [Table(headers, cells, "Tasks of lm-eval")]) if cells else None


def _notes(results: Results) -> Section | None:
    words = [*caveats(results), *disagreements(results)]
    cells = [[suite, label, f"{count:,}"] for (suite, label), count in counts(results).items()]
    made = [Table(["suite", "model", "items"], cells, "How many items were measured")] if cells else []
    return Section("How much to trust this", words, made) if words or made else None


def _how(results: Results) -> Section:
    words = []
    for name, run in results.evaluations.items():
        versions = ", ".join(f"{key} {value}" for key, value in (run.facts.get("versions") or {}).items())
        words.append(f"{name}: {versions or 'versions not given'}; {run.facts.get('device') or 'device not given'}.")
    sources = [[label, m.source, m.dtype, str(m.plan), m.run] for label, m in results.models.items()]
    made = [Table(["model", "source", "dtype", "plan", "run"], sources, "What was evaluated")] if sources else []
    commands = ["\n".join(run.facts.get("commands") or []) for run in results.evaluations.values()]
    settings = [
        f"{name}: {json.dumps(run.facts['settings'], ensure_ascii=False, indent=1)}"
        for name, run in results.evaluations.items()
        if run.facts.get("settings")
    ]
    recipes = [f"{run.name}: {json.dumps(run.recipe, ensure_ascii=False, indent=1)}" for run in results.trainings]
    return Section("How this was made", words, made, verbatim=[*filter(None, commands), *settings, *recipes])
