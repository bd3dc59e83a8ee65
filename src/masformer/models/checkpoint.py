"""Load models, converted or not, from folders and hub ids; make transformers' auto classes load conversions.

A converted folder holds the parent's weights (safetensors) and a `MasformerConfig`.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..errors import CorruptError, InputError
from ..spans import SpanPlan
from .config import MasformerConfig
from .convert import NAME, convert
from .families import family_of, native_plan

OUTPUT_SETTINGS = ("output_hidden_states", "output_attentions", "return_dict")
"""Fields that every config has and the auto class sets on ours."""


class MasformerForCausalLM(PreTrainedModel):
    """What transformers' auto class calls for model type `masformer`: loads the parent and converts it."""

    config_class = MasformerConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """The parent's class with the saved spans. Takes what transformers' `from_pretrained` takes.

        Raises:
            CorruptError: weights that are missing, superfluous, of another shape, or cut short.
        """
        config = kwargs.pop("config", None) or MasformerConfig.from_pretrained(pretrained_model_name_or_path)
        # transformers' auto class moves the argument into the config before it calls this.
        requested = kwargs.pop("attn_implementation", None) or config._attn_implementation
        if requested not in (None, NAME):
            raise InputError(f"attn_implementation={requested!r} would ignore the spans of a converted model")
        want_info = kwargs.pop("output_loading_info", False)
        parent, plan = config.parent_config(), config.span_plan()
        family_of(parent)
        # Settings for the parent's config come as keywords, or in our config, where the auto class puts those it knows;
        # what nobody set there must not undo what the parent was saved with.
        unset = MasformerConfig()
        given = {name: getattr(config, name) for name in OUTPUT_SETTINGS}
        settings = {name: value for name, value in given.items() if value != getattr(unset, name)}
        settings |= {name: kwargs.pop(name) for name in list(kwargs) if hasattr(parent, name) and name != "dtype"}
        for name, value in settings.items():
            setattr(parent, name, value)
        model, info = _load_strictly(_class_of(parent), pretrained_model_name_or_path, parent, kwargs)
        convert(model, plan, check=False)
        return (model, info) if want_info else model

    @classmethod
    def _from_config(cls, config: MasformerConfig, **kwargs: Any) -> Any:
        """What the auto class's `from_config` calls: the parent with random weights, converted."""
        parent, plan = config.parent_config(), config.span_plan()
        family_of(parent)
        return convert(_class_of(parent)._from_config(parent, **kwargs), plan, check=False)


AutoConfig.register(MasformerConfig.model_type, MasformerConfig)
AutoModelForCausalLM.register(MasformerConfig, MasformerForCausalLM)


def _class_of(config: PreTrainedConfig) -> Any:
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _load_strictly(
    cls: Any, source: Any, config: PreTrainedConfig, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Load weights, refusing what transformers would only warn of."""
    try:
        # Without this transformers raises on sizes that differ, and names none of them.
        strict = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = cls.from_pretrained(source, config=config, **{**kwargs, **strict})
    except SafetensorError as error:
        raise CorruptError(f"the weights in {source} are damaged ({error}): copy or download them again") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            first = sorted(map(str, info[kind]))[0]
            raise CorruptError(
                f"the weights in {source} do not fit its config: {len(info[kind])} {kind.replace('_', ' ')}, "
                f"the first is {first}"
            )
    return model, info


def load_config(source: str) -> tuple[PreTrainedConfig, SpanPlan]:
    """Config of the unconverted model and the spans of a folder or hub id, converted or not; loads no weights.

    Raises:
        InputError: nothing there, or a model that is not supported.
        CorruptError: a config that cannot be read.
    """
    config = _read_config(source)
    if isinstance(config, MasformerConfig):
        return config.parent_config(), config.span_plan()
    return config, native_plan(config)


def _read_config(source: str) -> PreTrainedConfig:
    if os.path.isdir(source):
        file = Path(source) / "config.json"
        if not file.is_file():
            raise InputError(f"{source} holds no config.json: give a model folder or a hub id")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CorruptError(f"{file} is not JSON: {error}") from error
        if not isinstance(content, dict) or "model_type" not in content:
            raise CorruptError(f"{file} names no model_type: it is not the config of a model")
    elif os.path.exists(source) or source.startswith((".", "/", "~")):
        raise InputError(f"{source} is not a folder: give a model folder or a hub id")
    try:
        config = AutoConfig.from_pretrained(source)
    except StrictDataclassError as error:
        raise CorruptError(f"the model config in {source} is not usable: {_one_line(error)}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read a model config from {source}: {_one_line(error)}") from error
    if not isinstance(config, MasformerConfig):
        family_of(config)
    return config


def load(source: str, *, dtype: Any = "auto", device: Any = None) -> PreTrainedModel:
    """A model from a folder or hub id, converted if it was saved so, in evaluation mode.

    Raises:
        InputError: nothing there, or a model that is not supported.
        CorruptError: weights or a config that are damaged or do not fit together.
    """
    config = _read_config(source)
    try:
        if isinstance(config, MasformerConfig):
            model = MasformerForCausalLM.from_pretrained(source, config=config, dtype=dtype)
        else:
            cls = _class_of(config)
            model, _ = _load_strictly(cls, source, config, {"dtype": dtype})
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, InputError) or _out_of_resources(error):
            raise
        raise CorruptError(f"cannot load the weights of {source}: {_one_line(error)}") from error
    return model.eval().to(device) if device else model.eval()


def _out_of_resources(error: BaseException) -> bool:
    """Not the fault of the files: memory or disk ran out."""
    no_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    return no_memory or getattr(error, "errno", None) in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 300 else text[:300] + " ..."
