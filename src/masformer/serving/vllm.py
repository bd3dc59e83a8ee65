"""The plugin that lets vLLM serve a folder of model type `masformer` as it is.

    pip install --no-deps masformer          # into vLLM's environment, which has an older transformers
    vllm serve FOLDER

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). Read with vLLM 0.32.0. The
parent's own class of vLLM does everything but attention; `vllm_layers.py` has the layers with spans.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import CorruptError, InputError
from ..models.rope import refuse_for_vllm

ARCHITECTURES = {
    "llama": "MasformerLlamaForCausalLM",
    "ministral": "MasformerLlamaForCausalLM",
    "mistral": "MasformerMistralForCausalLM",
    "qwen2": "MasformerQwen2ForCausalLM",
    "qwen3": "MasformerQwen3ForCausalLM",
}
"""By the parent's model type; names of classes in vllm_layers.py."""

PLAN = "masformer_plan"
"""Where the parent's config has the plan, in its text form."""


def _config(kind: str) -> Any:
    """The parent's config class under a name of its own, which transformers' auto classes refuse: they would build the
    parent with full attention if vLLM was told to use their models (`--model-impl transformers`).
    """
    parent: Any = CONFIG_MAPPING["llama" if kind == "ministral" else kind]
    name = f"{kind.title()}Spans"
    globals()[name] = type(name, (parent,), {"__module__": __name__})  # where other processes look for it
    return globals()[name]


CONFIGS = {kind: _config(kind) for kind in ARCHITECTURES}


class ServedConfig(PreTrainedConfig):
    """What transformers reads config.json of a conversion with, where vLLM runs: it becomes the parent's config."""

    model_type = "masformer"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The parent's config under an architecture that knows spans; takes what transformers' `from_dict` takes.

        Raises:
            CorruptError: a config that no conversion has written.
            InputError: a parent that cannot be served so.
        """
        kind, parent, plan = (config_dict.get(name) for name in ("parent_type", "parent", "plan"))
        if not isinstance(kind, str) or not isinstance(parent, dict) or not isinstance(plan, str):
            raise CorruptError("config.json of a converted model lacks its parent or its plan")
        if kind not in ARCHITECTURES:
            raise InputError(
                f"a converted {kind} cannot be served by vLLM, only {', '.join(ARCHITECTURES)}: use masformer.load"
            )
        refuse_for_vllm(parent.get("rope_parameters") or {}, "use masformer.load")
        # The plan says what every layer sees: nothing may be left that vLLM would give all layers.
        own = {name: value for name, value in parent.items() if name != "layer_types"} | {
            "sliding_window": None,
            "architectures": [ARCHITECTURES[kind]],
            "dtype": config_dict.get("dtype", parent.get("dtype")),
            PLAN: plan,
        }
        return CONFIGS[kind].from_dict(own, **kwargs)


def register() -> None:
    """Make the model type and its classes known to vLLM and to the transformers beside it."""
    from vllm import ModelRegistry

    AutoConfig.register(ServedConfig.model_type, ServedConfig, exist_ok=True)
    for name in sorted(set(ARCHITECTURES.values())):
        ModelRegistry.register_model(name, f"{__package__}.vllm_layers:{name}")
