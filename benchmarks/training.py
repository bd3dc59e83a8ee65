"""Peak memory of a training step on long input: a conversion here, and its parent in transformers' own Trainer.

    python -m benchmarks.training MODEL [--length 16384] [--out benchmarks/results/training.json]

Both in float32, with gradient checkpointing, AdamW and the same random tokens, each in a process of its own, whose
peak it is, from its start to the end of the step. Before anything is measured, both programs take a step on a short
input with all layers full, and their losses must be equal to 1e-5.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from masformer.data.sequences import Lengths, Sequence, assemble
from masformer.models.convert import convert
from masformer.spans import SpanPlan
from masformer.training.meter import Meter, peak_memory
from masformer.training.trainer import Numbered, SpanTrainer, objective_of

LOCAL = "window:252:sinks=4"
PLAN = f"full,{LOCAL}*6,full*2,{LOCAL}*8,full*2,{LOCAL},full*2,{LOCAL},full,{LOCAL}*6"
SHORT = 256


class RandomTokens:
    """Sequences of random tokens; see `masformer.data.sequences.Sequences`."""

    def __init__(self, length: int) -> None:
        self.lengths: Lengths = ((0, length),)
        self.identity: dict[str, Any] = {}

    def sequence(self, index: int) -> Sequence:
        length = self.lengths[0][1]
        return assemble([np.random.default_rng(index).integers(100, 40_000, length)], length)

    def place(self, index: int) -> dict[str, Any]:
        return {}

    def with_lengths(self, lengths: Lengths) -> RandomTokens:
        return RandomTokens(lengths[0][1])


def arguments(folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=1,
        per_device_train_batch_size=1,
        activation_checkpointing=True,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        logging_steps=1,
        remove_unused_columns=False,
    )


def parent(model: str, length: int, folder: str) -> float:
    """One step of transformers' Trainer on the parent as it is; the loss."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.from_numpy(RandomTokens(length).sequence(0).input_ids)
    trainer = Trainer(loaded, arguments(folder), train_dataset=[{"input_ids": ids, "labels": ids}])
    trainer.train()
    return float(trainer.state.log_history[0]["loss"])


def ours(model: str, length: int, folder: str, plan: str) -> float:
    """One step on the model with a plan; the loss."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded.config.max_position_embeddings = max(length, loaded.config.max_position_embeddings)
    convert(loaded, SpanPlan.parse(plan), check=False)
    meter = Meter(lambda tokens: 0.0, 1.0, torch.device("cpu"))
    with objective_of(loaded):
        trainer = SpanTrainer(
            loaded,
            arguments(folder),
            train=Numbered(RandomTokens(length), 1),
            held_out={},
            tokenizer=None,
            checkpoints=None,
            meter=meter,
            gradient_limit=float("inf"),
        )
        trainer.train()
    return float(trainer.state.log_history[0]["loss"])


def child(model: str, length: int, plan: str) -> dict[str, float]:
    """A step in a process of its own; `plan` is "parent" for transformers' Trainer."""
    command = [sys.executable, "-m", "benchmarks.training", model, "--length", str(length), "--one", plan]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{plan} at {length:,} tokens failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        with tempfile.TemporaryDirectory() as folder:
            loss = (
                parent(given.model, given.length, folder)
                if given.one == "parent"
                else ours(given.model, given.length, folder, given.one)
            )
        print(json.dumps({"loss": loss, "bytes": peak_memory(torch.device("cpu"))}))
        return
    full = f"full*{len(SpanPlan.parse(PLAN))}"
    losses = [child(given.model, SHORT, plan)["loss"] for plan in ("parent", full)]
    if not abs(losses[0] - losses[1]) < 1e-5:
        sys.exit(f"with all layers full the loss is {losses[1]}, the parent's is {losses[0]}: nothing was measured")
    rows = {}
    for name, plan in {
        "parent in transformers' Trainer": "parent",
        "here, all full": full,
        "here, 8 full": PLAN,
    }.items():
        rows[name] = child(given.model, given.length, plan)
        print(f"{name:32} {rows[name]['bytes'] / 2**30:6.2f} GiB", flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    about = {"commit": commit, "model": Path(given.model).name, "length": given.length, "plan": PLAN, **machine}
    given.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
