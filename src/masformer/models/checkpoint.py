"""Load models, converted or not, from folders, hub ids and GGUF files; make auto classes load conversions.

A converted folder holds the parent's weights (safetensors) and a `MasformerConfig`. Code that a model brings along
is never run, and nobody is asked about it: `trust_remote_code` is False wherever something is read.
"""

from __future__ import annotations

import errno
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..errors import CorruptError, InputError
from ..files import check_files, digest, sha256
from ..spans import SpanPlan
from .config import MasformerConfig
from .convert import NAME, convert
from .families import class_of, family_of, native_plan
from .gguf import gguf_config, gguf_place, is_gguf, one_line
from .positions import extend, extended_config

ADAPTER = "masformer.json"
"""File beside an adapter that says what it stands upon."""
OUTPUT_SETTINGS = ("output_hidden_states", "output_attentions", "return_dict")
"""Fields that every config has and the auto class sets on ours."""

OLD_MASKS = re.compile(r"\.(attn|attention)\.(masked_)?bias$")
"""Masks over all pairs, which GPT-2, GPT-Neo and GPT-NeoX once saved among their weights; the model makes them anew."""


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
        model, info = _load_strictly(class_of(parent), pretrained_model_name_or_path, parent, kwargs)
        convert(model, plan, check=False)
        return (model, info) if want_info else model

    @classmethod
    def _from_config(cls, config: MasformerConfig, **kwargs: Any) -> Any:
        """What the auto class's `from_config` calls: the parent with random weights, converted."""
        parent, plan = config.parent_config(), config.span_plan()
        family_of(parent)
        return convert(class_of(parent)._from_config(parent, **kwargs), plan, check=False)


AutoConfig.register(MasformerConfig.model_type, MasformerConfig)
AutoModelForCausalLM.register(MasformerConfig, MasformerForCausalLM)


def _load_strictly(
    cls: Any, source: Any, config: PreTrainedConfig, kwargs: dict[str, Any], folder: Any = None
) -> tuple[Any, dict[str, Any]]:
    """Load weights, refusing what transformers would only warn of; `folder` has them if `source` is only a name."""
    if os.path.isdir(source):
        check_files(Path(source))
    try:
        # Without this transformers raises on sizes that differ, and names none of them.
        strict = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = cls.from_pretrained(folder or source, config=config, **{**kwargs, **strict})
    except SafetensorError as error:
        raise CorruptError(f"the weights in {source} are damaged ({error}): copy or download them again") from error
    info["unexpected_keys"] = {key for key in info["unexpected_keys"] if not OLD_MASKS.search(key)}
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            first = sorted(map(str, info[kind]))[0]
            raise CorruptError(
                f"the weights in {source} do not fit its config: {len(info[kind])} {kind.replace('_', ' ')}, "
                f"the first is {first}"
            )
    return model, info


def load_config(source: str) -> tuple[PreTrainedConfig, SpanPlan]:
    """Config of the unconverted model and the spans of a folder, hub id or GGUF file; loads no weights.

    Raises:
        InputError: nothing there, a model that is not supported, or one that needs its own code.
        CorruptError: a config that cannot be read.
    """
    if (adapter := _adapter(source)) is not None:
        config, _ = load_config(adapter["model"])
        if adapter["positions"]:
            config = extended_config(config, **adapter["positions"])
        return config, SpanPlan.parse(adapter["plan"])
    config = _read_config(source)
    if isinstance(config, MasformerConfig):
        return config.parent_config(), config.span_plan()
    return config, native_plan(config)


def _read_config(source: str) -> PreTrainedConfig:
    if is_gguf(source):
        return gguf_config(source)
    if os.path.isdir(source):
        file = Path(source) / "config.json"
        if not file.is_file():
            raise InputError(f"{source} holds no config.json: give a model folder or a hub id")
        check_files(Path(source), file.name)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CorruptError(f"{file} is not JSON: {error}") from error
        if not isinstance(content, dict) or "model_type" not in content:
            raise CorruptError(f"{file} names no model_type: it is not the config of a model")
    elif os.path.exists(source) or source.startswith((".", "/", "~")):
        raise InputError(f"{source} is not a folder: give a model folder, a hub id or a GGUF file (.gguf)")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except StrictDataclassError as error:
        raise CorruptError(f"the model config in {source} is not usable: {one_line(error)}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse_own_code(source, error)
        raise InputError(f"cannot read a model config from {source}: {one_line(error)}") from error
    if not isinstance(config, MasformerConfig):
        family_of(config)
    return config


def load(source: str, *, dtype: Any = "auto", device: Any = None) -> PreTrainedModel:
    """A model from a folder, hub id or GGUF file, converted if it was saved so, in evaluation mode.

    `dtype="auto"` is the one it was saved in; the weights of a GGUF file, quantised or not, become float32.

    Raises:
        InputError: nothing there, a model that is not supported, or one that needs its own code.
        CorruptError: weights or a config that are damaged or do not fit together.
    """
    if (adapter := _adapter(source)) is not None:
        return _load_adapted(source, adapter, dtype=dtype, device=device)
    config = _read_config(source)
    how = {"dtype": dtype, "trust_remote_code": False}
    try:
        if isinstance(config, MasformerConfig):
            model = MasformerForCausalLM.from_pretrained(source, config=config, **how)
        elif is_gguf(source):
            model = _load_gguf(source, config, how)
        else:
            model, _ = _load_strictly(class_of(config), source, config, how)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, InputError) or _out_of_resources(error):
            raise
        raise CorruptError(f"cannot load the weights of {source}: {one_line(error)}") from error
    return model.eval().to(device) if device else model.eval()


def weights_digest(source: str, config: PreTrainedConfig) -> str | None:
    """What tells the weights of a model from others of its shape: their SHA-256, or the commit of a hub id.

    With those of an adapter go those that it stands upon.
    """
    path = Path(source)
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    own = digest([sha256(file) for file in files]) if files else getattr(config, "_commit_hash", None)
    adapter = _adapter(source)
    return own if adapter is None else digest([own, weights_digest(adapter["model"], config)])


def save_adapter(model: Any, folder: Path, about: dict[str, Any], state_dict: dict[str, Any] | None = None) -> None:
    """Write the adapters of a `PeftModel`, and what they stand upon: `model`, `plan` and `positions` of `about`.

    peft would name the unconverted parent in the adapter's config, and transformers' auto classes would then load the
    folder as that with full attention: no model is named there, which they refuse.
    """
    model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "base_model_name_or_path": None}, indent=2), encoding="utf-8")
    (folder / ADAPTER).write_text(json.dumps(about, indent=1), encoding="utf-8")


def _adapter(source: str) -> dict[str, Any] | None:
    """What `save_adapter` wrote beside an adapter; None where there is none."""
    file = Path(source) / ADAPTER
    if not file.is_file():
        return None
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        return {name: about[name] for name in ("model", "plan", "positions")}
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{file} does not say what the adapter stands upon") from error


def _load_adapted(source: str, about: dict[str, Any], *, dtype: Any, device: Any) -> PreTrainedModel:
    """The model that an adapter stands upon, with the spans it was trained with and its weights merged in."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InputError(f"{source} holds an adapter, which needs peft: pip install peft") from error
    model = load(about["model"], dtype=dtype)
    if about["positions"]:
        extend(model, **about["positions"])
    convert(model, SpanPlan.parse(about["plan"]), check=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # peft asks by the old name
        check_files(Path(source))
        merged: Any = PeftModel.from_pretrained(model, source).merge_and_unload()
    return merged.eval().to(device) if device else merged.eval()


def _out_of_resources(error: BaseException) -> bool:
    """Not the fault of the files: memory or disk ran out."""
    no_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    return no_memory or getattr(error, "errno", None) in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT)


def refuse_own_code(source: str, error: BaseException) -> None:
    """Raise an InputError if `error` is transformers' refusal to run code out of the model's folder."""
    if "trust_remote_code" in str(error):
        raise InputError(
            f"{source} needs its own code, which masformer does not run: "
            "only models that transformers knows by itself can be used"
        ) from error


def _load_gguf(source: str, config: PreTrainedConfig, how: dict[str, Any]) -> PreTrainedModel:
    try:
        with gguf_place(source) as (folder, keywords):
            model, _ = _load_strictly(class_of(config), source, config, {**how, **keywords}, folder)
    except NotImplementedError as error:
        raise InputError(f"a quantisation in {source} cannot be read: {one_line(error)}") from error
    # The weights are plain tensors now; transformers would still refuse to save or train them as quantised ones.
    model.hf_quantizer.remove_quantization_config(model)
    model.config.name_or_path = model.name_or_path = source
    return model
