"""Which plans may be chosen, and which budgets they keep to."""

import itertools

import pytest

from masformer.errors import InputError
from masformer.selection.space import Budget, Space, flops_budget, full_budget, kv_budget, nats_budget
from masformer.spans import Block, Full, ModelShape, Span, SpanPlan, Window, cost

FULL = SpanPlan((Full(),) * 4)
LOCAL = Window(8, sinks=1)
SHAPE = ModelShape(
    layers=4, hidden=32, heads=4, kv_heads=2, head_dim=8, linear_parameters=1000, head_parameters=100, parameters=2000
)
SIZES: tuple[Span, ...] = (Window(8), Window(16), Window(32))


def test_a_full_layer_has_its_local_spans_and_itself_to_choose_from_and_a_local_one_only_itself() -> None:
    space = Space.of(SpanPlan((Full(), Window(3), Full(), Block(7))), SIZES[:2])
    assert space.options == ((*SIZES[:2], Full()), (Window(3),), (*SIZES[:2], Full()), (Block(7),))
    assert space.layers == (0, 2)
    assert space.parent == SpanPlan((Full(), Window(3), Full(), Block(7)))
    assert space.shortest == SpanPlan((Window(8), Window(3), Window(8), Block(7)))
    assert space.mixed([2]) == SpanPlan((Window(8), Window(3), Full(), Block(7)))
    assert space.mixed([]) == space.shortest
    assert space.mixed(range(4)) == space.parent


def test_neighbours_are_one_step_away_at_one_layer_in_the_order_of_layers() -> None:
    space = Space.of(SpanPlan((Full(), Window(3), Full())), SIZES)
    plan = SpanPlan((Window(16), Window(3), Full()))
    assert list(space.longer(plan)) == [SpanPlan((Window(32), Window(3), Full()))]
    assert list(space.shorter(plan)) == [
        SpanPlan((Window(8), Window(3), Full())),
        SpanPlan((Window(16), Window(3), Window(32))),
    ]
    assert list(space.longer(space.parent)) == list(space.shorter(space.shortest)) == []


@pytest.mark.parametrize(
    "local", [[], [Full()], [LOCAL, Full()], [Window(8), Window(8)], [Window(8), Block(8)], [Window(16), Window(8)]]
)
def test_local_spans_that_are_none_unbounded_or_not_ascending_are_refused(local: list[Span]) -> None:
    with pytest.raises(InputError, match="bounded spans of ascending sizes"):
        Space.of(FULL, local)


def test_a_parent_without_a_full_layer_is_refused() -> None:
    with pytest.raises(InputError, match=r"no full layer.*nothing to choose"):
        Space.of(SpanPlan((Window(4),) * 3), [LOCAL])


def test_a_number_of_full_layers() -> None:
    space, budget = Space.of(FULL, [LOCAL]), full_budget(2)
    fitting = [budget.fits(space.mixed(range(count))) for count in range(5)]
    assert fitting == [True, True, True, False, False]
    assert budget.count(space) == 2
    budget.check(space)
    with pytest.raises(InputError, match="4 full layers are enough for the parent"):
        full_budget(4).check(space)
    full_budget(0).check(space)
    assert full_budget(0).count(space) == 0


@pytest.mark.parametrize("make", [kv_budget, flops_budget])
@pytest.mark.parametrize("local", [LOCAL, Block(16)], ids=str)
def test_a_cost_pays_for_as_many_layers_as_the_exact_arithmetic_says(make: object, local: Span) -> None:
    space = Space.of(SpanPlan((Full(), Window(20), Full(), Full())), [local])

    def price(full: int) -> float:
        found = cost(SHAPE, space.mixed(space.layers[:full]), 100)
        return found.kv_bytes_peak if make is kv_budget else found.prefill_flops.attention

    for full, more in itertools.product(range(3), (0, 1)):
        budget: Budget = make(SHAPE, price(full) + more, 100)  # type: ignore[operator]
        budget.check(space)
        assert budget.count(space) == full
        assert budget.fits(space.mixed(space.layers[:full]))
        assert not budget.fits(space.mixed(space.layers[: full + 1]))
    with pytest.raises(InputError, match="are not enough: with no full layer the model takes"):
        make(SHAPE, price(0) - 1, 100).check(space)  # type: ignore[operator]
    with pytest.raises(InputError, match="are enough for the parent"):
        make(SHAPE, price(3), 100).check(space)  # type: ignore[operator]


def test_nats_allow_every_plan_until_it_is_measured() -> None:
    space, budget = Space.of(FULL, [LOCAL]), nats_budget(0.1)
    budget.check(space)
    assert budget.fits(space.parent)
    assert budget.count(space) == 4
    assert budget.price(space.mixed([1, 3])) == 2


def test_sizes_that_cost_the_same_are_refused() -> None:
    """Steps between them would save nothing, whatever they lose."""
    with pytest.raises(InputError, match="window:8, window:16, window:32, full cost the same"):
        full_budget(2).check(Space.of(FULL, SIZES))
    with pytest.raises(InputError, match="window:8, window:64, full cost the same"):
        kv_budget(SHAPE, 6000, 40).check(Space.of(FULL, [Window(8), Window(64)]))
    kv_budget(SHAPE, 12000, 80).check(Space.of(FULL, [Window(8), Window(64)]))
