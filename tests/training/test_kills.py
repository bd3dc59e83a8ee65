"""A training that is killed at any moment has a checkpoint that loads, and loses none that was complete."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .made import make


@pytest.mark.slow
def test_fifty_kills_of_a_training(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.training.killed", str(make(tmp_path)), "50"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["lost"] == found["unloadable"] == 0
    assert found["inside"] >= 14
    assert found["step"] > 10
