"""Run a decoder again from the first layer that is new: layers that would compute the same once more are passed over.

    states: States = []
    with applied(model, first_plan), resumed(model, states, 0):
        model.base_model(input_ids=ids)
    with applied(model, second_plan), resumed(model, states, shared(first_plan, second_plan)):
        model.base_model(input_ids=ids)                          bit for bit as if all layers had run

Two plans that agree in their first layers give the same states up to there, so most of the work of trying one layer
after the other need not be done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from ..spans import SpanPlan
from .families import decoder_of, family_of

States = list[Any]
"""What each layer gave back, layer 0 first: hidden states `[batch, tokens, hidden]`, or a tuple that begins so."""


def shared(one: SpanPlan, other: SpanPlan) -> int:
    """How many first layers have the same spans in both plans."""
    pairs = enumerate(zip(one, other, strict=True))
    return next((layer for layer, (a, b) in pairs if a != b), len(one))


@contextlib.contextmanager
def resumed(model: PreTrainedModel, states: States, first: int) -> Iterator[None]:
    """Inside the block the layers before `first` give back `states`, and what the others give back is put there.

    Runs must be of the same tokens, without a cache, and in evaluation mode. With `first` the number of layers, none
    runs.
    """
    layers = list(decoder_of(model).get_submodule(family_of(model.config).layers).children())

    def keep(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            states[layer] = output

        return hook

    states.extend([None] * (len(layers) - len(states)))
    handles = [layer.register_forward_hook(keep(number)) for number, layer in enumerate(layers) if number >= first]
    for layer in layers[:first]:  # whatever these give back, only that of the last one is read
        layer.forward = lambda *args, **kwargs: states[first - 1]
    try:
        yield
    finally:
        for layer in layers[:first]:
            del layer.forward
        for handle in handles:
            handle.remove()
