import math

import pytest

from masformer.report import tables
from masformer.report.runs import read_results
from masformer.spans import SpanPlan

from .made import LENGTHS, SETTINGS, everything, facts, loss, recall, write_eval


@pytest.fixture
def read(tmp_path):
    """Results of one run with these records."""
    names = iter("abc")
    return lambda *records, **changes: read_results([write_eval(tmp_path / next(names), records, **changes)])


def test_loss_is_a_ratio_of_sums_with_an_interval_of_documents(read):
    results = read(loss("parent", 0, 200.0, tokens=100), loss("parent", 1, 900.0, tokens=300))
    (row,) = tables.loss(results)
    assert (row.documents, row.tokens, row.nats.value) == (2, 400, 1100 / 400)
    assert (row.nats.low, row.nats.high) == (2.0, 3.0)  # both documents the one or the other
    assert row.perplexity == pytest.approx(math.exp(2.75))
    assert row.bits_per_byte == pytest.approx(1100 / math.log(2) / 1600)
    assert row.difference is None


def test_a_difference_is_over_shared_documents_and_resamples_pairs(read):
    parent = [loss("parent", n, nats) for n, nats in enumerate((100.0, 300.0, 500.0))]
    chosen = [loss("chosen", n, nats) for n, nats in enumerate((110.0, 310.0))]
    row = next(row for row in tables.loss(read(*parent, *chosen)) if row.model == "chosen")
    assert row.nats.value == pytest.approx(2.1)
    assert row.difference.value == pytest.approx(0.1)  # not 2.1 - 3.0
    assert (row.difference.low, row.difference.high) == (pytest.approx(0.1), pytest.approx(0.1))


def test_one_document_has_no_interval(read):
    row = tables.loss(read(loss("parent", 0, 200.0), loss("chosen", 0, 210.0)))[1]
    assert (row.nats.low, row.nats.high) == (None, None)
    assert row.difference == tables.Estimate(pytest.approx(0.1))


def test_documents_with_other_tokens_are_not_compared(read):
    assert (
        tables.loss(read(loss("parent", 0, 200.0, tokens=100), loss("chosen", 0, 200.0, tokens=90)))[1].difference
        is None
    )


@pytest.mark.parametrize("one", [{"bytes": 391}, {"bytes": None}, {"tokens": 99}, {"document": "another"}])
def test_another_text_of_as_many_tokens_is_not_compared(read, one):
    other = {"buckets": [[1, 4, 3, 9.0]], "repeats": [[0, 0, 3, 9.0]]}
    results = read(loss("parent", 0, 200.0, **other), loss("chosen", 0, 200.0, **other, **one))
    for rows in (tables.loss, tables.loss_by_position, tables.loss_by_repeat):
        assert [row.difference for row in rows(results)] == [None, None]


def test_documents_are_paired_by_name_and_occurrence_not_by_item(read):
    names = ("a", "b", "b", "c")
    parent = [loss("parent", n, 100.0 * (n + 1), document=name) for n, name in enumerate(names)]
    chosen = [loss("chosen", n, 100.0 * (n + 2) + 10, document=name) for n, name in enumerate(names[1:])]
    row = tables.loss(read(*parent, *reversed(chosen)))[1]
    assert (row.documents, row.tokens) == (3, 300)
    assert row.difference == tables.Estimate(*(pytest.approx(0.1) for _ in range(3)))


def test_documents_read_in_other_windows_are_not_compared(tmp_path):
    runs = [write_eval(tmp_path / "a", [loss("parent", 0, 200.0)], models=facts({"parent": "full*24"})["models"])]
    for name, stride in (("b", 512), ("c", None)):
        models = facts({name: "full*24"})["models"]
        settings = {**SETTINGS, "stride": stride}
        runs.append(write_eval(tmp_path / name, [loss(name, 0, 210.0)], models=models, settings=settings))
    assert [row.difference is None for row in tables.loss(read_results(runs))] == [True, True, False]


def test_without_bytes_there_are_no_bits_per_byte_and_huge_losses_have_no_perplexity(read):
    (row,) = tables.loss(read(loss("parent", 0, 1e6), loss("parent", 1, 1e6, bytes=None)))
    assert row.bits_per_byte is None
    assert row.perplexity == math.inf


def test_buckets_are_joined_where_they_begin_and_never_comes_last(read):
    long = loss("parent", 0, 1.0, buckets=[[1, 4, 3, 6.0], [4, 9, 5, 5.0]], repeats=[[0, 0, 4, 8.0], [1, 4, 2, 1.0]])
    short = loss("parent", 1, 1.0, buckets=[[1, 4, 3, 3.0], [4, 6, 0, 0.0]], repeats=[[0, 0, 4, 4.0], [1, 4, 0, 0.0]])
    worse = loss("chosen", 0, 1.0, buckets=[[1, 4, 3, 9.0], [4, 9, 5, 5.0]])
    results = read(long, short, worse)
    rows = tables.loss_by_position(results)
    assert [(r.model, r.low, r.high, r.documents, r.tokens, r.mean) for r in rows] == [
        ("parent", 1, 4, 2, 6, 1.5),
        ("parent", 4, 9, 1, 5, 1.0),
        ("chosen", 1, 4, 1, 3, 3.0),
        ("chosen", 4, 9, 1, 5, 1.0),
    ]
    assert [r.difference and r.difference.value for r in rows] == [None, None, 1.0, 0.0]
    assert [(r.low, r.high, r.mean) for r in tables.loss_by_repeat(results)] == [(1, 4, 0.5), (0, 0, 1.5)]


def test_recall_by_depth_by_length_and_in_all(read):
    items = [(0, 1.0, 1024, 0.1), (1, 0.0, 1024, 0.9), (2, 1.0, 4096, 0.1), (3, 1.0, 4096, 0.9)]
    records = [recall("parent", n, score, length=length, depth=depth) for n, score, length, depth in items]
    results = read(*reversed(records), recall("parent", 0, 0.5, task="babi", depth=None, rank=None))
    rows = tables.recall(results)
    assert [(r.task, r.length, r.depth, r.score.value, r.items) for r in rows] == [
        ("babi", 1024, None, 0.5, 1),
        ("passkey", 1024, 0.1, 1.0, 1),
        ("passkey", 1024, 0.9, 0.0, 1),
        ("passkey", 4096, 0.1, 1.0, 1),
        ("passkey", 4096, 0.9, 1.0, 1),
    ]
    assert (rows[0].log_probability, rows[0].rank) == (-2.25, None)
    by_length = tables.recall(results, by=("task", "length"))
    assert [(r.task, r.length, r.depth, r.score.value) for r in by_length][1:] == [
        ("passkey", 1024, None, 0.5),
        ("passkey", 4096, None, 1.0),
    ]
    (whole,) = tables.recall(results, by=())
    assert (whole.task, whole.items, whole.score.value) == (None, 5, 0.7)


def test_the_interval_of_recall_is_wilsons(read):
    (row,) = tables.recall(read(*(recall("parent", n, float(n < 8)) for n in range(10))), by=())
    z = 1.959964  # by hand: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    middle, scale = 0.8 + z**2 / 20, 1 + z**2 / 10
    half = z * math.sqrt(0.016 + z**2 / 400)
    assert (row.score.low, row.score.high) == pytest.approx(((middle - half) / scale, (middle + half) / scale))


def test_summaries_and_fidelity(read):
    results = read(*everything(("parent", "chosen"), documents=2))
    rows = tables.summary(results)
    assert [(row.model, row.length, row.documents, row.cut) for row in rows][:2] == [
        ("parent", 1024, 2, 0),
        ("parent", 4096, 2, 0),
    ]
    assert rows[0].lead == {"rouge1": 0.25, "rouge2": 0.1, "rougeL": 0.2}
    assert rows[0].scores["rouge1"].low < rows[0].scores["rouge1"].value < rows[0].scores["rouge1"].high
    (chosen,) = tables.fidelity(results)
    assert (chosen.model, chosen.documents) == ("chosen", 2)
    assert 0.9 < chosen.agreement.low <= chosen.agreement.value <= chosen.agreement.high < 1
    by_position = tables.fidelity_by_position(results)
    assert (by_position[0].mean, by_position[0].difference) == (0, None)
    assert by_position[-1].mean > 0
    assert by_position[-1].agreement == pytest.approx(chosen.agreement.value)


def test_costs_are_those_of_the_run(read):
    results = read(loss("parent", 0, 1.0))
    rows = tables.cost(results)
    assert [(row.model, row.length) for row in rows] == [(label, n) for label in results.models for n in LENGTHS]
    assert rows[1].kv_bytes == 24 * 4096 * 2 * 2048 * 2  # layers, tokens, K and V, 16 heads of 128, two bytes
    assert rows[1].saved == 0
    assert rows[-1].saved == pytest.approx(
        1 - 255 / 4096
    )  # 251 keys and 4 sinks: of a window of 252, the next token is one


def test_the_overview_takes_the_longest_length_that_all_have(read):
    records = [loss("parent", 0, 200.0), loss("chosen", 0, 210.0), loss("parent", 0, 150.0, length=8192)]
    models = facts({"parent": "full*24", "chosen": "full*4,window:252:sinks=4*20"})["models"]
    del models["chosen"]["cost"]["4096"]
    parent, chosen = tables.overview(read(*records, recall("chosen", 0, 1.0), models=models))
    assert (parent.loss_length, parent.nats.value, chosen.difference.value) == (4096, 2.0, pytest.approx(0.1))
    assert (parent.cost_length, parent.kv_bytes) == (1024, 24 * 1024 * 2 * 2048 * 2)
    assert (parent.recall, parent.recall_items) == (None, 0)
    assert (chosen.recall, chosen.recall_items) == (None, 0)  # the parent has no such item
    assert (chosen.plan, chosen.full_layers, chosen.layers) == ("4 full, 20 window 252 + 4 sinks", (0, 1, 2, 3), 24)


def test_recall_in_the_overview_is_over_the_items_that_the_reference_has(read):
    parent = [recall("parent", n, float(n < 2)) for n in range(4)]
    chosen = [recall("chosen", n, float(n > 0)) for n in (1, 2, 9)] + [recall("chosen", 0, 1.0, task="babi")]
    local = [recall("all local", 0, 1.0, length=4096)]
    rows = tables.overview(read(*parent, *chosen, *local))
    assert [(row.recall and row.recall.value, row.recall_items) for row in rows] == [(0.5, 4), (1.0, 2), (None, 0)]
    assert [row.reference_recall and row.reference_recall.value for row in rows] == [0.5, 0.5, None]
    assert rows[0].recall == tables.recall(read(*parent), by=())[0].score


@pytest.mark.parametrize(("changes", "items"), [({}, 1), ({"seed": 1}, 0), ({"depths": [0.5]}, 0), ({"beams": 2}, 1)])
def test_recall_items_of_another_run_are_the_same_only_if_made_alike(tmp_path, changes, items):
    first = write_eval(tmp_path / "a", [recall("parent", 0, 1.0)], models=facts({"parent": "full*24"})["models"])
    models, settings = facts({"other": "full*24"})["models"], {**SETTINGS, **changes}
    second = write_eval(tmp_path / "b", [recall("other", 0, 0.0)], models=models, settings=settings)
    assert tables.overview(read_results([first, second]))[1].recall_items == items


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("full*3", "3 full"),
        ("window:64,full,window:64", "1 full, 2 window 64"),
        ("block:1024:lookback=1:sinks=4*2", "2 block 1,024 + 1 before + 4 sinks"),
    ],
)
def test_a_plan_in_short(plan, words):
    assert tables.in_short(SpanPlan.parse(plan)) == words


def test_what_was_not_measured_has_no_rows(read):
    results = read(recall("parent", 0, 1.0))
    for rows in (tables.loss, tables.loss_by_position, tables.loss_by_repeat, tables.summary, tables.fidelity):
        assert rows(results) == []
