"""What the commands that take a model share: options, and the model with the spans that were asked for."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .cli_output import UsageError
from .cli_plan import PlanFlags
from .spans import SpanPlan

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, hub id or GGUF file, converted or not.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; a GPU if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the model's own.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(dtype: str | None) -> None:
    """Refuse a name that `--dtype` does not know."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"unknown --dtype {dtype!r}: choose of {', '.join(DTYPES)}")


def load_with_plan(
    model: str, flags: PlanFlags, device: str | None, *, dtype: str | None = None, check: bool = False
) -> tuple[Any, SpanPlan]:
    """The model with the plan that was asked for; refused before its weights are read where that does not fit."""
    import torch

    from .models.checkpoint import load, load_config
    from .models.convert import convert, plan_of

    _, own = load_config(model)
    chosen, where = flags.plan_for(len(own), own), device_name(device)
    loaded = load(model, dtype="auto" if dtype is None else getattr(torch, dtype), device=where)
    if check or chosen != plan_of(loaded):
        convert(loaded, chosen)
    return loaded, chosen


def device_name(name: str | None) -> str:
    """The device that is named, or the best there is.

    Raises:
        UsageError: one that cannot be used.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return name
