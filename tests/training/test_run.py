"""A training that is killed at any moment loses no complete checkpoint and ends as if nothing had happened; what else
a run leaves as it was.
"""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import masformer
from masformer.training import run as run_module
from masformer.training.checkpoints import NAME, Checkpoints, verify
from masformer.training.run import train

from .helpers import Launcher
from .made import make, recipe

KILLS, INSIDE, STEPS = 50, 14, 250
TIMES = ("tokens_per_second", "mfu", "peak_memory", "seconds_left")
BITS = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")

LIVES = (
    lambda drawn: ("began", 1, 0.5),
    lambda drawn: ("saving", drawn.choice((1, 2)), 0.02),  # so soon that the save cannot have ended
    lambda drawn: ("saving", drawn.choice((1, 2)), 0.12),
)
"""When processes are killed, in turns: at most so many seconds after something happened the first or second time."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("run"))


def trained(folder: str, output: str, journal: str, every: int) -> dict[str, Any]:
    """In a process of its own; `journal` tells what began and what was complete."""
    run_module.matmul_peak = lambda *_: 1.0  # type: ignore[assignment]
    pen = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    writing = Checkpoints.writing

    @contextlib.contextmanager
    def told(self: Checkpoints, step: int, facts: dict[str, Any]) -> Iterator[Path]:
        os.write(pen, f"saving {step}\n".encode())
        with writing(self, step, facts) as place:
            yield place
        os.write(pen, f"saved {step}\n".encode())

    Checkpoints.writing = told  # type: ignore[method-assign,assignment]
    training = {"steps": STEPS, "batch": 1, "weight_decay": 0.1}
    reports = {"evaluation": {"every": STEPS, "sequences": 1}, "saving": {"every": every}}
    os.write(pen, b"began 0\n")
    return train(recipe(Path(folder), output, training=training, **reports), say=lambda words: None)


def read(journal: Path) -> list[tuple[str, int]]:
    words = journal.read_text().split() if journal.exists() else []
    return [(what, int(step)) for what, step in zip(words[::2], words[1::2], strict=True)]


def complete(output: Path) -> list[int]:
    """The steps of all checkpoints, ascending; each of them is whole."""
    named = [path for path in output.glob("*") if NAME.fullmatch(path.name)] if output.exists() else []
    return sorted(verify(path).step for path in named)


def test_fifty_kills(folder: Path) -> None:
    """The run goes on after every one and ends bit for bit as if there had been none; no checkpoint is lost."""
    drawn = random.Random(0)
    whole, killed = folder / "whole", folder / "killed"
    logs = folder / "logs"
    logs.mkdir()
    inside = newest = 0
    with Launcher(logs) as launcher:
        for number in range(KILLS):
            awaited, count, most = LIVES[number % 3](drawn)
            journal = folder / f"journal-{number}"
            given = {"folder": str(folder), "output": str(killed), "journal": str(journal), "every": 1}
            [pid] = launcher.start(trained, **given)
            while sum(what == awaited for what, _ in read(journal)) < count:
                time.sleep(0.001)
            time.sleep(drawn.uniform(0, most))
            os.kill(pid, signal.SIGKILL)
            assert launcher.wait([pid])[0][0] == -signal.SIGKILL, "it had come to its end"
            told = read(journal)
            inside += told[-1][0] == "saving"
            newest = max([newest, *(step for what, step in told if what == "saved")])
            there = complete(killed)
            assert len(there) >= min(2, newest)
            assert max(there, default=0) >= newest
            if there:
                newest = there[-1]
                masformer.load(str(killed / f"checkpoint-{newest}"))
        given = {"folder": str(folder), "journal": str(folder / "journal"), "every": STEPS}
        done = [launcher.run(trained, output=str(output), **given)[0] for output in (whole, killed)]
    assert inside >= INSIDE
    assert 10 < newest < STEPS  # the kills were spread over many steps
    assert [(result["step"], result["signal"]) for result in done] == [(STEPS, None)] * 2
    assert metrics(killed) == metrics(whole)
    for name in BITS:
        got, expected = (output / f"checkpoint-{STEPS}" / name for output in (killed, whole))
        assert got.read_bytes() == expected.read_bytes(), name


def metrics(output: Path) -> list[dict[str, Any]]:
    """Every line without what depends on time."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name not in TIMES} for line in lines]


def test_a_kill_while_metrics_are_cut_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"step": {step}}}\n' for step in range(4)) + '{"st')
    before = file.read_text()

    def killed(path: Path, *args: Any, **options: Any) -> None:
        path.open("w").close()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            run_module._keep_metrics(file, 2)
    assert file.read_text() == before
    run_module._keep_metrics(file, 2)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def ended(folder: Path, output: Path, **training: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The last line with a loss, and the weights."""
    wanted = recipe(folder, output, training={"steps": 2, "warmup_steps": 0, **training})
    done = train(wanted, say=lambda words: None)
    lines = [line for line in metrics(output) if "loss" in line]
    return lines[-1], load_file(Path(done["checkpoint"], "model.safetensors"))


def test_bf16_computes_and_float32_remembers(folder: Path, tmp_path: Path) -> None:
    """Steps of a millionth would be lost in bfloat16 weights."""
    torch.set_num_threads(1)
    small = {"learning_rate": 1e-6}
    line, weights = ended(folder, tmp_path / "bf16", precision="bf16", **small)
    exact, _ = ended(folder, tmp_path / "fp32", **small)
    parent = load_file(folder / "model" / "model.safetensors")
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        moved = float((weight - parent[name]).abs().max())
        assert 1e-7 < moved < 1e-5, name
    assert 1e-5 < abs(line["nats"] - exact["nats"]) < 0.05
    assert line["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.1)


def test_a_parent_that_teaches_stays_as_it_is(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parents, make_teacher = [], run_module._teacher
    monkeypatch.setattr(run_module, "_teacher", lambda *args: parents.append(make_teacher(*args)) or parents[-1])
    line, weights = ended(folder, tmp_path / "run", distill=0.5)
    [teacher] = parents
    parent = load_file(folder / "model" / "model.safetensors")
    assert line["kl"] > 1e-3
    assert line["loss"] == pytest.approx((line["nats"] + line["kl"]) / 2, rel=1e-5)
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    state = teacher.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in parent.items())
    assert not any(torch.equal(weights[name], weight) for name, weight in parent.items())
