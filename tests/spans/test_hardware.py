"""Times from rates: the arithmetic by hand, and what is refused."""

import dataclasses
import re

import pytest

from masformer.spans import GPT_NEO_1_3B, Block, Full, ModelShape, PlanError, SpanPlan, Window, cost, layout
from masformer.spans.hardware import HARDWARE, Rates, Work, predict

SHAPE = ModelShape(
    layers=2,
    hidden=8,
    heads=2,
    kv_heads=1,
    head_dim=4,
    linear_parameters=1000,
    head_parameters=80,
    parameters=1200,
    kv_dtype_bytes=2,
)
RATES = Rates(
    name="by hand",
    linear=Work(forward=100.0, training=50.0, decode=20.0),
    head=Work(forward=10.0, training=5.0, decode=4.0),
    attention={Full(): Work(8.0, 4.0, 2.0), Window(2): Work(2.0, 1.0, 0.5)},
    updates=600.0,
    start=7.0,
)


def test_by_hand():
    """3 tokens: a full layer has 6 pairs, a window of 2 has 5; a pair is 32 FLOPs, a key 16 bytes."""
    found = predict(SHAPE, SpanPlan((Full(), Window(2))), 3, RATES)
    forward = 2 * 1000 * 3 / 100 + 6 * 32 / 8 + 5 * 32 / 2
    learnt = 6 * 1000 * 3 / 50 + 3 * 6 * 32 / 4 + 3 * 5 * 32 / 1 + 6 * 80 * 3 / 5 + 1200 / 600
    assert found.prefill == pytest.approx(forward + 2 * 80 / 10)
    assert found.training == pytest.approx(learnt)
    assert found.recomputed == pytest.approx(learnt + forward)
    assert found.decode == pytest.approx(7 + 2 * 1000 / 20 + 2 * 80 / 4 + 3 * 16 / 2 + 1 * 16 / 0.5)


@pytest.mark.parametrize("name", HARDWARE)
def test_a_data_sheet_counts_the_flops_of_cost_and_the_bytes_read(name):
    rates, plan = HARDWARE[name], layout("masformer", 24, full=4, local=Block(1024))
    peak, bandwidth = rates.linear.forward, rates.linear.decode
    counted = cost(GPT_NEO_1_3B, plan, 5000)
    found = predict(GPT_NEO_1_3B, plan, 5000, rates)
    weights = 2 * (GPT_NEO_1_3B.linear_parameters + GPT_NEO_1_3B.head_parameters)
    assert found.prefill == pytest.approx(counted.prefill_flops.total / peak)
    assert found.training == pytest.approx(
        counted.training_flops.total / peak + 28 * GPT_NEO_1_3B.parameters / bandwidth
    )
    assert found.decode == pytest.approx((weights + counted.kv_bytes_read) / bandwidth)


def test_refusals():
    with pytest.raises(PlanError, match=re.escape("the rate of block:4 was not measured")):
        predict(SHAPE, SpanPlan((Full(), Block(4))), 3, RATES)
    with pytest.raises(PlanError, match="the plan is for 1 layers, the model has 2"):
        predict(SHAPE, SpanPlan((Full(),)), 3, RATES)
    with pytest.raises(PlanError, match="length must be a whole number"):
        predict(SHAPE, SpanPlan((Full(),) * 2), 0, RATES)


def test_a_rate_that_is_doubled_halves_its_part():
    plan = SpanPlan((Full(), Window(2)))
    before = predict(SHAPE, plan, 3, RATES)
    fast = dataclasses.replace(RATES, linear=Work(200.0, 100.0, 40.0))
    after = predict(SHAPE, plan, 3, fast)
    assert before.prefill - after.prefill == pytest.approx(2 * 1000 * 3 / 200)
    assert before.decode - after.decode == pytest.approx(2 * 1000 / 40)
