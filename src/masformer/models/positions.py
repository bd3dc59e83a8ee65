"""Give a parent more positions than it was trained with, before it is trained on longer documents.

    extend(model, 32768, "theta")              in place, converted or not
    extended_config(config, 32768, "theta")    the config alone
    check_positions(config, 40000)             refuses what the model has no positions for

Rotary positions (RoPE) are scaled through transformers' own `rope_parameters`, a table of learned positions gets
more rows. The config carries all of it, so a saved model loads as it was, and `extended_positions` in the config
says what was done. Nothing here makes a model good at long texts: that takes continual training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import InputError
from .families import attention_modules, decoder_of, family_of, head_dim, refuse_spread
from .gpt_neo import square

ROPE_METHODS = {
    "theta": "raise RoPE's base, which spares the fast frequencies (NTK-aware, arXiv 2309.00071 section 3.1)",
    "linear": "divide every RoPE frequency by the factor (position interpolation, arXiv 2306.15595)",
    "dynamic": "raise RoPE's base by the length of each call (dynamic NTK): prefill and decode differ on long texts",
    "yarn": "divide the slow RoPE frequencies, keep the fast ones, sharpen attention (YaRN, arXiv 2309.00071)",
}
TABLE_METHODS = {
    "tile": "copy the learned positions again and again (as Longformer did, arXiv 2004.05150 section 5)",
    "interpolate": "spread the learned positions evenly, linear in between, first and last kept",
}
METHODS = ROPE_METHODS | TABLE_METHODS
"""How positions can be extended: name -> one line."""

COMPOSES = {"default": tuple(ROPE_METHODS), "linear": ("linear",), "dynamic": ("dynamic",), "ntk_alpha": ("theta",)}
"""By the RoPE type of a parent: what can be put upon it exactly. Upon yarn, longrope and llama3: nothing."""

NOT_ACCEPTED = {"phi3": ("linear", "dynamic", "yarn"), "ministral3": ("yarn",)}
"""By model type: what its config refuses or takes for another (Phi-3), or what changes more than its RoPE: Ministral 3
scales its queries by the `original_max_position_embeddings` that yarn has to set."""


def methods_for(config: PreTrainedConfig) -> tuple[str, ...]:
    """The methods that fit a config; none where its RoPE is scaled already in a way that nothing composes with.

    Raises:
        InputError: a model type that is not supported.
    """
    if family_of(config).table:
        return tuple(TABLE_METHODS)
    fitting = COMPOSES.get(_rope_type(config), ())
    refused: tuple[str, ...] = NOT_ACCEPTED.get(config.model_type, ())
    if _rotary_dim(config) <= 2:  # one frequency: no base raises it
        refused += ("theta", "dynamic")
    return tuple(method for method in fitting if method not in refused)


def max_positions(config: PreTrainedConfig) -> int | None:
    """How many positions a model has; None: no limit is known.

    Read this and not `max_position_embeddings`, which for dynamic NTK stays what it was: transformers takes it for
    the original maximum, and would never scale if it were raised. Parents that come scaled may leave it there for
    yarn too (Qwen2.5's recipe). With linear scaling some raise it and some do not, and nothing tells them apart: it is
    taken as it stands.
    """
    done = getattr(config, "extended_positions", None)
    if done and done["method"] == "dynamic":
        return done["to"]
    most: int | None = getattr(config, "max_position_embeddings", None)
    if most is None or not getattr(config, "rope_parameters", None):
        return most
    rope = _rope(config)
    factor = rope.get("factor") or 1.0
    match _rope_type(config):
        case "yarn":
            return max(most, round(rope["original_max_position_embeddings"] * factor))
        case "dynamic":
            return round(most * factor)
    return most


def check_positions(config: PreTrainedConfig, length: int) -> None:
    """Refuse a text of `length` tokens that is longer than the model has positions.

    Raises:
        InputError: it is longer; the message says which methods could extend the model.
    """
    most = max_positions(config)
    if most is None or length <= most:
        return
    if methods := methods_for(config):
        remedy = f"extend it with convert --max-length {length} --positions {_either(methods)}"
    else:
        remedy = _nothing_fits(config)
    raise InputError(f"{length:,} tokens are more than the model's {most:,} positions: {remedy}")


def extended_config(config: PreTrainedConfig, length: int, method: str) -> PreTrainedConfig:
    """A copy of `config` with `length` positions, made by a method of `METHODS`; the argument stays as it is.

    The copy has `max_position_embeddings` of `length` (but for "dynamic", see `max_positions`), the RoPE parameters
    of the method, and the record `extended_positions`: method, from, to, and what had been done before that.

    Where RoPE differs by layer type (Gemma 3, OLMo 3), that of the full layers is scaled and that of the sliding ones
    kept, as both models were themselves extended: what a sliding layer sees is no farther away in a longer text. That
    holds for the parent's sliding layers too where a plan has made them full: their RoPE was trained for a window
    only, so no factor between maxima is right for it, and training has to teach them. Where one RoPE serves all layers
    it is scaled for all, though it may reach windows alone, which need no scaling (Cohere 2, hybrid EXAONE 4).

    "dynamic" has factor 1, with which transformers' formula is the paper's, `theta * (l / L) ** (d / (d - 2))` for a
    call that reaches `l` positions of `L` original ones; a factor above 1 overshoots. Its frequencies follow the
    call, and keys cached by an earlier call keep those of that call: beyond `L`, prefill, chunked prefill and decode
    of one text do not agree, and a call between `L` and a longer one before it gets the frequencies of the longer. The
    unconverted parent behaves the same.

    Raises:
        InputError: no such method, one that does not fit this model, or a length that is not longer.
    """
    _check(config, length, method)
    longer = copy.deepcopy(config)
    _set(longer, length, method)
    return longer


@torch.inference_mode(False)
def extend(model: PreTrainedModel, length: int, method: str) -> PreTrainedModel:
    """Give `model` `length` positions, in place, and return it: what its `extended_config` would load as.

    Works on a converted model too, on any device and in any type. Module and config objects stay the same ones but
    for RoPE, whose module is made anew (in float32, as on loading), and for the weight of a table of positions, which
    becomes a new parameter: make optimizers afterwards.

    Raises:
        InputError: as `extended_config`; or a model spread over devices by hooks.
    """
    _check(model.config, length, method)
    refuse_spread(model, "extend")
    if method in TABLE_METHODS:
        _lengthen_table(model, length, method)
    for config in _configs(model):
        _set(config, length, method)
    if family_of(model.config).native == "attention_layers":
        _lengthen_masks(model)
    if method in ROPE_METHODS:
        _rebuild_rope(model)
    return model


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The config objects of a model and its modules: one, unless somebody copied it."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in configs if isinstance(config, PreTrainedConfig)}.values())


def _check(config: PreTrainedConfig, length: int, method: str) -> None:
    if method not in METHODS:
        raise InputError(f"unknown method {method!r} for more positions: choose {_either(METHODS)}")
    methods = methods_for(config)
    if not methods:
        raise InputError(_nothing_fits(config))
    if method not in methods:
        raise InputError(f"{method!r} cannot extend this {config.model_type}: choose {_either(methods)}")
    most = max_positions(config)
    if most is None or length <= most:
        has = "has no limit" if most is None else f"has {most:,}"
        raise InputError(f"{length:,} positions are not more than the model has now: it {has}")


def _either(names: Any) -> str:
    """`a, b or c`."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _nothing_fits(config: PreTrainedConfig) -> str:
    scaled = f"the RoPE of this {config.model_type} is scaled already ({_rope_type(config)})"
    return f"{scaled} and cannot be extended once more"


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """The RoPE parameters that depend on the maximum: where they differ by layer type, those of full attention."""
    parameters = config.rope_parameters
    return parameters["full_attention"] if config.nested_rope_parameter_keys(parameters) else parameters


def _rope_type(config: PreTrainedConfig) -> str:
    """HunYuan's checkpoints call dynamic what a fixed `alpha` makes static (transformers/models/hunyuan_v1_dense)."""
    rope = _rope(config)
    fixed = config.model_type == "hunyuan_v1_dense" and rope["rope_type"] == "dynamic" and rope.get("alpha")
    return "ntk_alpha" if fixed else rope["rope_type"]


def _rotary_dim(config: PreTrainedConfig) -> int:
    """Dimensions of a head that are rotated, as transformers counts them."""
    return int(head_dim(config) * _rope(config).get("partial_rotary_factor", 1.0))


def _set(config: PreTrainedConfig, length: int, method: str) -> None:
    """Write `length` and `method` into a config; both were checked."""
    most = max_positions(config)
    assert most is not None
    if method in ROPE_METHODS:
        _scale_rope(config, most, length, method)
    if method != "dynamic":
        config.max_position_embeddings = length
    done = {"method": method, "from": most, "to": length}
    if getattr(config, "extended_positions", None):
        done["before"] = config.extended_positions
    config.extended_positions = done


def _scale_rope(config: PreTrainedConfig, most: int, length: int, method: str) -> None:
    rope, factor = dict(_rope(config)), length / most
    before = rope["factor"] if rope["rope_type"] == method else 1.0
    rope.pop("type", None)  # the old name of rope_type; some servers read it first
    match method:
        case "theta":
            dim = _rotary_dim(config)
            rope["rope_theta"] *= factor ** (dim / (dim - 2))
        case "linear":
            rope |= {"rope_type": "linear", "factor": before * factor}
        case "dynamic":
            rope |= {"rope_type": "dynamic", "factor": before}
            rope.pop("alpha", None)  # unused until now, it would make HunYuan's RoPE static
        case "yarn":
            rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": most}
    nested = config.nested_rope_parameter_keys(config.rope_parameters)
    config.rope_parameters = {**config.rope_parameters, "full_attention": rope} if nested else rope
    if getattr(config, "head_dim", 0) is None:  # which transformers' dynamic and yarn do not understand
        config.head_dim = head_dim(config)
    if hasattr(config, "original_max_position_embeddings"):
        # Yarn prefers it to its own parameter; Phi-3 without longrope drops its KV cache there, for nothing.
        config.original_max_position_embeddings = most if method == "yarn" else length


def _rebuild_rope(model: PreTrainedModel) -> None:
    """Make every module that holds RoPE frequencies anew from its config, on its device."""
    for name, module in list(model.named_modules()):
        buffers = dict(module.named_buffers(recurse=False))
        if any(key.endswith("inv_freq") for key in buffers):
            make: Callable[..., nn.Module] = type(module)
            device = next(iter(buffers.values())).device
            model.set_submodule(name, make(module.config).to(device).train(module.training))


def _lengthen_table(model: PreTrainedModel, length: int, method: str) -> None:
    """Learned positions: the rows before that of position 0 (OPT's two) stay, the others become `length` many."""
    family, decoder = family_of(model.config), decoder_of(model)
    table = decoder.get_submodule(family.table)
    assert isinstance(table, nn.Embedding)
    with torch.no_grad():
        before, rows = table.weight[: family.first_row], table.weight[family.first_row :]
        longer = torch.cat((before, _tiled(rows, length) if method == "tile" else _interpolated(rows, length)))
    table.weight = nn.Parameter(longer, requires_grad=table.weight.requires_grad)
    table.num_embeddings = len(longer)
    if hasattr(decoder, "max_target_positions"):  # OPT's copy of the maximum
        decoder.max_target_positions = length  # type: ignore[assignment]


def _tiled(rows: Tensor, length: int) -> Tensor:
    return rows[torch.arange(length, device=rows.device) % len(rows)]


def _interpolated(rows: Tensor, length: int) -> Tensor:
    """Row `i` stands at the old position `i * (old - 1) / (length - 1)`: corners are aligned.

    So the first and the last row are kept, and every new one lies between two learned ones. Aligned by half pixels,
    rows beyond the outer ones would be clamped to them, and position 0, which GPT-2 and its like use as a place to
    rest attention, would be had several times. Fractions are of whole numbers, exact where a row falls on a row.
    """
    old, new = len(rows) - 1, length - 1
    at = torch.arange(length) * old
    low, high = (at // new).to(rows.device), (at // new + 1).clamp(max=old).to(rows.device)
    exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
    fraction = ((at % new).double() / new).to(exact)[:, None]
    return torch.lerp(exact[low], exact[high], fraction).to(rows.dtype)


def _lengthen_masks(model: PreTrainedModel) -> None:
    """Unconverted GPT-Neo attention keeps the mask over all pairs as a buffer."""
    for module in attention_modules(model):
        mask = getattr(module, "bias", None)
        if isinstance(mask, Tensor) and mask.ndim == 4:
            module.bias = square(module, mask.device)
