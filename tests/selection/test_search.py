"""Searches on made-up losses, where brute force says what is best."""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from masformer.errors import InputError
from masformer.selection import search
from masformer.selection.bench import Measured
from masformer.selection.methods import GATE_STEPS, METHODS, Task, named
from masformer.selection.space import Budget, Space, full_budget, kv_budget, nats_budget
from masformer.selection.store import Store
from masformer.spans import Block, Full, ModelShape, Span, SpanPlan, Window

LAYERS, LENGTH = 6, 100
LOCAL = Window(8)
SHAPE = ModelShape(
    layers=LAYERS,
    hidden=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    linear_parameters=1000,
    head_parameters=100,
    parameters=2000,
)
SIZES: tuple[Span, ...] = (Window(8), Window(16), Window(32))
Loss = Callable[[SpanPlan], float]


class Bench:
    """Nats that a function gives; it counts the plans that it was asked for."""

    def __init__(self, space: Space, loss: Loss) -> None:
        self.parent, self.loss, self.asked = space.parent, loss, dict[SpanPlan, float]()
        self.store = Store()

    def measure(self, plans: list[SpanPlan]) -> list[Measured]:
        self.asked |= {plan: self.loss(plan) for plan in plans}
        return [Measured(self.asked[plan], None, 0.0) for plan in plans]


def space_of(*local: Span, without: tuple[int, ...] = ()) -> Space:
    parent = SpanPlan(tuple(Window(3) if layer in without else Full() for layer in range(LAYERS)))
    return Space.of(parent, local or (LOCAL,))


def additive(space: Space, seed: int) -> Loss:
    """Every layer loses something of its own for every step that it is shorter, the longer the less."""
    drawn = random.Random(seed)
    losses = [sorted((drawn.random() for _ in options[1:]), reverse=True) for options in space.options]
    lost = [[sum(steps[at:]) for at in range(len(steps) + 1)] for steps in losses]

    def loss(plan: SpanPlan) -> float:
        return 1 + sum(lost[n][space.options[n].index(span)] for n, span in enumerate(plan))

    return loss


def entangled(space: Space, seed: int) -> Loss:
    """Every plan has a loss of its own."""

    def loss(plan: SpanPlan) -> float:
        return random.Random(f"{seed} {plan}").random() if plan != space.parent else 0.0

    return loss


def growing(space: Space, seed: int) -> Loss:
    """What a layer loses grows with every other that is local."""
    alone = additive(space, seed)
    return lambda plan: alone(plan) ** 2


def every(space: Space) -> Iterator[SpanPlan]:
    return (SpanPlan(spans) for spans in itertools.product(*space.options))


def best(space: Space, budget: Budget, loss: Loss) -> SpanPlan:
    return min((plan for plan in every(space) if budget.fits(plan)), key=loss)


def cheapest(space: Space, within: float, loss: Loss) -> SpanPlan:
    keeping = [plan for plan in every(space) if loss(plan) - loss(space.parent) <= within]
    return min(keeping, key=lambda plan: (len(plan.full_layers), loss(plan)))


def eagerly(space: Space, budget: Budget, loss: Loss) -> SpanPlan:
    """Backward with everything measured at every step."""
    plan = space.parent
    while not budget.fits(plan):
        before = plan
        plan = min(
            space.shorter(before), key=lambda p: (loss(p) - loss(before)) / (budget.price(before) - budget.price(p))
        )
    return plan


def kv(space: Space, share: float) -> Budget:
    """Bytes that lie between those of all local and of the parent."""
    price = kv_budget(SHAPE, 0, LENGTH).price
    least, most = price(space.shortest), price(space.parent)
    return kv_budget(SHAPE, least + share * (most - least), LENGTH)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [0, 1, 3, 5])
@pytest.mark.parametrize("without", [(), (0, 3)])
def test_with_additive_losses_all_find_the_best_plan(seed: int, count: int, without: tuple[int, ...]) -> None:
    space, budget = space_of(without=without), full_budget(min(count, 3) if without else count)
    loss = additive(space, seed)
    wanted = best(space, budget, loss)
    bench: Any = Bench(space, loss)
    assert search.forward(bench, space, budget) == wanted
    assert search.forward(bench, space, budget, width=3) == wanted
    assert search.backward(bench, space, budget) == wanted
    assert search.exact(bench, space, budget, range(LAYERS)) == wanted
    alone = [loss(space.with_span(space.parent, n, space.shortest[n])) for n in range(LAYERS)]
    assert search.top(bench, space, budget, search.order_of(alone)) == wanted


@pytest.mark.parametrize("seed", range(4))
def test_entangled_losses_are_for_exact_and_for_a_beam_that_is_wide_enough(seed: int) -> None:
    space, budget = space_of(), full_budget(3)
    loss = entangled(space, seed)
    bench: Any = Bench(space, loss)
    threes = [space.mixed(chosen) for chosen in itertools.combinations(range(LAYERS), 3)]
    assert search.exact(bench, space, budget, range(LAYERS)) == min(threes, key=loss)
    among = [plan for plan in threes if {*plan.full_layers} <= {0, 2, 3, 5}]
    assert search.exact(bench, space, budget, [5, 0, 3, 2]) == min(among, key=loss)
    assert search.forward(bench, space, budget, width=100) == best(space, budget, loss)


@pytest.mark.parametrize("seed", range(6))
def test_a_beam_follows_the_best_few_and_takes_the_best_on_the_way(seed: int) -> None:
    space, budget = space_of(), full_budget(3)
    loss = entangled(space, seed)
    beam, seen = [space.shortest], [space.shortest]
    for _ in range(3):
        moves = {longer for plan in beam for longer in space.longer(plan)}
        beam = sorted(moves, key=loss)[:2]
        seen += beam
    bench: Any = Bench(space, loss)
    assert search.forward(bench, space, budget, width=2) == min(seen, key=loss)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("losses", [additive, growing])
def test_measuring_lazily_chooses_what_measuring_everything_does(
    seed: int, losses: Callable[[Space, int], Loss]
) -> None:
    space, budget = space_of(), full_budget(2)
    loss = losses(space, seed)
    bench: Any = Bench(space, loss)
    assert search.backward(bench, space, budget) == eagerly(space, budget, loss)
    if losses is additive:  # the parent, each layer, and four steps of which the first is known
        assert len(bench.asked) == 1 + LAYERS + 3


@pytest.mark.parametrize("seed", range(6))
def test_so_it_does_with_several_sizes_where_every_step_saves_at_a_higher_price(seed: int) -> None:
    space = space_of(*SIZES)
    budget = kv(space, 0.4)
    prices = [budget.price(space.with_span(space.shortest, 0, span)) for span in space.options[0]]
    saved = [more - less for less, more in itertools.pairwise(prices)]
    drawn = random.Random(seed)
    rates = [sorted((drawn.random() for _ in saved), reverse=True) for _ in range(LAYERS)]

    def loss(plan: SpanPlan) -> float:
        at = [options.index(span) for options, span in zip(space.options, plan, strict=True)]
        return sum(rates[n][step] * saved[step] for n in range(LAYERS) for step in range(at[n], len(saved)))

    bench: Any = Bench(space, loss)
    assert search.backward(bench, space, budget) == eagerly(space, budget, loss)


def test_lazily_a_loss_that_grew_is_measured_again_before_it_is_taken() -> None:
    space = space_of()
    bound = {frozenset({0, 1}): 5.0}  # 0 and 1 are cheap alone and dear together
    alone = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]

    def loss(plan: SpanPlan) -> float:
        local = {n for n, span in enumerate(plan) if span.is_local}
        return sum(alone[n] for n in local) + sum(extra for pair, extra in bound.items() if pair <= local)

    bench: Any = Bench(space, loss)
    assert search.backward(bench, space, full_budget(2)).full_layers == (1, 5)


def test_backward_can_begin_below_the_parent() -> None:
    space = space_of()
    bench: Any = Bench(space, additive(space, 0))
    plan = search.backward(bench, space, full_budget(1), space.mixed([1, 2, 4]))
    assert plan == min((space.mixed([n]) for n in (1, 2, 4)), key=bench.loss)
    assert not any({0, 3, 5} & {*asked.full_layers} for asked in bench.asked)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("within", [0.0, 0.3, 1.0, 10.0])
def test_within_some_nats_the_fewest_full_layers_are_taken(seed: int, within: float) -> None:
    space, budget = space_of(), nats_budget(within)
    loss = additive(space, seed)
    bench: Any = Bench(space, loss)
    wanted = cheapest(space, within, loss)
    assert search.forward(bench, space, budget) == wanted
    assert search.forward(bench, space, budget, width=3) == wanted
    assert search.backward(bench, space, budget) == wanted
    assert search.exact(bench, space, budget, range(LAYERS)) == wanted
    alone = [loss(space.with_span(space.parent, n, space.shortest[n])) for n in range(LAYERS)]
    assert search.top(bench, space, budget, search.order_of(alone)) == wanted
    if within == 0:
        assert wanted == space.parent
    if within == 10:
        assert wanted == space.shortest


def test_exact_within_nats_that_no_choice_of_its_candidates_keeps_is_the_parent() -> None:
    space = space_of()
    bench: Any = Bench(space, additive(space, 0))
    assert search.exact(bench, space, nats_budget(0.0), [0, 1, 2]) == space.parent


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("find", ["forward", "beam", "backward"])
def test_with_several_sizes_plans_keep_to_the_budget_and_leave_little_of_it(seed: int, share: float, find: str) -> None:
    space = space_of(*SIZES)
    budget = kv(space, share)
    loss = additive(space, seed)
    bench: Any = Bench(space, loss)
    plan = METHODS[find].choose(Task(bench, space, budget))
    assert plan is not None
    assert budget.fits(plan)
    assert all(span in options for span, options in zip(plan, space.options, strict=True))
    if find != "backward":
        assert not any(budget.fits(longer) for longer in space.longer(plan))
    reachable = [p for p in every(space) if budget.fits(p)]
    ranked = sorted(map(loss, reachable))
    assert ranked.index(loss(plan)) <= len(ranked) // 10


@pytest.mark.parametrize("find", [search.forward, search.backward])
def test_sizes_between_are_used_where_they_are_enough(find: Any) -> None:
    """Layer 0 needs 16 tokens and no more, layer 5 all of them, the others nothing."""
    space = space_of(*SIZES)

    def loss(plan: SpanPlan) -> float:
        return 3.0 * (plan[0] == Window(8)) + 2.0 * (plan[5] != Full())

    wanted = SpanPlan((Window(16), *(Window(8),) * 4, Full()))
    budget = kv_budget(SHAPE, kv_budget(SHAPE, 0, LENGTH).price(wanted), LENGTH)
    bench: Any = Bench(space, loss)
    if find is search.backward:
        assert find(bench, space, budget) == wanted
    else:  # it takes steps alone, and one to 16 tokens at layer 5 gains nothing: it must be led there
        assert find(bench, space, budget)[0] == Window(16)


def test_forward_takes_what_gains_most_for_its_price_and_not_what_gains_most() -> None:
    space = space_of(*SIZES)
    gains = {Window(8): 0.0, Window(16): 1.0, Window(32): 2.2, Full(): 2.2}

    def loss(plan: SpanPlan) -> float:
        return -gains[plan[0]] - 0.9 * sum(gains[span] > 0 for span in plan.spans[1:])

    price = kv_budget(SHAPE, 0, LENGTH).price
    three = SpanPlan((Window(16),) * 3 + (Window(8),) * 3)
    assert price(three) == price(SpanPlan((Window(32), *(Window(8),) * 5)))
    bench: Any = Bench(space, loss)
    assert search.forward(bench, space, kv_budget(SHAPE, price(three), LENGTH)) == three


def test_a_plan_that_loses_exactly_the_nats_allowed_keeps_to_them() -> None:
    space = space_of()
    for within in (0.0, 0.5):
        bench: Any = Bench(space, lambda plan, most=within: 1.0 + most * (plan == space.shortest))
        for find in (search.forward, search.backward):
            assert find(bench, space, nats_budget(within)) == space.shortest
        assert search.exact(bench, space, nats_budget(within), range(LAYERS)) == space.shortest
        assert search.top(bench, space, nats_budget(within), range(LAYERS)) == space.shortest


@pytest.mark.parametrize("local", [Window(8), Block(8)], ids=str)
def test_of_plans_that_measure_the_same_the_first_in_the_order_of_layers_wins(local: Span) -> None:
    space = Space.of(SpanPlan((Full(),) * LAYERS), [local])
    budget = full_budget(2)
    bench: Any = Bench(space, lambda plan: float(-len(plan.full_layers)))
    assert search.forward(bench, space, budget).full_layers == (0, 1)
    assert search.forward(bench, space, budget, width=3).full_layers == (0, 1)
    assert search.exact(bench, space, budget, range(LAYERS)).full_layers == (0, 1)
    assert search.exact(bench, space, budget, range(LAYERS)[::-1]).full_layers == (0, 1)
    assert search.backward(bench, space, budget).full_layers == (4, 5)  # the first to go local are the first, too
    assert search.order_of([1.0, 3.0, 1.0, 3.0]) == [1, 3, 0, 2]


def test_forward_keeps_the_plan_before_if_more_layers_measure_worse() -> None:
    space = space_of()

    def loss(plan: SpanPlan) -> float:
        return {0: 5.0, 1: 1.0}.get(len(plan.full_layers), 3.0) + 0.1 * (1 not in plan.full_layers)

    bench: Any = Bench(space, loss)
    assert search.forward(bench, space, full_budget(4)).full_layers == (1,)


def test_too_many_combinations_are_refused_with_their_number() -> None:
    space = Space.of(SpanPlan((Full(),) * 30), [LOCAL])
    bench: Any = Bench(space, lambda plan: pytest.fail("measured"))
    with pytest.raises(InputError, match="142,506 ways to choose of 30 layers are too many"):
        search.exact(bench, space, full_budget(5), range(30))


@pytest.mark.parametrize("name", ["prune", "exact"])
def test_layers_without_a_choice_take_no_place_among_the_best(name: str, monkeypatch: Any) -> None:
    """They score 0, which is more than layers that get better when they go local."""
    monkeypatch.setattr("masformer.selection.methods.FEWEST", 3)
    monkeypatch.setattr("masformer.selection.methods.MOST_WAYS", 3)
    space = space_of(without=(0, 1))
    bench: Any = Bench(space, additive(space, 0))
    bench.basis = "made up"
    task = Task(bench, space, full_budget(1))
    task.kept("score path", lambda: [0.0, 0.0, -1.0, -2.0, -3.0, -4.0])
    plan = METHODS[name].choose(task)
    assert plan is not None
    assert len(plan.full_layers) == 1
    assert {n for asked in bench.asked for n in asked.full_layers if asked != space.parent} == {2, 3, 4}


@pytest.mark.parametrize("hard", [False, True])
def test_gates_of_layers_without_a_choice_are_not_counted_as_open(hard: bool) -> None:
    space = space_of(without=(0, 1))
    bench: Any = Bench(space, additive(space, 0))
    bench.basis = "made up"
    bench.items = object()
    task = Task(bench, space, full_budget(2), 7)
    task.kept(f"gates {hard} 2 {GATE_STEPS} 7", lambda: [1.0, 1.0, 0.3, 0.1, 0.9, 0.2])
    plan = METHODS["gates-l0" if hard else "gates"].choose(task)
    assert plan == space.mixed([2, 4])


def test_gates_need_items_and_a_number_of_layers() -> None:
    space = space_of()
    bench: Any = Bench(space, additive(space, 0))
    for budget, items in ((full_budget(2), None),):
        bench.items = items
        with pytest.raises(InputError, match="gates need recall items"):
            METHODS["gates"].choose(Task(bench, space, budget))


def test_a_rule_places_layers_among_those_that_have_a_choice() -> None:
    space = space_of(without=(0, 3))
    bench: Any = Bench(space, additive(space, 0))

    def layers(name: str, count: int = 2, seed: int = 0) -> tuple[int, ...] | None:
        plan = METHODS[name].choose(Task(bench, space, full_budget(count), seed))
        return None if plan is None else plan.full_layers

    assert layers("bottom") == (1, 2)
    assert layers("top") == (4, 5)
    assert layers("middle") == (2, 4)
    assert layers("interleaved") == (2, 5)
    assert layers("gpt-oss", 3) == (1, 5)  # 1, 3 and 5 of all
    assert layers("gpt-oss", 1) is None
    assert {layers("random", seed=seed) for seed in range(20)} > {layers("random")}
    assert layers("random") == layers("random")
    assert not bench.asked


@pytest.mark.parametrize("name", METHODS)
def test_no_method_takes_less_than_no_effort(name: str) -> None:
    efforts = [METHODS[name].effort(layers, count, 15) for layers in (4, 24, 80) for count in range(layers + 1)]
    assert min(efforts) >= 0
    assert (max(efforts) == 0) == (METHODS[name].kind == "rule")


def test_methods_by_name_and_group() -> None:
    assert [method.name for method in named(["searches", "top", "forward"])][:2] == ["top", "forward"]
    assert len(named(["rules", "scores", "searches"])) == len(METHODS)
    with pytest.raises(InputError, match="unknown method 'best': choose of rules, scores, searches, bottom"):
        named(["top", "best"])
