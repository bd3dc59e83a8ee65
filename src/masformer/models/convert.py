"""Give a pretrained decoder the spans of a plan, in place, and take them back.

    convert(model, plan)            restore(model)            with applied(model, plan): ...

How it works: the attention modules carry their span; the config names one attention function, `masformer`
(`interface`), registered with transformers beside its own; and classes are put in front of the model's (`spanned`).
Nothing that exists in transformers is changed, and neither are the weights, the positions or the RoPE of a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin

from ..errors import InputError
from ..spans import SpanPlan
from .families import attention_modules, check_length, class_of, family_of, native_plan, refuse_spread, spans_on
from .fronts import enter, front_of, leave
from .interface import NAME
from .selfcheck import selfcheck
from .spanned import SpanModel, fronts_of


def is_converted(model: nn.Module) -> bool:
    """Whether a model carries spans of ours."""
    return isinstance(model, SpanModel)


def convert(model: PreTrainedModel, plan: SpanPlan, *, check: bool = True) -> PreTrainedModel:
    """Give `model` the spans of `plan`, in place, and return it. A converted model gets the new plan.

    Weights are not touched; an all-`Full` plan changes no bit of the logits. With `check` the probes of
    `masformer.models.selfcheck` run afterwards, about a second on a small model; if one fails, the model is
    given back as it was.

    Raises:
        InputError: a model that is not supported, with the list of those that are.
        PlanError: a plan for another number of layers.
        SelfCheckError: the converted model does not do what the plan says.
    """
    _refuse(model)
    check_length(plan, model.config)
    before = plan_of(model) if is_converted(model) else None
    if before is None:
        model._attention_before = model.config._attn_implementation
    try:
        _set_spans(model, plan)
        if before is None:
            model.config._attn_implementation = NAME
            for part, front in fronts_of(model):
                enter(part, front)
        if check:
            selfcheck(model)
    except BaseException:
        if before is None:
            _take_off(model)
        else:
            _set_spans(model, before)
        raise
    return model


def _set_spans(model: PreTrainedModel, plan: SpanPlan) -> None:
    for module, span in zip(attention_modules(model), plan, strict=True):
        module.span = span  # type: ignore[assignment]


def _take_off(model: PreTrainedModel) -> None:
    """Undo a conversion, or as much of one as was done."""
    for part, front in reversed(fronts_of(model)):
        if front_of(part) is front:
            leave(part)
    for module in attention_modules(model):
        vars(module).pop("span", None)
    model.config._attn_implementation = model._attention_before  # type: ignore[assignment]
    del model._attention_before


def _refuse(model: PreTrainedModel) -> None:
    """Refuse what is no causal language model, is not supported, or was changed so that spans would not reach it."""
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        raise InputError(f"{type(model).__name__} is not a causal language model of transformers")
    family_of(model.config)
    known = class_of(model.config)
    if not isinstance(model, known):
        raise InputError(f"{type(model).__name__} is not the {known.__name__} of transformers, nor derived from it")
    if getattr(model.config, "is_causal", True) is False:
        raise InputError("the model's config says is_causal=False: spans are causal")
    refuse_spread(model, "convert")


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `convert`, in place: class, attention implementation and attributes are as they were.

    Raises:
        InputError: a model that is not converted.
    """
    if not is_converted(model):
        raise InputError(f"{type(model).__name__} is not converted: there is nothing to restore")
    for part, front in fronts_of(model):
        if front_of(part) is not front:
            raise InputError(f"another library has changed the class of {type(part).__name__}: undo that first")
    _take_off(model)
    return model


@contextlib.contextmanager
def applied(model: PreTrainedModel, plan: SpanPlan, *, check: bool = False) -> Iterator[PreTrainedModel]:
    """`model` with the spans of `plan` inside the block, as it was afterwards, whatever happens."""
    before = plan_of(model) if is_converted(model) else None
    convert(model, plan, check=check)
    try:
        yield model
    finally:
        if before is not None:
            convert(model, before, check=False)
        elif is_converted(model):
            restore(model)


def plan_of(model: PreTrainedModel) -> SpanPlan:
    """The spans of a model: those it was converted to, or those it has by itself.

    Raises:
        InputError: a model that is not supported.
    """
    if not is_converted(model):
        return native_plan(model.config)
    return spans_on(model)
