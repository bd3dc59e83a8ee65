"""A run that begins at a later layer: bit for bit the whole run, in every family, and no trace of it afterwards."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from masformer.models.convert import applied, convert
from masformer.models.families import FAMILIES, attention_modules, decoder_of
from masformer.models.resume import States, resumed, shared
from masformer.spans import Block, Full, SpanPlan, Window

from .helpers import FULL, MIXED, state, tiny, tokens

A, B, C = Full(), Window(4, sinks=2), Block(5, lookback=1)
PLANS = (
    FULL,
    SpanPlan((A, A, A, B)),
    SpanPlan((A, A, A, B)),
    SpanPlan((A, A, C, B)),
    SpanPlan((A, B, A, A)),
    SpanPlan((A, B, B, A)),
    MIXED,
    FULL,
)
"""Plan by plan: 3, 4, 2, 1, 2, 1 and 1 first layers are those of the one before."""


def hidden(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return found


@pytest.mark.parametrize(("plans", "count"), [*zip(itertools.pairwise(PLANS), (3, 4, 2, 1, 2, 1, 1), strict=True)])
def test_shared_counts_the_first_layers_that_two_plans_have_in_common(
    plans: tuple[SpanPlan, SpanPlan], count: int
) -> None:
    assert shared(*plans) == shared(*reversed(plans)) == count


def test_plans_that_differ_at_once_or_in_length() -> None:
    assert shared(FULL, SpanPlan((B, A, A, A))) == 0
    with pytest.raises(ValueError, match="shorter"):
        shared(FULL, SpanPlan((A, A, A)))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_gives_the_bits_of_a_whole_run(family: str) -> None:
    """Hidden states and logits, of two rows, after any number of runs before; the layers before do not compute."""
    model, ids = tiny(family, torch.float32), tokens(24, batch=2)
    before = state(model)
    computed: list[int] = []
    expected = {}
    for plan in dict.fromkeys(PLANS):
        with applied(model, plan), torch.no_grad():
            expected[plan] = hidden(model, ids), model(input_ids=ids, use_cache=False).logits
    assert not torch.equal(expected[PLANS[0]][0], expected[PLANS[1]][0])
    handles = [
        module.register_forward_hook(lambda *_, layer=layer: computed.append(layer))
        for layer, module in enumerate(attention_modules(model))
    ]
    states: States = []
    last = None
    for plan in PLANS:
        first = 0 if last is None else shared(last, plan)
        with applied(model, plan), resumed(model, states, first), torch.no_grad():
            assert torch.equal(hidden(model, ids), expected[plan][0])
            assert computed == [*range(first, 4)]
            computed.clear()
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected[plan][1])
        computed.clear()
        last = plan
    for handle in handles:
        handle.remove()
    assert state(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_other_dtypes_too(dtype: torch.dtype) -> None:
    model, ids, states = tiny("llama", dtype), tokens(24), list[Any]()
    with applied(model, PLANS[3]):
        expected = hidden(model, ids)
    with applied(model, FULL), resumed(model, states, 0):
        hidden(model, ids)
    with applied(model, PLANS[3]), resumed(model, states, 2):
        assert torch.equal(hidden(model, ids), expected)


def test_states_of_other_tokens_would_show() -> None:
    """What the first layers give back is what was kept, not something computed after all."""
    model, states = convert(tiny(dtype=torch.float32), FULL, check=False), list[Any]()
    with resumed(model, states, 0):
        expected = hidden(model, tokens(24, seed=1))
    with resumed(model, states, 4):
        assert torch.equal(hidden(model, tokens(24, seed=2)), expected)


def test_layers_are_as_before_after_an_exception() -> None:
    model, ids, states = convert(tiny(dtype=torch.float32), FULL, check=False), tokens(24), list[Any]()
    expected = hidden(model, ids)
    layers = decoder_of(model).layers
    before = state(model)

    def stopped(*_: Any) -> None:
        assert ["forward" in vars(layer) for layer in layers] == [True, True, True, False]
        raise KeyboardInterrupt

    with resumed(model, states, 0):
        hidden(model, ids)
    handle = layers[3].register_forward_hook(stopped)
    with pytest.raises(KeyboardInterrupt), resumed(model, states, 3):
        hidden(model, ids)
    handle.remove()
    assert state(model) == before
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in layers)
    assert torch.equal(hidden(model, ids), expected)
