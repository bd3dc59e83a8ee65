"""Which plan is chosen, and how later calls join a folder."""

from typing import Any

import pytest

from masformer.selection.outcome import best, joined


def row(nats: float, price: float) -> dict[str, Any]:
    return {"nats": nats, "price": price}


PLANS = {"top": row(1.0, 6), "path": row(1.2, 3), "prune": row(1.1, 3), "middle": row(1.4, 1)}


def test_under_a_budget_of_cost_the_fewest_nats_are_chosen() -> None:
    assert best(PLANS, None) == "top"


@pytest.mark.parametrize(("limit", "chosen"), [(1.2, "prune"), (1.4, "middle"), (1.05, "top"), (0.5, "top")])
def test_under_a_budget_of_nats_the_cheapest_plan_within_it_is_chosen(limit: float, chosen: str) -> None:
    assert best(PLANS, limit) == chosen


def test_what_is_asked_for_later_joins_and_is_judged_together() -> None:
    def outcome(words: str, plans: dict[str, Any], **more: Any) -> dict[str, Any]:
        chosen = best(plans, more.get("limit"))
        return {"budgets": [{"words": words, "plans": plans, "chosen": chosen, **more}], "scores": {}, "train_steps": 0}

    first = outcome("within", {"top": PLANS["top"]}, limit=1.2)
    then = joined(first, outcome("within", {"path": PLANS["path"]}, limit=1.2))
    assert then["budgets"][0]["chosen"] == "path"
    assert [*then["budgets"][0]["plans"]] == ["top", "path"]
    other = joined(then, outcome("1 full layer", {"top": PLANS["top"]}))
    assert [budget["words"] for budget in other["budgets"]] == ["1 full layer", "within"]
