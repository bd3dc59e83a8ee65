"""Measured rates: made for every family, finite, of the right spans; how good they are a benchmark tells."""

import math
from typing import Any

import pytest
import torch

from masformer.errors import InputError
from masformer.models.families import FAMILIES, shape_of, shortened
from masformer.spans import Block, Full, SpanPlan, Window
from masformer.spans.hardware import Work, predict
from masformer.training import calibrate as module
from masformer.training.calibrate import calibrate

from ..models.helpers import config_of, tiny


def finite(rates: Any) -> bool:
    works = (rates.linear, rates.head, *rates.attention.values())
    numbers = [value for work in works for value in work.to_json().values()]
    return all(math.isfinite(number) and number > 0 for number in [*numbers, rates.updates])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shortened_config_makes_a_shortened_model(family):
    config = config_of(family)
    short = shortened(config, 2)
    assert short.num_hidden_layers == 2
    assert config.num_hidden_layers == 4
    whole, part = shape_of(config), shape_of(short)
    assert part.layers == 2
    assert part.linear_parameters < whole.linear_parameters
    model = tiny(family, num_hidden_layers=4)
    kept = type(model)._from_config(short, dtype=torch.float64)
    assert set(dict(kept.named_parameters())) < set(dict(model.named_parameters()))


@pytest.mark.parametrize("family", ["llama", "gpt_neo", "gpt2", "gemma3_text"])
def test_every_span_of_plan_and_parent_gets_a_rate(family):
    config = config_of(family)
    plan = SpanPlan((Full(), Block(16), Window(8), Window(8, 2)))
    said: list[str] = []
    rates = calibrate(config, plan, length=64, progress=said.append)
    assert set(plan) <= set(rates.attention)
    assert len(said) == len(rates.attention) + 1
    assert finite(rates)
    assert predict(shape_of(config), plan, 128, rates).training > 0


def test_no_more_tokens_than_positions():
    config = config_of("gpt2", max_position_embeddings=32)
    said: list[str] = []
    calibrate(config, SpanPlan((Full(),) * 4), length=64, progress=said.append)
    assert said[0] == "layers with full, 32 tokens"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None])
def test_types(dtype):
    """A prefill has the config's own type; training has float32 weights."""
    config = config_of("llama")
    config.dtype = dtype
    bench = module._Bench(config, 32, 32, torch.device("cpu"))
    assert {parameter.dtype for parameter in bench.models[2].parameters()} == {dtype or torch.float32}
    assert {parameter.dtype for parameter in bench.learners[2].parameters()} == {torch.float32}
    assert finite(calibrate(config, SpanPlan((Full(),) * 4), length=32, context=32))


def test_one_layer_is_refused():
    with pytest.raises(InputError, match="a model of one layer cannot be calibrated"):
        calibrate(config_of("llama", num_hidden_layers=1), SpanPlan((Full(),)), length=32)


def test_predictions_give_back_what_was_measured(monkeypatch):
    """Layers that take 2 + 3 seconds (full) or 2 + 1 (window), all else known: a model of four is their sum."""
    window, steps = Window(8), module.STEPS

    class Known:
        def __init__(self, config, length, context, device):
            self.device, self.dtype, self.held = device, torch.float32, context - steps
            self.shape = shape_of(config)

        def layer(self, span):
            return module._Times(*(2.0 + (3.0 if span == Full() else 1.0) for _ in range(3)))

        def rest(self, span, layer):
            assert span == window
            return layer.less(module._Times(1.0, 1.0, 1.0)), 0.0625

        def head(self, parameters):
            return Work(2 * parameters / 0.5, 6 * parameters * 64 / 0.25, 4 * parameters / 0.125)

        def updates(self):
            return 10.0

    monkeypatch.setattr(module, "_Bench", Known)
    config, plan = config_of("llama"), SpanPlan((Full(), window, window, Full()))
    shape = shape_of(config, kv_dtype_bytes=4)
    found = predict(shape, plan, 64, calibrate(config, plan, length=64, context=64 + steps))
    assert found.prefill == pytest.approx(2 * 5 + 2 * 3 + 0.5)
    assert found.training == pytest.approx(2 * 5 + 2 * 3 + 0.25 + shape.parameters / 10)
    assert found.recomputed == pytest.approx(found.training + 16)
    assert found.decode == pytest.approx(2 * 5 + 2 * 3 + 0.125 + 0.0625)
