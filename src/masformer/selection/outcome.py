"""What a selection found, as a file: `selection.json`. Needs neither torch nor transformers.

    outcome = read(Path("runs/select"))
    outcome["budgets"][0]["chosen"], distinct(outcome)

`facts` says what was asked for; `scores` has a list per method, a number per layer; `parent`, `local` and, for each of
`budgets`, its `plans` by method have a plan each, its `label` among the held-out results, what it costs and what it
measures on the checks; `chosen` names a method; `limit`, under a budget of nats alone, is
the most that it allows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CorruptError, InputError
from ..files import replace
from ..spans import SpanPlan

FILE, HELD_OUT, CORPORA = "selection.json", "held-out", "corpora"
"""The outcome; the folders beside it with an evaluation of every plan, and with tokenised documents."""
TRAINED = "trained"
"""What a label ends with after a training."""
FORMAT = 2


def distinct(outcome: dict[str, Any]) -> dict[str, SpanPlan]:
    """The plans of an outcome by their labels: the parent, all local, and each choice once."""
    rows = [outcome["parent"], outcome["local"]]
    rows += [row for budget in outcome["budgets"] for row in budget["plans"].values()]
    return {row["label"]: SpanPlan.parse(row["plan"]) for row in rows}


def compared_on(outcome: dict[str, Any]) -> str:
    """What the plans of an outcome are compared on, in a word: checks that no method saw, or the probes themselves."""
    facts = outcome["facts"]
    return "probes" if facts["checks"] == facts["probes"] else "checks"


def joined(earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What two selections with the same facts found, other budgets or other methods."""
    before, budgets = {budget["words"]: budget for budget in earlier["budgets"]}, []
    for budget in now["budgets"]:
        plans = before.pop(budget["words"], {"plans": {}})["plans"] | budget["plans"]
        budgets.append({**budget, "chosen": best(plans, budget.get("limit")), "plans": plans})
    return {
        **now,
        "budgets": [*budgets, *before.values()],
        "scores": earlier["scores"] | now["scores"],
        "train_steps": now["train_steps"] or earlier["train_steps"],
    }


def best(plans: dict[str, dict[str, Any]], limit: float | None) -> str:
    """The method whose plan measures best; or where a `limit` of nats is given, the one with the cheapest
    plan that keeps to it, the better of two that cost the same. The first of those that are the same in all this.
    """

    def order(name: str) -> tuple[float, ...]:
        row = plans[name]
        if limit is None:
            return (row["nats"],)
        return (0, row["price"], row["nats"]) if row["nats"] <= limit else (1, row["nats"])

    return min(plans, key=order)


def read(folder: Path) -> dict[str, Any]:
    """The outcome in a folder.

    Raises:
        InputError: none there. CorruptError: one that cannot be read.
    """
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise InputError(f"{folder} is of format {found['format']}, this program reads {FORMAT}")
    except OSError as error:
        raise InputError(f"{folder} holds no selection: {FILE}: {error.strerror}") from error
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise CorruptError(f"{folder / FILE} is damaged: delete it, what was measured is kept") from error
    return dict(found)


def write(folder: Path, outcome: dict[str, Any]) -> None:
    """`selection.json`, whole or as it was."""
    replace(folder / FILE, json.dumps(outcome, indent=1, allow_nan=False) + "\n")
