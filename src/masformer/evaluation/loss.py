"""Loss by position: how well a token is predicted, by how many tokens stand before it.

    result = loss_by_position(model, [ids, ...])        ids: one document each, [tokens]
    result.nats_per_token, [(b.low, b.nats_per_token) for b in result.buckets]

A model whose spans are too short shows it here: its loss stops falling where its parent's goes on. Documents
run one by one, without padding, so the numbers depend neither on batches nor on the order. Never are the
logits of a whole document held at once.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..errors import InputError
from ..models.head import Head
from ..models.positions import check_positions
from ..models.selfcheck import evaluating


@dataclasses.dataclass(frozen=True, slots=True)
class Bucket:
    """Predicted tokens that stand at position `low` up to `high` - 1 of their document; `nats` is their sum."""

    low: int
    high: int
    tokens: int
    nats: float

    @property
    def nats_per_token(self) -> float | None:
        """None where no document reaches this far."""
        return self.nats / self.tokens if self.tokens else None

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "nats_per_token": self.nats_per_token}


@dataclasses.dataclass(frozen=True, slots=True)
class LossByPosition:
    """Loss of all predicted tokens, and by position.

    tokens: how many were predicted, all of a document but its first.
    nats: the sum of -log p over them.
    bytes: the size of the text that they stand for, where it is known.
    """

    buckets: tuple[Bucket, ...]
    tokens: int
    nats: float
    bytes: int | None = None

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the nats per token; infinite where that has no floating-point number."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """The measure to compare models of different tokenizers by."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None

    def to_json(self) -> dict[str, Any]:
        """All numbers as one object."""
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "nats": self.nats,
            "nats_per_token": self.nats_per_token,
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "bits_per_byte": self.bits_per_byte,
            "buckets": [bucket.to_json() for bucket in self.buckets],
        }


@torch.no_grad()
def token_losses(model: PreTrainedModel, ids: Tensor, *, chunk: int = 512) -> Tensor:
    """Nats of every token but the first, float32, `[batch, tokens - 1]`, for ids `[batch, tokens]` without padding.

    The head runs on `chunk` positions at a time, so at most `[batch, chunk, vocabulary]` logits exist.

    Raises:
        InputError: a head that is no plain linear layer, as under LoRA.
    """
    head = Head.of(model)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    pieces = zip(hidden.split(chunk, dim=1), ids[:, 1:].split(chunk, dim=1), strict=True)
    losses = [F.cross_entropy(head(x).float().transpose(1, 2), wanted, reduction="none") for x, wanted in pieces]
    return torch.cat(losses, dim=1)


def loss_by_position(
    model: PreTrainedModel,
    documents: Sequence[Tensor],
    *,
    edges: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> LossByPosition:
    """The loss of `model` on documents of token ids `[tokens]`, one by one, in evaluation mode.

    Args:
        edges: borders of the buckets, increasing; bucket i holds the positions edges[i] .. edges[i + 1] - 1.
            Powers of two up to the longest document if None. Positions count from 0; the first is not predicted.
        sizes: bytes of text that each document's predicted tokens stand for.
        progress: called after every document with its number of tokens.

    Raises:
        InputError: no documents; one shorter than two tokens or longer than the model's positions; a loss that
            is not a number; edges that do not increase.
    """
    _check_documents(model, documents)
    edges = default_edges(max(len(ids) for ids in documents)) if edges is None else list(edges)
    if len(edges) < 2 or edges[0] < 1 or any(low >= high for low, high in itertools.pairwise(edges)):
        raise InputError(f"the edges of position buckets must increase, from 1 or more, got {edges}")
    counts, sums = [0] * (len(edges) - 1), [0.0] * (len(edges) - 1)
    tokens, nats = 0, 0.0
    with evaluating(model):
        for number, ids in enumerate(documents):
            losses = token_losses(model, ids[None].to(model.device))[0].double().cpu()
            if not bool(losses.isfinite().all()):
                raise InputError(f"the loss of document {number} is not a finite number: the model is not usable")
            tokens, nats = tokens + len(losses), nats + float(losses.sum())
            for index, (low, high) in enumerate(itertools.pairwise(edges)):
                inside = losses[low - 1 : high - 1]
                counts[index] += len(inside)
                sums[index] += float(inside.sum())
            if progress is not None:
                progress(len(ids))
    spans = zip(itertools.pairwise(edges), counts, sums, strict=True)
    buckets = tuple(Bucket(low, high, count, total) for (low, high), count, total in spans)
    return LossByPosition(buckets, tokens, nats, sum(sizes) if sizes is not None else None)


def default_edges(length: int) -> list[int]:
    """Powers of two from 1, and `length`, which ends the last bucket: [1, 2, 4, 6] for 6 tokens."""
    powers = itertools.takewhile(lambda edge: edge < length, (2**power for power in itertools.count()))
    return [*powers, length]


def _check_documents(model: PreTrainedModel, documents: Sequence[Tensor]) -> None:
    if not len(documents):
        raise InputError("no documents: the loss needs at least one of two tokens or more")
    for number, ids in enumerate(documents):
        if ids.dim() != 1:
            raise InputError(f"document {number} has shape {list(ids.shape)}: give one row of token ids each")
        if len(ids) < 2:
            raise InputError(f"document {number} has {len(ids)} tokens: a loss needs at least 2")
        check_positions(model.config, len(ids))
