"""What the runs say, as rows of numbers: for the page and for the terminal. Nothing here knows HTML.

    for row in overview(results):
        row.model, row.nats.value, row.nats.low, row.kv_bytes

Means over documents are ratios of sums; their 95 % intervals resample documents, so with one document there is none.
A difference is taken over the documents that both models were measured on, and its interval resamples pairs; a
document of as many tokens and bytes counts as the same, for other tokenizers cut another text of it.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from ..evaluation.statistics import bootstrap, wilson
from ..spans import SpanPlan
from .runs import Record, Results, by_document

Cells = dict[Hashable, tuple[float, float]]
"""By document: a sum, and the count that it is divided by."""
ROUGES = ("rouge1", "rouge2", "rougeL")


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval, which is None where it cannot be had."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Loss:
    """Nats per token of one model at one length; `difference` is to the reference, above 0 is worse."""

    model: str
    length: int
    documents: int
    tokens: int
    nats: Estimate
    difference: Estimate | None
    bits_per_byte: float | None

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats.value) if self.nats.value < 700 else math.inf


@dataclasses.dataclass(frozen=True, slots=True)
class Bucket:
    """A mean over the tokens in one bucket; `low` up to `high` - 1, both 0 for a 3-gram never seen before."""

    model: str
    length: int
    low: int
    high: int
    documents: int
    tokens: int
    mean: float
    difference: Estimate | None = None
    agreement: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Recall:
    """Items found; `task`, `length` and `depth` are None where the row is a mean over all of them."""

    model: str
    task: str | None
    length: int | None
    depth: float | None
    items: int
    score: Estimate
    log_probability: float | None
    rank: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """ROUGE of one model's summaries at one input length, and of the baseline `lead`, by name of the score."""

    model: str
    length: int
    documents: int
    cut: int
    scores: dict[str, Estimate]
    lead: dict[str, float | None]


@dataclasses.dataclass(frozen=True, slots=True)
class Fidelity:
    """How far a model's next-token distribution is from its parent's: nats of KL, and how often the first agrees."""

    model: str
    length: int
    documents: int
    tokens: int
    kl: Estimate
    agreement: Estimate


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """What one document of `length` tokens costs; `saved` is the share of the reference's KV cache, if it has one."""

    model: str
    length: int
    pairs: int
    attention_flops: int
    prefill_flops: int
    training_flops: int
    decode_flops: int
    kv_bytes: int
    kv_peak: int
    saved: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Overview:
    """One model in a row. Losses are at `loss_length`, costs at `cost_length`: the longest that all models have.

    recall: over the `recall_items` items that the reference was measured on too, where it scored `reference_recall`.
    """

    model: str
    reference: str
    plan: str
    full_layers: tuple[int, ...]
    layers: int
    loss_length: int | None
    nats: Estimate | None
    difference: Estimate | None
    recall: Estimate | None
    recall_items: int
    reference_recall: Estimate | None
    cost_length: int | None
    kv_bytes: int | None
    attention_flops: int | None


def in_short(plan: SpanPlan) -> str:
    """`4 full, 26 window 252 + 4 sinks`: how many layers of each span, the full ones first."""
    spans = sorted(dict.fromkeys(plan), key=lambda span: span.is_local)
    words = []
    for span in spans:
        values = span.to_json()
        size = f" {values['size']:,}" if "size" in values else ""
        lookback = f" + {values['lookback']} before" if values.get("lookback") else ""
        sinks = f" + {values['sinks']} sinks" if values.get("sinks") else ""
        words.append(f"{list(plan).count(span)} {span.kind}{size}{lookback}{sinks}")
    return ", ".join(words)


def overview(results: Results) -> list[Overview]:
    """Every model in a row, the reference first."""
    losses = {(row.model, row.length): row for row in loss(results)}
    recalls = _shared_recall(results)
    at = _longest([{length for name, length in losses if name == label} for label in results.models])
    cost_at = _longest([set(model.cost) for model in results.models.values()])
    costs = {
        row.model: (row.length, row.kv_bytes, row.attention_flops) for row in cost(results) if row.length == cost_at
    }
    rows = []
    for label, model in results.models.items():
        own = losses.get((label, at or 0))
        rows.append(
            Overview(
                label,
                model.reference,
                in_short(model.plan),
                model.plan.full_layers,
                len(model.plan),
                own.length if own else None,
                own.nats if own else None,
                own.difference if own else None,
                *recalls.get(label, (None, 0, None)),
                *costs.get(label, (None, None, None)),
            )
        )
    return rows


def loss(results: Results) -> list[Loss]:
    """Loss per model and length."""
    groups = _groups(results, "loss", "length")
    rows = []
    for (label, length), records in groups.items():
        reference = groups.get((_compared(results, label), length), [])
        cells = _cells(records, "nats")
        size = sum(record.get("bytes") or math.nan for record in records)
        rows.append(
            Loss(
                label,
                length,
                len(records),
                sum(record["tokens"] for record in records),
                _ratio(cells),
                _difference(cells, _cells(reference, "nats")),
                None if math.isnan(size) else sum(record["nats"] for record in records) / math.log(2) / size,
            )
        )
    return rows


def loss_by_position(results: Results) -> list[Bucket]:
    """Loss per model, length and bucket of positions."""
    return _buckets(results, "loss", "buckets")


def loss_by_repeat(results: Results) -> list[Bucket]:
    """Loss per model, length and distance to the last occurrence of the token's 3-gram; `never` comes last."""
    return _buckets(results, "loss", "repeats")


def fidelity_by_position(results: Results) -> list[Bucket]:
    """KL (`mean`) and agreement per model, length and bucket of positions."""
    return _buckets(results, "fidelity", "buckets")


def recall(results: Results, by: Sequence[str] = ("task", "length", "depth")) -> list[Recall]:
    """Items found per model and the fields in `by`, with Wilson's interval; a rank or log-probability may be absent."""
    rows = []
    for (label, *values), records in _groups(results, "recall", *by).items():
        known = dict.fromkeys(("task", "length", "depth")) | dict(zip(by, values, strict=True))
        rows.append(
            Recall(
                label,
                **known,
                items=len(records),
                score=_share([record["score"] for record in records]),
                log_probability=_mean(record.get("log_probability") for record in records),
                rank=_mean(record.get("rank") for record in records),
            )
        )
    return rows


def _shared_recall(results: Results) -> dict[str, tuple[Estimate, int, Estimate]]:
    """By model: its score on the items that the reference has too, how many these are, and the reference's score."""
    scores: dict[str, dict[Hashable, float]] = {}
    for record in results.records.get("recall", []):
        made = [results.models[record["model"]].settings.get(name) for name in ("seed", "depths")]
        key = str(made), record["task"], record["length"], record["item"]
        scores.setdefault(record["model"], {})[key] = record["score"]
    found = {}
    for label, own in scores.items():
        before = scores.get(results.models[label].reference, {})
        if keys := own.keys() & before.keys():
            found[label] = _share([own[key] for key in keys]), len(keys), _share([before[key] for key in keys])
    return found


def summary(results: Results) -> list[Summary]:
    """ROUGE per model and input length."""
    rows = []
    for (label, length), records in _groups(results, "summary", "length").items():
        scores = {name: _ratio({n: (record[name], 1.0) for n, record in enumerate(records)}) for name in ROUGES}
        lead = {name: _mean((record.get("lead") or {}).get(name) for record in records) for name in ROUGES}
        cut = sum(bool(record.get("cut")) for record in records)
        rows.append(Summary(label, length, len(records), cut, scores, lead))
    return rows


def fidelity(results: Results) -> list[Fidelity]:
    """KL and agreement per model and length."""
    rows = []
    for (label, length), records in _groups(results, "fidelity", "length").items():
        ratios = (_ratio(_cells(records, name)) for name in ("kl", "agree"))
        rows.append(Fidelity(label, length, len(records), sum(record["tokens"] for record in records), *ratios))
    return rows


def cost(results: Results) -> list[Cost]:
    """Costs per model and length."""
    rows = []
    for label, model in results.models.items():
        reference = results.models[model.reference].cost
        for length, paid in sorted(model.cost.items()):
            before = reference.get(length, {}).get("kv_bytes_held")
            rows.append(
                Cost(
                    label,
                    length,
                    pairs=paid["attention_pairs"],
                    attention_flops=paid["prefill_flops"]["attention"],
                    prefill_flops=paid["prefill_flops"]["total"],
                    training_flops=paid["training_flops"]["total"],
                    decode_flops=paid["decode_flops"]["total"],
                    kv_bytes=paid["kv_bytes_held"],
                    kv_peak=paid["prefill_kv_peak"],
                    saved=1 - paid["kv_bytes_held"] / before if before else None,
                )
            )
    return rows


def _groups(results: Results, suite: str, *names: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records by model and the named fields: models in their order, then by value, None first."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in results.records.get(suite, []):
        groups.setdefault((record["model"], *(record.get(name) for name in names)), []).append(record)
    order = {label: rank for rank, label in enumerate(results.models)}

    def place(key: tuple[Any, ...]) -> tuple[Any, ...]:
        return order[key[0]], *((value is not None, value if value is not None else 0) for value in key[1:])

    return {key: groups[key] for key in sorted(groups, key=place)}


def _longest(lengths: Iterable[set[int]]) -> int | None:
    """The longest length that all have who have any."""
    some = [found for found in lengths if found]
    return max(set.intersection(*some), default=max(some[0])) if some else None


def _cells(records: Iterable[Record], name: str) -> Cells:
    return {key: (record[name], record["tokens"]) for key, record in by_document(records).items()}


def _compared(results: Results, label: str) -> str | None:
    """The reference, if it is another model and read documents in the same windows."""
    own = results.models[label]
    reference = results.models[own.reference]
    return reference.label if reference is not own and reference.stride == own.stride else None


def _buckets(results: Results, suite: str, name: str) -> list[Bucket]:
    groups = _groups(results, suite, "length")
    means = {key: _split(records, name, 3) for key, records in groups.items()}
    rows = []
    for (label, length), split in means.items():
        theirs = means.get((_compared(results, label), length), {})
        agreed = _split(groups[label, length], name, 4) if suite == "fidelity" else {}
        high = _highs(groups[label, length], name)
        for low, cells in sorted(split.items(), key=lambda pair: (high[pair[0]] == 0, pair[0])):
            rows.append(
                Bucket(
                    label,
                    length,
                    low,
                    high[low],
                    len(cells),
                    int(sum(tokens for _, tokens in cells.values())),
                    _plain(cells),
                    _difference(cells, theirs.get(low, {})),
                    _plain(agreed[low]) if agreed else None,
                )
            )
    return rows


def _split(records: Iterable[Record], name: str, column: int) -> dict[int, Cells]:
    """By where buckets begin: the column of sums of every document that has tokens there."""
    split: dict[int, Cells] = {}
    for key, record in by_document(records).items():
        for bucket in record.get(name, []):
            if bucket[2]:
                split.setdefault(bucket[0], {})[key] = bucket[column], bucket[2]
    return split


def _highs(records: Iterable[Record], name: str) -> dict[int, int]:
    """Where the bucket that begins at a place ends, in the longest document: the last one ends with the document."""
    highs: dict[int, int] = {}
    for record in records:
        for low, high, *_ in record.get(name, []):
            highs[low] = max(high, highs.get(low, 0))
    return highs


def _plain(cells: Cells) -> float:
    return math.fsum(above for above, _ in cells.values()) / math.fsum(below for _, below in cells.values())


def _share(scores: Sequence[float]) -> Estimate:
    return Estimate(statistics.fmean(scores), *wilson(math.fsum(scores), len(scores)))


def _ratio(cells: Cells) -> Estimate:
    sums, counts = [pair[0] for pair in cells.values()], [pair[1] for pair in cells.values()]
    low, high = bootstrap(sums, counts) or (None, None)
    return Estimate(_plain(cells), low, high)


def _difference(cells: Cells, reference: Cells) -> Estimate | None:
    """Over the documents in both, where as many tokens count in both; None if there are none."""
    shared = [key for key in cells if key in reference and reference[key][1] == cells[key][1]]
    return _ratio({key: (cells[key][0] - reference[key][0], cells[key][1]) for key in shared}) if shared else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
