import json
import re

import pytest

from masformer.errors import InputError
from masformer.report.gains import conclusions
from masformer.report.runs import read_results
from masformer.report.sections import sections, title, write_report
from masformer.report.tables import Estimate, Overview
from masformer.report.trust import counts

from .made import SETTINGS, everything, facts, harness, loss, recall, write_eval, write_train
from .test_page import Page

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

ALL = [
    "What was gained and lost",
    "The plans",
    "Loss by position",
    "Loss by repeat distance",
    "Recall",
    "Summaries by input length",
    "Fidelity by position",
    "Cost and memory",
    "Quality against cost",
    "Training",
    "lm-eval",
    "How much to trust this",
    "How this was made",
]
HOSTILE = "</script><b>x</b>"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = [write_eval(folder / "eval", everything(documents=3)), write_train(folder / "train")]
    return Page(write_report(runs, folder / "out" / "report.html").read_text("utf-8"))


def cells(section, caption):
    (table,) = [table for table in section.tables if table.caption.startswith(caption)]
    return [dict(zip(table.headers, row, strict=True)) for row in table.rows]


def made(tmp_path, *records, **changes):
    results = read_results([write_eval(tmp_path / "eval", records, **changes)])
    return results, {section.heading: section for section in sections(results)}


def test_a_full_page_has_every_section_and_whole_html(page):
    assert [text for _, text in page.all("h2")] == ALL
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(len(attributes["aria-label"]) > 10 for attributes, _ in page.all("div") if "aria-label" in attributes)


def test_the_page_asks_for_nothing_outside_itself(page):
    for _, attributes, _ in page.elements:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert not re.search(r"url\((?!#)|@import", " ".join(text for _, text in page.all("style")))


def test_hostile_labels_and_texts_stay_text(tmp_path):
    records = everything(("parent",), documents=2)
    for number, record in enumerate(records):
        record |= {
            "model": HOSTILE,
            "item": number,
            **{name: HOSTILE for name in ("document", "task", "text") if record.get(name)},
        }
    models = {HOSTILE: {**facts()["models"]["parent"], "model": HOSTILE}, "local": facts()["models"]["all local"]}
    run = write_eval(tmp_path / HOSTILE.replace("/", ""), records, models=models, commands=[HOSTILE])
    html = write_report([run], tmp_path / "report.html").read_text("utf-8")
    assert html.count("</script>") == 1
    assert "<b>" not in html
    page = Page(html)
    assert any(text == HOSTILE for _, text in page.all("pre"))


def test_sections_are_absent_where_there_is_nothing(tmp_path):
    _, found = made(tmp_path, recall("parent", 0, 1.0), models={"parent": {"plan": "full*2"}})
    assert list(found) == ["What was gained and lost", "Recall", "How much to trust this", "How this was made"]


def test_trainings_alone_make_a_page(tmp_path):
    results = read_results([write_train(tmp_path / "a"), write_train(tmp_path / "b", start=2.0)])
    assert title(results) == "Training: a, b"
    assert [section.heading for section in sections(results)] == ["Training", "How this was made"]
    rows = cells(sections(results)[0], "Losses")
    assert [row["loss"] for row in rows] == ["training", "documents", "recall"] * 2
    assert rows[0] == {
        "run": "a",
        "loss": "training",
        "steps": "6",
        "at the first": "2.900",
        "at the last": "2.400",
        "difference": "\u22120.500",
    }
    assert len(sections(results)[0].figures) == 3


def test_the_first_table_says_it_all(tmp_path):
    records = [loss("parent", 0, 200.0), loss("parent", 1, 200.0), loss("chosen", 0, 212.0), loss("chosen", 1, 210.0)]
    models = facts({"parent": "full*24", "chosen": "full*6,window:252*18"})["models"]
    results, found = made(tmp_path, *records, recall("parent", 0, 1.0), recall("chosen", 0, 0.0), models=models)
    assert title(results) == "parent against chosen"
    parent, chosen = cells(found["What was gained and lost"], "Every model")
    assert parent["difference"] == "\u2013"
    assert (chosen["nats/token"], chosen["difference"], chosen["recall"]) == ("2.110", "+0.110", "0.0 %")
    assert (chosen["full layers"], chosen["plan"]) == ("6/24", "6 full, 18 window 252")
    assert found["What was gained and lost"].paragraphs == [
        "chosen needs 70.4 % less KV cache and 66.1 % fewer FLOPs of attention than parent at 4,096 tokens. "
        "Its loss is 0.110 nats per token higher (95 % interval +0.100 to +0.120); it finds 0.0 % of the recall items, "
        "parent 100.0 %."
    ]


def row(model, nats, change, **more):
    known = dict.fromkeys(("loss_length", "recall", "cost_length", "kv_bytes", "attention_flops"))
    plan = {"plan": "1 full", "full_layers": (0,), "layers": 1, "recall_items": 0, "reference_recall": None}
    return Overview(model=model, reference="parent", nats=Estimate(nats), difference=change, **plan, **(known | more))


def test_words_say_what_is_sure():
    parent = row("parent", 2.0, None, kv_bytes=10, cost_length=8)
    unsure = row("a", 1.9, Estimate(-0.1, -0.3, 0.1), kv_bytes=12, cost_length=8)
    assert conclusions([parent, unsure, row("b", 2.5, Estimate(0.5)), row("c", 1.0, None)]) == [
        "a needs 20.0 % more KV cache than parent at 8 tokens. Its loss is 0.100 nats per token lower "
        "(95 % interval \u22120.300 to +0.100, which may be chance).",
        "b against parent: its loss is 0.500 nats per token higher (on one document, so without an interval).",
    ]


def test_recall_on_no_shared_item_is_not_compared(tmp_path):
    models = facts({"parent": "full*24", "chosen": "full*24"})["models"]
    results, found = made(tmp_path, recall("parent", 0, 1.0), recall("chosen", 1, 0.0), models=models)
    gained = found["What was gained and lost"]
    assert gained.paragraphs == []
    assert [row["recall items"] for row in cells(gained, "Every model")] == ["1", "\u2013"]
    assert "Quality against cost" not in found
    assert counts(results)["recall", "chosen"] == 1


def test_recall_is_compared_on_the_shared_items(tmp_path):
    models = facts({"parent": "full*24", "chosen": "full*24"})["models"]
    parent, chosen = (
        [recall(name, n, score) for n, score in enumerate(s)] for name, s in (("parent", (1, 0)), ("chosen", (0,)))
    )
    gained = made(tmp_path, *parent, *chosen, models=models)[1]["What was gained and lost"]
    assert gained.paragraphs == ["chosen against parent: it finds 0.0 % of the recall items, parent 100.0 %."]
    assert [(row["recall"], row["recall items"]) for row in cells(gained, "Every model")] == [
        ("50.0 %", "2"),
        ("0.0 %", "1"),
    ]


def test_lm_eval_shows_every_metric_with_its_items_and_a_dash_for_none(tmp_path):
    two = [harness("parent", ("acc", 0.5, 0.1, n), limit=n) for n in (20, 40)]
    group = harness("parent", ("mmlu_a", "acc", None, None, 7), ("mmlu", "acc_norm", 0.25, None, 1200), task="mmlu")
    rows = cells(made(tmp_path, *two, group)[1]["lm-eval"], "Tasks")
    assert [list(row.values())[1:] for row in rows] == [
        ["piqa", "acc", "0.5000", "0.1000", "20"],
        ["piqa", "acc", "0.5000", "0.1000", "40"],
        ["mmlu_a", "acc", "\u2013", "\u2013", "7"],
        ["mmlu", "acc_norm", "0.2500", "\u2013", "1,200"],
    ]


def captions(section):
    return [figure.caption for figure in section.figures]


def test_captions_say_how_documents_were_read(tmp_path):
    records = [r for r in everything(documents=2) if r["suite"] in ("loss", "fidelity")]
    for stride, words in (
        (None, "documents of 4,096 tokens"),
        (512, "whole documents in windows of 4,096 tokens, 512 apart"),
    ):
        found = made(tmp_path / str(stride), *records, settings={**SETTINGS, "stride": stride})[1]
        for heading in ("Loss by position", "Loss by repeat distance"):
            assert f", {words}" in captions(found[heading])[0]
        assert captions(found["Fidelity by position"]) == ["Mean KL by position, documents of 4,096 tokens"]
        assert f"Loss of {words}," in found["What was gained and lost"].tables[0].caption


@pytest.mark.parametrize("documents", [1, 2])
def test_intervals_are_promised_only_where_there_are_some(tmp_path, documents):
    found = made(tmp_path, *everything(documents=documents))[1]
    loss, summaries = found["Loss by position"], found["Summaries by input length"]
    promises = [*captions(summaries), captions(loss)[1]]
    some = "with 95 % intervals over documents" if documents > 1 else "without intervals, for one document gives none"
    assert [some in words for words in promises] == [True] * 3
    assert ("so no interval is given" in loss.paragraphs[0]) == (documents == 1)


def test_the_dtype_of_every_model_is_shown(tmp_path):
    models = facts({"parent": "full*24", "chosen": "full*24"})["models"]
    models["chosen"]["dtype"] = "bfloat16"
    how = made(tmp_path, loss("parent", 0, 1.0), models=models)[1]["How this was made"]
    assert [row["dtype"] for row in cells(how, "What was evaluated")] == ["float32", "bfloat16"]


def test_the_commands_and_settings_are_shown(tmp_path):
    how = made(tmp_path, loss("parent", 0, 1.0))[1]["How this was made"]
    assert how.paragraphs == ["eval: masformer 0.1.0, torch 2.10.0, transformers 5.23.0, python 3.11.9; cpu."]
    assert how.verbatim[0] == facts()["commands"][0]
    assert json.loads(how.verbatim[1].removeprefix("eval: ")) == facts()["settings"]


def test_a_page_that_cannot_be_written_is_an_input_error(tmp_path):
    run = write_eval(tmp_path / "eval", [loss("parent", 0, 1.0)])
    with pytest.raises(InputError, match="cannot write"):
        write_report([run], run / "run.json" / "report.html")
