"""`masformer select`: a whole run, folders that are gone on with, refusals before weights are read."""

import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from masformer import cli_select
from masformer.cli import run
from masformer.evaluation import suites
from masformer.models.checkpoint import load
from masformer.report.picture import scores_text
from masformer.selection import bench, choice, trial
from masformer.selection.bench import Bench
from masformer.selection.methods import MOST_FRESH
from masformer.selection.outcome import read
from masformer.selection.probes import document_probes, recall_probe, recall_sequences
from masformer.spans import Full, SpanPlan, Window, cost
from tests.cli.conftest import LAYERS, POSITIONS, answer, refusal

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs", "away"]
LOCAL = ["--window", 16, "--sinks", 2]
SMALL = ["--length", 512, "--probes", 1, "--items", 1, "--tasks", "passkey"]
METHODS = ["--methods", "bottom,recall,backward"]


def write(file, *counts):
    """Documents of so many words."""
    drawn = random.Random(0)
    records = [{"id": f"d{n}", "text": " ".join(drawn.choices(WORDS, k=count))} for n, count in enumerate(counts)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write(tmp_path_factory.mktemp("texts") / "texts.jsonl", *[700] * 6)


@pytest.fixture(scope="module")
def command(parent, texts):
    return ["select", parent, "--data", texts, *SMALL, *LOCAL]


@pytest.fixture(scope="module")
def done(command, tmp_path_factory):
    """A run from beginning to end."""
    out = tmp_path_factory.mktemp("runs") / "select"
    assert run([*map(str, command), "--full", "1,2", *METHODS, "--out", str(out)]) == 0
    return out


def selection(out):
    return json.loads((out / "selection.json").read_text())


def contents(out):
    return {name: (out / name).read_bytes() for name in ("measured.jsonl", "held-out/results.jsonl")}


def test_a_run_chooses_for_every_budget_and_tries_every_distinct_plan(done, command, parent, texts, tmp_path):
    found = selection(done)
    assert [budget["words"] for budget in found["budgets"]] == ["1 full layer", "2 full layers"]
    model, local = load(str(parent)), Window(16, sinks=2)
    labels = {"parent", "all local"}
    for count, budget in enumerate(found["budgets"], start=1):
        plans = budget["plans"]
        assert [*plans] == ["bottom", "recall", "backward"]
        assert plans["bottom"]["full_layers"] == list(range(count))
        assert plans["recall"]["full_layers"] == sorted(
            sorted(range(LAYERS), key=lambda layer: -found["scores"]["recall"][layer])[:count]
        )
        assert budget["chosen"] == min(plans, key=lambda name: plans[name]["nats"])
        for row in plans.values():
            plan = SpanPlan.mixed(LAYERS, row["full_layers"], local)
            assert (row["plan"], len(row["full_layers"])) == (str(plan), count)
            assert row["label"] == f"full {','.join(map(str, row['full_layers']))}"
            assert row["cost"] == cost(choice.shape_of(model.config, kv_dtype_bytes=4), plan, 512).to_json()
            labels.add(row["label"])
    assert found["scores"].keys() == {"recall"}
    assert (found["parent"]["plan"], found["local"]["plan"]) == ("full*4", f"{local}*4")
    assert found["facts"]["local"] == [str(local)]
    assert (found["facts"]["dtype"], found["facts"]["length"], len(found["facts"]["probes"])) == ("float32", 512, 2)
    assert len(found["facts"]["checks"]) == 2
    assert not {*found["facts"]["checks"]} & {*found["facts"]["probes"]}
    held_out = [json.loads(line) for line in (done / "held-out" / "results.jsonl").read_text().splitlines()]
    assert {record["model"] for record in held_out} == labels
    assert {record["suite"] for record in held_out} == {"loss", "recall"}
    assert {record.get("task") for record in held_out if record["suite"] == "recall"} == {"passkey"}


def test_what_is_written_is_what_the_bench_measures_on_one_half_of_the_documents(done, parent, texts, tmp_path):
    found = selection(done)
    documents = [json.loads(line) for line in texts.read_text().splitlines()]
    known = [choice.Document(id=each["id"], text=each["text"]) for each in documents]
    chosen_by, others = choice.drawn(known, None, 0)
    assert sorted(each.id for each in [*chosen_by, *others]) == [f"d{n}" for n in range(6)]
    tokenizer = choice.load_tokenizer(str(parent))
    items = recall_sequences(tokenizer, chosen_by, tmp_path / "corpora", length=512, seed=0)
    checks = [recall_probe(items, 1 + MOST_FRESH), document_probes(tokenizer, chosen_by, length=512, count=2)[1]]
    measured = Bench(load(str(parent)), checks)
    for row in (found["parent"], found["local"], *found["budgets"][1]["plans"].values()):
        [expected] = measured.measure([SpanPlan.parse(row["plan"])])
        for name, value in expected.to_json().items():
            assert row[name] == pytest.approx(value, abs=1e-9)
        assert row["by_probe"] == pytest.approx([row["recall"]])
    tried = (done / "held-out" / "results.jsonl").read_text()
    assert {f'"{each.id}"' in tried for each in chosen_by} == {False}


def test_the_table_says_what_was_chosen_and_the_last_lines_how_to_convert(done, command, capsys):
    assert run([*map(str, command), "--full", "1,2", *METHODS, "--out", str(done)]) == 0
    out, err = capsys.readouterr()
    found = selection(done)
    for budget in found["budgets"]:
        assert f"{budget['words']}: chosen by {budget['chosen']}" in out
        assert f"{budget['words']}: --plan {budget['plans'][budget['chosen']]['plan']}\n" in err
    for words in ("parent", "all local", "backward", "held-out", "FLOPs"):
        assert words in out
    assert scores_text(found["scores"], {}).splitlines()[1].removeprefix("recall") in out
    for budget in found["budgets"]:
        full = budget["plans"][budget["chosen"]]["full_layers"]
        strip = "".join("█" if layer in full else "·" for layer in range(LAYERS))
        assert re.search(rf"^chosen, {budget['words']} +{strip}$", out, re.MULTILINE)
    assert f"masformer report {done} makes a page" in err.replace("\n", " ")


def test_thirty_layers_and_a_training_fit_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = Path(__file__).parents[2] / "docs/results/selection/trained-1"
    cli_select._print(out, read(out), json=False)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert " method       full layers        KV  FLOPs  probes  held-out  to parent  recall " in lines
    assert " path         0, 7, 8, 15,     36 %   36 %   3.261     3.364      0.134    75 % " in lines
    assert " path            3.291    75 % " in lines


def test_json_has_the_outcome_and_the_held_out_results(done, command, capsys):
    facts = answer(capsys, *command, "--full", "1,2", *METHODS, "--out", done)
    assert facts["out"] == str(done)
    assert {name: facts[name] for name in selection(done)} == selection(done)
    row = facts["held_out"][facts["budgets"][0]["plans"]["bottom"]["label"]]
    assert row["nats"]["value"] > 0
    assert facts["held_out"].keys() == {"parent", "all local"} | {
        row["label"] for budget in facts["budgets"] for row in budget["plans"].values()
    }


def test_the_same_command_measures_nothing_anew(done, command, capsys, monkeypatch):
    before, outcome = contents(done), selection(done)
    monkeypatch.setattr(bench, "measure_probe", lambda *_: pytest.fail("measured"))
    answer(capsys, *command, "--full", "1,2", *METHODS, "--out", done)
    assert contents(done) == before
    assert selection(done) == outcome


def copied(done, out):
    """A folder that may be changed."""
    for file in done.rglob("*"):
        if file.is_file():
            (out / file.relative_to(done)).parent.mkdir(parents=True, exist_ok=True)
            (out / file.relative_to(done)).write_bytes(file.read_bytes())
    return out


def test_methods_and_budgets_that_are_asked_for_later_are_added(done, command, tmp_path, capsys):
    out = copied(done, tmp_path / "more")
    before, first = contents(out), selection(out)
    answer(capsys, *command, "--full", 2, "--methods", "top,kl", "--out", out)
    then = selection(out)
    assert [budget["words"] for budget in then["budgets"]] == ["2 full layers", "1 full layer"]
    assert then["budgets"][1] == first["budgets"][0]
    plans = then["budgets"][0]["plans"]
    assert [*plans] == ["bottom", "recall", "backward", "top", "kl"]
    assert {name: plans[name] for name in first["budgets"][1]["plans"]} == first["budgets"][1]["plans"]
    assert then["scores"].keys() == {"recall", "kl"}
    assert all(contents(out)[name].startswith(before[name]) for name in before)
    answer(capsys, *command, "--full", 3, "--methods", "bottom", "--out", out)
    last = selection(out)
    assert [budget["words"] for budget in last["budgets"]] == ["3 full layers", "2 full layers", "1 full layer"]
    assert last["budgets"][1:] == then["budgets"]


def test_a_run_that_was_killed_again_and_again_ends_as_one_that_was_not(done, command, tmp_path, capsys, monkeypatch):
    out, calls = tmp_path / "cut", []

    def stopping(function):
        def called(*args, **kwargs):
            calls.append(function)
            if len(calls) % 4 == 0:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return called

    monkeypatch.setattr(bench, "measure_probe", stopping(bench.measure_probe))
    monkeypatch.setattr(suites.Run, "add", stopping(suites.Run.add))
    codes = []
    while not codes or codes[-1] == 130:
        codes.append(run([*map(str, command), "--full", "1,2", *METHODS, "--out", str(out)]))
    assert codes == [130] * (len(calls) // 4) + [0]
    assert len(codes) > 4
    assert (out / "selection.json").read_bytes() == (done / "selection.json").read_bytes()
    assert sorted((out / "measured.jsonl").read_text().splitlines()) == sorted(
        (done / "measured.jsonl").read_text().splitlines()
    )
    assert (out / "held-out/results.jsonl").read_bytes() == (done / "held-out/results.jsonl").read_bytes()
    capsys.readouterr()


def test_sizes_and_a_budget_of_bytes_choose_sizes(command, parent, tmp_path, capsys):
    shape = choice.shape_of(load(str(parent)).config, kv_dtype_bytes=4)
    most = cost(shape, SpanPlan((Full(), Window(64, sinks=2), *(Window(16, sinks=2),) * 2)), 512).kv_bytes_held
    what = ["--kv-bytes", most, "--at", 512, "--sizes", "64", "--methods", "forward,backward"]
    facts = answer(capsys, *command, *what, "--out", tmp_path / "run")
    [budget] = facts["budgets"]
    for row in budget["plans"].values():
        assert row["cost"]["kv_bytes_held"] <= most
        assert {str(span) for span in SpanPlan.parse(row["plan"])} <= {"full", "window:16:sinks=2", "window:64:sinks=2"}
    assert facts["facts"]["local"] == ["window:16:sinks=2", "window:64:sinks=2"]


def test_within_takes_the_fewest_layers_near_the_parent(command, tmp_path, capsys):
    what = ["--within", "0.5,100", "--methods", "top,backward"]
    facts = answer(capsys, *command, *what, "--out", tmp_path / "run")
    near, far = facts["budgets"]
    assert facts["facts"]["checks"] == facts["facts"]["probes"]  # the budget is kept to on these
    assert {row["label"] for row in far["plans"].values()} == {"all local"}
    for row in near["plans"].values():
        assert row["nats"] - facts["parent"]["nats"] <= 0.5


def test_other_documents_can_be_held_out_and_other_lengths(command, tmp_path, capsys):
    others = write(tmp_path / "others.jsonl", 900, 800)
    what = ["--held-out", others, "--lengths", "512,600", "--full", 1, "--methods", "top"]
    answer(capsys, *command, *what, "--out", tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "held-out" / "run.json").read_text())
    assert str(others) in json.dumps(facts)
    records = [json.loads(line) for line in (tmp_path / "run/held-out/results.jsonl").read_text().splitlines()]
    assert {record["length"] for record in records} == {512, 600}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (LOCAL, "give one kind of budget"),
        ([*LOCAL, "--full", 1, "--within", 1], "give one kind of budget"),
        (["--full", 1], "either --block or --window"),
        (["--full", 1, "--block", 16, *LOCAL], "either --block or --window"),
        (["--full", 1, *LOCAL, "--lookback", 1], "--lookback needs --block"),
        (["--full", 1, *LOCAL, "--at", 512], "--at says at which length"),
        (["--full", "a", *LOCAL], "cannot read --full 'a'"),
        (["--full", "1.5", *LOCAL], "--full counts layers, got 1.5"),
        (["--full", ",", *LOCAL], "--full is empty"),
        (["--kv-bytes", "-5", *LOCAL], "--kv-bytes must be 0 or more, got -5"),
        (["--within", "nan", *LOCAL], "--within must be 0 or more, got nan"),
        (["--full", 1, "--window", 0], "window size must be a whole number of at least 1"),
        (["--full", 1, *LOCAL, "--sizes", "x"], "cannot read --sizes 'x'"),
        (["--full", 1, *LOCAL, "--dtype", "int8"], "unknown --dtype 'int8': choose of float32, bfloat16, float16"),
        (["--full", 1, *LOCAL, "--length", 511], "--length must be at least 512, got 511"),
        (["--full", 1, *LOCAL, "--probes", 0], "--probes must be at least 1, got 0"),
        (["--full", 1, *LOCAL, "--workers", 0], "--workers must be at least 1, got 0"),
    ],
)
def test_a_command_that_cannot_be_meant_is_refused(options, says, parent, texts, tmp_path, capsys):
    out = tmp_path / "run"
    assert says in refusal(capsys, 2, "select", parent, "--data", texts, *options, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--full", 1, "--methods", "best"], "unknown method 'best': choose of rules, scores, searches, bottom"),
        (["--full", LAYERS], "4 full layers are enough for the parent (4): nothing to choose"),
        (["--full", 1, "--sizes", "64"], "bottom chooses which layers are full, not among sizes: use forward"),
        (["--full", 1, "--sizes", "64", "--methods", "forward"], "with several sizes the budget must be one of KV"),
        (["--kv-bytes", 10], "10 bytes of KV cache up to 4,096 tokens are not enough: with no full layer"),
        (["--flops", "1e30", "--at", 600], "are enough for the parent"),
        (["--kv-bytes", 50000, "--at", 40, "--sizes", "64", "--methods", "forward"], "cost the same: leave out sizes"),
        (["--full", 1, "--length", POSITIONS + 1], "4,096"),
        (["--full", 1, "--length", 4000], "no document has 4,000 tokens"),
        (["--full", 1, "--lengths", 4000], "no document has 4,000 tokens"),
        (["--full", 1, "--tasks", "juggling"], "juggling"),
        (["--full", 1, "--methods", "gates-l0", "--held-out", "absent.jsonl"], "absent.jsonl"),
        (["--within", 0.1, "--methods", "gates"], "gates needs a budget that says how many layers may be full"),
        (["--full", 1, "--methods", "path", "--dtype", "float16"], "path takes gradients, which float16 loses"),
    ],
)
def test_what_cannot_be_done_is_refused_before_weights_are_read(options, says, command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(choice, "load", lambda *_, **__: pytest.fail("weights were read"))
    assert says in refusal(capsys, 3, *command, *METHODS, *options, "--out", tmp_path / "run")


def test_a_folder_of_a_refused_command_can_be_used(command, tmp_path, capsys):
    out = tmp_path / "run"
    refusal(capsys, 3, *command, "--full", 1, "--lengths", 4000, "--out", out)
    answer(capsys, *command, "--full", 1, "--methods", "top", "--out", out)


def test_a_converted_model_is_refused(converted, texts, tmp_path, capsys):
    said = refusal(
        capsys, 3, "select", converted, "--data", texts, *SMALL, *LOCAL, "--full", 1, "--out", tmp_path / "x"
    )
    assert "is converted already (full,window:8:sinks=2,full,window:8:sinks=2): select for its parent" in said


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ([700], "one document cannot be both chosen by and tried on: give more, or --held-out ones"),
        ([100, 100, 100, 90], "no document has 512 tokens; the longest of 2 has "),
    ],
)
def test_documents_that_are_too_few_or_too_short_are_refused(counts, says, parent, tmp_path, capsys):
    few = write(tmp_path / "few.jsonl", *counts)
    what = ["select", parent, "--data", few, *SMALL, *LOCAL, "--full", 1, "--out", tmp_path / "run"]
    assert says in refusal(capsys, 3, *what)


def test_a_folder_with_other_content_is_refused_and_left_alone(command, tmp_path, capsys):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("all of it")
    said = refusal(capsys, 3, *command, "--full", 1, "--out", out)
    assert f"{out} is not empty and holds no selection: name a new folder" in said
    assert [file.name for file in out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        (["--seed", 1], "probes is"),
        (["--sinks", 1], "local is ['window:16:sinks=2'] in the state and ['window:16:sinks=1'] here"),
        (["--length", 520], "length is 512 in the state and 520 here"),
        (["--probes", 2], "probes is"),
        (["--dtype", "bfloat16"], "identity is"),
    ],
)
def test_a_folder_of_another_selection_is_refused(changed, what, done, command, capsys):
    before = contents(done)
    said = refusal(capsys, 3, *command, "--full", "1,2", *METHODS, *changed, "--out", done)
    assert f"{done} holds another selection ({what}" in said
    assert contents(done) == before


def test_a_folder_of_another_model_is_refused_though_it_has_the_same_name(done, texts, parent, tmp_path, capsys):
    def go(folder):
        return ["select", folder, "--data", texts, *SMALL, *LOCAL, "--full", 1, "--methods", "top"]

    folder, out = tmp_path / "model", tmp_path / "run"
    for file in parent.iterdir():
        folder.mkdir(exist_ok=True)
        (folder / file.name).write_bytes(file.read_bytes())
    answer(capsys, *go(folder), "--out", out)
    model = load(str(parent))
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(folder)
    assert "holds another selection (identity is" in refusal(capsys, 3, *go(folder), "--out", out)


def test_damaged_files_of_a_folder_are_named(done, command, tmp_path, capsys):
    again = [*command, "--full", "1,2", *METHODS, "--out"]
    out = copied(done, tmp_path / "a")
    (out / "selection.json").write_text("{")
    assert "selection.json is damaged: delete it, what was measured is kept" in refusal(capsys, 4, *again, out)
    (out / "selection.json").unlink()
    answer(capsys, *again, out)
    assert selection(out) == selection(done)
    assert contents(out) == contents(done)
    out = copied(done, tmp_path / "b")
    with (out / "measured.jsonl").open("a") as stream:
        stream.write("torn")
    answer(capsys, *again, out)
    assert (out / "measured.jsonl").read_bytes() == (done / "measured.jsonl").read_bytes()


@pytest.mark.slow
def test_two_processes_find_what_one_does(done, command, tmp_path, capsys):
    answer(capsys, *command, "--full", "1,2", *METHODS, "--workers", 2, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "selection.json").read_bytes() == (done / "selection.json").read_bytes()


def stopping_once(function, when=lambda *_: True):
    """The function, interrupted when it is called so first, before it does anything."""
    stopped = []

    def called(*args, **kwargs):
        if when(*args) and not stopped:
            stopped.append(args)
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return called


def test_choices_are_trained_alike_and_measured_again_whenever_it_is_cut_off(command, tmp_path, capsys, monkeypatch):
    """Cut off before the first training, before its weights are deleted, and before the second one is measured."""
    out, trained, train = tmp_path / "run", [], trial.train

    def noted(recipe, **how):
        trained.append((Path(recipe.output).name, any(Path(recipe.output).glob("checkpoint-*"))))
        return train(recipe, **how)

    def weights():
        return len(list((out / "training").rglob("model.safetensors")))

    again = [*command, "--full", 1, "--methods", "top", "--train-steps", 2, "--out", out]
    monkeypatch.setattr(trial, "train", stopping_once(noted))
    assert (run([*map(str, again)]), trained, weights()) == (130, [], 0)
    monkeypatch.setattr(trial, "shutil", SimpleNamespace(rmtree=stopping_once(shutil.rmtree)))
    assert (run([*map(str, again)]), trained, weights()) == (130, [("parent", False)], 1)
    cut = stopping_once(trial._evaluate, lambda _, subjects, *__: subjects[0].label == "all local, trained")
    monkeypatch.setattr(trial, "_evaluate", cut)
    assert (run([*map(str, again)]), trained[1:], weights()) == (130, [("all-local", False)], 1)
    capsys.readouterr()

    facts = answer(capsys, *again)
    labels = {"parent", "all local"} | {row["label"] for budget in facts["budgets"] for row in budget["plans"].values()}
    assert trained[2] == ("all-local", True)  # goes on from what is there, which is all
    names = [name for name, found in trained if not found]
    assert len({*names}) == len(names) == len(labels) == len(trained) - 1
    for name in names:
        lines = [json.loads(line) for line in (out / "training" / name / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines if "loss" in line]
        assert steps == sorted({*steps}) != []
    assert weights() == 0
    assert {name for name in facts["held_out"] if name.endswith("trained")} == {f"{x}, trained" for x in labels}
    assert any(facts["held_out"][f"{x}, trained"]["nats"] != facts["held_out"][x]["nats"] for x in labels)
    assert facts["train_steps"] == 2

    before, calls = contents(out), len(trained)
    answer(capsys, *again)
    assert (contents(out), len(trained)) == (before, calls)
    answer(capsys, *again, "--train-steps", 0)
    assert selection(out)["train_steps"] == 2
    assert "train_steps is 2 in the state and 3 here" in refusal(capsys, 3, *again, "--train-steps", 3)
