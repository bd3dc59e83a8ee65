"""What test_kills.py starts, `python -m tests.training.killed FOLDER KILLS`: trains in forked children, kills them."""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import masformer
from masformer.models.tokenizer import quiet
from masformer.training.checkpoints import Checkpoints
from masformer.training.prepare import prepare
from masformer.training.run import train

from .made import recipe

STEPS = 400


def wanted(folder: Path, name: str) -> Any:
    return recipe(
        folder,
        folder / name,
        training={"steps": STEPS, "batch": 1},
        evaluation={"every": STEPS, "sequences": 1},
        saving={"every": 1, "keep": 1},
    )


def child(folder: Path, journal: int) -> None:
    """Trains, and writes a line when a save begins and when it is complete."""
    writing = Checkpoints.writing

    @contextmanager
    def told(self: Checkpoints, step: int, facts: dict[str, Any]) -> Iterator[Path]:
        os.write(journal, f"begun {step}\n".encode())
        with writing(self, step, facts) as place:
            yield place
        os.write(journal, f"done {step}\n".encode())

    Checkpoints.writing = told  # type: ignore[method-assign,assignment]
    train(wanted(folder, "killed"), say=lambda words: None)


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    quiet()
    identity = prepare(wanted(folder, "killed")).identity
    drawn = random.Random(0)
    inside = lost = unloadable = 0
    complete = 0
    for _ in range(kills):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            child(folder, writing)
            os._exit(0)
        os.close(writing)
        told = os.fdopen(reading)
        first = told.readline()  # the first save of this child has begun
        time.sleep(drawn.uniform(0, 0.5))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        said = [first, *told]
        inside += said[-1].startswith("begun")
        complete = max([complete, *(int(line.split()[1]) for line in said if line.startswith("done"))])
        with Checkpoints(folder / "killed", identity) as checkpoints:
            found = checkpoints.newest(lambda words: None)
        if found is None:
            lost += complete > 0
            continue
        lost += found.step < complete
        try:
            masformer.load(str(found.folder))
        except Exception:
            unloadable += 1
    print(json.dumps({"inside": inside, "lost": lost, "unloadable": unloadable, "step": complete}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
