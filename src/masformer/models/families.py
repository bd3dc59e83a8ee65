"""What differs between model families, as data."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..errors import InputError
from ..spans import Block, Full, ModelShape, PlanError, Span, SpanPlan, Window


@dataclasses.dataclass(frozen=True)
class Family:
    """Where a family keeps its attention modules, and how its config says which spans it has by itself."""

    layers: str = "layers"
    """Path from the decoder (`base_model`) to its list of layers."""
    attention: str = "self_attn"
    """Name of the attention module in a layer."""
    native: Literal["full", "sliding_window", "layer_types"] = "full"
    """Which config field the family's own forward reads: none, one window for all layers, a list of types."""


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(native="sliding_window"),
    "qwen2": Family(native="layer_types"),
    "qwen3": Family(native="layer_types"),
}
"""By transformers' `model_type`. SmolLM and SmolLM2 are of type llama."""


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a config.

    Raises:
        InputError: a model type that is not supported, with the list of those that are.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        supported = ", ".join(sorted(FAMILIES))
        raise InputError(f"model type {config.model_type!r} is not supported; supported are: {supported}")
    return family


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules of a causal language model or of its decoder, layer 0 first."""
    family = family_of(model.config)
    layers = model.base_model.get_submodule(family.layers)
    return [layer.get_submodule(family.attention) for layer in layers.children()]


def spans_on(model: PreTrainedModel) -> SpanPlan:
    """The spans that the attention modules of a converted model (or of its decoder) carry."""
    return SpanPlan(tuple(module.span for module in attention_modules(model)))  # type: ignore[misc]


def native_plan(config: PreTrainedConfig) -> SpanPlan:
    """The spans that the unconverted model has by itself (sliding or chunked layers of its own config)."""
    family, layers = family_of(config), config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    if family.native == "layer_types":
        return SpanPlan(tuple(_native_span(kind, config) for kind in config.layer_types))
    if family.native == "sliding_window" and window is not None:
        return SpanPlan((Window(window),) * layers)
    return SpanPlan((Full(),) * layers)


def _native_span(kind: str, config: PreTrainedConfig) -> Span:
    match kind:
        case "full_attention":
            return Full()
        case "sliding_attention":
            return Window(config.sliding_window)
        case "chunked_attention":
            return Block(config.attention_chunk_size)
    raise InputError(f"layer type {kind!r} has no span: supported are full, sliding and chunked attention")


def check_length(plan: SpanPlan, config: PreTrainedConfig) -> None:
    """Refuse a plan for another number of layers."""
    if len(plan) != config.num_hidden_layers:
        raise PlanError(
            f"the plan has {len(plan)} layers, the model has {config.num_hidden_layers}: "
            "give one span per layer (for example block:1024*20)"
        )


def shape_of(config: PreTrainedConfig, kv_dtype_bytes: int = 2) -> ModelShape:
    """Sizes of the model that a config describes, counted on a model without storage."""
    family_of(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head: Any = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        linear_parameters=linear,
        head_parameters=head.weight.numel(),
        parameters=sum(p.numel() for p in model.parameters()),
        kv_dtype_bytes=kv_dtype_bytes,
    )
