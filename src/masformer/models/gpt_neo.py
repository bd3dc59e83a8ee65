"""GPT-Neo, which computes its attention itself: the one step of it that spans replace.

Its scores are not scaled, and are made in float32 whatever the model's dtype (transformers/models/gpt_neo,
GPTNeoSelfAttention._attn). Every layer holds its mask as a square of bools over all positions, 268 MB a layer at
16,384 positions: it is taken off while the model is converted.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoFlashAttention2

from ..attention.blockwise import MOST_CHUNK
from ..errors import InputError
from ..spans import Full, PlanError, SpanPlan, Window
from .fronts import Front
from .interface import span_attention


class SpanGPTNeoAttention(Front):
    """In front of GPTNeoSelfAttention."""

    def _attn(
        self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """`[batch, heads, tokens, dim]` in and out; bit for bit the parent's over `MOST_CHUNK` keys."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        eager = key.shape[2] <= MOST_CHUNK
        dropout = self.attn_dropout.p if self.training else 0.0
        values = value if eager else value.to(dtype)
        out, weights = span_attention(
            self, query.to(dtype), key.to(dtype), values, attention_mask, scaling=1.0, dropout=dropout, eager=eager
        )
        return out.transpose(1, 2).to(value.dtype), weights

    def entered(self: Any) -> None:
        """Take the mask off.

        Raises:
            InputError: flash attention, which goes round `_attn`.
        """
        if isinstance(self, GPTNeoFlashAttention2):
            raise InputError("a GPT-Neo with flash_attention_2 cannot be converted: load it with 'eager'")
        del self.bias

    def left(self: Any) -> None:
        """Put the mask back."""
        self.bias = nn.Buffer(square(self, self.k_proj.weight.device), persistent=False)


@torch.inference_mode(False)  # training could not use a tensor that was made inside inference_mode
def square(module: Any, device: torch.device) -> Tensor:
    """The mask that a GPTNeoSelfAttention holds for the maximum in its config, `[1, 1, length, length]`."""
    length = module.config.max_position_embeddings
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if module.attention_type == "local":
        seen ^= seen.tril(-module.config.window_size)
    return seen[None, None]


def with_attention_types(config: PreTrainedConfig, plan: SpanPlan) -> PreTrainedConfig:
    """A copy of a GPT-Neo config whose own layers have the spans of `plan`, for software that knows GPT-Neo alone.

    Raises:
        PlanError: spans other than Full and one Window without sinks, for which GPT-Neo has no word.
    """
    local = {span for span in plan if not isinstance(span, Full)}
    if len(local) > 1 or any(not isinstance(span, Window) or span.sinks for span in local):
        raise PlanError(f"GPT-Neo knows full attention and one window without sinks, not {plan}")
    kinds = ["local" if span in local else "global" for span in plan]
    changed = copy.deepcopy(config)
    changed.attention_types, changed.attention_layers = [[[kind], 1] for kind in kinds], kinds
    for span in local:
        changed.window_size = span.size  # type: ignore[attr-defined]
    return changed
