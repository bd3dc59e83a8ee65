"""The ways to choose which layers stay full, by name: rules that look at nothing, scores whose top is taken, searches.

METHODS["backward"].choose(task)            task: what is chosen, from what, on what
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from ..data.seeds import generator
from ..errors import InputError
from ..spans import LAYOUTS, PLACEMENTS, SpanPlan, layout
from . import search
from .bench import Bench
from .gates import learned
from .score import LISTED as SCORES
from .score import PATH_PROBES, Score
from .search import order_of
from .space import Budget, Space

GATE_STEPS = 48
MOST_FRESH = max(PATH_PROBES, GATE_STEPS)
"""How many recall items beside the probes a method learns from at most."""
MOST_WAYS, WIDTH, FEWEST = 100, 3, 16
"""How many plans an exact search measures at most, and how many a beam follows; with how many layers `prune` begins at
least."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What a method gets."""

    bench: Bench
    space: Space
    budget: Budget
    seed: int = 0

    def scores(self, score: Score) -> list[float]:
        """A score of all layers, kept in the bench's store."""
        return self.kept(f"score {score.name}", lambda: score.of(self.bench, self.space))

    def has(self, score: Score) -> bool:
        """Whether a score was asked for, by a method of its name or one that rests on it."""
        return self._key(f"score {score.name}") in self.bench.store

    def _key(self, name: str) -> str:
        return f"{self.bench.basis} {self.space.shortest} {name}"

    def kept(self, name: str, compute: Callable[[], list[float]]) -> list[float]:
        key = self._key(name)
        if key not in self.bench.store:
            self.bench.store.put({key: compute()})
        values: list[float] = self.bench.store[key]
        return values


@dataclasses.dataclass(frozen=True)
class Method:
    """words, source: for people. kind: "rule", "score" or "search".

    choose: the plan of a task; None where the method has none within the budget.
    sizes: whether it can choose between several local spans. learns: whether it takes gradients.
    within: whether it can find how many layers a budget of nats needs.
    effort: probes' forwards that it takes at most, of (layers, full layers wanted, probes); a backward counts two.
    """

    name: str
    kind: str
    words: str
    source: str
    choose: Callable[[Task], SpanPlan | None]
    effort: Callable[[int, int, int], float] = lambda layers, count, probes: 0.0
    sizes: bool = False
    learns: bool = False
    within: bool = True


def _rule(name: str, place: Callable[[int, int], Sequence[int]], words: str) -> Method:
    def choose(task: Task) -> SpanPlan:
        layers = task.space.layers
        return search.by_count(
            task.bench, task.space, task.budget, lambda count: [layers[i] for i in place(len(layers), count)]
        )

    return Method(name, "rule", words, "spans/layouts.py", choose)


def _random(task: Task) -> SpanPlan:
    order = generator("random layers", task.seed).permutation(len(task.space.layers))
    return search.by_count(
        task.bench, task.space, task.budget, lambda count: [task.space.layers[i] for i in order[:count]]
    )


def _layout(name: str, task: Task) -> SpanPlan | None:
    """The full layers of a layout, if the budget pays for as many; the others as in every plan here."""
    full = layout(name, len(task.space.options)).full_layers
    plan = task.space.mixed(set(full) & set(task.space.layers))
    fits = search.keeps(task.bench, task.budget, plan) if task.budget.within is not None else task.budget.fits(plan)
    return plan if full and fits else None


def _top(score: Score) -> Method:
    def choose(task: Task) -> SpanPlan:
        return search.top(task.bench, task.space, task.budget, order_of(task.scores(score)))

    return Method(score.name, "score", score.words, score.source, choose, score.effort, learns=score.learns)


def _gates(hard: bool, task: Task) -> SpanPlan:
    if task.bench.items is None:
        raise InputError("gates need recall items to learn on")
    count = task.budget.count(task.space)

    def learn() -> list[float]:
        probes = task.bench.fresh(GATE_STEPS)
        return learned(task.bench.model, task.space, probes, count=count, hard=hard, seed=task.seed)

    values = task.kept(f"gates {hard} {count} {GATE_STEPS} {task.seed}", learn)
    return search.top(task.bench, task.space, task.budget, order_of(values))


def _prune(task: Task) -> SpanPlan:
    """Of twice the layers that may be full, and at least 16, those that lose least are given up one by one; under a
    budget of nats, of as many as keep to it.
    """
    order = _order(task, "path")
    if task.budget.within is None:
        start = task.space.mixed(order[: _first(len(order), task.budget.count(task.space))])
    else:
        start = search.top(task.bench, task.space, task.budget, order)
    return search.backward(task.bench, task.space, task.budget, start)


def _first(layers: int, count: int) -> int:
    """With how many layers `prune` begins, where `count` may be full."""
    return min(layers, max(2 * count, FEWEST))


def _exact(task: Task) -> SpanPlan:
    """All choices among the highest of the score path, as many of these as make at most `MOST_WAYS`."""
    order = _order(task, "path")
    count = None if task.budget.within is not None else task.budget.count(task.space)
    return search.exact(task.bench, task.space, task.budget, order[: _candidates(len(order), count)])


def _candidates(layers: int, count: int | None) -> int:
    """Of how many layers `count`, or any number, can be chosen in at most `MOST_WAYS` ways."""
    ways = (lambda among: 2**among) if count is None else (lambda among: math.comb(among, count))
    return max(among for among in range(count or 0, layers + 1) if ways(among) <= MOST_WAYS)


def _order(task: Task, name: str) -> list[int]:
    """The layers that have a choice, by falling score."""
    scores = task.scores(next(score for score in SCORES if score.name == name))
    return [layer for layer in order_of(scores) if layer in task.space.layers]


def _searches() -> Iterator[Method]:
    yield Method(
        "forward",
        "search",
        "greedy from all local, measured again at every step",
        "greedy search",
        lambda task: search.forward(task.bench, task.space, task.budget),
        lambda layers, count, probes: layers * count * probes / 2,
        sizes=True,
    )
    yield Method(
        "beam",
        "search",
        f"the same with {WIDTH} plans at once",
        "beam search, as in PostNAS (arXiv 2508.15884)",
        lambda task: search.forward(task.bench, task.space, task.budget, WIDTH),
        lambda layers, count, probes: WIDTH * layers * count * probes / 2,
        sizes=True,
    )
    yield Method(
        "backward",
        "search",
        "greedy from the parent, lazily measured again",
        "greedy search; Minoux 1978",
        lambda task: search.backward(task.bench, task.space, task.budget),
        lambda layers, count, probes: (layers + 4 * (layers - count)) * probes / 2,
        sizes=True,
    )
    yield Method(
        "prune",
        "search",
        "backward from the highest of the score path",
        "",
        _prune,
        lambda layers, count, probes: 4.0 * PATH_PROBES + (5 * _first(layers, count) - 4 * count) * probes / 2,
        learns=True,
    )
    yield Method(
        "exact",
        "search",
        "the best of all choices among the highest of the score path",
        "exhaustive search",
        _exact,
        lambda layers, count, probes: 4.0 * PATH_PROBES + MOST_WAYS * probes / 2,
        learns=True,
    )
    for name, hard, words, source in (
        ("gates", False, "gates learned under L1 pressure", "LoZA, arXiv 2512.23966; DuoAttention, arXiv 2410.10819"),
        ("gates-l0", True, "gates learned under L0 pressure", "ConSA, arXiv 2606.18056; arXiv 1712.01312"),
    ):
        choose = functools.partial(_gates, hard)
        yield Method(name, "search", words, source, choose, lambda *_: 4.0 * GATE_STEPS, learns=True, within=False)


NOT_COMPARED = ("full", "local", "masformer", "transformer-xl")
"""Layouts that have no full layers of their own to compare with."""
LISTED = (
    *(_rule(name, place, f"placement: {name}") for name, place in PLACEMENTS.items()),
    Method("random", "rule", "layers drawn by the seed", "a baseline", _random),
    *(
        Method(name, "rule", "the full layers of this layout", "spans/layouts.py", functools.partial(_layout, name))
        for name in LAYOUTS
        if name not in NOT_COMPARED
    ),
    *map(_top, SCORES),
    *_searches(),
)
METHODS: dict[str, Method] = {method.name: method for method in LISTED}
GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(name for name, method in METHODS.items() if method.kind == kind)
    for group, kind in (("rules", "rule"), ("scores", "score"), ("searches", "search"))
}
"""Several methods by one name."""


def named(names: Iterable[str]) -> tuple[Method, ...]:
    """Methods and groups of them, each once, in the order of `METHODS`.

    Raises:
        InputError: an unknown name.
    """
    wanted = [each for name in names for each in GROUPS.get(name, (name,))]
    for name in wanted:
        if name not in METHODS:
            raise InputError(f"unknown method {name!r}: choose of {', '.join((*GROUPS, *METHODS))}")
    return tuple(method for name, method in METHODS.items() if name in wanted)
