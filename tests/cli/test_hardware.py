"""`plan --hardware`: what it says, and what it refuses before a model is looked at."""

import pytest
import torch

from masformer.cli import run
from masformer.training import calibrate

from .conftest import LAYERS, LOCAL, answer


def test_a_data_sheet(capsys, parent):
    found = answer(capsys, "plan", parent, *LOCAL, "--length", "64", "--hardware", "a100")["hardware"]
    assert not found["calibrated"]
    assert 0 < found["planned"]["prefill"] < found["parent"]["prefill"]
    assert run(["plan", str(parent), *LOCAL, "--hardware", "a100"]) == 0
    out = capsys.readouterr().out
    assert "A100 SXM 80 GB, data sheet" in out
    assert "which no program reaches" in out


def test_measured_rates(capsys, parent, monkeypatch):
    monkeypatch.setattr(calibrate, "LENGTH", 64)
    found = answer(capsys, "plan", parent, *LOCAL, "--length", "64", "--hardware", "cpu", "--calibrate")["hardware"]
    assert found["calibrated"]
    assert {"full", "window:8:sinks=2"} == set(found["rates"]["attention"])
    assert all(found[who][what] > 0 for who in ("parent", "planned") for what in found["parent"])
    assert run(["plan", str(parent), *LOCAL, "--hardware", "cpu", "--calibrate"]) == 0
    out, err = capsys.readouterr()
    assert "this CPU" in out
    assert "data sheet" not in out
    assert "timing layers with full, 64 tokens" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hardware", "tpu"], "unknown hardware 'tpu': choose one of h100, a100, cpu"),
        (["--hardware", "cpu"], "--hardware cpu needs --calibrate"),
        (["--calibrate"], "--calibrate needs --hardware"),
    ],
)
def test_refusals(capsys, arguments, words):
    assert run(["plan", "no-such-model", *arguments]) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert not out


def test_a_number_of_layers_has_no_time(capsys):
    assert run(["plan", "--layers", str(LAYERS), "--layout", "full", "--hardware", "h100"]) == 2
    assert "--hardware needs MODEL" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("there", "name"), [(False, "no GPU"), (True, "NVIDIA A100-SXM4-80GB"), (True, "NVIDIA H1000")]
)
def test_a_gpu_that_is_not_there_is_not_measured(capsys, monkeypatch, there, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert run(["plan", "no-such-model", "--hardware", "h100", "--calibrate"]) == 2
    assert f"this machine, which has {name}" in capsys.readouterr().err
