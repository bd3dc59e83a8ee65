"""What a layer is worth: scores by which layers are ranked, a number for each; those of the highest stay full.

    scores = SCORES["recall"].of(bench, space)

Those that measure take plans that differ from the parent (or from all local) at one layer, on the bench's probes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ..attention.softmax import Softmax
from ..models.convert import applied
from ..models.families import attention_modules
from ..models.interface import Watch, watched
from ..models.selfcheck import evaluating
from ..spans import Span
from .bench import Bench
from .gates import first_order
from .space import Space

QUERIES = 64
"""Queries whose attention is looked at: the last ones for `lazy` (LightTransfer), evenly spaced ones for `mass`."""

PATH_PROBES, PATH_STEPS = 32, 8
"""Recall items of the score `path`, and points between the parent and all local that they are spread over."""

Field = Literal["recall", "documents", "kl"]


@dataclasses.dataclass(frozen=True)
class Score:
    """words: what it is, for people. source: where it comes from. of: the function, a number per layer.

    effort: probes' forwards that it takes, of (layers, full layers wanted, probes); a backward counts two.
    learns: whether it takes gradients.
    """

    name: str
    words: str
    source: str
    of: Callable[[Bench, Space], list[float]]
    effort: Callable[[int, int, int], float] = lambda layers, count, probes: layers * probes / 2
    learns: bool = False


def lost_without(bench: Bench, space: Space, field: Field) -> list[float]:
    """How much the measure gains when the layer alone goes local, the others being the parent's; 0 without a choice."""
    changed = [space.with_span(space.parent, layer, space.shortest[layer]) for layer in space.layers]
    [parent, *found] = [_value(measured, field) for measured in bench.measure([space.parent, *changed])]
    return _by_layer(space, [value - parent for value in found])


def gained_by(bench: Bench, space: Space, field: Field) -> list[float]:
    """How much the measure falls when the layer alone stays full, the others being local; 0 without a choice."""
    [local, *found] = [
        _value(measured, field)
        for measured in bench.measure([space.shortest, *(space.mixed([layer]) for layer in space.layers)])
    ]
    return _by_layer(space, [local - value for value in found])


def _value(measured: Any, field: Field) -> float:
    return float(getattr(measured, field))


def _by_layer(space: Space, values: list[float]) -> list[float]:
    found = dict(zip(space.layers, values, strict=True))
    return [found.get(layer, 0.0) for layer in range(len(space.options))]


def gradient(bench: Bench, space: Space) -> list[float]:
    return first_order(bench.model, space, bench.probes)


def path_gradient(bench: Bench, space: Space) -> list[float]:
    probes = bench.fresh(PATH_PROBES)
    steps = min(PATH_STEPS, len(probes))
    return first_order(bench.model, space, probes, [1 - (step + 0.5) / steps for step in range(steps)])


@torch.no_grad()
def mass_beyond(bench: Bench, space: Space, *, last: bool) -> list[float]:
    """The share of a full layer's attention, 0 to 1, that its shortest span would not see, over heads and probes.

    Args:
        last: of the last queries, one minus what LightTransfer calls the lazy ratio; else of queries all over the text.
    """
    sums = torch.zeros(len(space.options), dtype=torch.float64)

    def look(layer: int) -> Watch:
        def mass(span: Span, over: Callable[[Span], Tensor], query: Tensor, key: Tensor, how: Softmax) -> Tensor:
            tokens = query.shape[2]
            first = max(0, tokens - QUERIES) if last else 0
            chosen = torch.linspace(first, tokens - 1, min(QUERIES, tokens)).round().long().to(query.device)
            sums[layer] += _beyond(query[:, :, chosen], key, how, chosen, space.shortest[layer])
            return over(span)

        return mass

    modules = attention_modules(bench.model)
    looks = [look(layer) for layer in space.layers]
    with (
        applied(bench.model, space.parent),
        watched([modules[layer] for layer in space.layers], looks),
        evaluating(bench.model),
    ):
        for probe in bench.probes:
            bench.model.base_model(input_ids=probe.ids[None].to(bench.model.device), use_cache=False)
    return [float(x) for x in sums / len(bench.probes)]


def _beyond(query: Tensor, key: Tensor, how: Softmax, places: Tensor, local: Span) -> float:
    """Mean weight on keys that `local` does not see, of queries `[batch, heads, queries, dim]` at `places`.

    With a 1 as the value of every key that one query would lose and a 0 elsewhere, attention gives their weights' sum.
    """
    keys = torch.arange(key.shape[2], device=key.device)
    starts = torch.tensor([local.start(int(place)) for place in places], device=key.device)
    causal = keys <= places[:, None]
    beyond = (keys < starts[:, None]) & (keys >= local.sinks)
    values = beyond.T.float().expand(*key.shape[:2], *beyond.T.shape)  # [batch, kv_heads, keys, queries]
    exact = dataclasses.replace(how, dropout=0.0)
    weight = exact.attend(query.float(), key.float(), values, mask=causal).diagonal(dim1=2, dim2=3)
    return float(weight.double().mean())


LISTED = (
    Score(
        "recall",
        "nats per answer token lost when the layer alone goes local",
        "sensitivity of answers; the other direction of arXiv 2606.27791",
        lambda bench, space: lost_without(bench, space, "recall"),
    ),
    Score(
        "recall-only",
        "nats per answer token gained when the layer alone stays full",
        "NLL-guided selection, arXiv 2606.27791",
        lambda bench, space: gained_by(bench, space, "recall"),
    ),
    Score(
        "loss",
        "nats per token of documents lost when the layer alone goes local",
        "leave one out",
        lambda bench, space: lost_without(bench, space, "documents"),
    ),
    Score(
        "loss-only",
        "nats per token of documents gained when the layer alone stays full",
        "leave one in",
        lambda bench, space: gained_by(bench, space, "documents"),
    ),
    Score(
        "kl",
        "KL from the parent when the layer alone goes local",
        "the other direction of arXiv 2512.20569",
        lambda bench, space: lost_without(bench, space, "kl"),
    ),
    Score(
        "kl-only",
        "KL from the parent that the layer takes away when it alone stays full",
        "KL-guided selection, arXiv 2512.20569, without its distillation",
        lambda bench, space: gained_by(bench, space, "kl"),
    ),
    Score(
        "gradient",
        "first-order estimate of the nats lost without the layer",
        "gradient times change",
        gradient,
        lambda layers, count, probes: 4.0 * probes,
        learns=True,
    ),
    Score(
        "path",
        "the layer's part in what all local loses on answers",
        "integrated gradients, arXiv 1703.01365, over gates",
        path_gradient,
        lambda layers, count, probes: 4.0 * PATH_PROBES,
        learns=True,
    ),
    Score(
        "mass",
        "share of attention beyond the local span",
        "attention mass",
        lambda bench, space: mass_beyond(bench, space, last=False),
        lambda layers, count, probes: 1.0 * probes,
    ),
    Score(
        "lazy",
        "share of the last 64 queries' attention beyond the local span",
        "LightTransfer, arXiv 2410.13846: one minus the lazy ratio",
        lambda bench, space: mass_beyond(bench, space, last=True),
        lambda layers, count, probes: 1.0 * probes,
    ),
)
SCORES: dict[str, Score] = {score.name: score for score in LISTED}
