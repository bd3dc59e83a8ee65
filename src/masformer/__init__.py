"""masformer: mixed attention spans for pretrained decoders.

    import masformer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    plan = masformer.layout("masformer", 30, full=8, local=masformer.Window(128, sinks=4))
    masformer.convert(model, plan)

Importing this package makes the model type `masformer` known to transformers' auto classes and registers one
attention function of that name; nothing that exists there is changed.
"""

from typing import Any

from .attention import UnsupportedSpan, attend
from .errors import CorruptError, InputError, MasformerError, ResourceError
from .models.cache import SpanCache
from .models.checkpoint import load
from .models.convert import applied, convert, is_converted, plan_of, restore
from .spans import Block, Full, PlanError, SpanPlan, Window, layout

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`train` and `read_recipe`, which need the extra `train`, are imported when they are asked for."""
    if name == "train":
        from .training.run import train

        return train
    if name == "read_recipe":
        from .training.recipe import read_recipe

        return read_recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Block",
    "CorruptError",
    "Full",
    "InputError",
    "MasformerError",
    "PlanError",
    "ResourceError",
    "SpanCache",
    "SpanPlan",
    "UnsupportedSpan",
    "Window",
    "applied",
    "attend",
    "convert",
    "is_converted",
    "layout",
    "load",
    "plan_of",
    "read_recipe",
    "restore",
    "train",
]
