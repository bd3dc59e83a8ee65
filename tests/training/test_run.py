"""A training that is killed at any moment loses no complete checkpoint and ends as if nothing had happened."""

import contextlib
import itertools
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
from masformer.training.recipe import Recipe
from masformer.training.run import train

from .helpers import Launcher
from .made import make, recipe

KILLS, INSIDE, STEPS = 50, 14, 150
BITS = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


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
    lora = {"rank": 2, "dropout": 0.5}  # draws random numbers in every step
    training = {"steps": STEPS, "batch": 1, "lora": lora, "weight_decay": 0.1}
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
    """Half of the processes are killed some time after a save began, the others at any time after their start."""
    drawn = random.Random(0)
    whole, killed = folder / "whole", folder / "killed"
    logs = folder / "logs"
    logs.mkdir()
    inside, lives, newest = 0, 0, 0
    with Launcher(logs) as launcher:
        for number in range(KILLS):
            journal = folder / f"journal-{number}"
            given = {"folder": str(folder), "output": str(killed), "journal": str(journal), "every": 1}
            [pid] = launcher.start(trained, **given)
            awaited = "saving" if number % 2 else "began"
            while not any(what == awaited for what, _ in read(journal)):
                time.sleep(0.001)
            time.sleep(drawn.uniform(0, 0.1 if number % 2 else 0.5))
            os.kill(pid, signal.SIGKILL)
            assert launcher.wait([pid])[0][0] == -signal.SIGKILL, "it had come to its end"
            told = read(journal)
            inside += told[-1][0] == "saving"
            lives += told[-1][0] != "began"
            newest = max([newest, *(step for what, step in told if what == "saved")])
            there = complete(killed)
            assert len(there) >= min(2, newest)
            assert max(there, default=0) >= newest
            if there:
                newest = there[-1]
                if number % 5 == 0:
                    loads(killed / f"checkpoint-{newest}", folder)
        assert inside >= INSIDE
        assert lives >= KILLS // 2
        assert KILLS // 4 < newest < STEPS
        given = {"folder": str(folder), "journal": str(folder / "journal"), "every": STEPS}
        done = [launcher.run(trained, output=str(output), **given)[0] for output in (whole, killed)]
    assert [result["step"] for result in done] == [STEPS] * 2
    print(inside, lives, newest)
