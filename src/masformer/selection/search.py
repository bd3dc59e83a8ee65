"""Searches for the best plan that a budget allows, each measuring again after every choice it makes.

    plan = forward(bench, space, full_budget(4))
    plan = top(bench, space, full_budget(4), order_of(scores))

All are deterministic: of plans that measure the same, the first in the order of layers wins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from ..errors import InputError
from ..spans import SpanPlan
from .bench import Bench
from .space import Budget, Space

MOST_PLANS = 1000
"""More combinations than so many are refused by `exact`."""


def order_of(scores: Sequence[float]) -> list[int]:
    """Layers by falling score, those of the same score by their number."""
    return sorted(range(len(scores)), key=lambda layer: (-scores[layer], layer))


def top(bench: Bench, space: Space, budget: Budget, order: Sequence[int]) -> SpanPlan:
    """The first layers of `order` full, as many as the budget pays for."""
    free = [layer for layer in order if layer in space.layers]
    return by_count(bench, space, budget, lambda count: free[:count])


def by_count(bench: Bench, space: Space, budget: Budget, choose: Callable[[int], Iterable[int]]) -> SpanPlan:
    """What `choose` makes full for the number of layers that the budget pays for, or the least number within it."""
    if budget.within is None:
        return space.mixed(choose(budget.count(space)))
    low, high = 0, len(space.layers)
    while low < high:  # more full layers are taken to be no worse, which noise may belie
        middle = (low + high) // 2
        if keeps(bench, budget, space.mixed(choose(middle))):
            high = middle
        else:
            low = middle + 1
    return space.mixed(choose(low))


def forward(bench: Bench, space: Space, budget: Budget, width: int = 1) -> SpanPlan:
    """Greedy from all local: at every step the longer span at one layer that gains most nats for its price, counted
    from all local, of all that the budget allows; `width` plans are followed at once. The best on the way is taken.
    """
    beam, seen = [space.shortest], [space.shortest]
    while beam:
        keeping = [plan for plan in beam if budget.within is not None and keeps(bench, budget, plan)]
        if keeping:
            return min(keeping, key=budget.price)
        moves = dict.fromkeys(longer for plan in beam for longer in space.longer(plan) if budget.fits(longer))
        beam = _ranked(bench, space, budget, [*moves])[:width]
        seen += beam
    return _best(bench, seen)


def backward(bench: Bench, space: Space, budget: Budget, start: SpanPlan | None = None) -> SpanPlan:
    """Greedy from the parent or from `start`: at every step the shorter span at one layer that loses fewest nats for
    what it saves.

    Lazily (Minoux 1978): what a layer lost when it was last measured stands for what it would lose now, until it comes
    first; then it is measured again. Where losses only grow as other layers go local, that is the same choice.
    """
    plan = space.parent if start is None else start
    stale: dict[int, float] = {}
    while budget.within is not None or not budget.fits(plan):
        moves = {_changed(plan, shorter): shorter for shorter in space.shorter(plan)}
        if not moves:
            break
        if not stale:
            stale = _losses(bench, budget, plan, moves)
        layer = _least(bench, budget, plan, moves, stale)
        if budget.within is not None and not keeps(bench, budget, moves[layer]):
            break
        plan = moves[layer]
    return plan


def exact(bench: Bench, space: Space, budget: Budget, candidates: Sequence[int]) -> SpanPlan:
    """The best of all ways to choose, of these layers, as many full ones as the budget pays for.

    Raises:
        InputError: more than a thousand ways.
    """
    among = [layer for layer in candidates if layer in space.layers]
    counts = range(len(among) + 1) if budget.within is not None else [min(budget.count(space), len(among))]
    if (ways := sum(math.comb(len(among), count) for count in counts)) > MOST_PLANS:
        raise InputError(f"{ways:,} ways to choose of {len(among)} layers are too many for an exact search: give fewer")
    for count in counts:
        plans = [space.mixed(chosen) for chosen in itertools.combinations(sorted(among), count)]
        best = _best(bench, plans)
        if budget.within is None or keeps(bench, budget, best):
            return best
    return space.parent


def keeps(bench: Bench, budget: Budget, plan: SpanPlan) -> bool:
    """Whether a plan is within the nats of the budget."""
    assert budget.within is not None
    ours, parent = bench.measure([plan, bench.parent])
    return ours.nats - parent.nats <= budget.within


def _best(bench: Bench, plans: Iterable[SpanPlan]) -> SpanPlan:
    listed = list(dict.fromkeys(plans))
    return min(zip(listed, bench.measure(listed), strict=True), key=lambda pair: pair[1].nats)[0]


def _ranked(bench: Bench, space: Space, budget: Budget, plans: Sequence[SpanPlan]) -> list[SpanPlan]:
    """By the nats that each gains over all local for what it costs more."""
    [start, *found] = bench.measure([space.shortest, *plans])
    least = budget.price(space.shortest)

    def worth(plan: SpanPlan, nats: float) -> float:
        gain, price = start.nats - nats, budget.price(plan) - least
        return gain / price if gain > 0 else gain * price

    values = {plan: worth(plan, each.nats) for plan, each in zip(plans, found, strict=True)}
    return sorted(plans, key=lambda plan: -values[plan])


def _changed(plan: SpanPlan, other: SpanPlan) -> int:
    """The one layer where two plans differ."""
    return next(layer for layer, (one, two) in enumerate(zip(plan, other, strict=True)) if one != two)


def _losses(bench: Bench, budget: Budget, plan: SpanPlan, moves: dict[int, SpanPlan]) -> dict[int, float]:
    """Nats that each of these shorter plans loses for what it saves."""
    before = bench.measure([plan])[0].nats
    after = bench.measure(list(moves.values()))
    return {
        layer: (found.nats - before) / (budget.price(plan) - budget.price(moves[layer]))
        for layer, found in zip(moves, after, strict=True)
    }


def _least(bench: Bench, budget: Budget, plan: SpanPlan, moves: dict[int, SpanPlan], stale: dict[int, float]) -> int:
    """The layer that loses least, measured now; `stale` gets what was measured."""
    fresh: set[int] = set()
    while True:
        layer = min(moves, key=lambda layer: (stale[layer], layer))
        if layer in fresh:
            return layer
        stale |= _losses(bench, budget, plan, {layer: moves[layer]})
        fresh.add(layer)
