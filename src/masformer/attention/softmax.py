"""One call of attention over keys that are all at hand: by torch's kernels, or written out where they cannot."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Softmax:
    """How the scores of a layer become weights, the same for all of its queries."""

    scale: float | None = None
    """Factor of the scores, default dim ** -0.5."""
    dropout: float = 0.0
    """Probability with which weights are dropped."""
    softcap: float | None = None
    """Scores become `softcap * tanh(score / softcap)` (Gemma 2, arXiv 2408.00118, section 2)."""
    sink_logits: Tensor | None = None
    """`[heads]`: one more score in every softmax, whose weight is thrown away (gpt-oss, arXiv 2508.10925)."""
    eager: bool = False
    """Written out in any case, as transformers' eager attention does: the same bits in one call over all pairs."""

    @property
    def written_out(self) -> bool:
        """Whether torch's kernels cannot be used, since they take neither softcap nor sink logits."""
        return self.eager or self.softcap is not None or self.sink_logits is not None

    def factor(self, q: Tensor) -> float:
        """What scores are multiplied by."""
        return q.shape[3] ** -0.5 if self.scale is None else self.scale

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Attention with fewer key heads than query heads allowed; `[batch, heads, queries, value dim]`.

        Args:
            q: `[batch, heads, queries, dim]`; k, v: `[batch, kv_heads, keys, dim]`.
            mask: true where a key is seen, broadcast to `[batch, heads, queries, keys]`.
            causal: query i sees keys 0 to i, and no mask is given.
        """
        if self.written_out:
            return self._written_out(q, k, v, mask, causal)
        groups = q.shape[1] // k.shape[1]
        # Keys are repeated where a mask is given, since `enable_gqa` falls back to the slow kernel there on CUDA
        # (transformers does the same, integrations/sdpa_attention.py), and where gradients are to be taken in half
        # precision on the CPU, since torch adds them up over the heads in bfloat16. `attend_grouped` does better.
        rounded = q.requires_grad and q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16)
        if groups > 1 and (mask is not None or rounded):
            k, v, groups = _repeated(k, groups), _repeated(v, groups), 1
        settings: dict[str, Any] = {"dropout_p": self.dropout, "scale": self.scale, "enable_gqa": groups > 1}
        if causal:  # not is_causal=causal: under torch.compile it may be a symbol, which the kernel does not take
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **settings)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **settings)

    def attend_grouped(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor) -> Tensor:
        """`attend` under a mask `[queries, keys]` that all heads share: the query heads of a key head stand one after
        the other along the queries, so keys are neither repeated nor their gradients rounded one head at a time.
        """
        groups = q.shape[1] // k.shape[1]
        if groups == 1 or self.written_out:
            return self.attend(q, k, v, mask=mask)
        stacked = q.unflatten(1, (k.shape[1], groups)).flatten(2, 3)
        out = self.attend(stacked, k, v, mask=mask.repeat(groups, 1))
        return out.unflatten(2, (groups, q.shape[2])).flatten(1, 2)

    def _written_out(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Step by step in the order and the dtypes of transformers' eager attention (models/gemma2, models/gpt_oss)."""
        groups = q.shape[1] // k.shape[1]
        scores = q @ _repeated(k, groups).transpose(2, 3) * self.factor(q)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        if self.sink_logits is not None:
            extra = self.sink_logits.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
            scores = torch.cat([scores, extra.to(scores.dtype)], dim=-1)
            scores = scores - scores.max(dim=-1, keepdim=True).values
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
        if self.sink_logits is not None:
            weights = weights[..., :-1]
        return F.dropout(weights, self.dropout) @ _repeated(v, groups)


def _repeated(x: Tensor, groups: int) -> Tensor:
    """Every key head once for each of its query heads."""
    return x if groups == 1 else x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)
