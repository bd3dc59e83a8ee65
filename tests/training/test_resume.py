"""A run that was cut off goes on bit for bit, and no step that cannot be right is taken."""

import copy
import json
import math
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

import masformer
from masformer.data.packing import CorpusSequences
from masformer.errors import InputError, ResourceError
from masformer.evaluation.loss import token_losses
from masformer.models.checkpoint import load_config
from masformer.models.convert import convert, plan_of
from masformer.models.positions import max_positions
from masformer.models.tokenizer import load_tokenizer
from masformer.spans import SpanPlan
from masformer.training import run as run_module
from masformer.training.checkpoints import verify
from masformer.training.loss import chunked_loss
from masformer.training.prepare import prepare
from masformer.training.recipe import Recipe
from masformer.training.run import train
from masformer.training.trainer import DivergedError, SpanTrainer, collate, objective_of

from .made import MIXED, make, recipe

TIMES = ("tokens_per_second", "mfu", "peak_memory", "seconds_left")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make(tmp_path_factory.mktemp("training"))


def lines(output: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on time."""
    read = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read]


def run(wanted: Recipe, stop: int | None = None) -> dict[str, Any]:
    """Train, and ask for an end by SIGTERM when the line of step `stop`, or the first one after it, was written."""
    asked = []

    def show(line: dict[str, Any]) -> None:
        if stop is not None and line["step"] >= stop and "loss" in line and not asked:
            asked.append(line["step"])
            os.kill(os.getpid(), signal.SIGTERM)

    return train(wanted, say=lambda words: None, progress=show)


def contents(checkpoint: str) -> dict[str, Any]:
    """Weights, moments, schedule and random states."""
    found: dict[str, Any] = {}
    for file in sorted(Path(checkpoint).iterdir()):
        if file.suffix == ".safetensors":
            found |= load_file(file)
        elif file.suffix in (".pt", ".pth"):
            found[file.name] = torch.load(file, weights_only=False)
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(repr(one) == repr(other))


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"training": {"batch": 6, "micro_batch": 2}},
    "curriculum": {"data": {"lengths": [[0, 48], [3, 64], [7, 96]]}},
    "single": {"data": {"mode": "single"}, "training": {"micro_batch": 2}},
    "recall": {"data": {"recall": {"share": 0.4, "loss_on": "answer"}, "lengths": 512}, "training": {"batch": 2}},
    "taught": {"training": {"distill": 0.5}},
    "lora": {"training": {"lora": {"rank": 4, "dropout": 0.2, "norms": True}}},
    "recomputed": {"training": {"recompute": True, "precision": "bf16", "batch": 2}},
}
CUTS = [
    (name, random.Random(name).sample((1, 3, 5, 7), cuts))
    for name, cuts in zip(SETTINGS, (4, 3, 3, 2, 2, 2, 2, 2), strict=True)
]
"""Steps after which a run is cut off, 20 in all."""


@pytest.mark.parametrize(("name", "cuts"), CUTS, ids=list(SETTINGS))
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(name: str, cuts: list[int], folder: Path, tmp_path: Path) -> None:
    """Losses, gradient norms, weights, moments, schedule, random states; cut again and again."""
    whole = run(recipe(folder, tmp_path / "whole", **SETTINGS[name]))
    assert whole["step"] == 10
    step = 0
    for cut in sorted(cuts):
        stopped = run(recipe(folder, tmp_path / "cut", **SETTINGS[name]), max(cut, step + 1))
        assert stopped["signal"] == "SIGTERM"
        assert step < stopped["step"] < 10
        step = stopped["step"]
    done = run(recipe(folder, tmp_path / "cut", **SETTINGS[name]))
    assert (done["step"], done["signal"]) == (10, None)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    expected = contents(whole["checkpoint"])
    assert "optimizer.pt" in expected
    assert same(contents(done["checkpoint"]), expected)


def test_twenty_runs_were_cut_off() -> None:
    assert sum(len(cuts) for _, cuts in CUTS) == 20


def test_a_finished_run_does_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recipe(folder, tmp_path, training={"steps": 2})
    first = run(wanted)
    before = lines(tmp_path)
    monkeypatch.setattr(run_module, "load", None)
    assert run(wanted)["checkpoint"] == first["checkpoint"]
    assert lines(tmp_path) == before


def test_a_checkpoint_is_a_model(folder: Path, tmp_path: Path) -> None:
    done = run(recipe(folder, tmp_path, training={"steps": 2}))
    model = masformer.load(done["checkpoint"])
    assert str(plan_of(model)) == recipe(folder, "x").plan
    assert verify(Path(done["checkpoint"])).step == 2
    parent = masformer.load(str(folder / "model"))
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), parent.parameters(), strict=True)]
    assert all(moved)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not list(Path(done["checkpoint"]).glob("training_args*"))


def test_another_training_is_not_gone_on_with(folder: Path, tmp_path: Path) -> None:
    run(recipe(folder, tmp_path, training={"steps": 2}))
    for change in ({"training": {"steps": 2, "seed": 1}}, {"training": {"steps": 2}, "plan": "full*4"}):
        with pytest.raises(InputError, match="is of another training"):
            run(recipe(folder, tmp_path, **change))
    reported = {"evaluation": {"every": 1, "sequences": 1}, "saving": {"every": 1}, "logging": {"every": 2}}
    assert run(recipe(folder, tmp_path, training={"steps": 2, "micro_batch": 2}, **reported))["step"] == 2


class Poison(TrainerCallback):
    """Puts NaN into a weight before a step, and remembers the others."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                list(model.parameters())[-1][0] = math.nan
            self.model, self.weights = model, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("kind", ["nan", "large"])
def test_a_step_that_diverges_is_not_taken(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = Poison(3)
    init = SpanTrainer.__init__

    def with_poison(self: Any, *args: Any, callbacks: Any, **kwargs: Any) -> None:
        init(self, *args, callbacks=[*callbacks, poison] if kind == "nan" else callbacks, **kwargs)

    monkeypatch.setattr(SpanTrainer, "__init__", with_poison)
    limit = 1000.0 if kind == "nan" else 0.01
    saving = {"every": 2}
    with pytest.raises(DivergedError, match=r"gradient norm is (nan|\d).*this step was not taken"):
        run(recipe(folder, tmp_path, training={"gradient_limit": limit}, saving=saving))
    if kind == "nan":
        assert all(
            torch.equal(
                a,
                b,
            )
            or bool(a.isnan().any())
            for a, b in zip(poison.model.parameters(), poison.weights, strict=True)
        )
        assert verify(tmp_path / "checkpoint-2").step == 2
        assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [1, 2, 3]
    else:
        assert not list(tmp_path.glob("checkpoint-*"))


def test_a_full_disk_leaves_the_last_checkpoint(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recipe(folder, tmp_path, saving={"every": 4, "keep": 1})
    save = torch.save

    def full(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-8" in str(file):
            raise OSError(28, "No space left on device", str(file))
        save(value, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        run(wanted)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert verify(tmp_path / "checkpoint-4").step == 4
    monkeypatch.undo()
    assert run(wanted)["step"] == 10


def test_evaluation_is_the_mean_over_held_out_tokens(folder: Path, tmp_path: Path) -> None:
    wanted = recipe(folder, tmp_path, data={"mode": "single"}, training={"steps": 1}, evaluation={"sequences": 5})
    run(wanted)
    prepared = prepare(wanted)
    model = convert(masformer.load(str(folder / "model")), prepared.plan)
    nats, tokens = 0.0, 0
    for index in range(5):
        sequence = prepared.held_out["documents"].sequence(index)
        ids = torch.from_numpy(sequence.input_ids)[None, : 64 - sequence.padding]
        losses = token_losses(model, ids)
        nats, tokens = nats + float(losses.sum()), tokens + losses.numel()
    assert isinstance(prepared.held_out["documents"], CorpusSequences)
    assert lines(tmp_path)[0]["eval_documents_loss"] == pytest.approx(nats / tokens, abs=1e-5)


def test_a_model_learns_nothing_from_a_parent_that_it_equals(folder: Path, tmp_path: Path) -> None:
    run(recipe(folder, tmp_path, plan="full*4", training={"steps": 2, "distill": 1.0}))
    first = next(line for line in lines(tmp_path) if "kl" in line)
    assert abs(first["kl"]) < 1e-6
    assert first["grad_norm"] < 1e-5


@pytest.mark.parametrize("kind", ["parent", "converted", "extended"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_adapters_are_saved_with_what_they_stand_upon(
    kind: str, embeddings: bool, folder: Path, tmp_path: Path
) -> None:
    """The checkpoint loads by itself, with its spans and positions; transformers alone refuses it."""
    parent, length = masformer.load(str(folder / "model")), 64
    parts: dict[str, Any] = {}
    if kind == "converted":
        convert(parent, SpanPlan.parse(MIXED)).save_pretrained(tmp_path / "converted")
        load_tokenizer(str(folder / "model")).save_pretrained(tmp_path / "converted")
        parts = {"model": str(tmp_path / "converted"), "plan": None}
    elif kind == "extended":
        length = 1200
        parts = {"positions": {"length": length, "method": "theta"}}
    lora = {"rank": 2, "norms": True, "embeddings": embeddings}
    training = {"steps": 3, "batch": 1, "lora": lora, "learning_rate": 1e-2}
    wanted = recipe(folder, tmp_path / "run", data={"lengths": length}, training=training, **parts)
    done = run(wanted)
    saved = load_file(Path(done["checkpoint"], "adapter_model.safetensors"))
    assert all("lora_" in name or "norm" in name or (embeddings and "embed" in name) for name in saved)
    model = masformer.load(done["checkpoint"])
    assert str(plan_of(model)) == MIXED
    assert max_positions(model.config) == max(length, 1024)
    assert str(load_config(done["checkpoint"])[1]) == MIXED
    held, nats, tokens = prepare(wanted).held_out["documents"], 0.0, 0
    for index in range(3):
        with objective_of(model), torch.no_grad():
            losses = model(**collate([held.sequence(index)]))
        nats, tokens = nats + float(losses.nats), tokens + losses.tokens
    assert nats / tokens == pytest.approx(done["metrics"]["eval_documents_loss"], abs=1e-4)
    with pytest.raises((OSError, ValueError, TypeError)):
        AutoModelForCausalLM.from_pretrained(done["checkpoint"])


def test_other_weights_of_the_same_shape_are_another_training(folder: Path, tmp_path: Path) -> None:
    run(recipe(folder, tmp_path / "run", training={"steps": 2}))
    other = masformer.load(str(folder / "model"))
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    shutil.copytree(folder / "model", tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"is of another training.*weights"):
        run(recipe(folder, tmp_path / "run", training={"steps": 2}, model=str(tmp_path / "other")))


def test_what_is_reported_and_kept_may_change_on_the_way(folder: Path, tmp_path: Path) -> None:
    """And a launcher's own precision does not go before the recipe's."""
    run(recipe(folder, tmp_path, logging={"every": 4}), stop=4)
    reported = {"evaluation": {"every": 3, "sequences": 1}, "saving": {"every": 3, "keep": 9}, "logging": {"every": 2}}
    done = run(recipe(folder, tmp_path, **reported))
    assert sorted(int(path.name[11:]) for path in tmp_path.glob("checkpoint-*")) == [5, 6, 9, 10]
    assert [line["step"] for line in lines(tmp_path) if "nats" in line] == [4, 5, 6, 8, 9, 10]
    assert sum(line["tokens"] for line in lines(tmp_path) if "nats" in line) == 10 * 4 * 64
    assert [line["step"] for line in lines(tmp_path) if "eval_documents_loss" in line] == [0, 4, 6, 9, 10]
    assert masformer.load(done["checkpoint"]).config.use_cache is True


def test_what_training_would_leave_out_is_refused(folder: Path, tmp_path: Path) -> None:
    """The loss of a router, and a parent that is none."""
    shutil.copytree(folder / "model", tmp_path / "router")
    file = tmp_path / "router" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "output_router_logits": True}))
    with pytest.raises(InputError, match="output_router_logits"):
        prepare(recipe(folder, tmp_path / "run", model=str(tmp_path / "router")))
    shutil.copytree(folder / "model", tmp_path / "converted")
    convert(masformer.load(str(folder / "model")), SpanPlan.parse(MIXED)).save_pretrained(tmp_path / "converted")
    with pytest.raises(InputError, match=r"distill needs a parent, and .*converted is converted"):
        prepare(recipe(folder, tmp_path / "run", model=str(tmp_path / "converted"), training={"distill": 0.5}))


def test_a_launcher_does_not_change_the_precision(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe(folder, tmp_path / "plain", training={"steps": 2}))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run(recipe(folder, tmp_path / "launched", training={"steps": 2}))
    assert lines(tmp_path / "launched") == lines(tmp_path / "plain")


# fmt: off
CURVE = [
    6.5763, 6.6071, 6.2413, 6.0249, 5.7646, 5.7335, 5.1836, 5.2528, 4.6722, 4.4756,
    4.2711, 4.2435, 4.0563, 4.0380, 3.9146, 3.8294, 3.9020, 3.7249, 3.6645, 3.6689,
    3.7541, 3.4797, 3.6520, 3.5656, 3.5195, 3.5307, 3.5005, 3.5571, 3.4557, 3.5785,
]
# fmt: on


def test_the_loss_curve_of_thirty_steps(folder: Path, tmp_path: Path) -> None:
    """To one in the last printed digit, for processors that add up in another order."""
    run(recipe(folder, tmp_path, training={"steps": 30, "batch": 2, "learning_rate": 3e-3}))
    assert [line["nats"] for line in lines(tmp_path) if "nats" in line] == pytest.approx(CURVE, rel=0, abs=1e-4)


def test_the_loss_of_a_step_is_over_all_its_tokens(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is cut into micro-batches, though these hold unequal numbers of tokens; the mean of means differs."""
    single = {"data": {"mode": "single"}, "training": {"steps": 3}}
    together = copy.deepcopy(single)
    together["training"]["micro_batch"] = 4
    run(recipe(folder, tmp_path / "apart", **single))
    run(recipe(folder, tmp_path / "together", **together))

    def norms(name: str) -> list[float]:
        return [line["grad_norm"] for line in lines(tmp_path / name) if "loss" in line]

    assert norms("apart") == pytest.approx(norms("together"), rel=1e-5)

    def mean_of_means(hidden: Any, labels: Any, head: Any, *, total: Any, **kwargs: Any) -> Any:
        own = (labels[:, 1:] >= 0).sum()
        return chunked_loss(hidden, labels, head, total=own * 4, **kwargs)

    monkeypatch.setattr("masformer.training.trainer.chunked_loss", mean_of_means)
    run(recipe(folder, tmp_path / "wrong", **single))
    assert max(abs(a / b - 1) for a, b in zip(norms("wrong"), norms("apart"), strict=True)) > 1e-3
