"""`plan --hardware`: how long a plan takes, by a data sheet or by rates measured here."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from rich.table import Table

from .cli_output import UsageError, say
from .spans import ModelShape, SpanPlan
from .spans.hardware import HARDWARE, Rates, predict

NAMES = (*HARDWARE, "cpu")
ROWS = {
    "training step": "training",
    "training step, recomputing": "recomputed",
    "prefill": "prefill",
    "one more token": "decode",
}


def check_hardware(hardware: str | None, calibrate: bool, model: str | None) -> None:
    """Refuse before a model is looked at what cannot be predicted."""
    if hardware is None:
        if calibrate:
            raise UsageError(f"--calibrate needs --hardware: {', '.join(NAMES)}")
        return
    if hardware not in NAMES:
        raise UsageError(f"unknown hardware {hardware!r}: choose one of {', '.join(NAMES)}")
    if model is None:
        raise UsageError("--hardware needs MODEL: time follows from its weights")
    if hardware == "cpu" and not calibrate:
        raise UsageError("--hardware cpu needs --calibrate: no data sheet tells how fast a processor is")
    if calibrate and hardware != "cpu":
        _refuse_absent(hardware)


def _refuse_absent(hardware: str) -> None:
    import torch

    found = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    if not re.search(rf"\b{hardware.upper()}\b", found):
        raise UsageError(f"--calibrate measures this machine, which has {found}: leave it out, or name cpu")


def seconds(
    hardware: str, calibrate: bool, config: Any, shape: ModelShape, plan: SpanPlan, length: int
) -> dict[str, Any]:
    """What a model takes by itself and with the plan, for `--json`."""
    from .models.families import dtype_of, native_plan

    rates = _measured(config, plan, length, hardware) if calibrate else HARDWARE[hardware]
    shape = dataclasses.replace(shape, kv_dtype_bytes=dtype_of(config).itemsize)  # as it is calibrated
    parent, planned = (predict(shape, each, length, rates) for each in (native_plan(config), plan))
    facts = {"name": rates.name, "calibrated": calibrate, "rates": rates.to_json()}
    return {**facts, "parent": parent.to_json(), "planned": planned.to_json()}


def _measured(config: Any, plan: SpanPlan, length: int, hardware: str) -> Rates:
    from .training.calibrate import LENGTH, calibrate

    device = "cpu" if hardware == "cpu" else "cuda"
    return calibrate(
        config,
        plan,
        length=min(LENGTH, length),
        context=length,
        device=device,
        progress=lambda words: say(f"timing {words}"),
    )


def hardware_table(facts: dict[str, Any], length: int) -> Table:
    """Seconds of the parent and of the plan."""
    table = Table(f"seconds, {length:,} tokens", "parent", "this plan", "times as fast", title=facts["name"])
    for column in table.columns[1:]:
        column.justify = "right"
    for words, name in ROWS.items():
        before, after = facts["parent"][name], facts["planned"][name]
        table.add_row(words, f"{before:.3g}", f"{after:.3g}", f"{before / after:.2f}")
    return table
