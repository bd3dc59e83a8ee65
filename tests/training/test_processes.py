"""Two processes compute what one does, by DDP through Accelerate and by FSDP2, with unequal numbers of tokens."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import masformer
from masformer.models.convert import convert
from masformer.training.checkpoints import verify
from masformer.training.prepare import prepare
from masformer.training.run import train
from masformer.training.trainer import collate, objective_of

from .made import make, recipe
from .test_resume import lines
from .two_processes import UNEQUAL, unequal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have done what two_processes.py says, and one process the run `one`."""
    folder = make(tmp_path_factory.mktemp("processes"))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    script = [sys.executable, "-m", "tests.training.two_processes", str(folder)]
    done = subprocess.run([sys.executable, *launch, *script], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-6000:]
    train(recipe(folder, folder / "one", **UNEQUAL), say=lambda words: None)
    return folder


def results(folder: Path, rank: int) -> dict[str, Any]:
    return dict(json.loads((folder / f"rank-{rank}.json").read_text()))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def series(folder: Path, name: str, field: str) -> list[float]:
    return [line[field] for line in lines(folder / name) if field in line]


def test_ddp_computes_what_one_process_does(folder: Path) -> None:
    for field in ("nats", "loss", "eval_documents_loss"):
        assert series(folder, "ddp", field) == pytest.approx(series(folder, "one", field), rel=0, abs=1e-6)
    assert series(folder, "ddp", "grad_norm") == pytest.approx(series(folder, "one", "grad_norm"), rel=1e-5)
    two, one = weights(folder / "ddp" / "checkpoint-6"), weights(folder / "one" / "checkpoint-6")
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=2e-5)


def test_the_mean_of_each_rank_would_be_seen(folder: Path) -> None:
    wrong, right = series(folder, "wrong", "grad_norm"), series(folder, "one", "grad_norm")
    assert max(abs(a / b - 1) for a, b in zip(wrong, right, strict=True)) > 1e-3


def test_a_signal_to_one_rank_stops_both_after_the_same_step(folder: Path) -> None:
    stopped = [results(folder, rank)["stopped"] for rank in range(2)]
    assert stopped[0]["step"] == stopped[1]["step"] < 6
    assert stopped[0]["signal"] == stopped[1]["signal"] == "SIGTERM"
    assert verify(Path(stopped[0]["checkpoint"])).step == stopped[0]["step"]


def test_one_process_goes_on_where_two_stopped(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "stopped", tmp_path / "run")
    train(recipe(folder, tmp_path / "run", **UNEQUAL), say=lambda words: None)
    for field in ("nats", "grad_norm"):
        assert series(tmp_path, "run", field) == pytest.approx(series(folder, "one", field), rel=1e-5)


def test_fsdp_computes_what_one_process_does(folder: Path) -> None:
    sharded = torch.load(folder / "fsdp.pt")
    prepared = prepare(recipe(folder, folder / "fsdp", **UNEQUAL))
    model = convert(masformer.load(str(folder / "model")), prepared.plan).train()
    batch = collate(unequal(prepared.train))
    with objective_of(model):
        losses = model(**batch)
        losses.loss.backward()
    assert sharded["loss"] == pytest.approx(float(losses.loss.detach()), abs=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(sharded["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-7)
