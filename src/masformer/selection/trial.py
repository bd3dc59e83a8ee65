"""Chosen plans tried on held-out data: the loss of other documents and recall tasks of another kind than the probes.

    try_out(trial, plans, folder)                    as they are
    try_trained(trial, plans, folder, steps=20)      after an equal short training of each

Both write to one evaluation in `folder/held-out`, which goes on where it was cut off.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.documents import Document
from ..evaluation.facts import facts_of
from ..evaluation.results import Run, key_of, read_run
from ..evaluation.suites import Data, Settings, Subject, evaluate, prepare
from ..files import digest, disk_errors
from ..models.checkpoint import load, load_config
from ..models.convert import convert
from ..models.tokenizer import load_tokenizer
from ..spans import SpanPlan
from ..training.prepare import prepare as prepare_training
from ..training.recipe import Recipe
from ..training.run import train
from .choice import Asked
from .outcome import CORPORA, HELD_OUT, TRAINED

TRAINING, TEXTS = "training", "documents.jsonl"
TASKS = ("passkey", "niah_multikey", "kv_retrieval")
"""Recall tasks that choices are tried on if no others are named."""
BATCH_SHARE = 0.25
"""Share of recall items in the short training."""

LONGEST_NAME = 100
"""Of a folder made from a label."""

Plans = Mapping[str, SpanPlan]
"""Distinct plans by their label."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """What was asked for, the held-out documents and what is measured on them.

    chosen_by: the documents that plans were chosen by, on which they are trained, in sequences of the probes' length.
    data: where the held-out documents came from.
    """

    asked: Asked
    documents: Sequence[Document]
    chosen_by: Sequence[Document]
    settings: Settings
    data: str

    def subject(self, label: str, plan: SpanPlan, source: str | None = None) -> Subject:
        """A plan on the model, or on the trained weights in a folder."""
        asked = self.asked
        source = asked.model if source is None else source
        config = copy.copy(load_config(asked.model)[0])
        config.dtype = asked.dtype

        def loaded() -> Any:
            model = load(source, dtype=asked.dtype, device=asked.device)
            return convert(model, plan, check=False)

        return Subject(label, source, config, plan, load_tokenizer(asked.model), loaded)


Progress = Callable[[str, int], Any]


def try_out(trial: Trial, plans: Plans, folder: Path, progress: Progress = lambda label, tokens: None) -> None:
    """Measure every plan, untrained."""
    _evaluate(trial, [trial.subject(label, plan) for label, plan in plans.items()], folder, progress)


def check(trial: Trial, parent: SpanPlan, folder: Path, steps: int, say: Callable[[str], Any]) -> int:
    """Refuse what could not be measured or trained later, before anything is searched; how many tokens a plan takes.

    Args:
        say: called with a line for documents that are passed over, or fewer than were asked for.

    Raises:
        InputError: as `evaluation.suites.prepare` and `training.prepare` do.
    """
    subjects, data = [trial.subject("parent", parent)], Data(trial.documents)
    [entries] = prepare(subjects, trial.settings, data, say)
    with Run.open(folder / HELD_OUT, facts_of(subjects, trial.settings, trial.data, data, trial.asked.device)):
        pass  # refuses results of other data or settings that are there
    if steps:
        _write_texts(trial, folder)
        prepare_training(_recipe(trial, "parent", parent, folder, steps)).refuse_too_large()
    return sum(entry.tokens for entry in entries)


def _evaluate(trial: Trial, subjects: Sequence[Subject], folder: Path, progress: Progress) -> None:
    data = Data(trial.documents)
    work = prepare(subjects, trial.settings, data)
    facts = facts_of(subjects, trial.settings, trial.data, data, trial.asked.device)
    with Run.open(folder / HELD_OUT, facts) as run:
        evaluate(subjects, work, trial.settings, run, progress)


def try_trained(
    trial: Trial,
    plans: Plans,
    folder: Path,
    *,
    steps: int,
    say: Callable[[str], Any] = lambda line: None,
    progress: Progress = lambda label, tokens: None,
) -> None:
    """Train the model under every plan for as many steps on the same tokens, and measure it.

    Weights are deleted once they are measured; `metrics.jsonl` of each training stays.
    """
    _write_texts(trial, folder)
    first = next(iter(plans.items()))
    [entries] = prepare([trial.subject(*first)], trial.settings, Data(trial.documents))
    done = {key_of(record) for record in read_run(folder / HELD_OUT)[1]}
    for label, plan in plans.items():
        name, recipe = f"{label}, {TRAINED}", _recipe(trial, label, plan, folder, steps)
        if not all(entry.key(name) in done for entry in entries):
            say(f"training {label}, {steps} steps")
            checkpoint = _trained(recipe, trial.asked.device == "cpu")
            _evaluate(trial, [trial.subject(name, plan, str(checkpoint))], folder, progress)
        for weights in Path(recipe.output).glob("checkpoint-*"):  # those of a run that was cut off here, too
            shutil.rmtree(weights)


def _write_texts(trial: Trial, folder: Path) -> None:
    """The documents that plans are trained on, as a file that a recipe can name."""
    lines = [json.dumps({"id": each.id, "text": each.text}, ensure_ascii=False) + "\n" for each in trial.chosen_by]
    with disk_errors(folder):
        (folder / TEXTS).write_text("".join(lines), encoding="utf-8")


def _recipe(trial: Trial, label: str, plan: SpanPlan, folder: Path, steps: int) -> Recipe:
    """The training of a plan, the same tokens for all of one folder."""
    name = re.sub(r"\W+", "-", label)
    target = folder / TRAINING / (name if len(name) <= LONGEST_NAME else digest(label)[:16])
    return Recipe.model_validate(
        {
            "model": trial.asked.model,
            "output": str(target),
            "plan": str(plan),
            "data": {
                "documents": str(folder / TEXTS),
                "held_out": 1,
                "lengths": trial.asked.length,
                "recall": {"share": BATCH_SHARE, "loss_on": "answer"},
                "cache": str(folder / CORPORA),
            },
            "training": {
                "steps": steps,
                "learning_rate": 1e-4,
                "warmup_steps": max(1, steps // 10),
                "precision": "bf16" if trial.asked.dtype == torch.bfloat16 else "fp32",
                "seed": trial.settings.seed,
            },
            "evaluation": {"every": steps, "sequences": 1},
            "saving": {"every": max(10, steps // 4), "keep": 1},
        }
    )


def _trained(recipe: Recipe, cpu: bool) -> Path:
    """The last checkpoint."""
    result = train(recipe, cpu=cpu, say=lambda line: None)
    if result["signal"]:
        raise KeyboardInterrupt
    return Path(result["checkpoint"])
