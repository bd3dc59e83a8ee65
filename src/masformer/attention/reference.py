"""The definition of mixed-span attention as a dense mask: the oracle of the tests, never optimised.

Builds the whole score matrix, works in the dtype of its inputs (float64 for an oracle), and shares no code
with the fast path beyond `Span`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spans import Span


def visible(span: Span, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """Which keys each query sees, `[queries, keys]` (leading dimensions broadcast), by `Span.start`.

    Positions are long tensors `[..., queries]` and `[..., keys]`, counted within one document.
    """
    query, key = query_positions[..., :, None], key_positions[..., None, :]
    return (key <= query) & ((key >= span.unclamped_start(query)) | (key < span.sinks))


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Span,
    *,
    scale: float | None = None,
    documents: Tensor | None = None,
    positions: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of the last `queries` tokens to all `keys`.

    Args:
        q: `[batch, heads, queries, dim]`; k, v: `[batch, kv_heads, keys, dim]`, kv_heads dividing heads.
        documents: `[batch, keys]`, the document of each token, negative for padding; default one document.
        positions: `[batch, keys]`, position of each token in its document; default 0, 1, 2, ...
        softcap: scores become `softcap * tanh(score / softcap)`.
        sink_logits: `[heads]`, `exp(logit)` joins the sum that the weights of a query are divided by.

    Returns:
        `[batch, heads, queries, value dim]`, zero where the query is padding.
    """
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    index = torch.arange(keys, device=q.device).expand(batch, keys)
    documents = torch.zeros_like(index) if documents is None else documents
    positions = index if positions is None else positions
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    v = v.repeat_interleave(heads // v.shape[1], dim=1)
    query_documents = documents[:, -queries:]
    mask = (
        visible(span, positions[:, -queries:], positions)
        & (query_documents[:, :, None] == documents[:, None, :])
        & (index[:, -queries:, None] >= index[:, None, :])
        & (documents[:, None, :] >= 0)
    )[:, None]
    scores = q @ k.transpose(-1, -2) * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~mask, float("-inf"))
    total = scores.logsumexp(-1, keepdim=True)
    if sink_logits is not None:
        total = torch.logaddexp(total, sink_logits.reshape(1, -1, 1, 1))
    weights = (scores - total).exp().masked_fill(~mask, 0.0)
    return weights @ v
