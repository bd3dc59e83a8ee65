"""A selection from beginning to end, in one folder: choose, then try every distinct plan on held-out data.

    outcome = select(asked, trial, Path("runs/select"))

The folder gets `selection.json` (what `choice.choose` returns, and what was asked), `measured.jsonl` (`store.py`), and
in `held-out` an evaluation that `masformer report` shows. The same call goes on where one was cut off; methods and
budgets that are asked for later are added.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import difference, disk_errors
from .choice import Asked, Prepared, choose, prepare
from .outcome import CORPORA, FILE, FORMAT, HELD_OUT, distinct, joined, read, write
from .store import Store
from .trial import TEXTS, Trial, check, try_out, try_trained
from .workers import workers

STORE = "measured.jsonl"
FRESH = {STORE, CORPORA, TEXTS, HELD_OUT}
"""What may lie in the folder before the first outcome does."""

TRAINING_STEP = 4
"""Forwards that a step of training takes as long as."""

Show = Callable[[str, int], Any]


def select(
    asked: Asked,
    trial: Trial,
    folder: Path,
    *,
    train_steps: int = 0,
    processes: int = 1,
    ray: str | None = None,
    say: Callable[[str], Any] = lambda line: None,
    progress: Show = lambda what, done: None,
) -> dict[str, Any]:
    """What `selection.json` holds.

    Args:
        train_steps: of a training of each distinct plan, the parent and all local among them, after which it is tried
            again; 0 for none.
        processes, ray: see `workers`.
        progress: called with what is going on and how many tokens of held-out data, or plans, were measured since.

    Raises:
        InputError, ResourceError: what was asked for cannot be done, or the folder holds something else.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(folder)
    earlier = read(folder) if (folder / FILE).exists() else None
    prepared = prepare(asked, trial.chosen_by, folder)
    prepared.refuse_too_large(processes)
    facts = _facts(prepared)
    if earlier is not None:
        _refuse_other(folder, earlier, facts, train_steps)
    tokens = check(trial, prepared.space.parent, folder, train_steps, say)
    say(f"about {prepared.memory(processes) / 1e9:.1f} GB of memory")
    beside = (2 + len(asked.methods) * len(asked.budgets)) * (
        tokens / asked.length * (2 if train_steps else 1) + TRAINING_STEP * train_steps
    )
    with Store.open(folder / STORE) as store:
        with workers(processes, ray) as executor:
            outcome = choose(
                prepared,
                store,
                executor=executor,
                beside=beside,
                say=say,
                progress=lambda plans: progress("choosing", plans),
            )
        outcome = {"format": FORMAT, "facts": facts, "train_steps": train_steps, **outcome}
        if earlier is not None:
            outcome = joined(earlier, outcome)
        write(folder, outcome)
        plans = distinct(outcome)
        try_out(trial, plans, folder, progress)
        if train_steps:
            try_trained(trial, plans, folder, steps=train_steps, say=say, progress=progress)
    return outcome


def _facts(prepared: Prepared) -> dict[str, Any]:
    """What may not change while a folder is gone on with."""
    asked = prepared.asked
    return {
        "model": asked.model,
        "identity": prepared.identity,
        "local": [str(span) for span in asked.local],
        "length": asked.length,
        "probes": [probe.key for probe in prepared.probes],
        "checks": [probe.key for probe in prepared.checks],
        "seed": asked.seed,
        "dtype": str(asked.dtype).removeprefix("torch."),
        "device": asked.device,
    }


def _refuse_foreign(folder: Path) -> None:
    found = {file.name for file in folder.iterdir()}
    if not found & {FILE, STORE} and found - FRESH - {f"{FILE}.part"}:
        raise InputError(f"{folder} is not empty and holds no selection: name a new folder")


def _refuse_other(folder: Path, earlier: dict[str, Any], facts: dict[str, Any], train_steps: int) -> None:
    what = difference({**earlier["facts"], "model": facts["model"]}, facts)  # a place; its identity is compared
    if train_steps and earlier["train_steps"]:
        what = what or difference(earlier["train_steps"], train_steps, "train_steps")
    if what:
        raise InputError(f"{folder} holds another selection ({what}): name a new folder")
