"""`train` on a tiny model: what it prints, writes and refuses, and how it ends when it is told to; `fetch`."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml

from masformer.cli import run
from masformer.cli_train import _steps, duration, in_line
from masformer.models.checkpoint import load_config
from masformer.training.checkpoints import verify

from .conftest import PLAN, TEXT, answer, refusal

LINE = {
    "step": 7,
    "nats": 3.25,
    "kl": 0.0,
    "grad_norm": 1.5,
    "learning_rate": 1e-4,
    "tokens_per_second": 1234.5,
    "mfu": 0.125,
    "peak_memory": 3 * 2**29,
    "seconds_left": 3725.0,
}


@pytest.fixture
def recipe(parent, tmp_path):
    """Four steps of two sequences, with checkpoints and evaluations after two and four."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{n} " + TEXT * (5 + n)}) + "\n" for n in range(20)))
    settings = {
        "model": str(parent),
        "output": str(tmp_path / "run"),
        "plan": PLAN,
        "data": {"documents": str(texts), "lengths": 64, "cache": str(tmp_path / "cache")},
        "training": {"steps": 4, "batch": 2, "learning_rate": 1e-3},
        "evaluation": {"every": 2, "sequences": 1},
        "saving": {"every": 2},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture
def output(recipe):
    return recipe.parent / "run"


def train(*arguments):
    assert run(["train", *map(str, arguments)]) == 0


def checkpoints(output):
    return sorted(folder.name for folder in output.glob("checkpoint-*"))


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def damage(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


# dry runs


@pytest.mark.parametrize("columns", [80, 120])
def test_a_dry_run_says_what_would_be_done_and_does_nothing(recipe, output, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    train(recipe, "--dry-run")
    out, err = capsys.readouterr()
    assert err == ""
    assert not output.exists()
    assert max(map(len, out.splitlines())) <= columns
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line[0] == "│"]
    said = dict(rows)
    assert said["plan"] == f"{PLAN} (2 full)"
    assert said["documents"].startswith("19 with ")
    assert said["held out"].startswith("1 with ")
    assert said["steps"] == "4"
    assert said["sequences"] == "8 of up to 64 tokens, 512 in all"
    assert said["of documents"].startswith("512 tokens in ")
    assert said["training FLOPs"].endswith(" % less than the parent's)")
    assert said["memory"].startswith("about ")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["plan=full*4"], "as many as the parent's"),
        (["training.distill=0.5"], "% more than the parent's"),
        (["data.recall={share: 0.5}", "data.lengths=600", "training.steps=20"], "of them recall items"),
        (["data.mode=single", "data.lengths=1000"], "padded"),
    ],
)
def test_a_dry_run_says_what_is_special(recipe, changes, words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    train(recipe, "--dry-run", *changes)
    assert words in capsys.readouterr().out


def test_a_dry_run_answers_in_json(recipe, output, capsys):
    facts = answer(capsys, "train", recipe, "training.steps=5", "--dry-run")
    assert (facts["plan"], facts["steps"], facts["tokens"], facts["longest"]) == (PLAN, 5, 5 * 2 * 64, 64)
    assert facts["documents"]["documents"] == 19
    assert facts["read"]["documents_sequences"] == 10
    assert 0 < facts["flops"] < facts["flops_of_the_parent"]
    assert not output.exists()


# runs


def test_a_run_says_its_steps_and_leaves_a_model(recipe, output, capsys):
    train(recipe)
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line[: line.index("  ")] for line in lines] == [f"step {step}/4" for step in (0, 1, 2, 2, 3, 4, 4)]
    assert sum("held out: documents " in line for line in lines) == 3
    assert all("tokens/s" in line and " left" in line for line in lines if "held out" not in line)
    assert out.splitlines()[-1] == f"{output / 'checkpoint-4'}: 4 of 4 steps done"
    assert checkpoints(output) == ["checkpoint-2", "checkpoint-4"]
    assert str(load_config(str(output / "checkpoint-4"))[1]) == PLAN
    assert verify(output / "checkpoint-4").step == 4
    losses = [line["nats"] for line in metrics(output) if "nats" in line]
    assert len(losses) == 4
    assert losses[-1] < losses[0]

    before = (output / "metrics.jsonl").read_bytes()
    train(recipe)
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"{output / 'checkpoint-4'}: 4 of 4 steps done"
    assert not any(line.startswith("step ") for line in out.splitlines())
    assert err == ""
    assert (output / "metrics.jsonl").read_bytes() == before
    assert run(["generate", str(output / "checkpoint-4"), "--prompt", "the", "--max-new-tokens", "2"]) == 0


def test_a_run_answers_in_json_and_takes_changes(recipe, tmp_path, capsys):
    other = tmp_path / "other"
    facts = answer(capsys, "train", recipe, "training.steps=1", f"output={other}", "data.lengths=32")
    assert (facts["step"], facts["checkpoint"], facts["signal"]) == (1, str(other / "checkpoint-1"), None)
    assert facts["metrics"]["eval_documents_loss"] > 0
    assert facts["tokens"] == 64
    assert [line["step"] for line in metrics(other)] == [0, 1, 1]
    assert json.loads((other / "recipe.json").read_text())["data"]["lengths"] == 32


# refusals


@pytest.mark.parametrize(
    ("code", "arguments", "words"),
    [
        (2, ["train"], "Missing argument 'RECIPE'"),
        (2, ["train", "x.yaml", "--no-such-flag"], "No such option: --no-such-flag"),
        (2, ["fetch", "nothing", "x"], "unknown name 'nothing': choose one of smollm2"),
        (2, ["fetch", "smollm2"], "Missing argument 'OUT'"),
        (3, ["train", "none.yaml"], "cannot read none.yaml: No such file or directory"),
    ],
)
def test_a_mistaken_command_is_refused(code, arguments, words, capsys):
    assert words in refusal(capsys, code, *arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("training.step=3", "unknown key training.step: did you mean training.steps?"),
        ("training.steps", "cannot read the change 'training.steps'"),
        ("training.steps=0", "training.steps should be greater than or equal to 1 (got 0)"),
        ("plan=full*3", "the plan has 3 layers, the model has 4"),
        ("plan={layout: nope}", "unknown layout 'nope'"),
        ("model=./nowhere", "./nowhere is not a folder"),
        ("data.documents=./nowhere", "cannot read nowhere: No such file or directory"),
        ("data.lengths=5000", "set positions={length: 5000, method: ...}"),
    ],
)
def test_a_bad_recipe_is_refused_before_anything_is_printed_or_written(recipe, output, change, words, capsys):
    assert words in refusal(capsys, 3, "train", recipe, change)
    assert not output.exists()


def test_what_does_not_fit_is_refused(recipe, output, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    for flags in ([], ["--dry-run"]):
        assert "0.0 GB are free: set training.recompute=true" in refusal(capsys, 5, "train", recipe, "--json", *flags)
    assert not output.exists()


def test_a_step_that_diverges_is_not_taken_and_the_run_goes_on_with_another_limit(recipe, output, capsys):
    limit = "training.gradient_limit=1e-9"
    line = refusal(capsys, 3, "train", recipe, limit, "--json")
    assert "step 1: the gradient norm is " in line
    assert "raise training.gradient_limit" in line
    assert checkpoints(output) == []
    train(recipe)
    shutil.rmtree(output / "checkpoint-4")
    capsys.readouterr()
    assert run(["train", str(recipe), limit]) == 3
    assert "masformer: error: step 3: the gradient norm is " in capsys.readouterr().err
    assert checkpoints(output) == ["checkpoint-2"]
    train(recipe)
    assert checkpoints(output) == ["checkpoint-2", "checkpoint-4"]


def test_checkpoints_of_another_run_and_damaged_ones(recipe, output, capsys):
    train(recipe)
    capsys.readouterr()
    line = refusal(capsys, 3, "train", recipe, "training.seed=3", "--json")
    assert "checkpoint-4 is of another training, name another folder: recipe.training.seed is 0" in line
    damage(output / "checkpoint-4")
    train(recipe, "--json")
    out, err = capsys.readouterr()
    assert json.loads(out)["step"] == 4
    assert "passed over: " in err
    assert f"going on from {output / 'checkpoint-2'}" in err
    for step in (2, 4):
        damage(output / f"checkpoint-{step}")
    assert run(["train", str(recipe), "--json"]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines()] == ["passed over", "passed over", "masformer"]
    assert "is whole, name another folder: checkpoint-4, checkpoint-2" in err


# signals


def told_to_end(number, recipe, *changes):
    """The command in a new process, every step of which takes a while; it gets the signal once step 3 was printed."""
    arguments = ["masformer", "train", str(recipe), *changes]
    code = f"""
import sys, time
from masformer import cli, cli_train
line = cli_train.in_line
cli_train.in_line = lambda *given: time.sleep(0.2) or line(*given)
sys.argv = {arguments!r}
cli.main()
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )
    try:
        for said in child.stdout:
            if said.startswith("step  3/"):
                child.send_signal(number)
                break
        out, err = child.communicate(timeout=100)
    finally:
        child.kill()
    return child.returncode, out, err


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 0), pytest.param("SIGINT", 130, marks=pytest.mark.slow)])
def test_a_signal_ends_a_run_with_a_checkpoint_and_it_goes_on(name, code, recipe, output, tmp_path, capsys):
    changes = ["training.steps=30", "saving.every=30", "evaluation.every=30"]
    ended, out, err = told_to_end(signal.Signals[name], recipe, *changes)
    assert ended == code, err
    [checkpoint] = checkpoints(output)
    step = verify(output / checkpoint).step
    assert 3 <= step < 30
    assert out.splitlines()[-1] == f"{output / checkpoint}: {step} of 30 steps done"
    interrupted = ["masformer: interrupted"] if name == "SIGINT" else []
    assert err.splitlines() == [f"stopped by {name}; the same command goes on", *interrupted]
    train(recipe, *changes)
    out, err = capsys.readouterr()
    assert err == f"going on from {output / checkpoint}\n"
    assert out.splitlines()[-1] == f"{output / 'checkpoint-30'}: 30 of 30 steps done"
    steps = [line["step"] for line in metrics(output) if "nats" in line]
    assert steps == list(range(1, 31))


# words


def test_a_line_for_people():
    assert in_line(LINE, 1000) == (
        "step    7/1000  nats 3.2500  |g| 1.50  lr 1.0e-04   1,234 tokens/s  MFU 12.5 %  1.5 GiB  1 h 02 min left"
    )
    assert "nats 3.2500  kl 0.1250  |g|" in in_line(LINE | {"kl": 0.125}, 1000)
    held_out = {"step": 0, "eval_documents_loss": 3.5, "eval_recall_loss": 1.25}
    assert in_line(held_out, 10) == "step  0/10  held out: documents 3.5000, recall 1.2500 nats"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3569, "59 min"), (3590, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_the_terminal_leaves_the_lines_to_the_file(monkeypatch):
    file, terminal = io.StringIO(), Terminal()
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with _steps(10, json=False) as show:
        show(LINE)
    assert file.getvalue() == in_line(LINE, 10) + "\n"
    assert "7/10" in terminal.getvalue()
    assert "nats" not in terminal.getvalue()


def test_the_help_shows_how(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    for command in ("train", "fetch"):
        assert run([command, "--help"]) == 0
        assert f"Example: masformer {command} " in capsys.readouterr().out
    run(["train", "--help"])
    assert "RECIPE} [KEY=VALUE]..." in capsys.readouterr().out
