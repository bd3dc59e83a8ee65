"""How spans reach the attention of a model: one attention function and one mask function, registered by one name.

What the mask function returns in place of a mask are the documents (`Segments`), so they reach every layer in
whatever way the family hands its mask on, gradient checkpointing included.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..attention import Segments, UnsupportedSpan, attend
from ..attention.softmax import Softmax
from ..spans import Span

NAME = "masformer"
"""The attention implementation's name. It must not contain flash, sdpa, flex_attention, "/" or "paged|"."""

NOT_HONOURED = ("position_bias",)
"""Arguments of attention functions that change the result and that `attend` does not compute."""


Watch = Callable[[Span, Callable[[Span], Tensor], Tensor, Tensor, Softmax], Tensor]
"""What `watched` puts in the place of a layer's attention; its own span, attention over any span, and what both are
computed from: queries and keys `[batch, heads or kv_heads, tokens, dim]`, and how their scores become weights."""


class Current(threading.local):
    """The documents of the forward that runs in this thread."""

    segments: Segments | None = None


current = Current()


def span_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Segments | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    eager: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: `[batch, heads, tokens, dim]` in, `[batch, tokens, ...]` out."""
    span: Span | None = getattr(module, "span", None)
    if span is None or attention_mask is None:
        raise UnsupportedSpan(
            "attention 'masformer' was reached outside a converted model: use masformer.convert(model, plan)"
        )
    if not isinstance(attention_mask, Segments):
        raise UnsupportedSpan("a ready-made attention mask over pairs cannot be combined with spans")
    for name in NOT_HONOURED:
        if kwargs.get(name) is not None:
            raise UnsupportedSpan(f"this model passes {name} to its attention, which spans do not honour")
    softmax = Softmax(scaling, dropout, softcap, s_aux, eager)

    def over(other: Span) -> Tensor:
        return attend(query, key, value, other, segments=attention_mask, **vars(softmax))

    watch: Watch | None = getattr(module, "watch", None)
    out = over(span) if watch is None else watch(span, over, query, key, softmax)
    return out.transpose(1, 2).contiguous(), None


def documents_as_mask(**kwargs: Any) -> Segments | None:
    """The mask function: documents and padding instead of a mask over pairs, which is never made."""
    return current.segments


@contextlib.contextmanager
def watched(modules: Sequence[nn.Module], watches: Sequence[Watch]) -> Iterator[None]:
    """Inside the block each of these attention modules of a converted model computes what its `Watch` returns:
    `[batch, heads, tokens, value dim]`.
    """
    try:
        for module, watch in zip(modules, watches, strict=True):
            module.watch = watch  # type: ignore[assignment]
        yield
    finally:
        for module in modules:
            vars(module).pop("watch", None)


AttentionInterface.register(NAME, span_attention)
AttentionMaskInterface.register(NAME, documents_as_mask)
