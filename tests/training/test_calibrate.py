"""Measured rates: made for every family, finite, of the right spans; how good they are a benchmark tells."""

import math
from typing import Any

import pytest
import torch

from masformer.models.families import FAMILIES, shape_of, shortened
from masformer.spans import Block, Full, SpanPlan, Window
from masformer.spans.hardware import predict
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
    assert finite(rates)
    assert len(said) == len(rates.attention) + 1
    assert finite(rates)
    assert predict(shape_of(config), plan, 128, rates).training > 0


def test_no_more_tokens_than_positions():
    config = config_of("gpt2", max_position_embeddings=32)
    said: list[str] = []
    calibrate(config, SpanPlan((Full(),) * 4), length=64, progress=said.append)
    assert said[0] == "layers with full, 32 tokens"


def test_the_model_has_the_configs_own_type():
    config = config_of("llama")
    config.dtype = torch.bfloat16
    bench = module._Bench(config, 32, 32, torch.device("cpu"))
    assert {parameter.dtype for parameter in bench.models[2].parameters()} == {torch.bfloat16}
