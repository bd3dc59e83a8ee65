"""What a selection found, read and checked: the folder of `masformer select`.

selection = read_selection(Path("runs/select"), "select")
selection.budgets[0].chosen, selection.budgets[0].plans["recall"].nats
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CorruptError
from ..selection.outcome import FILE, compared_on, read
from ..spans import PlanError, SpanPlan


@dataclasses.dataclass(frozen=True)
class Choice:
    """A plan with what it measures on the checks and costs at their length; held-out results name it by `label`.

    nats: `recall` and `documents` together, by which is chosen; None where there was no probe of the kind.
    kv_bytes: of the cache at its largest. items: how many checks were recall items, as many as of the probes.
    """

    label: str
    plan: SpanPlan
    nats: float
    recall: float | None
    documents: float | None
    kl: float
    items: int
    kv_bytes: int
    attention_flops: int

    @classmethod
    def of(cls, row: dict[str, Any]) -> Choice:
        recall, documents = (None if row[name] is None else _number(row[name]) for name in ("recall", "documents"))
        return cls(
            str(row["label"]),
            SpanPlan.parse(row["plan"]),
            _number(row["nats"]),
            recall,
            documents,
            _number(row["kl"]),
            items=len(row["by_probe"]),
            kv_bytes=round(_number(row["cost"]["kv_bytes_peak"])),
            attention_flops=round(_number(row["cost"]["prefill_flops"]["attention"])),
        )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


@dataclasses.dataclass(frozen=True)
class Budget:
    """What was allowed, in words, every method's choice within it, and the method whose choice was taken.

    limit: the most nats, under a budget of nats.
    """

    words: str
    plans: dict[str, Choice]
    chosen: str
    limit: float | None

    @property
    def best(self) -> Choice:
        return self.plans[self.chosen]

    @property
    def distinct(self) -> dict[str, Choice]:
        """The choices by label: two methods may have chosen the same."""
        return {choice.label: choice for choice in self.plans.values()}


@dataclasses.dataclass(frozen=True)
class Selection:
    """One folder of `masformer select`. `scores` has a number per layer by method; `compared_on` is a word."""

    folder: Path
    name: str
    source: str
    local: tuple[str, ...]
    length: int
    probes: int
    compared_on: str
    made: str
    train_steps: int
    parent: Choice
    shortest: Choice
    budgets: list[Budget]
    scores: dict[str, list[float]]

    @property
    def model(self) -> str:
        """The last part of where the model came from."""
        return Path(self.source).name or self.source

    @property
    def main(self) -> dict[str, SpanPlan]:
        """The parent, all local and what was chosen, by label."""
        best = (budget.best for budget in self.budgets)
        return {choice.label: choice.plan for choice in (self.parent, self.shortest, *best)}

    def choices(self) -> Iterator[Choice]:
        yield from (self.parent, self.shortest)
        for budget in self.budgets:
            yield from budget.plans.values()


def read_selection(folder: Path, name: str) -> Selection:
    """The selection in a folder; what was measured on held-out data is read with the evaluations.

    Raises:
        InputError: none there.
        CorruptError: one that cannot be read, or that contradicts itself.
    """
    found = read(folder)
    try:
        return _selection(folder, name, found)
    except (PlanError, KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise CorruptError(f"{folder / FILE} cannot be read: {what}") from error


def _selection(folder: Path, name: str, found: dict[str, Any]) -> Selection:
    facts = found["facts"]
    budgets = []
    for budget in found["budgets"]:
        plans = {str(method): Choice.of(row) for method, row in budget["plans"].items()}
        if budget["chosen"] not in plans:
            raise ValueError(f"the chosen {budget['chosen']!r} is none of the plans")
        limit = _number(budget["limit"]) if "limit" in budget else None
        budgets.append(Budget(str(budget["words"]), plans, budget["chosen"], limit))
    selection = Selection(
        folder,
        name,
        str(facts["model"]),
        tuple(map(str, facts["local"])),
        round(_number(facts["length"])),
        len(facts["probes"]),
        compared_on(found),
        f"seed {facts['seed']}, {facts['dtype']} on {facts['device']}",
        round(_number(found["train_steps"])),
        Choice.of(found["parent"]),
        Choice.of(found["local"]),
        budgets,
        {str(method): list(map(_number, values)) for method, values in found["scores"].items()},
    )
    layers = len(selection.parent.plan)
    if any(len(choice.plan) != layers for choice in selection.choices()):
        raise ValueError(f"a plan has not {layers} layers")
    if wrong := [method for method, values in selection.scores.items() if len(values) != layers]:
        raise ValueError(f"the scores of {wrong[0]} are not {layers} numbers")
    return selection
