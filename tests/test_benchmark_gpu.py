"""The benchmark of a GPU: its whole program on the CPU, tiny, and what it refuses."""

import json
import math
import sys

import pytest
import torch
from benchmarks import gpu, record


def numbers(found):
    """All numbers of a JSON value."""
    if isinstance(found, dict | list):
        return [x for inner in (found.values() if isinstance(found, dict) else found) for x in numbers(inner)]
    return [found] if isinstance(found, int | float) else []


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run it with arguments; what it wrote."""

    def called(*arguments):
        out = tmp_path / "results" / "gpu.json"
        monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(out), *arguments])
        gpu.main()
        return json.loads(out.read_text())

    return called


def test_a_dry_run_fills_every_section(run, capsys):
    found = run("--dry-run")
    assert found["complete"]
    assert found["dry_run"]
    assert found["device"] == "CPU"
    assert all(math.isfinite(x) for x in numbers(found))
    assert not found["skipped"]
    assert len(found["check"]) == len(gpu.KINDS) * 2 * 3
    assert len(found["op"]) == 2 * 2 * 2 * (len(gpu.KINDS) + 3)
    assert len(found["training"]) == 2 * (4 + 4)
    assert not [row for row in found["op"] + found["training"] if "failed" in row]
    assert all(row["of_causal"] > 0 for row in found["op"])
    for row in found["training"]:
        assert row["seconds"]["median"] * row["tokens_per_second"] == pytest.approx(row["length"])
        assert (row["pairs_saved"] > 0) == (row["speedup_by_flops"] > 1) == (row["plan"] in ("0 full", "1 full"))
        assert row["speedup"] > 0
        assert row["loss"] > 1
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + sum(len(found[name]) for name in ("check", "op", "training"))


def test_without_a_gpu_it_refuses(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device is here"):
        run()


def test_what_is_wrong_is_not_timed(run, monkeypatch):
    right = gpu.attend
    monkeypatch.setattr(gpu, "attend", lambda *given, **more: right(*given, **more) * 1.1)
    monkeypatch.setattr(gpu, "measure_ops", lambda *given: pytest.fail("it was timed"))
    with pytest.raises(SystemExit, match="is wrong: nothing was timed"):
        run("--dry-run")


def test_rows_for_which_no_time_is_left_are_listed(tmp_path):
    kept = record.Record(tmp_path / "x.json", deadline=5.0)
    found = kept.row("op", ("a",), {"op": "a"}, lambda: pytest.fail("it was measured"))
    assert found == {"failed": "no time left"}
    kept.took["a",] = 1.0
    kept.row("op", ("a",), {"op": "b"}, lambda: {"seconds": {}})
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["skipped"] == [{"section": "op", "op": "a"}]
    assert written["op"] == [{"op": "b", "seconds": {}}]
    assert not written["complete"]


def test_what_does_not_fit_into_memory_is_a_result():
    def too_much():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more")

    def broken():
        raise RuntimeError("CUDA error: something\nat a place")

    assert record.attempted(too_much) == {"failed": "out of memory"}
    assert record.attempted(broken) == {"failed": "CUDA error: something"}
