"""Give a pretrained decoder the spans of a plan, in place, and take them back.

    convert(model, plan)            restore(model)            with applied(model, plan): ...

How it works: the attention modules carry their span; the config names one attention function, `masformer`,
registered with transformers beside its own; and two classes are put in front of the model's (as FSDP2 does):
one that works out documents and cache before the decoder's forward, one that saves and refuses. Nothing that
exists in transformers is changed.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.generation import GenerationMixin

from ..attention import Segments, UnsupportedSpan, attend
from ..errors import InputError
from ..spans import Span, SpanPlan
from .cache import SpanCache
from .config import saved_as_converted
from .families import attention_modules, check_length, family_of, native_plan, spans_on
from .selfcheck import selfcheck

NAME = "masformer"
"""The attention implementation's name. It must not contain flash, sdpa, flex_attention, "/" or "paged|"."""

NOT_HONOURED = ("softcap", "s_aux", "position_bias")
"""Arguments of attention functions that change the result and that `attend` does not compute."""


def span_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: `[batch, heads, tokens, dim]` in, `[batch, tokens, ...]` out."""
    span: Span | None = getattr(module, "span", None)
    if span is None or segments is None:
        raise UnsupportedSpan(
            "attention 'masformer' was reached outside a converted model: use masformer.convert(model, plan)"
        )
    if attention_mask is not None:
        raise UnsupportedSpan("a ready-made attention mask over pairs cannot be combined with spans")
    for name in NOT_HONOURED:
        if kwargs.get(name) is not None:
            raise UnsupportedSpan(f"this model passes {name} to its attention, which spans do not honour yet")
    out = attend(query, key, value, span, scale=scaling, segments=segments, dropout=dropout)
    return out.transpose(1, 2).contiguous(), None


def no_mask(**kwargs: Any) -> None:
    """The mask function: documents and padding travel as `Segments`, so no mask over pairs is ever made."""
    return


AttentionInterface.register(NAME, span_attention)
AttentionMaskInterface.register(NAME, no_mask)


def _refuse_unknown_documents(kwargs: dict[str, Any]) -> None:
    """Borders of packed documents reach us by `position_ids` only."""
    given = [name for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx") if kwargs.get(name) is not None]
    if given and kwargs.get("position_ids") is None:
        raise UnsupportedSpan(f"{given[0]} without position_ids: packed documents are told apart by position_ids")


class SpanDecoder:
    """In front of a decoder's class: documents, padding and cache are settled once, before the layers run."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward  # type: ignore[misc]
        names = [name for name in inspect.signature(forward).parameters if name != "kwargs"]
        kwargs |= dict(zip(names, args, strict=False))
        if self.config._attn_implementation != NAME:
            raise UnsupportedSpan(
                f"the attention implementation was changed to {self.config._attn_implementation!r}, which ignores "
                "the spans: call masformer.restore(model) first"
            )
        if kwargs.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise UnsupportedSpan("output_attentions: local attention does not make attention weights over all pairs")
        _refuse_unknown_documents(kwargs)
        if kwargs.get("is_causal", True) is False or getattr(self.config, "is_causal", True) is False:
            raise UnsupportedSpan("is_causal=False: spans are causal, a query never sees what comes after it")
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if tokens is None:
            return forward(**kwargs)  # which says what is missing
        batch, new = tokens.shape[:2]
        mask, positions = kwargs.pop("attention_mask", None), kwargs.get("position_ids")
        cache = self._span_cache(kwargs)
        if cache is None:
            segments = Segments.of(batch, new, attention_mask=mask, position_ids=positions)
        else:
            segments = cache.advance(batch, new, mask, positions)
        return forward(**kwargs, segments=segments)

    def _span_cache(self: Any, kwargs: dict[str, Any]) -> SpanCache | None:
        """The cache of this call: the caller's, a new one where one is wanted, or None."""
        plan = spans_on(self)
        use_cache = kwargs.get("use_cache")
        wanted = getattr(self.config, "use_cache", False) if use_cache is None else use_cache
        if self.training and use_cache is None:  # nobody asked: training holds no keys beyond the layer that runs
            wanted = kwargs["use_cache"] = False
        if self.training and getattr(self, "gradient_checkpointing", False):
            if kwargs.get("past_key_values") is not None:
                raise UnsupportedSpan("a cache cannot be used with gradient checkpointing: pass use_cache=False")
            wanted = kwargs["use_cache"] = False
        if kwargs.get("past_key_values") is None:
            if not wanted:
                return None
            kwargs["past_key_values"] = SpanCache(plan)
        return SpanCache.adopt(kwargs["past_key_values"], plan)

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedSpan("the decoder alone would be saved without its spans: save the whole converted model")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(super().__reduce_ex__(protocol), type(self))


class SpanModel:
    """In front of a causal language model's class: saves the plan, and refuses what would drop it."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(super().__reduce_ex__(protocol), type(self))

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write a folder of model type `masformer`; see `masformer.models.config`."""
        with saved_as_converted(self.config, plan_of(self)):
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def set_attn_implementation(self: Any, attn_implementation: Any, **kwargs: Any) -> None:
        if attn_implementation != NAME:
            raise UnsupportedSpan(
                f"attention implementation {attn_implementation!r} would ignore the spans of this converted model: "
                "call masformer.restore(model) first"
            )

    def generate_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedSpan("continuous batching (generate_batch) ignores spans: use generate() with a padded batch")

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def _prepare_cache_for_generation(
        self: Any, generation_config: Any, model_kwargs: Any, *args: Any, **kw: Any
    ) -> None:
        """Refuse other caches before any work; a plain one is adopted before `generate` asks it to record."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise UnsupportedSpan(
                f"cache_implementation={kind!r} cannot honour spans: leave it out, the default cache is bounded by them"
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kw)  # type: ignore[misc]
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            adopted = SpanCache.adopt(cache, plan_of(self))
            if generation_config.is_assistant:
                adopted.activate_past_recording()


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
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        raise InputError(f"{type(model).__name__} is not a causal language model of transformers")
    family_of(model.config)
    check_length(plan, model.config)
    if getattr(model.config, "is_causal", True) is False:
        raise InputError("the model's config says is_causal=False: spans are causal")
    if "forward" in vars(model.base_model):
        raise InputError(
            "the decoder's forward was replaced on this object (as a device_map over several devices does): "
            "convert the model first"
        )
    before = plan_of(model) if is_converted(model) else None
    for module, span in zip(attention_modules(model), plan, strict=True):
        module.span = span  # type: ignore[assignment]
    if before is None:
        model._attention_before = model.config._attn_implementation
        model.config._attn_implementation = NAME
        fronts: tuple[tuple[Any, type], ...] = ((model.base_model, SpanDecoder), (model, SpanModel))
        for part, front in fronts:
            part.__class__ = _in_front(front, type(part))  # type: ignore[arg-type]
    if check:
        try:
            selfcheck(model)
        except BaseException:
            restore(model)
            if before is not None:
                convert(model, before, check=False)
            raise
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `convert`, in place: class, attention implementation and attributes are as they were.

    Raises:
        InputError: a model that is not converted.
    """
    if not is_converted(model):
        raise InputError(f"{type(model).__name__} is not converted: there is nothing to restore")
    for part in (model.base_model, model):
        if type(part).__bases__[0] not in (SpanDecoder, SpanModel):
            raise InputError(f"another library has changed the class of {type(part).__name__}: undo that first")
    for module in attention_modules(model):
        del module.span
    model.config._attn_implementation = model._attention_before  # type: ignore[assignment]
    del model._attention_before
    for part in (model.base_model, model):
        part.__class__ = type(part).__bases__[1]
    return model


@contextlib.contextmanager
def applied(model: PreTrainedModel, plan: SpanPlan, *, check: bool = False) -> Iterator[PreTrainedModel]:
    """`model` with the spans of `plan` inside the block, as it was afterwards, whatever happens."""
    before = plan_of(model) if is_converted(model) else None
    convert(model, plan, check=check)
    try:
        yield model
    finally:
        if before is None:
            restore(model)
        else:
            convert(model, before, check=False)


def plan_of(model: PreTrainedModel) -> SpanPlan:
    """The spans of a model: those it was converted to, or those it has by itself.

    Raises:
        InputError: a model that is not supported.
    """
    if not is_converted(model):
        return native_plan(model.config)
    return spans_on(model)


def _reduced(reduced: Any, cls: type) -> Any:
    """How to copy or pickle an object whose class was made here: by the two classes it was made of."""
    return (_blank, cls.__bases__, *reduced[2:])


def _blank(front: type, behind: type) -> Any:
    cls: Any = _in_front(front, behind)
    return cls.__new__(cls)


@functools.cache
def _in_front(front: type, behind: type) -> type:
    """A class that is `front` before `behind`, under the name and module of the latter."""
    return type(behind.__name__, (front, behind), {"__module__": behind.__module__, "__doc__": behind.__doc__})
