"""`masformer eval` and `masformer report`: the same items for every model, runs that go on, refusals before weights."""

import json

import pytest
import torch
from torch.nn import functional as F

from masformer import cli_eval
from masformer.cli import run
from masformer.evaluation import suites
from masformer.models.checkpoint import load
from masformer.models.tokenizer import load_tokenizer
from tests.cli.conftest import LOCAL, PLAN, POSITIONS, answer, refusal
from tests.small import TEXT

LENGTHS = [512, 700]


@pytest.fixture
def pairs(tmp_path):
    file = tmp_path / "pairs.jsonl"
    texts = [TEXT * 100, TEXT * 10, "the lazy dog " * 400, TEXT * 130]
    records = [{"id": f"d{n}", "text": text, "summary": "the quick brown fox"} for n, text in enumerate(texts)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def all_suites(pairs, out):
    lengths = ",".join(map(str, LENGTHS))
    what = ["--suite", "loss,recall,summary,fidelity", "--tasks", "passkey,babi_1", "--lengths", lengths]
    return ["--data", pairs, *what, "--items", 2, "--out", out]


def records(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_the_loss_is_that_of_a_plain_loop_and_compared_on_the_same_documents(parent, converted, speeches, capsys):
    facts = answer(
        capsys, "eval", parent, converted, "--data", speeches, "--suite", "loss", "--lengths", 64, "--items", 2
    )
    assert [row["plan"] for row in facts["models"]] == ["4 full", "2 full, 2 window 8 + 2 sinks"]
    full, local = facts["loss"]
    tokenizer, sums = load_tokenizer(str(parent)), []
    for name in (parent, converted):
        model = load(str(name))
        texts = [json.loads(line)["text"] for line in speeches.read_text().splitlines()]
        ids = [i for i in (tokenizer(text)["input_ids"] for text in texts) if len(i) >= 64][:2]
        with torch.no_grad():
            logits = [model(torch.tensor([i[:64]])).logits[0, :-1].double() for i in ids]
        sums.append([float(F.cross_entropy(x, torch.tensor(i[1:64]))) for x, i in zip(logits, ids, strict=True)])
    assert full["nats"]["value"] == pytest.approx(sum(sums[0]) / 2, abs=1e-6)
    assert local["nats"]["value"] == pytest.approx(sum(sums[1]) / 2, abs=1e-6)
    assert local["difference"]["value"] == pytest.approx(sum(sums[1]) / 2 - sum(sums[0]) / 2, abs=1e-6)
    assert (full["tokens"], full["documents"]) == (126, 2)


def test_a_plan_given_is_that_of_the_converted(parent, converted, speeches, capsys):
    where = ["--data", speeches, "--suite", "loss", "--lengths", 64]
    one, other = (answer(capsys, "eval", *what, *where)["loss"][0] for what in ([parent, *LOCAL], [converted]))
    assert one["nats"] == other["nats"]


def test_all_suites_end_in_tables_a_run_and_a_page(parent, converted, pairs, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(["eval", str(parent), str(converted), *map(str, all_suites(pairs, out))]) == 0
    text, err = capsys.readouterr()
    for words in ("Models", "Recall", "Summaries", "Fidelity", "passkey", "babi_1", "converted"):
        assert words in text
    assert "1 documents of less than 700 tokens passed over" in err
    made = records(out)
    count = {suite: sum(r["suite"] == suite and r["model"] == "parent" for r in made) for suite in suites.SUITES}
    assert count == {"loss": 2, "recall": 2 * 2 * 2, "summary": 2 * 2, "fidelity": 0, "lm-eval": 0}
    assert sum(r["suite"] == "fidelity" for r in made) == 2
    facts = json.loads((out / "run.json").read_text())
    assert facts["models"]["converted"]["plan"] == PLAN
    assert facts["models"]["converted"]["cost"].keys() == {"512", "700"}
    assert answer(capsys, "report", out)["page"] == str(out / "report.html")
    assert "passkey" in (out / "report.html").read_text()


def test_a_run_that_was_interrupted_goes_on_to_the_same_numbers(
    parent, converted, pairs, tmp_path, capsys, monkeypatch
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = ["eval", str(parent), str(converted)]
    assert run([*command, *map(str, all_suites(pairs, whole))]) == 0
    add, calls = suites.Run.add, []

    def stopping(self, batch):
        add(self, batch)
        calls.append(batch)
        if len(calls) % 5 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(suites.Run, "add", stopping)
    codes = []
    while not codes or codes[-1] == 130:
        codes.append(run([*command, *map(str, all_suites(pairs, cut))]))
    assert codes == [130] * (len(calls) // 5) + [0]
    assert len(codes) > 3
    assert records(cut) == records(whole)
    capsys.readouterr()


def test_a_second_call_measures_nothing_and_more_items_only_the_new_ones(parent, pairs, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    recall = ["eval", parent, "--suite", "recall", "--tasks", "passkey", "--lengths", 512, "--out", out]
    first = answer(capsys, *recall, "--items", 2)
    before = records(out)
    with monkeypatch.context() as patch:
        patch.setattr("masformer.models.checkpoint.load", None)  # no weights are read
        assert answer(capsys, *recall, "--items", 2) == first
    answer(capsys, *recall, "--items", 3)
    assert records(out)[:2] == before
    assert len(records(out)) == 3
    assert "seed is 0 in the state and 1 here" in refusal(capsys, 3, *recall, "--seed", 1)


def test_fidelity_is_to_the_first_model_of_a_run_and_each_is_loaded_once(
    parent, converted, pairs, tmp_path, capsys, monkeypatch
):
    loads = []
    monkeypatch.setattr(
        "masformer.models.checkpoint.load", lambda source, **how: loads.append(source) or load(source, **how)
    )
    what = ["--suite", "fidelity", "--data", pairs, "--lengths", 64, "--items", 1, "--out", tmp_path / "run"]
    answer(capsys, "eval", parent, converted, *what)
    assert loads == [str(parent), str(converted)]
    assert "compares models with parent" in refusal(capsys, 3, "eval", converted, parent, *what)
    answer(capsys, "eval", parent, f"again={converted}", *what)
    assert loads[2:] == [str(parent), str(converted)]


@pytest.mark.parametrize("changed", ["tokenizer", "generation", "summary"])
def test_what_decides_the_numbers_must_be_the_same_when_a_run_goes_on(changed, copy, pairs, tmp_path, capsys):
    what = ["eval", copy, "--suite", "loss,summary", "--data", pairs, "--lengths", 200, "--out", tmp_path / "run"]
    answer(capsys, *what, "--items", 1)
    if changed == "tokenizer":
        file = copy / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        tokenizer["normalizer"] = {"type": "Lowercase"}
        file.write_text(json.dumps(tokenizer))
    elif changed == "generation":
        (copy / "generation_config.json").write_text('{"eos_token_id": 5}')
    else:
        pairs.write_text(pairs.read_text().replace("quick brown", "slow brown"))
    assert run([*map(str, what), "--items", "2"]) == 3
    assert "holds another" in capsys.readouterr().err


def test_quick_does_what_it_can_and_says_what_it_leaves_out(parent, speeches, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("masformer.cli_eval.QUICK", cli_eval.QUICK | {"lengths": (300, POSITIONS + 1)})
    assert run(["eval", str(parent), "--quick", "--data", str(speeches), "--out", str(tmp_path / "run")]) == 0
    err = capsys.readouterr().err
    assert "--quick leaves out fidelity" in err
    assert "--quick leaves out summary" in err
    assert "--quick ends at 300 tokens" in err
    assert {record["suite"] for record in records(tmp_path / "run")} == {"loss", "recall"}


def test_batches_change_nothing(parent, tmp_path, capsys):
    recall = ["eval", parent, "--suite", "recall", "--tasks", "passkey,niah_multiquery", "--lengths", 900]
    one, four = (answer(capsys, *recall, "--items", 4, "--batch", batch)["recall"] for batch in (1, 4))
    for alone, together in zip(one, four, strict=True):
        assert together["score"] == alone["score"]
        assert together["log_probability"] == pytest.approx(alone["log_probability"], rel=1e-6)


def test_whole_documents_are_read_in_windows(parent, speeches, capsys):
    flags = ["--data", speeches, "--suite", "loss", "--lengths", 64, "--stride", 16]
    facts = answer(capsys, "eval", parent, *flags)
    tokenizer = load_tokenizer(str(parent))
    texts = [json.loads(line)["text"] for line in speeches.read_text().splitlines()]
    assert facts["loss"][0]["tokens"] == sum(len(tokenizer(text)["input_ids"]) - 1 for text in texts)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--data", "y"], "--lengths, or --quick"),
        (["x", "--data", "y", "--lengths", "1"], "lengths must be at least 2"),
        (["x", "--data", "y", "--lengths", "1k"], "cannot read --lengths '1k'"),
        (["x", "--data", "y", "--lengths", ","], "--lengths is empty"),
        (["x", "--data", "y", "--lengths", "8", "--items", "0"], "--items must be at least 1, got 0"),
        (["x", "--data", "y", "--lengths", "8", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["x", "--data", "y", "--lengths", "8", "--suite", "los"], "unknown suite 'los': choose of loss, recall"),
        (["x", "--data", "y", "--lengths", "8", "--tasks", "niah"], "unknown task 'niah': choose of passkey"),
        (["x", "--data", "y", "--lengths", "8", "--stride", "0"], "the stride must be 1 to 7"),
        (["x", "--data", "y", "--lengths", "8", "--stride", "8"], "the stride must be 1 to 7"),
        (["x", "--data", "y", "--lengths", "8", "--suite", "loss", "--tasks", "passkey"], "--tasks is for the suite"),
        (["x", "--data", "y", "--lengths", "8", "--beams", "2"], "--beams is for the suite summary"),
        (["=x", "--data", "y", "--lengths", "8"], "one of the two is empty"),
        (["x", "--lengths", "8", "--suite", "lm-eval"], "lm-eval and its tasks go together"),
    ],
)
def test_mistaken_commands_are_usage_errors(arguments, words, capsys):
    assert words in refusal(capsys, 2, "eval", *arguments)


def test_everything_is_refused_before_weights_are_read(
    parent, converted, speeches, pairs, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("masformer.models.checkpoint.load", None)
    eight = ["--lengths", 8, "--data", speeches]
    assert "passkey needs at least" in refusal(capsys, 3, "eval", parent, "--suite", "recall", *eight)
    assert 'has no "summary"' in refusal(capsys, 3, "eval", parent, "--suite", "summary", *eight)
    assert "give the parent" in refusal(capsys, 3, "eval", parent, "--suite", "fidelity", *eight)
    long = ["--suite", "recall", "--lengths", POSITIONS + 1]
    assert f"{POSITIONS:,} positions" in refusal(capsys, 3, "eval", parent, *long)
    same = refusal(capsys, 3, "eval", parent, parent, "--suite", "loss", *eight)
    assert "two models are called parent: write NAME=MODEL" in same
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("precious")
    used = ["--suite", "loss", *eight, "--items", 4, "--out", tmp_path / "used"]
    assert "holds no evaluation" in refusal(capsys, 3, "eval", parent, *used)
    assert "the suite loss needs --data" in refusal(capsys, 2, "eval", parent, "--lengths", 8)
    room = ["--suite", "summary", "--data", pairs, "--lengths", 100]
    assert "leave the document none" in refusal(capsys, 3, "eval", parent, *room)


def test_names_are_given_and_a_path_with_an_equals_sign_is_a_path(parent, speeches, tmp_path, capsys):
    odd = tmp_path / "a=b"
    odd.symlink_to(parent)
    flags = ["--data", speeches, "--suite", "loss", "--lengths", 64]
    facts = answer(capsys, "eval", f"first={parent}", odd, *flags)
    assert [row["model"] for row in facts["models"]] == ["first", "a=b"]


def test_lm_eval_runs_a_task_of_ones_own(converted, tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    docs = [{"text": f"the {a} fox", "options": ["dog", "fox"], "right": n % 2} for n, a in enumerate(("red", "lazy"))]
    (tasks / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tasks / "own.yaml").write_text(
        "task: own\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{tasks / 'docs.jsonl'}\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{{{text}}}}'\n"
        "doc_to_choice: options\ndoc_to_target: right\nmetric_list:\n  - metric: acc\n"
    )
    flags = ["--suite", "lm-eval", "--tasks", "own", "--include", tasks]
    rows = answer(capsys, "eval", converted, *flags)["lm-eval"]
    assert [(row["task"], row["metric"], row["items"]) for row in rows] == [("own", "acc", 2)]
    assert rows[0]["value"] in (0, 0.5, 1)
    monkeypatch.setattr("masformer.models.checkpoint.load", None)  # nor are weights read for what follows
    docs[1]["text"] = "the " * POSITIONS
    (tasks / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    assert f"do not fit into the model's {POSITIONS:,} positions" in refusal(capsys, 3, "eval", converted, *flags)
    (tasks / "docs.jsonl").unlink()
    assert "cannot load own, or the data" in refusal(capsys, 3, "eval", converted, *flags)
    flags[3] = "owm"
    assert "unknown task 'owm'" in refusal(capsys, 3, "eval", converted, *flags)


def test_report_refuses_what_is_no_run(tmp_path, capsys):
    assert "is no run folder" in refusal(capsys, 3, "report", tmp_path)
