"""Several processes train as one does: DDP as transformers' Trainer starts it, and FSDP2 by torch alone."""

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

import masformer
from masformer.models.convert import convert
from masformer.spans import SpanPlan
from masformer.training import run as run_module
from masformer.training import trainer as trainer_module
from masformer.training.checkpoints import verify
from masformer.training.loss import chunked_loss
from masformer.training.prepare import prepare
from masformer.training.run import Ending, train
from masformer.training.trainer import collate, objective_of

from .helpers import Launcher
from .made import MIXED, make, recipe

STEPS, STOP, BATCH = 6, 3, 4
TRAINING = {"steps": STEPS, "batch": BATCH, "micro_batch": 1, "weight_decay": 0.1}
DATA = {"mode": "single", "lengths": 256}  # documents of 25 to 360 tokens, padded
SAME = 1e-6
BITS = ("model.safetensors", "optimizer.pt", "scheduler.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def launcher(folder: Path) -> Any:
    logs = folder / "logs"
    logs.mkdir()
    with Launcher(logs) as launcher:
        yield launcher


def trained(folder: str, output: str, stop: bool = False, wrong: bool = False) -> dict[str, Any]:
    """On every rank. With `stop` the last rank alone gets a SIGTERM in step 3; `wrong` takes the mean of means."""
    run_module.matmul_peak = lambda *_: 1.0  # type: ignore[assignment]
    if stop:
        end = Ending.on_step_end

        def on_step_end(self: Ending, args: Any, state: Any, control: Any, **given: Any) -> Any:
            if state.global_step == STOP and args.process_index == args.world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return end(self, args, state, control, **given)

        Ending.on_step_end = on_step_end  # type: ignore[method-assign]
    if wrong:
        trainer_module.chunked_loss = mean_of_means  # type: ignore[assignment]
    wanted = recipe(Path(folder), output, data=DATA, training=TRAINING, saving={"every": 2, "keep": 9})
    return train(wanted, say=lambda words: None)


def mean_of_means(hidden: Tensor, labels: Tensor, head: Any, *, total: Tensor, **given: Any) -> Any:
    """The mean over the micro-batches of a step of the means over their tokens: the bug that this file guards from."""
    own = (labels[:, 1:] >= 0).sum()
    return chunked_loss(hidden, labels, head, total=own * BATCH, **given)


def curve(output: Path) -> dict[str, list[float]]:
    """Numbers of every step, in order, each step once."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    named = {name: [line[name] for line in steps] for name in ("loss", "nats", "grad_norm", "learning_rate", "tokens")}
    return {**named, "held out": [line["eval_documents_loss"] for line in lines if "eval_documents_loss" in line]}


def far(one: dict[str, list[float]], other: dict[str, list[float]]) -> dict[str, float]:
    """The largest relative difference of every kind of number."""
    assert {name: len(values) for name, values in one.items()} == {name: len(values) for name, values in other.items()}
    pairs = {name: zip(one[name], other[name], strict=True) for name in one}
    return {name: max(abs(a - b) / (abs(b) or 1) for a, b in pairs[name]) for name in pairs}


def apart(one: Path, other: Path) -> float:
    """How far all weights together are from each other, in parts of their norm."""
    a, b = (load_file(place / f"checkpoint-{STEPS}" / "model.safetensors") for place in (one, other))
    assert a.keys() == b.keys()
    difference, norm = ([weights[name].double().norm() for name in a] for weights in ({n: a[n] - b[n] for n in a}, b))
    return float(torch.stack(difference).norm() / torch.stack(norm).norm())


@pytest.fixture(scope="module")
def runs(folder: Path, launcher: Launcher) -> Path:
    """One run by one process and one by two."""
    for ranks in (1, 2):
        launcher.run(trained, ranks, folder=str(folder), output=str(folder / f"by-{ranks}"))
    return folder


def test_two_processes_take_the_steps_of_one(runs: Path, launcher: Launcher) -> None:
    """Loss, gradient norm, evaluation and weights, though the ranks predict unlike numbers of tokens."""
    one, two, wrong = runs / "by-1", runs / "by-2", runs / "wrong"
    counts = [
        (prepare(recipe(runs, "unused", data=DATA)).train.sequence(n).labels >= 0).sum() for n in range(BATCH * STEPS)
    ]
    own = [sum(counts[step * BATCH + rank :: 2][:2]) for step in range(STEPS) for rank in (0, 1)]
    assert max(a / b for a, b in zip(own[::2], own[1::2], strict=True)) > 1.3
    assert len(curve(one)["loss"]) == STEPS
    assert max(far(curve(two), curve(one)).values()) < SAME
    assert apart(two, one) < SAME
    launcher.run(trained, 2, folder=str(runs), output=str(wrong), wrong=True)
    differs = far(curve(wrong), curve(one))
    assert min(differs["loss"], differs["grad_norm"], apart(wrong, one)) > 100 * SAME
    assert (two / f"checkpoint-{STEPS}" / "config.json").read_bytes() == (
        one / f"checkpoint-{STEPS}" / "config.json"
    ).read_bytes()


def test_a_signal_to_one_rank_stops_all_and_any_number_goes_on(runs: Path, launcher: Launcher) -> None:
    """The same number of ranks to the bit, another one with the same global batches."""
    stopped = runs / "stopped"
    results = launcher.run(trained, 2, folder=str(runs), output=str(stopped), stop=True)
    assert [(result["step"], result["signal"]) for result in results] == [(STOP, "SIGTERM")] * 2
    assert sorted(path.name for path in stopped.glob("checkpoint-*")) == ["checkpoint-2", f"checkpoint-{STOP}"]
    for ranks in (1, 2):
        resumed = runs / f"resumed-by-{ranks}"
        shutil.copytree(stopped, resumed)
        results = launcher.run(trained, ranks, folder=str(runs), output=str(resumed))
        assert [(result["step"], result["signal"]) for result in results] == [(STEPS, None)] * ranks
        for checkpoint in resumed.glob("checkpoint-*"):
            assert f"checkpoint-{verify(checkpoint).step}" == checkpoint.name
        assert max(far(curve(resumed), curve(runs / "by-2")).values()) < SAME
        assert apart(resumed, runs / "by-2") < SAME
    assert curve(resumed) == curve(runs / "by-2")
    for name in BITS:
        got, expected = (place / f"checkpoint-{STEPS}" / name for place in (resumed, runs / "by-2"))
        assert got.read_bytes() == expected.read_bytes(), name


def converted(folder: Path) -> PreTrainedModel:
    return convert(masformer.load(str(folder / "model"), dtype=torch.float32), SpanPlan.parse(MIXED), check=False)


def batches(folder: Path) -> list[dict[str, Tensor]]:
    """Two, one for each rank, with unlike numbers of predicted tokens."""
    train = prepare(recipe(folder, "unused", data=DATA)).train
    made = sorted((train.sequence(n) for n in range(8)), key=lambda one: one.padding)
    return [collate(made[:1]), collate(made[-1:])]


def predicted(batch: dict[str, Tensor]) -> Tensor:
    return (batch["labels"][:, 1:] >= 0).sum()


def sharded(folder: str, output: str) -> float:
    """On 2 ranks with FSDP2: this rank's loss; gradients, right ones and those of a mean of means, go into a file."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    model = converted(Path(folder))
    own = batches(Path(folder))
    found, losses = {}, {}
    with objective_of(model):
        mesh = distributed.init_device_mesh("cpu", (2,))
        for layer in model.base_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for kind, total in {"right": sum(map(predicted, own)), "wrong": 2 * predicted(own[rank])}.items():
            model.zero_grad()
            loss = model(**own[rank], total=torch.as_tensor(total)).loss
            (2 * loss).backward()  # FSDP takes the mean over the ranks
            losses[kind] = float(loss)
            for name, parameter in model.named_parameters():
                found[f"{kind} {name}"] = parameter.grad.full_tensor().contiguous()
    if rank == 0:
        save_file(found, output)
    distributed.destroy_process_group()
    return losses["right"]


def test_sharded_gradients_are_those_of_one_process(folder: Path, launcher: Launcher) -> None:
    model, own = converted(folder), batches(folder)
    counts = [int(predicted(batch)) for batch in own]
    assert counts[0] > 2 * counts[1]
    with objective_of(model):
        losses = [model(**batch, total=torch.tensor(sum(counts))).loss for batch in own]
        sum(losses).backward()
    got = launcher.run(sharded, 2, folder=str(folder), output=str(folder / "gradients.safetensors"))
    assert got == pytest.approx([float(loss.detach()) for loss in losses], rel=SAME)
    found = load_file(folder / "gradients.safetensors")
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == {f"{kind} {name}" for kind in ("right", "wrong") for name in expected}

    def error(kind: str) -> float:
        parts = [float((found[f"{kind} {name}"] - grad).norm()) for name, grad in expected.items()]
        return math.hypot(*parts) / math.hypot(*(float(grad.norm()) for grad in expected.values()))

    assert error("right") < SAME
    assert error("wrong") > 1000 * SAME
