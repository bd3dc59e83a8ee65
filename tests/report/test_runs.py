import json
import re

import pytest

from masformer.errors import CorruptError, InputError
from masformer.report.runs import read_results
from masformer.report.trust import caveats, counts, disagreements

from .made import SETTINGS, everything, facts, harness, loss, recall, write_eval, write_train

TWO = [loss("parent", 0, 200.0), loss("chosen", 0, 210.0)]
PAIR = {"parent": "full*24", "chosen": "full*2,window:252*22"}


def add(folder, text, name="results.jsonl"):
    with (folder / name).open("a", encoding="utf-8") as stream:
        stream.write(text)


def test_models_keep_the_order_of_the_run_and_the_first_is_the_reference(tmp_path):
    results = read_results([write_eval(tmp_path / "eval", reversed(TWO), models=facts(PAIR)["models"])])
    assert list(results.models) == ["parent", "chosen"]
    assert {model.reference for model in results.models.values()} == {"parent"}
    assert sorted(results.models["chosen"].cost) == [1024, 4096]
    assert results.models["chosen"].plan.full_layers == (0, 1)


def test_labels_of_two_runs_are_told_apart_only_where_they_must(tmp_path):
    models = facts({"chosen": "full*24", "other": "full*24"})["models"]
    first = write_eval(tmp_path / "a", TWO, models=facts(PAIR)["models"])
    second = write_eval(tmp_path / "b", [loss("chosen", 0, 220.0), loss("other", 0, 190.0)], models=models)
    results = read_results([first, second, first])
    assert list(results.models) == ["parent", "chosen (a)", "chosen (b)", "other"]
    assert [record["model"] for record in results.records["loss"]] == ["parent", "chosen (a)", "chosen (b)", "other"]
    assert {model.reference for model in results.models.values()} == {"parent"}


def test_a_run_on_other_data_has_its_own_reference(tmp_path):
    other = {**SETTINGS, "data": "e", "seed": 1}
    first, second = write_eval(tmp_path / "a", TWO), write_eval(tmp_path / "b", TWO, settings=other)
    results = read_results([first, second])
    assert results.models["chosen (b)"].reference == "parent (b)"
    assert "The runs differ in settings.seed: 0 in a; 1 in b." in disagreements(results)


def test_folders_of_the_same_name_are_named_by_more_of_their_path(tmp_path):
    results = read_results([write_eval(tmp_path / "x" / "eval", TWO), write_eval(tmp_path / "y" / "eval", TWO)])
    assert "parent (x/eval)" in results.models


def test_other_versions_are_named(tmp_path):
    first = write_eval(tmp_path / "a", TWO)
    second = write_eval(tmp_path / "b", TWO, versions={"torch": "2.11.0"})
    assert "The runs differ in versions.torch: 2.10.0 in a; 2.11.0 in b." in disagreements(
        read_results([first, second])
    )
    assert disagreements(read_results([first])) == []


def test_trainings_are_read_beside_evaluations(tmp_path):
    results = read_results([write_train(tmp_path / "run"), write_eval(tmp_path / "eval", TWO)])
    (run,) = results.trainings
    assert (run.name, run.kinds, run.tokens, run.speed) == ("run", ["documents", "recall"], 6 * 2048, 103.5)
    assert run.curve("eval_documents_loss") == [(0, 3.0), (3, 2.85), (6, 2.7)]
    assert len(run.curve("nats")) == 6
    assert run.words == "models/parent, plan layout masformer, full [7, 18], local window:252:sinks=4"


def test_a_step_that_was_done_again_counts_once(tmp_path):
    folder = write_train(tmp_path / "run")
    add(folder, '{"step": 6, "nats": 1.5, "tokens": 2048.0}\n{"step": 7, "nats": 1.', "metrics.jsonl")
    (run,) = read_results([folder]).trainings
    assert run.curve("nats")[-1] == (6, 1.5)


def test_what_is_no_run_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="at least one"):
        read_results([])
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path))} is no run folder"):
        read_results([tmp_path])
    with pytest.raises(InputError, match="missing is no run folder"):
        read_results([tmp_path / "missing"])
    with pytest.raises(InputError, match="empty holds no result yet"):
        read_results([write_eval(tmp_path / "empty", [])])
    (write_train(tmp_path / "train") / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="train holds no step yet"):
        read_results([tmp_path / "train"])
    (tmp_path / "train" / "recipe.json").unlink()
    with pytest.raises(InputError, match=r"train is no training run: recipe\.json"):
        read_results([tmp_path / "train"])


def test_a_torn_last_line_is_left_out(tmp_path):
    folder = write_eval(tmp_path / "eval", TWO)
    add(folder, '{"model": "parent", "suite": "lo')
    assert len(read_results([folder]).records["loss"]) == 2


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1, 2]",
        json.dumps(loss("stranger", 1, 1.0)),
        json.dumps({**loss("parent", 1, 1.0), "suite": "strange"}),
        json.dumps({**loss("parent", 1, 1.0), "nats": "many"}),
        json.dumps({**loss("parent", 1, 1.0), "nats": float("nan")}),
        json.dumps(loss("parent", 1, 1.0, tokens=0)),
        json.dumps(loss("parent", 1, 1.0, document=None)),
        json.dumps(loss("parent", 1, 1.0, buckets=[[1, 2, 3]])),
        json.dumps(recall("parent", 1, 1.5)),
        json.dumps(recall("parent", 1, 0.5, depth="deep")),
        json.dumps(loss("parent", 1, 1.0, bytes="many")),
        json.dumps(harness("parent", ("acc", "many", None, 10))),
        json.dumps(harness("parent", ("acc", 0.5, None, None))),
        json.dumps({**harness("parent"), "metrics": [{"task": "piqa", "metric": "acc", "items": 1}]}),
        json.dumps({**harness("parent"), "metrics": {}}),
        json.dumps({**harness("parent"), "metrics": None, "metric": "acc", "value": 0.5, "items": 10}),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line):
    folder = write_eval(tmp_path / "eval", TWO)
    add(folder, line + "\n")
    with pytest.raises(CorruptError, match=r"results\.jsonl, line 3"):
        read_results([folder])


@pytest.mark.parametrize("name", ["metrics.jsonl", "recipe.json"])
def test_a_damaged_training_is_named(tmp_path, name):
    folder = write_train(tmp_path / "run")
    add(folder, "{\n", name)
    with pytest.raises(CorruptError, match=re.escape(name)):
        read_results([folder])


@pytest.mark.parametrize(
    "models",
    [
        None,
        {"parent": {"plan": "fool*24"}, "chosen": {"plan": "full"}},
        {"parent": {}, "chosen": {}},
        {"parent": {"plan": "full", "cost": {"x": {}}}, "chosen": {"plan": "full"}},
        {"parent": {"plan": "full", "cost": {"8": {}}}, "chosen": {"plan": "full"}},
    ],
)
def test_facts_that_cannot_be_read_are_damage(tmp_path, models):
    with pytest.raises(CorruptError, match=r"run\.json"):
        read_results([write_eval(tmp_path / "eval", TWO, models=models)])


def test_counts_and_caveats(tmp_path):
    records = [*TWO, loss("parent", 1, 150.0), *(recall("parent", n, 1.0) for n in range(3)), recall("chosen", 0, 1.0)]
    results = read_results([write_eval(tmp_path / "eval", records, models=facts(PAIR)["models"])])
    assert counts(results) == {
        ("loss", "parent"): 2,
        ("loss", "chosen"): 1,
        ("recall", "parent"): 3,
        ("recall", "chosen"): 1,
    }
    assert caveats(results) == [
        "Intervals of loss are missing where one document was read: nothing says how two differ.",
        "Intervals of loss rest on as few as 2 documents and are too narrow.",
        "Items behind each number of recall by length and depth: 1 to 3.",
        "chosen lacks 1 of 2 items of loss that others have.",
        "chosen lacks 2 of 3 items of recall that others have.",
    ]


def test_lm_eval_items_count_once_whatever_the_metrics_and_limits(tmp_path):
    piqa = [harness("parent", ("acc", 0.5, 0.1, n), ("acc_norm", 0.5, 0.1, n), limit=n) for n in (20, 40)]
    own = [("mmlu_a", "acc", 0.5, None, 7), ("mmlu_b", "acc", 0.5, None, 5), ("mmlu", "acc", 0.5, None, 12)]
    group, tag = harness("parent", *own, task="mmlu"), harness("parent", *own[:2], task="tag")
    results = read_results([write_eval(tmp_path / "a", [*piqa, group, tag, harness("chosen", ("acc", None, None, 9))])])
    assert counts(results) == {("lm-eval", "parent"): 40 + 12 + 12, ("lm-eval", "chosen"): 9}


def test_a_whole_run_has_all_its_items_and_the_reference_lacks_no_fidelity(tmp_path):
    results = read_results([write_eval(tmp_path / "eval", everything(documents=2))])
    found = counts(results)
    assert [found.get((suite, "parent")) for suite in results.records] == [2, 4, 40, 1838, None]
    assert [found.get((suite, "chosen")) for suite in results.records] == [2, 4, 40, 1838, 2]
    assert not [words for words in caveats(results) if "lacks" in words]


def test_a_model_without_fidelity_to_the_first_lacks_it(tmp_path):
    records = [r for r in everything(documents=2) if (r["model"], r["suite"]) != ("all local", "fidelity")]
    words = caveats(read_results([write_eval(tmp_path / "eval", records)]))
    assert [line for line in words if "lacks" in line] == ["all local lacks 2 of 2 items of fidelity that others have."]


def test_models_of_other_dtypes_are_named(tmp_path):
    models = facts(PAIR)["models"]
    models["chosen"]["dtype"] = "bfloat16"
    results = read_results([write_eval(tmp_path / "eval", TWO, models=models)])
    assert results.models["chosen"].dtype == "bfloat16"
    assert disagreements(results) == [
        "The models differ in dtype, and so in the bytes of their KV cache: float32 of parent; bfloat16 of chosen."
    ]
