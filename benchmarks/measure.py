"""What the results of all benchmarks depend on."""

from __future__ import annotations

import platform
import subprocess
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """What a result depends on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "commit": commit,
        "machine": platform.machine(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
