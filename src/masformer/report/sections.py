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
from .gains import cost_section, overview_section, trade_offs_section
from .page import Figure, Section, Table, number, write_page
from .picture import plan_svg
from .places import both, by_position, fidelity_section, recall_section, repeats_section, spread
from .plots import Point, lines
from .runs import Results, Training, harness_rows, read_results
from .selection import selection_sections
from .trust import trust_section

CURVE = 60  # points of a training curve; of more steps, means of neighbours are drawn
LEAD = "lead-75"
ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write one self-contained page about evaluations, trainings and selections, and give back its path.

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
    if results.selections:
        return f"Which layers of {' and '.join(dict.fromkeys(each.model for each in results.selections))} stay full"
    if not results.models:
        return "Training: " + ", ".join(training.name for training in results.trainings)
    first, *others = results.models
    if not others:
        return f"Evaluation of {first}"
    return f"{first} against {others[0] if len(others) == 1 else f'{len(others)} other models'}"


def sections(results: Results) -> list[Section]:
    """All sections for which there are numbers."""
    overview = tables.overview(results)
    shown = results.drawn
    drawn = [row for row in overview if row.model in shown]
    made = [
        *selection_sections(results),
        overview_section(results, overview),
        _plans(results),
        _loss(results),
        repeats_section(results),
        recall_section(results),
        _summary(results),
        fidelity_section(results),
        cost_section(results, drawn),
        trade_offs_section(drawn),
        _training(results),
        _harness(results),
        trust_section(results),
        _how(results),
    ]
    return [section for section in made if section is not None]


def _plans(results: Results) -> Section | None:
    figures = []
    for label in results.drawn:
        model = results.models[label]
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


def _training(results: Results) -> Section | None:
    if not results.trainings:
        return None
    drawn = results.drawn_trainings
    curves = {
        f"Training loss (means of neighbouring steps where there are more than {CURVE})": {
            run.name: _thinned(run.curve("nats")) for run in drawn
        },
        **{
            f"Held-out loss, {kind}": {run.name: run.curve(f"eval_{kind}_loss") for run in drawn}
            for kind in sorted({kind for run in results.trainings for kind in run.kinds})
        },
    }
    figures = []
    for name, series in curves.items():
        known = {label: points for label, points in series.items() if points}
        if known:
            order = [run.name for run in drawn]
            svg = lines(known, "step", "loss (nats/token)", order=order)
            figures.append(Figure(f"{name} by step; its ends are in the table", svg=svg, caption=name))
    cells = [row for run in results.trainings for row in _training_rows(run)]
    headers = ["run", "loss", "steps", "at the first", "at the last", "difference"]
    caption = "Losses in nats/token at the first and last step where they were measured"
    facts = [
        f"{run.name}: {run.words}, {run.tokens:,} tokens in {len(run.steps):,} steps"
        + (f", {number(run.speed, 0)} tokens/s in the median" if run.speed is not None else "")
        + "."
        for run in drawn
    ]
    if others := len(results.trainings) - len(drawn):
        facts.append(f"The other {others:,} trainings of plans that were not chosen are in the table.")
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
