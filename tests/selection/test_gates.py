"""Gates between a layer's full attention and its local one: exact at both ends, right gradients, no trace after."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from masformer.attention.softmax import Softmax
from masformer.errors import InputError
from masformer.models.convert import applied, convert
from masformer.models.families import attention_modules, native_plan
from masformer.models.interface import watched
from masformer.selection.bench import Bench
from masformer.selection.gates import _hard, _open, first_order, gated, learned
from masformer.selection.probes import RECALL, Probe
from masformer.selection.space import Space
from masformer.spans import Block, Full, Span, Window
from tests.models.helpers import FULL, MIXED, logits, state, tiny, tokens

FAMILIES = ("llama", "gpt2", "gemma2", "gpt_oss", "gpt_neo")
LOCAL = Window(5, sinks=1)


def space_of(model: Any, local: Span = LOCAL) -> Space:
    return Space.of(native_plan(model.config), [local])


def probe(seed: int = 0) -> Probe:
    return Probe(RECALL, tokens(30, seed=seed)[0], torch.tensor([17, 23, 28, 29]))


def exact_loss(model: Any, what: Probe) -> Tensor:
    """In the model's own dtype."""
    found: Tensor = model(input_ids=what.ids[None], use_cache=False).logits[0, what.places - 1]
    return F.cross_entropy(found, what.ids[what.places])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_open_gates_are_the_parent_and_shut_ones_all_local_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    model, ids = tiny(family, dtype), tokens(30, batch=2)
    space = space_of(model)
    with applied(model, space.parent):
        parent = logits(model, ids)
    with applied(model, space.shortest):
        local = logits(model, ids)
    assert not torch.equal(parent, local)
    for gate, expected in ((1.0, parent), (0.0, local)):
        with gated(model, space, torch.full((4,), gate)):
            assert torch.equal(logits(model, ids), expected)
    with gated(model, space, torch.full((4,), 0.5)):
        assert not torch.equal(logits(model, ids), parent)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("local", [LOCAL, Block(4, lookback=1)], ids=str)
def test_the_gradient_of_a_gate_is_the_difference_quotient(family: str, local: Span) -> None:
    model, what = tiny(family), probe()
    space = space_of(model, local)
    at = torch.tensor([0.9, 0.3, 1.0, 0.6], dtype=torch.float64)
    gates = at.clone().requires_grad_(True)
    with gated(model, space, gates):
        exact_loss(model, what).backward()
    assert gates.grad is not None
    # all but GPT-2 make norms, scores or weights in float32 whatever the dtype
    step, bar = (1e-5, 1e-8) if family == "gpt2" else (1e-3, 2e-3)
    for layer in range(4):
        change = torch.zeros(4, dtype=torch.float64)
        change[layer] = step
        ends = []
        for moved in (at + change, at - change):
            with gated(model, space, moved), torch.no_grad():
                ends.append(float(exact_loss(model, what)))
        quotient = (ends[0] - ends[1]) / (2 * step)
        assert float(gates.grad[layer]) == pytest.approx(quotient, abs=bar)
        assert (quotient == 0) == (layer not in space.layers)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_first_order_of_a_layer_is_minus_its_gates_derivative_and_0_without_a_choice() -> None:
    model = tiny("gemma2")
    space = space_of(model)
    assert space.layers == (1, 3)
    expected = torch.zeros(4, dtype=torch.float64)
    for seed in (1, 2):
        gates = torch.ones(4, dtype=torch.float64, requires_grad=True)
        with gated(model, space, gates):
            exact_loss(model, probe(seed)).backward()
        assert gates.grad is not None
        expected -= gates.grad / 2
    found = first_order(model, space, [probe(1), probe(2)])
    assert found == pytest.approx(expected.tolist(), abs=1e-5)
    assert found[0] == found[2] == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_along_the_whole_way_the_parts_of_all_layers_add_up_to_what_all_local_loses(family: str) -> None:
    """The completeness of integrated gradients."""
    model, what = tiny(family, torch.float32), probe()
    space = space_of(model)
    parent, local = Bench(model, [what]).measure([space.parent, space.shortest])
    loss = local.recall - parent.recall
    assert abs(loss) > 0.1
    steps = 64
    points = [(step + 0.5) / steps for step in range(steps)]
    parts = first_order(model, space, [what] * steps, points)
    assert sum(parts) == pytest.approx(loss, abs=2e-3)
    assert sum(first_order(model, space, [what])) != pytest.approx(loss, abs=2e-2)


def test_every_probe_takes_the_next_point() -> None:
    model, probes = tiny(dtype=torch.float32), [probe(seed) for seed in range(3)]
    space = space_of(model)
    expected = torch.zeros(4)
    for what, point in zip(probes, (0.25, 0.75, 0.25), strict=True):
        expected += torch.tensor(first_order(model, space, [what], [point])) / 3
    assert first_order(model, space, probes, [0.25, 0.75]) == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before_afterwards_whatever_happens(converted: bool, fails: bool) -> None:
    model = tiny(dtype=torch.float32)
    if converted:
        convert(model, MIXED, check=False)
    model.train()
    parameters = list(model.parameters())
    for parameter in parameters[::3]:
        parameter.requires_grad_(False)
    before, wanted = state(model), [parameter.requires_grad for parameter in parameters]
    space = Space.of(FULL, [LOCAL])
    gates = torch.ones(4, requires_grad=True)

    def work() -> None:
        with gated(model, space, gates):
            assert not any(parameter.requires_grad for parameter in parameters)
            assert not model.training
            assert all(hasattr(module, "watch") for module in attention_modules(model))
            exact_loss(model, probe()).backward()
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            work()
    else:
        work()
    assert state(model) == before
    assert [parameter.requires_grad for parameter in parameters] == wanted
    assert all(parameter.grad is None for parameter in parameters)


def test_a_watch_sees_the_layers_own_span_and_decides_what_the_layer_computes() -> None:
    model, ids = convert(tiny(dtype=torch.float32), MIXED, check=False), tokens(20)
    expected, seen = logits(model, ids), []

    def look(span: Span, over: Any, query: Tensor, key: Tensor, how: Softmax) -> Tensor:
        seen.append((span, query.shape, key.shape))
        return over(span)

    def narrow(span: Span, over: Any, *_: Any) -> Tensor:
        found: Tensor = over(Window(3))
        return found

    modules = attention_modules(model)
    with watched(modules, [look] * 4):
        assert torch.equal(logits(model, ids), expected)
    assert seen == [(span, (1, 4, 20, 8), (1, 2, 20, 8)) for span in MIXED]
    with applied(model, MIXED.__class__((*MIXED.spans[:3], Window(3)))):
        other = logits(model, ids)
    with watched(modules[3:], [narrow]):
        assert torch.equal(logits(model, ids), other)
    assert torch.equal(logits(model, ids), expected)
    assert not any("watch" in vars(module) for module in modules)


def test_the_gates_that_are_drawn_are_open_as_often_as_is_said() -> None:
    raw, random = torch.tensor([-3.0, -1.0, 0.0, 2.0]), torch.Generator().manual_seed(0)
    drawn = torch.stack([_hard(raw, random)[1] for _ in range(20_000)])
    assert drawn.min() == 0
    assert drawn.max() == 1
    assert ((drawn > 0).float().mean(0) - _open(raw)).abs().max() < 0.02
    assert torch.equal(_hard(raw, random)[0], _open(raw))


@pytest.mark.parametrize("hard", [False, True])
def test_learning_depends_on_the_seed_alone_and_leaves_the_weights(hard: bool) -> None:
    model = tiny(dtype=torch.float32)
    space, weights = space_of(model), [parameter.clone() for parameter in model.parameters()]

    def values(seed: int) -> list[float]:
        return learned(model, space, [probe(step) for step in range(6)], count=2, hard=hard, seed=seed)

    first = values(0)
    assert values(0) == first
    assert (values(1) == first) == (not hard)
    assert all(0 <= value <= 1 for value in first)
    assert all(map(torch.equal, model.parameters(), weights))


@pytest.mark.parametrize("hard", [False, True])
def test_the_pressure_closes_layers_that_do_nothing_down_to_the_count(hard: bool) -> None:
    model = tiny(dtype=torch.float32)
    for module in attention_modules(model):
        torch.nn.init.zeros_(module.o_proj.weight)
    space = space_of(model)
    probes = [probe(step) for step in range(48)]
    sums = [sum(learned(model, space, probes, count=count, hard=hard)) for count in (1, 3)]
    assert sums[0] < sums[1] - 0.5
    assert sums[1] < 3.7


@pytest.mark.parametrize("hard", [False, True])
def test_layers_without_a_choice_are_not_counted_among_the_open_ones(hard: bool) -> None:
    """As many may be open as have a choice, so nothing presses, and nothing else moves a gate here."""
    model = tiny("gemma2", torch.float32)
    for module in attention_modules(model):
        torch.nn.init.zeros_(module.o_proj.weight)
    space, probes = space_of(model), [probe(step) for step in range(12)]
    shut = learned(model, space, probes, count=0, hard=hard)
    left = learned(model, space, probes, count=2, hard=hard)
    assert len({*left}) == 1
    assert [value < left[0] for value in shut] == [False, True, False, True]


def test_a_model_without_finite_gradients_is_refused() -> None:
    model = tiny(dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[5] = float("inf")
    with pytest.raises(InputError, match="gradient of the loss is not a finite number"):
        first_order(model, space_of(model), [probe()])


def test_full_layers_alone_have_gates() -> None:
    model = tiny("gpt_neo", torch.float32)
    space = space_of(model)
    assert [isinstance(span, Full) for span in space.parent] == [layer in space.layers for layer in range(4)]
    gates = torch.ones(4, requires_grad=True)
    with gated(model, space, gates):
        exact_loss(model, probe()).backward()
    assert gates.grad is not None
    assert [layer for layer in range(4) if gates.grad[layer] != 0] == list(space.layers)
