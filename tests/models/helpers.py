"""Tiny random models of every family, and the same models with their spans written out as dense masks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from masformer.spans import Block, Full, Span, SpanPlan, Window

FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
VOCABULARY = 64
KV_HEADS, HEAD_DIM = 2, 8

MIXED = SpanPlan((Full(), Block(5), Window(4, sinks=2), Block(3, lookback=1, sinks=1)))
FULL = SpanPlan((Full(),) * 4)


def config_of(family: str, **changes: Any) -> PreTrainedConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    if family == "mistral":
        values["sliding_window"] = None
    return FAMILIES[family][0](**{**values, **changes})


def tiny(family: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in evaluation mode; biases and norms are random too, and attention matters to its logits."""
    torch.manual_seed(seed)
    model = FAMILIES[family][1]._from_config(config_of(family, **changes), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def tokens(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def additive_mask(span: Span, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """`[1, 1, length, length]`: 0 where seen, the least number elsewhere."""
    seen = torch.tensor([[span.sees(t, s) for s in range(length)] for t in range(length)])
    return torch.zeros(length, length, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


@contextlib.contextmanager
def dense_masks(model: PreTrainedModel, plan: SpanPlan, length: int) -> Iterator[None]:
    """An unconverted model whose layers get the masks of a plan, each its own, by hooks of torch alone."""

    def hook_for(mask: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "attention_mask": mask}

        return hook

    handles = [
        layer.self_attn.register_forward_pre_hook(hook_for(additive_mask(span, length)), with_kwargs=True)
        for layer, span in zip(model.model.layers, plan, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def state(model: PreTrainedModel) -> dict[str, Any]:
    """What conversion could change: classes, attributes, the config; compare it before and after."""
    return {
        "classes": [
            (type(module).__name__, type(module).__module__, type(module).__mro__[1:]) for module in model.modules()
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "config": model.config.to_json_string(use_diff=False),
        "implementation": model.config._attn_implementation,
        "config attributes": sorted(vars(model.config)),
        "generation": model.generation_config.to_json_string(use_diff=False),
        "training": [module.training for module in model.modules()],
    }


def close(got: Tensor, expected: Tensor, bar: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=bar)
