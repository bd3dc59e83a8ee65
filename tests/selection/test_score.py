"""Scores: shares of attention as dense weights give them, and what one layer is worth from either end."""

from typing import Any

import pytest
import torch

from masformer.models.families import native_plan
from masformer.selection.bench import Bench
from masformer.selection.probes import DOCUMENTS, RECALL, Probe
from masformer.selection.score import QUERIES, SCORES, mass_beyond
from masformer.selection.space import Space
from masformer.spans import Block, Span, SpanPlan, Window
from tests.models.helpers import state, tiny, tokens

LENGTH = 90
SPANS = (Window(6, sinks=2), Window(1), Block(5, lookback=1), Block(8, sinks=1), Window(200))


def probes() -> list[Probe]:
    return [
        Probe(RECALL, tokens(LENGTH, seed=1)[0], torch.tensor([70, 71])),
        Probe(DOCUMENTS, tokens(LENGTH // 2, seed=2)[0], torch.arange(20, LENGTH // 2)),
    ]


def explicit(family: str, local: Span, last: bool) -> list[float]:
    """From the weights that transformers' own eager attention returns."""
    model = tiny(family, torch.float32, attn_implementation="eager")
    shares: list[list[float]] = []
    for probe in probes():
        with torch.no_grad():
            weights = model(input_ids=probe.ids[None], output_attentions=True).attentions
        length = len(probe.ids)
        if last:
            queries = list(range(max(0, length - QUERIES), length))
        else:
            queries = sorted({round(x) for x in torch.linspace(0, length - 1, min(QUERIES, length)).tolist()})
            assert len(queries) == min(QUERIES, length)
        unseen = torch.tensor([[not local.sees(t, s) and s <= t for s in range(length)] for t in queries])
        shares.append([float((w[0, :, queries].double() * unseen).sum(-1).mean()) for w in weights])
    means = [sum(x) / len(x) for x in zip(*shares, strict=True)]
    return [0.0 if span.is_local else mean for span, mean in zip(native_plan(model.config), means, strict=True)]


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("local", SPANS, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_the_mass_beyond_a_span_is_that_of_the_dense_weights(family: str, local: Span, last: bool) -> None:
    model = tiny(family, torch.float32)
    before = state(model)
    bench = Bench(model, probes())
    space = Space.of(native_plan(model.config), [local])
    found = mass_beyond(bench, space, last=last)
    assert found == pytest.approx(explicit(family, local, last), abs=2e-6)
    assert state(model) == before
    if local == SPANS[0]:
        assert max(found) > 0.1


def test_the_names_mass_and_lazy_are_of_all_and_of_the_last_queries() -> None:
    model = tiny(dtype=torch.float32)
    bench, space = Bench(model, probes()), Space.of(native_plan(model.config), [SPANS[0]])
    found = {name: SCORES[name].of(bench, space) for name in ("mass", "lazy")}
    assert found == {"mass": mass_beyond(bench, space, last=False), "lazy": mass_beyond(bench, space, last=True)}
    assert found["mass"] != found["lazy"]


@pytest.mark.parametrize(
    ("name", "field", "alone"),
    [
        ("recall", "recall", False),
        ("recall-only", "recall", True),
        ("loss", "documents", False),
        ("loss-only", "documents", True),
        ("kl", "kl", False),
        ("kl-only", "kl", True),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_score_is_the_difference_between_two_plans(family: str, name: str, field: str, alone: bool) -> None:
    model = tiny(family, torch.float32)
    bench = Bench(model, probes())
    parent = native_plan(model.config)
    space = Space.of(parent, [SPANS[0]])

    def value(plan: SpanPlan) -> Any:
        return getattr(Bench(model, probes()).measure([plan])[0], field)

    expected = [0.0] * 4
    for layer in space.layers:
        if alone:
            local = [SPANS[0] if not span.is_local else span for span in parent]
            one = [*local[:layer], parent[layer], *local[layer + 1 :]]
            expected[layer] = value(SpanPlan(tuple(local))) - value(SpanPlan(tuple(one)))
        else:
            one = [*parent.spans[:layer], SPANS[0], *parent.spans[layer + 1 :]]
            expected[layer] = value(SpanPlan(tuple(one))) - value(parent)
    assert SCORES[name].of(bench, space) == expected
    assert any(expected)
