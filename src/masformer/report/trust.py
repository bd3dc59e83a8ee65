"""How far the numbers can be trusted: what they rest on, and in what the runs differ."""

from __future__ import annotations

import collections
import json
from typing import Any

from .page import Section, Table
from .runs import Record, Results, harness_rows

FEW = 10  # documents; with fewer, intervals are clearly too narrow
COMPARED = ("versions", "device", "settings")


def trust_section(results: Results) -> Section | None:
    words = [*caveats(results), *disagreements(results)]
    cells = [[suite, label, f"{count:,}"] for (suite, label), count in counts(results).items()]
    made = [Table(["suite", "model", "items"], cells, "How many items were measured")] if cells else []
    return Section("How much to trust this", words, made) if words or made else None


def counts(results: Results) -> dict[tuple[str, str], int]:
    """How many items were measured, by suite and model; of an lm-eval task the most, if it was run more than once."""
    order = list(results.models)
    others = {suite: records for suite, records in results.records.items() if suite != "lm-eval"}
    found = collections.Counter((suite, record["model"]) for suite, records in others.items() for record in records)
    most: dict[tuple[str, str], int] = {}
    for record in results.records.get("lm-eval", []):
        key = record["model"], record["task"]
        most[key] = max(most.get(key, 0), _harness_items(record))
    for (label, _), items in most.items():
        found["lm-eval", label] += items
    return dict(sorted(found.items(), key=lambda pair: (pair[0][0], order.index(pair[0][1]))))


def _harness_items(record: Record) -> int:
    """Of the task or group that was asked for, if it has metrics of its own, or of all its tasks."""
    items = {row["task"]: round(row["items"]) for row in harness_rows(record)}
    return items.get(record["task"], sum(items.values()))


def caveats(results: Results) -> list[str]:
    """What the numbers do not say: intervals that are missing or rough, models that were measured on other items."""
    words = []
    for suite, records in results.records.items():
        sizes = collections.Counter((r["model"], r.get("length")) for r in records).values()
        if suite in ("loss", "summary", "fidelity") and 1 in sizes:
            words.append(f"Intervals of {suite} are missing where one document was read: nothing says how two differ.")
        if suite in ("loss", "summary", "fidelity") and (few := [size for size in sizes if 1 < size < FEW]):
            words.append(f"Intervals of {suite} rest on as few as {min(few)} documents and are too narrow.")
        if suite == "recall":
            cells = collections.Counter((r["model"], r["task"], r["length"], r.get("depth")) for r in records).values()
            some = f"{min(cells)} to {max(cells)}" if len(set(cells)) > 1 else f"{min(cells)}"
            words.append(f"Items behind each number of recall by length and depth: {some}.")
    return words + _unequal(results)


def _unequal(results: Results) -> list[str]:
    """Suites of which a model lacks items that another model of the same run has: its means are of something else."""
    words = []
    for suite, records in results.records.items():
        items: dict[str, dict[str, set[Any]]] = {}
        for record in records:
            run = items.setdefault(results.models[record["model"]].run, {})
            run.setdefault(record["model"], set()).add((record.get("task"), record.get("length"), record.get("item")))
        what = "tasks (with their limits)" if suite == "lm-eval" else "items"
        for name, run in items.items():
            every = set().union(*run.values())
            first, *others = (label for label, model in results.models.items() if model.run == name)
            for label in others if suite == "fidelity" else (first, *others):  # the first one is what it compares with
                if missing := len(every - run.get(label, set())):
                    words.append(f"{label} lacks {missing:,} of {len(every):,} {what} of {suite} that others have.")
    return words


def disagreements(results: Results) -> list[str]:
    """In which versions, settings or devices the evaluations differ, or models in their dtype: a sentence for each."""
    facts = {name: _flat({k: run.facts.get(k) for k in COMPARED}) for name, run in results.evaluations.items()}
    sentences = []
    for key in dict.fromkeys(key for flat in facts.values() for key in flat):
        values = {name: flat.get(key, "not given") for name, flat in facts.items()}
        if len(set(values.values())) > 1:
            sentences.append(f"The runs differ in {key}: " + "; ".join(f"{v} in {n}" for n, v in values.items()) + ".")
    dtypes = {label: model.dtype or "not given" for label, model in results.models.items()}
    if len(set(dtypes.values())) > 1:
        words = "; ".join(f"{dtype} of {label}" for label, dtype in dtypes.items())
        sentences.append(f"The models differ in dtype, and so in the bytes of their KV cache: {words}.")
    return sentences


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Nested objects as one, `settings.seed`, with values in words."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in _flat(value[key], f"{name}.{key}".lstrip(".")).items()}
    return {name: json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value}
