"""Plans: a frozen tuple of spans with a text and a JSON form."""

import dataclasses
import json

import pytest

from masformer.spans import Block, Full, PlanError, SpanPlan, Window

PLANS = [
    SpanPlan((Full(),)),
    SpanPlan((Full(),) * 2 + (Block(1024),) * 20 + (Full(),) * 2),
    SpanPlan((Window(128, sinks=4),) * 3 + (Full(),)),
    SpanPlan((Block(4, lookback=2, sinks=1), Block(4, lookback=2), Window(1), Block(4))),
]
TEXTS = [
    "full",
    "full*2,block:1024*20,full*2",
    "window:128:sinks=4*3,full",
    "block:4:lookback=2:sinks=1,block:4:lookback=2,window:1,block:4",
]


@pytest.mark.parametrize(("plan", "text"), list(zip(PLANS, TEXTS, strict=True)))
def test_text_form(plan: SpanPlan, text: str) -> None:
    assert str(plan) == text
    assert SpanPlan.parse(text) == plan


def test_spaces_and_repeats_are_read() -> None:
    assert SpanPlan.parse(" full * 2 , block:8,block:8") == SpanPlan((Full(), Full(), Block(8), Block(8)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot read ''"),
        ("full,,full", "cannot read ''"),
        ("full*two", r"cannot read 'full\*two'"),
        ("full*2*2", r"cannot read 'full\*2\*2'"),
        ("full*0", "repeats its span 0 times"),
        ("full*10001", "repeats its span 10001 times"),
        ("full,block:0*3", "at least 1, got 0"),
        ("full;block:4", "unknown span 'full;block:4'"),
    ],
)
def test_text_that_cannot_be_read_is_named(text: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        SpanPlan.parse(text)


@pytest.mark.parametrize("plan", PLANS, ids=TEXTS)
def test_json_form(plan: SpanPlan) -> None:
    text = plan.to_json()
    assert len(json.loads(text)) == len(plan)
    assert SpanPlan.from_json(text) == plan


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "JSONDecodeError"),
        ("null", "TypeError"),
        ('["full"]', "AttributeError"),
        ('[{"size": 3}]', "KeyError"),
        ('[{"kind": "ring"}]', "ring"),
        ('[{"kind": "block", "size": 3, "stride": 2}]', "stride"),
        ('[{"kind": "block"}]', "size"),
        ('[{"kind": "window", "size": "3"}]', "got '3'"),
        ("[]", "at least one layer"),
    ],
)
def test_json_that_is_no_plan_is_refused(text: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        SpanPlan.from_json(text)


def test_mixed_puts_full_layers_where_told() -> None:
    plan = SpanPlan.mixed(4, [3, 1], Window(8))
    assert plan.spans == (Window(8), Full(), Window(8), Full())
    assert plan.full_layers == (1, 3)


@pytest.mark.parametrize(
    ("layers", "full", "words"),
    [(4, [4], "full layer 4 .* 0 to 3"), (4, [-1], "full layer -1"), (4, [1, 1], "twice"), (0, [], "at least one")],
)
def test_mixed_refuses_layers_that_do_not_fit(layers: int, full: list[int], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        SpanPlan.mixed(layers, full, Block(8))


def test_a_plan_is_a_sequence_of_spans() -> None:
    plan = SpanPlan.parse("full,block:8*2")
    assert len(plan) == 3
    assert plan[0] == Full()
    assert plan[-1] == Block(8)
    assert list(plan) == [Full(), Block(8), Block(8)]


def test_a_plan_takes_any_iterable_and_is_frozen_and_hashable() -> None:
    plan = SpanPlan([Full(), Block(8)])  # type: ignore[arg-type]
    assert plan.spans == (Full(), Block(8))
    assert {plan: "seen"}[SpanPlan.parse("full,block:8")] == "seen"
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.spans = ()  # type: ignore[misc]


@pytest.mark.parametrize(("spans", "words"), [((), "at least one layer"), ((Full(), "full"), "layer 1 .* 'full'")])
def test_what_is_no_plan_is_refused(spans: tuple, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        SpanPlan(spans)
