"""Write a converted model as a checkpoint of a family that stock software knows, and prove that it says the same.

    export("mixed", Path("out"), "vllm")

What has a native form: full layers and windows of one size without sinks, of families where a layer's type changes
its span and nothing else. Llama and Mistral become Ministral, which is Llama with layer types; vLLM has no class of
that name, but its Llama reads layer types, and vLLM goes by `architectures` where transformers goes by `model_type`:
one folder serves both. Everything else is refused.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.ministral.configuration_ministral import MinistralConfig

from ..errors import InputError
from ..spans import Full, SpanPlan, Window
from .checkpoint import load, load_config
from .convert import convert, is_converted, restore
from .families import class_of, family_of, head_dim
from .gpt_neo import with_attention_types
from .proof import Proof, check_vllm, prove, prove_in_vllm, questions
from .rope import refuse_for_vllm
from .stock import answers
from .tokenizer import has_tokenizer, load_tokenizer

TARGETS = ("transformers", "vllm")
WAYS_OUT = (
    "train the last phase with plain windows (recipes/smollm2-windows.yaml) and export that, or keep the conversion "
    "and serve it through the vLLM plugin, which knows blocks and windows of all sizes, without sinks"
)

TO_MINISTRAL = ("llama", "mistral", "ministral")
QWEN = ("qwen2", "qwen3")
MOVES_POSITIONS = ("cohere2", "exaone4", "gemma3_text", "olmo3", "smollm3")
"""Families whose layer types say which RoPE a layer has, or whether it has one."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written, and what was proved of it."""

    plan: SpanPlan
    source_type: str
    model_type: str
    architecture: str
    tokenizer: bool
    proof: Proof
    vllm: Proof | None


def export(source: str, folder: Path, target: str, *, device: str = "cpu", vllm: str | None = None) -> Exported:
    """Write the converted model `source` (folder, hub id) into `folder`, natively, and prove the folder.

    The weights keep their type; the proof is in float32. If anything is raised, what is in `folder` is worth nothing.

    Args:
        target: "transformers" or "vllm"; the latter is right in both.
        vllm: an interpreter that has vLLM, to prove the folder there too.

    Raises:
        InputError: what has no native form, with the ways out; a folder that differs from its source.
    """
    if vllm is not None:
        check_vllm(vllm)
    config, plan = load_config(source)
    native = native_config(config, plan, target)
    tokenizer = None if Path(source).exists() and not has_tokenizer(source) else load_tokenizer(source)
    model = load(source, device=device)
    _write(model, native, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    asked = questions(config, _one_window(plan), tokenizer)
    expected = answers(convert(model.float(), plan, check=False), asked["prompts"])
    del model  # the other process needs the room
    assert native.architectures is not None
    return Exported(
        plan=plan,
        source_type=config.model_type,
        model_type=native.model_type,
        architecture=native.architectures[0],
        tokenizer=tokenizer is not None,
        proof=prove(folder, asked, expected, tokenizer, device),
        vllm=prove_in_vllm(folder, asked, expected, vllm, tokenizer) if vllm else None,
    )


def native_config(config: PreTrainedConfig, plan: SpanPlan, target: str) -> PreTrainedConfig:
    """The config of a native model that does what `config` does with the spans of `plan`; both stay as they are.

    Raises:
        InputError: there is none for `target`; the message says why and what to do.
    """
    if target not in TARGETS:
        raise InputError(f"exports are for {' and '.join(TARGETS)}, not for {target!r}")
    family_of(config)
    kind = config.model_type
    if kind not in (*TO_MINISTRAL, *QWEN, "gpt_neo"):
        raise InputError(f"a {kind} cannot be exported: {_why_not(kind)}; masformer.load runs the conversion")
    if getattr(config, "quantization_config", None):
        raise InputError("quantised weights cannot be exported: load them in full precision, convert and save that")
    window = _one_window(plan)
    if target == "vllm":
        _refuse_for_vllm(config)
    if kind in TO_MINISTRAL:
        native = _as_ministral(config, plan, window)
    elif kind in QWEN:
        native = _as_qwen(config, plan, window)
    else:
        native = with_attention_types(config, plan)
    vars(native).pop("auto_map", None)  # code that the parent brought along and nobody ran
    native.architectures = ["LlamaForCausalLM" if target == "vllm" else class_of(native).__name__]
    return native


def _why_not(kind: str) -> str:
    if kind == "gpt_neox":
        return "transformers' GPT-NeoX takes layer_types for its cache alone, and would prefill with full attention"
    if kind in MOVES_POSITIONS:
        return "there a layer's type changes its positions too, not its span alone"
    return f"only {', '.join((*TO_MINISTRAL, *QWEN, 'gpt_neo'))} have a native form that is proved"


def _one_window(plan: SpanPlan) -> int:
    """The size of the window that all local layers have."""
    if not any(span.is_local for span in plan):
        raise InputError("the model has no local layers, so there is nothing to export: convert it first")
    windows = set()
    for span in plan:
        if span.is_local and not isinstance(span, Window):
            raise InputError(f"{span} cannot be exported, native layers know windows alone: {WAYS_OUT}")
        if isinstance(span, Window):
            if span.sinks:
                raise InputError(f"{span} cannot be exported, native layers have no sinks: {WAYS_OUT}")
            windows.add(span.size)
    if len(windows) > 1:
        words = " and ".join(f"window:{size}" for size in sorted(windows))
        raise InputError(f"{words} cannot be exported together, native layers share one window: {WAYS_OUT}")
    if 1 in windows:
        raise InputError("window:1 cannot be exported: the caches of transformers would hold all tokens, not one")
    return windows.pop()


def _types(plan: SpanPlan) -> list[str]:
    return ["full_attention" if isinstance(span, Full) else "sliding_attention" for span in plan]


def _as_ministral(config: PreTrainedConfig, plan: SpanPlan, window: int) -> PreTrainedConfig:
    """Llama's and Mistral's fields under the name of Ministral; its head width and window have to be said."""
    if biased := [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]:
        raise InputError(f"a {config.model_type} with {biased[0]} cannot be exported: Ministral has no such biases")
    known = {field.name for field in dataclasses.fields(MinistralConfig)} | {"extended_positions"}
    values = {name: value for name, value in config.to_dict().items() if name in known and value is not None}
    absent = {name: None for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name not in values}
    spans = {"layer_types": _types(plan), "sliding_window": window, "head_dim": head_dim(config)}
    return MinistralConfig(**{**values, **absent, **spans})


def _as_qwen(config: PreTrainedConfig, plan: SpanPlan, window: int) -> PreTrainedConfig:
    """`max_window_layers` is for software that reads no layer types: with 0 vLLM's own class refuses a mixed model,
    with the number of layers it would serve full attention (measured: 3.6 nats apart).
    """
    native: Any = copy.deepcopy(config)
    native.use_sliding_window, native.sliding_window, native.max_window_layers = True, window, 0
    native.layer_types = _types(plan)
    return native


def _refuse_for_vllm(config: PreTrainedConfig) -> None:
    """Refuse what vLLM would serve with other spans or other positions."""
    kind = config.model_type
    if kind in QWEN:
        raise InputError(
            f"a {kind} cannot be exported for vLLM, whose own {kind} reads no layer types: it would refuse the model "
            "or give all layers full attention; export it for transformers and serve that with --model-impl "
            "transformers, or serve the conversion through the plugin"
        )
    if kind not in TO_MINISTRAL:
        raise InputError(f"a {kind} cannot be exported for vLLM, which has no such class: export it for transformers")
    refuse_for_vllm(config.rope_parameters, "export it for transformers")


def _write(model: PreTrainedModel, native: PreTrainedConfig, folder: Path) -> None:
    """Weights, generation config and the native config; the model becomes its parent again."""
    if is_converted(model):
        restore(model)
    with torch.device("meta"):
        stock = class_of(native)(copy.deepcopy(native))
    shapes = {name: tensor.shape for name, tensor in stock.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in model.state_dict().items()}:
        raise InputError(f"the weights do not fit a {native.model_type}: this model cannot be exported")
    model.save_pretrained(folder)
    native.dtype = model.dtype
    native.save_pretrained(folder)
