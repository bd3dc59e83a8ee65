"""Models of which one knows the layers that carry recall: which methods find exactly these."""

import itertools
import math
from collections.abc import Iterable

import pytest

from masformer.selection import methods
from masformer.selection.bench import Bench
from masformer.selection.methods import METHODS, Task
from masformer.selection.probes import Probe
from masformer.selection.score import SCORES, Score
from masformer.selection.space import Budget, Space, full_budget, nats_budget

from .planted import BAITS, LAYERS, LOCAL, NAMES, Items, S, parent, planted, probes

FAR = "sees where attention goes, not what it is used for: layers that look far and write nothing of use come first"
ALONE = "counts what a layer does alone: with two hops one layer of S without the other does less than a bait or noise"
EXPECTED_TO_MISS = {
    1: {"mass": FAR, "lazy": FAR},
    2: {
        "mass": FAR,
        "lazy": FAR,
        "recall-only": ALONE,
        "loss-only": ALONE,
        "kl-only": ALONE,
        "forward": "its first step " + ALONE,
        "beam": "its first step " + ALONE + ", and there are as many baits as plans that it follows",
    },
}
"""By the number of hops: methods that do not find S, with the reason."""
MEASURED = [name for name, method in METHODS.items() if method.kind != "rule"]


@pytest.fixture(scope="module")
def benches() -> dict[int, Bench]:
    return {
        hops: Bench(planted(hops), probes(hops), items=Items(hops), identity=f"planted {hops}")  # type: ignore[arg-type]
        for hops in S
    }


@pytest.fixture(scope="module")
def space() -> Space:
    return Space.of(parent(), [LOCAL])


def task(benches: dict[int, Bench], space: Space, hops: int, seed: int = 0, budget: Budget | None = None) -> Task:
    budget = full_budget(len(S[hops])) if budget is None else budget
    return Task(benches[hops], space, budget, seed)


@pytest.mark.parametrize("hops", S)
def test_with_all_layers_full_it_answers_and_with_all_local_it_guesses(
    benches: dict[int, Bench], space: Space, hops: int
) -> None:
    full, local, chosen = benches[hops].measure([space.parent, space.shortest, space.mixed(S[hops])])
    assert 0.9 < math.exp(-full.recall) < 0.99
    assert local.recall == pytest.approx(math.log(NAMES), abs=0.02)
    assert chosen.recall == pytest.approx(full.recall, abs=0.05)


@pytest.mark.parametrize("hops", S)
def test_every_layer_of_s_is_needed_and_no_other_choice_comes_near(
    benches: dict[int, Bench], space: Space, hops: int
) -> None:
    choices = list(itertools.combinations(range(LAYERS), len(S[hops])))
    found = dict(zip(choices, benches[hops].measure([space.mixed(choice) for choice in choices]), strict=True))
    best = found.pop(S[hops])
    for other in found.values():
        assert best.recall + 1.5 < other.recall
        assert best.nats + 1.5 < other.nats


@pytest.mark.parametrize("hops", S)
def test_no_rule_makes_s_full(benches: dict[int, Bench], space: Space, hops: int) -> None:
    rules = [method for method in METHODS.values() if method.kind == "rule"]
    assert len(rules) > 10
    assert space.mixed(S[hops]) not in [rule.choose(task(benches, space, hops)) for rule in rules]


@pytest.mark.parametrize(("hops", "name"), [*itertools.product(S, MEASURED)])
def test_a_method_finds_exactly_s_or_misses_it_for_a_known_reason(
    benches: dict[int, Bench], space: Space, hops: int, name: str
) -> None:
    plan = METHODS[name].choose(task(benches, space, hops))
    assert plan is not None
    assert len(plan.full_layers) == len(S[hops])
    assert (plan == space.mixed(S[hops])) == (name not in EXPECTED_TO_MISS[hops]), plan


def test_the_reasons_name_methods_that_there_are() -> None:
    assert {name for missed in EXPECTED_TO_MISS.values() for name in missed} <= {*MEASURED}


def test_where_attention_goes_ranks_s_last(benches: dict[int, Bench], space: Space) -> None:
    for hops, name in itertools.product(S, ("mass", "lazy")):
        scores = task(benches, space, hops).scores(SCORES[name])
        assert min(scores[layer] for layer in range(LAYERS) if layer not in S[hops]) > max(
            scores[layer] for layer in S[hops]
        )


def test_with_two_hops_each_alone_is_worth_less_than_a_bait(benches: dict[int, Bench], space: Space) -> None:
    for name in ("recall-only", "kl-only"):
        scores = task(benches, space, 2).scores(SCORES[name])
        assert min(scores[bait] for bait in BAITS) > max(scores[layer] for layer in S[2])
    alone = task(benches, space, 1).scores(SCORES["recall-only"])
    assert alone[4] > 10 * max(alone[bait] for bait in BAITS)


@pytest.mark.parametrize("name", ["recall", "kl", "gradient", "path"])
def test_scores_that_find_s_leave_a_gap_between_it_and_the_others(
    benches: dict[int, Bench], space: Space, name: str
) -> None:
    for hops in S:
        scores = task(benches, space, hops).scores(SCORES[name])
        others = [scores[layer] for layer in range(LAYERS) if layer not in S[hops]]
        assert min(scores[layer] for layer in S[hops]) > 5 * max(map(abs, others))


@pytest.mark.parametrize("name", ["gates", "gates-l0"])
@pytest.mark.parametrize("seed", [1, 2])
def test_gates_find_s_with_other_seeds(benches: dict[int, Bench], space: Space, name: str, seed: int) -> None:
    assert METHODS[name].choose(task(benches, space, 2, seed)) == space.mixed(S[2])


def test_gates_learn_on_items_that_are_no_probes_and_never_on_one_twice(
    benches: dict[int, Bench], space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []

    def looked_at(model: object, space: Space, probes: Iterable[Probe], **_: object) -> list[float]:
        taken.extend(probe.key for probe in probes)
        return [0.0] * LAYERS

    monkeypatch.setattr(methods, "learned", looked_at)
    METHODS["gates"].choose(task(benches, space, 1, seed=99))
    assert len({*taken, *(probe.key for probe in benches[1].probes)}) == methods.GATE_STEPS + len(benches[1].probes)


@pytest.mark.parametrize("name", ["backward", "exact", "recall"])
def test_the_fewest_layers_near_the_parent_are_s(benches: dict[int, Bench], space: Space, name: str) -> None:
    for hops in S:
        wanted = task(benches, space, hops, budget=nats_budget(0.5))
        assert METHODS[name].choose(wanted) == space.mixed(S[hops])


def test_a_score_is_computed_once_for_all_tasks_of_a_bench(benches: dict[int, Bench], space: Space) -> None:
    calls = []
    score = Score("counted", "", "", lambda bench, space: calls.append(bench) or [0.0] * LAYERS)
    for seed in (0, 1):
        assert task(benches, space, 1, seed).scores(score) == [0.0] * LAYERS
    assert len(calls) == 1
