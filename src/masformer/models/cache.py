"""Key-value caches that hold no more than their layer's span can still see.

One class of layer serves every span. It keeps the sinks and a run of the newest keys in one tensor, which
`attend` takes as it is. What lies before the span is copied away, not cut off as a view: a view would keep
the whole prompt alive (transformers/cache_utils.py, DynamicSlidingWindowLayer.update).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..attention import Segments, UnsupportedSpan
from ..spans import Span, SpanPlan


@dataclasses.dataclass
class Timeline:
    """Which documents the rows of a cache hold: shared by the cache and its layers."""

    segments: Segments | None = None
    """The newest: set before the layers' `update`."""


class SpanLayer(DynamicLayer):
    """Keys and values `[batch, kv_heads, sinks + run, dim]` of one layer: the sinks once something was dropped."""

    keys: Tensor
    values: Tensor

    def __init__(self, span: Span, timeline: Timeline) -> None:
        super().__init__()
        self.span, self.timeline = span, timeline
        self.is_sliding = span.is_local
        self.seen = 0
        self.first = 0
        """Column where the run of held keys begins; the sinks stand before it where this is not 0."""
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Keep everything until `crop` is called: assisted decoding takes tokens back."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add new keys and values `[batch, kv_heads, new, dim]`; return what `attend` needs for them."""
        segments, new = self.timeline.segments, key_states.shape[2]
        if segments is None or (segments.seen, segments.new) != (self.seen, new):
            raise UnsupportedSpan(
                "this cache is out of step with the model: it belongs to a converted model, or a forward with it "
                "failed half-way; start with a new one"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.keys.numel() > 0
        if held and self.keys.shape[0] != key_states.shape[0]:
            raise UnsupportedSpan(f"the cache holds {self.keys.shape[0]} rows, the batch has {key_states.shape[0]}")
        keys = torch.cat([self.keys, key_states], dim=2) if held else _alone(key_states)
        values = torch.cat([self.values, value_states], dim=2) if held else _alone(value_states)
        self.keys, self.values = keys, values
        self.seen += new
        if not self.record_past:
            self._drop(segments)
        return keys, values

    def _drop(self, segments: Segments) -> None:
        """Let go of all keys that no later token sees."""
        first = segments.first_needed(self.span)
        if first <= self.first:
            return
        sinks, run = self.span.sinks, first - self.first + (self.span.sinks if self.first else 0)
        held = [self.keys, self.values]
        if sinks:
            index = self._sink_index(segments)
            held = [torch.cat([_pick(x, index), x[:, :, run:]], dim=2) for x in held]
        else:
            held = [x[:, :, run:].clone() for x in held]
        self.keys, self.values = held
        self.first = first

    def _sink_index(self, segments: Segments) -> Tensor:
        """Where each row's sinks stand in what is held, `[batch or 1, sinks]`."""
        sinks, held = self.span.sinks, self.keys.shape[2]
        begins = torch.tensor([row.begin for row in segments.rows] if segments.rows else [0])
        column = begins[:, None] + torch.arange(sinks)
        index = column - self.first + (sinks if self.first else 0)
        # A sink that was dropped earlier already has its slot; one that is still to come has none yet.
        index = torch.where(column < self.first, torch.arange(sinks), index)
        return index.clamp(max=held - 1).to(self.keys.device)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen - self.first + query_length, self.first

    def get_seq_length(self) -> int:
        return self.seen

    def reset(self) -> None:
        super().reset()
        self.seen = self.first = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back `-tokens_to_remove` tokens and let go of what is not needed any more."""
        tokens, segments = abs(tokens_to_remove), self.timeline.segments
        if segments is None or not self.is_initialized:
            return
        if tokens:
            self.seen -= tokens
            self.keys, self.values = self.keys[:, :, :-tokens].clone(), self.values[:, :, :-tokens].clone()
        self._drop(segments)


def _alone(x: Tensor) -> Tensor:
    """`x` without the rest of a fused projection, which a view of it would keep alive (GPT-NeoX, Phi-3, GPT-2)."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone(memory_format=torch.contiguous_format)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """`x[b, h, index[b, s], d]` for all h and d."""
    batch, heads, _, dim = x.shape
    return x.gather(2, index[:, None, :, None].expand(batch, heads, -1, dim))


class SpanCache(DynamicCache):
    """A cache with one `SpanLayer` per layer of a plan.

    A converted model makes its own; make one to hold it yourself: `SpanCache(plan_of(model))`.
    """

    def __init__(self, plan: SpanPlan) -> None:
        super().__init__()
        self._become(plan)

    def _become(self, plan: SpanPlan) -> None:
        self.timeline = Timeline()
        self.layers = [SpanLayer(span, self.timeline) for span in plan]
        self.layer_class_to_replicate = None

    @property
    def span_layers(self) -> list[SpanLayer]:
        """The layers, by their type."""
        return self.layers  # type: ignore[return-value]

    @classmethod
    def adopt(cls, cache: DynamicCache, plan: SpanPlan) -> SpanCache:
        """Turn an empty `DynamicCache`, such as `generate` makes, into one for the plan, in place.

        Raises:
            UnsupportedSpan: a cache of another kind, or one that already holds tokens.
        """
        if isinstance(cache, cls):
            if [layer.span for layer in cache.span_layers] != list(plan):
                raise UnsupportedSpan("this cache was made for another plan")
            return cache
        if type(cache) is not DynamicCache or cache.offloading:
            kind = f"offloaded {type(cache).__name__}" if getattr(cache, "offloading", False) else type(cache).__name__
            raise UnsupportedSpan(
                f"a {kind} cannot honour spans: use the default cache of generate(), a DynamicCache or a SpanCache"
            )
        if cache.get_seq_length() > 0:
            raise UnsupportedSpan(
                f"the cache already holds {cache.get_seq_length()} tokens that were not computed with these spans"
            )
        cache.__class__ = cls
        cache._become(plan)  # type: ignore[attr-defined]
        return cache  # type: ignore[return-value]

    def held_bytes(self) -> int:
        """Bytes of the storage behind all keys and values."""
        tensors = [x for layer in self.span_layers if layer.is_initialized for x in (layer.keys, layer.values)]
        return sum(storage.nbytes() for storage in {x.untyped_storage() for x in tensors})

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        rows = self.timeline.segments.rows if self.timeline.segments else None
        self._select([index for index in range(len(rows or ())) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        rows = self.timeline.segments.rows if self.timeline.segments else None
        self._select(torch.arange(len(rows))[indices.cpu()].tolist() if rows else [])

    def _select(self, indices: list[int]) -> None:
        if self.timeline.segments:
            self.timeline.segments = self.timeline.segments.select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}")
        if self.timeline.segments is None:
            return
        segments = self.timeline.segments.crop(-tokens_to_remove)
        for layer in self.span_layers:
            if segments.first_needed(layer.span) < layer.first:
                raise UnsupportedSpan(
                    f"cannot take back {-tokens_to_remove} tokens: {layer.span} has let go of keys from before; "
                    "call activate_past_recording() first"
                )
        self.timeline.segments = segments
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.timeline.segments = None
