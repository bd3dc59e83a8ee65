"""What differs between model families, as data."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..errors import InputError
from ..spans import Block, Full, ModelShape, PlanError, Span, SpanPlan, Window


@dataclasses.dataclass(frozen=True)
class Family:
    """Where a family keeps what conversion touches, and how its config says which spans it has by itself."""

    decoder: str = ""
    """Path from `base_model` to the module that gets tokens, mask and cache; empty where it is `base_model` itself."""
    layers: str = "layers"
    """Path from the decoder to its list of layers."""
    attention: str = "self_attn"
    """Path from a layer to its attention module."""
    native: Literal["full", "sliding_window", "layer_types", "attention_layers"] = "full"
    """Which config field the family's own forward reads: none, one window for all layers, a list of types."""
    table: str = ""
    """Path from the decoder to the table of learned positions; empty for rotary positions (RoPE)."""
    first_row: int = 0
    """Row of position 0 in that table."""
    counts_real: bool = False
    """Whether positions that nobody gave count real tokens alone, and not the row's padding too."""
    logits: Literal["", "logit_scale", "logits_scaling", "final_logit_softcapping"] = ""
    """Config field that the family's logits are multiplied by, divided by or capped at after the head, if any."""
    refused: tuple[str, ...] = ()
    """Config fields that make attention something else than causal self-attention; they must be unset."""


_WINDOW = Family(native="sliding_window")
_TYPES = Family(native="layer_types")
_GEMMA = dataclasses.replace(_TYPES, logits="final_logit_softcapping", refused=("use_bidirectional_attention",))

FAMILIES: dict[str, Family] = {
    "apertus": Family(),
    "arcee": Family(),
    "cohere": Family(logits="logit_scale"),
    "cohere2": dataclasses.replace(_TYPES, logits="logit_scale"),
    "ernie4_5": Family(),
    "exaone4": _TYPES,
    "gemma": Family(refused=("use_bidirectional_attention",)),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "glm4": Family(),
    "gpt2": Family(layers="h", attention="attn", table="wpe", refused=("add_cross_attention",)),
    "gpt_neo": Family(layers="h", attention="attn.attention", native="attention_layers", table="wpe"),
    "gpt_neox": Family(attention="attention"),
    "gpt_oss": _TYPES,
    "granite": Family(logits="logits_scaling"),
    "granitemoe": Family(logits="logits_scaling"),
    "hunyuan_v1_dense": Family(),
    "llama": Family(),
    "ministral": _TYPES,
    "ministral3": _WINDOW,
    "mistral": _WINDOW,
    "mixtral": _WINDOW,
    "nemotron": Family(),
    "olmo": Family(),
    "olmo2": Family(),
    "olmo3": _TYPES,
    "olmoe": Family(),
    "opt": Family(decoder="decoder", table="embed_positions", first_row=2, counts_real=True),
    "phi": Family(),
    "phi3": _WINDOW,
    "qwen2": _TYPES,
    "qwen2_moe": _TYPES,
    "qwen3": _TYPES,
    "qwen3_moe": _WINDOW,
    "seed_oss": Family(),
    "smollm3": _TYPES,
    "stablelm": Family(),
    "starcoder2": _WINDOW,
}
"""By transformers' `model_type`. SmolLM and SmolLM2 are of type llama, Pythia of type gpt_neox."""


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a config.

    Raises:
        InputError: a model type that is not supported, with the reason and the list of those that are.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        supported = ", ".join(sorted(FAMILIES))
        raise InputError(f"model type {config.model_type!r} {_why_not(config)}; supported are: {supported}")
    for field in family.refused:
        if getattr(config, field, None):
            raise InputError(f"this {config.model_type} has {field}={getattr(config, field)!r}: spans are causal")
    return family


_REASONS = {
    "bloom": "biases its scores by distance (ALiBi)",
    "mpt": "biases its scores by distance (ALiBi)",
}
"""What cannot be read off the class."""


def _why_not(config: PreTrainedConfig) -> str:
    """Why a model type is not supported, to be read after its name."""
    if config.model_type in _REASONS:
        return f"{_REASONS[config.model_type]}, which spans do not honour"
    if config.is_encoder_decoder:
        return "is an encoder-decoder, spans are for decoders alone"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "is not a causal language model of transformers"
    if class_of(config)._is_stateful:
        return "keeps a state that is no KV cache, in all or some of its layers"
    if not class_of(config)._can_set_attn_implementation():
        return "computes its attention itself, out of reach of the attention interface of transformers"
    return "is not among the families that are proved to work"


def class_of(config: PreTrainedConfig) -> Any:
    """transformers' class of causal language models with such a config."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The module that gets tokens, mask and cache, of a causal language model, its base model or the decoder itself."""
    base: Any = model.base_model
    path = family_of(model.config).decoder
    return getattr(base, path, base) if path else base


def refuse_spread(model: PreTrainedModel, verb: str) -> None:
    """Refuse a decoder whose forward was replaced on the object: what is put in front of its class would not run."""
    if "forward" in vars(decoder_of(model)):
        raise InputError(
            "the decoder's forward was replaced on this object (as a device_map over several devices does): "
            f"{verb} the model first"
        )


def dtype_of(config: PreTrainedConfig) -> torch.dtype:
    """The type of a model's weights, torch's default where its config does not say."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.get_default_dtype()


def head_dim(config: PreTrainedConfig) -> int:
    """Width of a query head and of a key head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules of a causal language model or of its decoder, layer 0 first."""
    family = family_of(model.config)
    layers = decoder_of(model).get_submodule(family.layers)
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
    if family.native == "attention_layers":
        local = Window(config.window_size)
        return SpanPlan(tuple(local if kind == "local" else Full() for kind in config.attention_layers))
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
    """Sizes of the model that a config describes, counted on a model without storage.

    A token meets every weight matrix that is no embedding, of a mixture of experts only those of the experts
    that it is sent to.
    """
    family_of(config)
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # that of a converted model is none to build a GPT-Neo with
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head: Any = model.get_output_embeddings()
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = {
        weight
        for name, weight in model.named_parameters()
        if weight.ndim > 1 and weight is not head.weight and weight not in tables and not name.endswith("bias")
    }
    heads = config.num_attention_heads
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim(config),
        linear_parameters=sum(_active(weight, config) for weight in matrices),
        head_parameters=head.weight.numel(),
        parameters=sum(p.numel() for p in model.parameters()),
        kv_dtype_bytes=kv_dtype_bytes,
    )


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The config of a model that has the first `layers` layers alone; what lists one entry per layer is cut, too."""
    values, count = config.to_dict(), config.num_hidden_layers
    for name, value in list(values.items()):
        if isinstance(value, list) and len(value) == count and not name.endswith(("_token_id", "architectures")):
            values[name] = value[:layers]
    if config.model_type == "gpt_neo":
        values["attention_types"] = [[[kind], 1] for kind in config.attention_layers[:layers]]
    depth = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    short = type(config).from_dict({**values, depth: layers})
    short.dtype = config.dtype
    return short


def _active(weight: nn.Parameter, config: PreTrainedConfig) -> int:
    """How many numbers of a weight one token meets: experts stand along the first of three dimensions."""
    return weight.numel() if weight.ndim < 3 else weight.numel() // weight.shape[0] * config.num_experts_per_tok
