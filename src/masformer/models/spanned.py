"""What a converted model does beside its parent: it settles documents and cache before the decoder's forward, saves
the plan with the model, and refuses what would drop the spans.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..attention import Segments, UnsupportedSpan
from ..files import MANIFEST, is_ours
from .cache import SpanCache
from .config import saved_as_converted
from .families import attention_modules, decoder_of, family_of, spans_on
from .fronts import Front
from .gpt_neo import SpanGPTNeoAttention
from .interface import NAME, current
from .positions import check_positions

ATTENTION_FRONTS: dict[str, type[Front]] = {"gpt_neo": SpanGPTNeoAttention}
"""By model type: families whose attention modules do not use the attention interface."""


class SpanPart(Front):
    """In front of a class inside a causal language model, which alone would be saved without the spans."""

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedSpan("the decoder alone would be saved without its spans: save the whole converted model")


class SpanDecoder(SpanPart):
    """In front of a decoder's class: documents, padding and cache are settled once, before the layers run."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs |= dict(zip(self.forward_names, args, strict=False))
        self._refuse(kwargs)
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if tokens is None:
            return super().forward(**kwargs)  # type: ignore[misc]  # says what is missing
        batch, new = tokens.shape[:2]
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if positions is None and isinstance(mask, Tensor) and family_of(self.config).counts_real:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[..., -new:]
        cache = self._span_cache(kwargs)
        previous = None if cache is None else cache.timeline.segments
        segments = Segments.of(batch, new, previous=previous, attention_mask=mask, position_ids=positions)
        check_positions(self.config, segments.reach)
        if cache is not None:
            cache.timeline.segments = segments
        outer, current.segments = current.segments, segments
        try:
            return super().forward(**kwargs)  # type: ignore[misc]
        finally:
            current.segments = outer

    def _refuse(self: Any, kwargs: dict[str, Any]) -> None:
        """What would be taken and not followed."""
        if self.config._attn_implementation != NAME:
            raise UnsupportedSpan(
                f"the attention implementation was changed to {self.config._attn_implementation!r}, which ignores "
                "the spans: call masformer.restore(model) first"
            )
        if kwargs.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise UnsupportedSpan("output_attentions: local attention does not make attention weights over all pairs")
        if kwargs.get("is_causal", True) is False or getattr(self.config, "is_causal", True) is False:
            raise UnsupportedSpan("is_causal=False: spans are causal, a query never sees what comes after it")
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            if kwargs.get(name) is not None:
                raise UnsupportedSpan(f"{name}: spans are for a decoder alone")
        given = [name for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx") if kwargs.get(name) is not None]
        if given and kwargs.get("position_ids") is None:
            raise UnsupportedSpan(f"{given[0]} without position_ids: packed documents are told apart by position_ids")

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


class SpanModel(Front):
    """In front of a causal language model's class: saves the plan, and refuses what would drop it."""

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write a folder of model type `masformer`; see `masformer.models.config`."""
        with saved_as_converted(self.config, spans_on(self)):
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        manifest = Path(save_directory) / MANIFEST
        if is_ours(manifest):  # of what has been replaced
            manifest.unlink()

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
        self: Any, generation_config: Any, model_kwargs: Any, mode: Any, batch: int, tokens: int
    ) -> None:
        """Refuse other caches and too many tokens before any work; a plain cache is adopted before `generate` asks it
        to record.
        """
        mask = model_kwargs.get("attention_mask")
        padding = int((mask.cumsum(-1) == 0).sum(-1).min()) if isinstance(mask, Tensor) else 0
        check_positions(self.config, tokens - padding)
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise UnsupportedSpan(
                f"cache_implementation={kind!r} cannot honour spans: leave it out, the default cache is bounded by them"
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch, tokens)  # type: ignore[misc]
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            adopted = SpanCache.adopt(cache, spans_on(self))
            if generation_config.is_assistant:
                adopted.activate_past_recording()


def fronts_of(model: PreTrainedModel) -> list[tuple[Any, type[Front]]]:
    """The parts of a causal language model that get a class in front of theirs, and which."""
    decoder, base = decoder_of(model), model.base_model
    attention = ATTENTION_FRONTS.get(model.config.model_type)
    parts: list[tuple[Any, type[Front]]] = [(module, attention) for module in attention_modules(model) if attention]
    return [*parts, (decoder, SpanDecoder), *([] if base is decoder else [(base, SpanPart)]), (model, SpanModel)]
