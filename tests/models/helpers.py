"""Tiny random models of every family, and the same models with their spans written out as dense masks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from masformer.models.families import attention_modules, class_of
from masformer.spans import Block, Full, Span, SpanPlan, Window

FEW = ("llama", "mistral", "qwen2", "qwen3")
"""Families for the tests that look closer than the matrix of test_families.py, which takes all of them."""
VOCABULARY = 64
KV_HEADS, HEAD_DIM = 2, 8

MIXED = SpanPlan((Full(), Block(5), Window(4, sinks=2), Block(3, lookback=1, sinks=1)))
FULL = SpanPlan((Full(),) * 4)


COMMON: dict[str, Any] = {
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
ABSENT = object()
NO_GROUPS = {"num_key_value_heads": ABSENT, "head_dim": ABSENT}
TYPES = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 6}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
OWN: dict[str, dict[str, Any]] = {
    "cohere2": TYPES,
    "exaone4": TYPES,
    "gemma2": TYPES | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": TYPES | {"query_pre_attn_scalar": 8},
    "gpt2": NO_GROUPS | {"intermediate_size": ABSENT, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "gpt_neo": NO_GROUPS | {"attention_types": [[["global", "local"], 2]], "window_size": 6},
    "gpt_neox": NO_GROUPS,
    "gpt_oss": TYPES | EXPERTS,
    "granitemoe": EXPERTS | {"head_dim": ABSENT},
    "ministral": TYPES,
    "ministral3": {"sliding_window": 6},
    "mistral": {"sliding_window": None},
    "mixtral": EXPERTS | {"sliding_window": 6},
    "olmo3": TYPES,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": NO_GROUPS | {"intermediate_size": ABSENT, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "phi": {"head_dim": ABSENT},
    "phi3": {"head_dim": ABSENT, "sliding_window": 6},
    "qwen2_moe": QWEN_EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": QWEN_EXPERTS,
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "stablelm": {"head_dim": ABSENT},
    "starcoder2": {"sliding_window": 6},
}
"""What the tiny config of a family has beside `COMMON`, or lacks."""


def config_of(family: str, **changes: Any) -> PreTrainedConfig:
    values = COMMON | OWN.get(family, {}) | changes
    return CONFIG_MAPPING[family](**{name: value for name, value in values.items() if value is not ABSENT})


def tiny(family: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in evaluation mode; biases and norms are random too, and attention matters to its logits."""
    torch.manual_seed(seed)
    config = config_of(family, **changes)
    config._experts_implementation = "eager"  # the others take no float64
    model = class_of(config)._from_config(config, dtype=dtype)
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
        module.register_forward_pre_hook(hook_for(additive_mask(span, length, model.dtype)), with_kwargs=True)
        for module, span in zip(attention_modules(model), plan, strict=True)
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
