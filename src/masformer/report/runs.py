"""Run folders, read: what evaluations measured, how trainings went and what was selected, as one `Results`.

    results = read_results([Path("runs/eval"), Path("runs/recovery")])
    results.models["parent"].plan, results.records["loss"], results.trainings

Models keep the order of their runs; a label that two runs use gets the folder's name added in both.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import statistics
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import CorruptError, InputError
from ..evaluation.results import FACTS, RECORDS, read_run
from ..selection.outcome import FILE, HELD_OUT, TRAINED
from ..spans import PlanError, SpanPlan
from .choices import Selection, read_selection

METRICS, RECIPE = "metrics.jsonl", "recipe.json"
TRAININGS = "training"  # the folder of a selection's trainings
MANY = 12  # models; of more, those of a selection that were not chosen are in the tables alone
Record = dict[str, Any]

NUMBERS = {
    "loss": ("tokens", "nats", "length", "item"),
    "recall": ("score", "length", "item"),
    "summary": ("rouge1", "rouge2", "rougeL", "length", "item"),
    "fidelity": ("tokens", "kl", "agree", "length", "item"),
    "lm-eval": ("length", "item"),
}
"""The fields of each suite's records that must be numbers."""
NAMES = {
    "loss": ("document",),
    "recall": ("task",),
    "summary": ("document",),
    "fidelity": ("document",),
    "lm-eval": ("task",),
}
"""Those that must be text."""
BUCKETS = {"buckets": {"loss": 4, "fidelity": 5}, "repeats": {"loss": 4}}
"""Lists of buckets, and how many numbers a bucket of each suite has."""
COSTS = ("attention_pairs", "kv_bytes_held", "prefill_kv_peak")
FLOPS = ("prefill_flops", "training_flops", "decode_flops")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One folder of `masformer eval`: `facts` is its run.json, `records` its results.jsonl."""

    folder: Path
    facts: dict[str, Any]
    records: list[Record]


@dataclasses.dataclass(frozen=True)
class Training:
    """One folder of `masformer train`: its recipe, and the lines of metrics.jsonl by step, of each step the last.

    of: the selection that it belongs to.
    """

    folder: Path
    name: str
    recipe: dict[str, Any]
    steps: dict[int, Record]
    held_out: dict[int, Record]
    of: str = ""

    @property
    def kinds(self) -> list[str]:
        """What was held out: `documents`, `recall`."""
        names = dict.fromkeys(name for line in self.held_out.values() for name in line if name.startswith("eval_"))
        return [name.removeprefix("eval_").removesuffix("_loss") for name in names if name.endswith("_loss")]

    @property
    def tokens(self) -> int:
        """How many were trained on, as far as the lines say."""
        return round(sum(line["tokens"] for line in self.steps.values() if is_number(line.get("tokens"))))

    @property
    def speed(self) -> float | None:
        """Tokens per second, the median over the lines."""
        speeds = [line["tokens_per_second"] for line in self.steps.values() if is_number(line.get("tokens_per_second"))]
        return statistics.median(speeds) if speeds else None

    @property
    def words(self) -> str:
        """The model and the plan that the recipe names."""
        plan = self.recipe.get("plan")
        if isinstance(plan, dict):
            plan = ", ".join(f"{name} {value}" for name, value in plan.items() if value is not None)
        return f"{self.recipe.get('model', 'a model')}, plan {plan or 'as it is'}"

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) wherever a line has this field as a number."""
        lines = self.held_out if name.startswith("eval_") else self.steps
        return [(step, line[name]) for step, line in sorted(lines.items()) if is_number(line.get(name))]


@dataclasses.dataclass(frozen=True)
class Model:
    """An evaluated model. `cost` has one object a length; `reference` is the label of what it is compared with;
    `settings` are those of its run."""

    label: str
    source: str
    dtype: str
    plan: SpanPlan
    cost: dict[int, dict[str, Any]]
    run: str
    reference: str
    settings: dict[str, Any]

    @property
    def stride(self) -> int | None:
        """How far apart the windows begin in which `loss` read whole documents; None: it cut them."""
        return self.settings.get("stride")


@dataclasses.dataclass(frozen=True)
class Results:
    """All runs together. `records` by suite, each with the label under which `models` has its model."""

    models: dict[str, Model]
    records: dict[str, list[Record]]
    evaluations: dict[str, Evaluation]
    trainings: list[Training]
    selections: list[Selection] = dataclasses.field(default_factory=list)

    @property
    def drawn(self) -> list[str]:
        """The models that pictures and sentences are about: all, or of many those that no selection passed over."""
        main = {each.name: each.main for each in self.selections}
        return [
            label
            for label, model in self.models.items()
            if len(self.models) <= MANY
            or model.run not in main
            or label.removesuffix(f" ({model.run})").removesuffix(f", {TRAINED}") in main[model.run]
        ]

    @property
    def drawn_trainings(self) -> list[Training]:
        """Those of the same plans."""
        main = {each.name: set(map(str, each.main.values())) for each in self.selections}
        few = len(self.trainings) <= MANY
        return [each for each in self.trainings if few or not each.of or each.recipe.get("plan") in main[each.of]]

    def alone(self, name: str) -> Results:
        """One evaluation under the labels that its folder has."""
        return _joined({name: self.evaluations[name]} if name in self.evaluations else {}, [])


def read_results(folders: Sequence[Path]) -> Results:
    """Read evaluation and training runs and selections, in any order and number; a folder named twice counts once.

    A selection brings its held-out evaluation under its own name, as far as that has got, and its trainings.

    Raises:
        InputError: no folder, one that holds no run, or one with no number in it yet.
        CorruptError: a file that is damaged; a torn last line is left out, for the run may be going on.
    """
    if not folders:
        raise InputError("name at least one run folder")
    folders = _outer(folders)
    names = dict(zip(folders, _names(folders), strict=True))
    evaluations: dict[str, Evaluation] = {}
    trainings: list[Training] = []
    selections: list[Selection] = []
    for folder, name in names.items():
        if (folder / FILE).exists():
            selections.append(read_selection(folder, name))
            with contextlib.suppress(InputError):  # nothing is there yet
                evaluations[name] = _evaluation(folder / HELD_OUT)
            for each in sorted((folder / TRAININGS).glob(f"*/{METRICS}")):
                with contextlib.suppress(InputError):
                    trainings.append(_training(each.parent, each.parent.name, name))
            continue
        kinds = [(folder / RECORDS).exists() or (folder / FACTS).exists(), (folder / METRICS).exists()]
        if not any(kinds):
            raise InputError(f"{folder} is no run folder: it holds none of {RECORDS}, {METRICS}, {FILE}")
        if kinds[0]:
            evaluations[name] = _evaluation(folder)
        if kinds[1]:
            trainings.append(_training(folder, name))
    return dataclasses.replace(_joined(evaluations, _told_apart(trainings)), selections=selections)


def _outer(folders: Sequence[Path]) -> list[Path]:
    """Each folder once; none that lies in a selection which is there too."""
    named = {folder.resolve(): folder for folder in folders}
    selected = {path for path, folder in named.items() if (folder / FILE).exists()}
    return [folder for path, folder in named.items() if not selected.intersection(path.parents)]


def _told_apart(trainings: Sequence[Training]) -> list[Training]:
    """With the name of the selection added where two have the same name."""
    used = collections.Counter(each.name for each in trainings)
    return [
        dataclasses.replace(each, name=f"{each.name} ({each.of})") if each.of and used[each.name] > 1 else each
        for each in trainings
    ]


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of every path, as few as tell all of them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _evaluation(folder: Path) -> Evaluation:
    facts, records = read_run(folder)
    if not isinstance(facts.get("models"), dict):
        raise CorruptError(f"{folder / FACTS} names no models")
    for number, record in enumerate(records, start=1):
        if wrong := _wrong(record, facts):
            raise CorruptError(f"{folder / RECORDS}, line {number}: {wrong}")
    if not records:
        raise InputError(f"{folder} holds no result yet")
    return Evaluation(folder, facts, records)


def _wrong(record: Record, facts: dict[str, Any]) -> str:
    """What keeps a record from being used; empty if nothing does."""
    suite = record.get("suite")
    if record.get("model") not in facts["models"]:
        return f"model {record.get('model')!r} is not in {FACTS}"
    if suite not in NUMBERS:
        return f"unknown suite {suite!r}"
    for name in NUMBERS[suite]:
        if not is_number(record.get(name)):
            return f"{name} is {record.get(name)!r}, not a number"
    for name in ("depth", "bytes"):
        if not _is_number_or_null(record.get(name)):
            return f"{name} is {record[name]!r}, neither a number nor null"
    if record.get("tokens", 1) < 1 or not 0 <= record.get("score", 0) <= 1:
        return "tokens must be at least 1, and a score 0 to 1"
    if suite == "lm-eval" and not _are_metrics(record.get("metrics")):
        return "metrics are not rows of task, metric, value, stderr and items"
    for name in NAMES[suite]:
        if not isinstance(record.get(name), str):
            return f"{name} is {record.get(name)!r}, not text"
    for name, sizes in BUCKETS.items():
        if suite in sizes and not _are_buckets(record.get(name, []), sizes[suite]):
            return f"{name} are not lists of {sizes[suite]} numbers"
    return ""


def harness_rows(record: Record) -> list[Record]:
    """The metrics of an lm-eval record: `task`, `metric`, `items`, and `value` and `stderr`, which may be None."""
    rows: list[Record] = record["metrics"]
    return rows


def is_number(value: Any) -> bool:
    """Whether it is a finite number; JSON as Python reads it also has NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_number_or_null(value: Any) -> bool:
    return value is None or is_number(value)


def _are_metrics(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, dict)
        and all(isinstance(row.get(name), str) for name in ("task", "metric"))
        and all(_is_number_or_null(row.get(name, "missing")) for name in ("value", "stderr"))
        and is_number(row.get("items"))
        for row in value
    )


def _are_buckets(value: Any, size: int) -> bool:
    return isinstance(value, list) and all(
        isinstance(bucket, list) and len(bucket) == size and all(map(is_number, bucket)) for bucket in value
    )


def _training(folder: Path, name: str, of: str = "") -> Training:
    try:
        recipe = json.loads((folder / RECIPE).read_text("utf-8"))
        lines = (folder / METRICS).read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise InputError(f"{folder} is no training run: {Path(error.filename).name}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{folder / RECIPE} is damaged: {error}") from error
    steps: dict[int, Record] = {}
    held_out: dict[int, Record] = {}
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            (held_out if any(key.startswith("eval_") for key in line) else steps)[int(line["step"])] = line
        except (ValueError, RecursionError, TypeError, KeyError) as error:
            raise CorruptError(f"{folder / METRICS}, line {number} is damaged") from error
    if not steps and not held_out:
        raise InputError(f"{folder} holds no step yet")
    return Training(folder, name, recipe, steps, held_out, of)


def _joined(evaluations: dict[str, Evaluation], trainings: list[Training]) -> Results:
    used = collections.Counter(label for run in evaluations.values() for label in run.facts["models"])
    models: dict[str, Model] = {}
    records: dict[str, list[Record]] = {}
    digests: dict[str, Any] = {}  # of the data of every run, by the label of the run's first model
    for name, run in evaluations.items():
        labels = {label: f"{label} ({name})" if used[label] > 1 else label for label in run.facts["models"]}
        own = next(iter(labels.values()))
        digests[own] = (run.facts.get("settings") or {}).get("data")
        first = next(iter(digests))
        reference = first if digests[own] == digests[first] else own
        for label, model in run.facts["models"].items():
            models[labels[label]] = _model(labels[label], model, name, reference, run)
        for record in run.records:
            records.setdefault(record["suite"], []).append({**record, "model": labels[record["model"]]})
    return Results(models, records, evaluations, trainings)


def _model(label: str, facts: dict[str, Any], name: str, reference: str, run: Evaluation) -> Model:
    try:
        costs = {int(length): cost for length, cost in (facts.get("cost") or {}).items()}
        for cost in costs.values():
            _ = [cost[name] for name in COSTS], [cost[name][part] for name in FLOPS for part in ("attention", "total")]
        source, dtype = (str(facts.get(key, "")) for key in ("model", "dtype"))
        settings = run.facts.get("settings") or {}
        return Model(label, source, dtype, SpanPlan.parse(facts["plan"]), costs, name, reference, settings)
    except (PlanError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(f"{run.folder / FACTS}, model {label!r}, cannot be read: {error}") from error


def by_document(records: Iterable[Record]) -> dict[Hashable, Record]:
    """By what makes two documents the same: name, tokens, bytes, and which one of these it is in the order of items."""
    named: dict[Hashable, Record] = {}
    seen: collections.Counter[Hashable] = collections.Counter()
    for record in sorted(records, key=lambda record: float(record["item"])):
        same = record["document"], record.get("tokens"), record.get("bytes")
        named[*same, seen[same]] = record
        seen[same] += 1
    return named
