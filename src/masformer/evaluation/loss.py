"""Loss by position: how well a token is predicted, by how many tokens stand before it.

    result = loss_by_position(model, [ids, ...])        ids: one document each, [tokens]
    result.nats_per_token, [(b.low, b.nats_per_token) for b in result.buckets]
    losses = sliding_losses(model, ids, length=4096, stride=2048)         a document of any length
    bucketed(losses, repeat_distances(ids), [1, 16, 256, 4096])           the loss of what could be copied

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
def token_losses(model: PreTrainedModel, ids: Tensor, *, chunk: int = 512, first: int = 1) -> Tensor:
    """Nats of every token from position `first` on, float32, `[batch, tokens - first]`, for ids `[batch, tokens]`
    without padding.

    The head runs on `chunk` positions at a time, so at most `[batch, chunk, vocabulary]` logits exist.

    Raises:
        InputError: a head that is no plain linear layer, as under LoRA.
    """
    head = Head.of(model)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, first - 1 : -1]
    pieces = zip(hidden.split(chunk, dim=1), ids[:, first:].split(chunk, dim=1), strict=True)
    # With the vocabulary as the last axis, SmolLM2's losses are 5e-6 nats below float64's in the mean; as the middle
    # one of three, which torch's CPU kernel sums less exactly, they were 7e-5 below.
    return torch.cat([_cross_entropy(head(x), wanted) for x, wanted in pieces], dim=1)


def _cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """Nats `[batch, tokens]` of logits `[batch, tokens, vocabulary]`, in float32."""
    return F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)


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
    if not len(documents):
        raise InputError("no documents: the loss needs at least one of two tokens or more")
    for number, ids in enumerate(documents):
        check_document(ids, f"document {number}")
        check_positions(model.config, len(ids))
    edges = default_edges(max(len(ids) for ids in documents)) if edges is None else list(edges)
    _check_edges(edges, least=1)
    found = []
    with evaluating(model):
        for number, ids in enumerate(documents):
            found.append(token_losses(model, ids[None].to(model.device))[0].cpu())
            if not bool(found[-1].isfinite().all()):
                raise InputError(f"the loss of document {number} is not a finite number: the model is not usable")
            if progress is not None:
                progress(len(ids))
    losses, places = torch.cat(found), torch.cat([torch.arange(1, len(ids)) for ids in documents])
    buckets = tuple(Bucket(*row) for row in bucketed(losses, places, edges))
    size = sum(sizes) if sizes is not None else None
    return LossByPosition(buckets, len(losses), float(losses.double().sum()), size)


def sliding_losses(model: PreTrainedModel, ids: Tensor, *, length: int, stride: int, chunk: int = 512) -> Tensor:
    """Nats of every token but the first of one document `[tokens]` of any length: float32 `[tokens - 1]`, on the CPU.

    A document of at most `length` tokens runs whole. A longer one runs in windows of exactly `length` tokens, each
    from position 0 of the model on: window i begins at token i * stride, but the last so that it ends with the
    document. The first predicts all its tokens but the first, every other what the one before has not predicted: so
    each token once, and from token `length` on with at least length - stride tokens before it in its window
    (the strided perplexity of transformers' docs, perplexity.md; there the last window is shorter).

    Raises:
        InputError: a length beyond the model's positions, a stride outside 1 .. length - 1, a document of fewer than
            two tokens, a loss that is not a number.
    """
    check_positions(model.config, length)
    if not 1 <= stride < length:
        raise InputError(f"the stride of windows of {length} tokens must be 1 to {length - 1}, got {stride}")
    check_document(ids, "the document")
    parts, done = [], 1
    with evaluating(model):
        for start in range(0, max(len(ids) - length, 0) + stride, stride):
            end = min(start + length, len(ids))
            window = ids[max(end - length, 0) : end]
            first = len(window) - (end - done)
            parts.append(token_losses(model, window[None].to(model.device), chunk=chunk, first=first)[0].cpu())
            done = end
    losses = torch.cat(parts)
    if not bool(losses.isfinite().all()):
        raise InputError("the loss of the document is not a finite number: the model is not usable")
    return losses


def repeat_distances(ids: Tensor, n: int = 3) -> Tensor:
    """How far back a document `[tokens]` has said the same: int64 `[tokens - 1]`, one for each token but the first.

    For token t it is t - s in tokens, where s < t is the last place with the same n tokens up to and with itself,
    `ids[s - n + 1 .. s] == ids[t - n + 1 .. t]`; 0 where there is none. A model that sees s could have copied t.

    Raises:
        InputError: n below 1.
    """
    if n < 1:
        raise InputError(f"runs of tokens have a length of 1 or more, got {n}")
    listed: list[int] = ids.tolist()
    last: dict[tuple[int, ...], int] = {}
    distances = torch.zeros(len(listed), dtype=torch.int64)
    for t in range(n - 1, len(listed)):
        run = tuple(listed[t - n + 1 : t + 1])
        distances[t] = t - last.get(run, t)
        last[run] = t
    return distances[1:]


def bucketed(values: Tensor, places: Tensor, edges: Sequence[int]) -> list[tuple[int, int, int, float]]:
    """Rows (low, high, count, sum) of `values` `[n]` by `places` `[n]`, whole numbers such as positions or distances.

    Row i has the values whose place is low = edges[i] up to high - 1 = edges[i + 1] - 1, summed in float64; a place
    outside all edges is in no row.

    Raises:
        InputError: edges that do not increase.
    """
    _check_edges(edges, least=0)
    index = torch.bucketize(places.cpu(), torch.tensor(edges), right=True)
    counts = torch.bincount(index, minlength=len(edges) + 1).tolist()
    sums = torch.bincount(index, values.double().cpu(), minlength=len(edges) + 1).tolist()
    rows = zip(itertools.pairwise(edges), counts[1:-1], sums[1:-1], strict=True)
    return [(low, high, count, total) for (low, high), count, total in rows]


def default_edges(length: int) -> list[int]:
    """Powers of two from 1, and `length`, which ends the last bucket: [1, 2, 4, 6] for 6 tokens."""
    powers = itertools.takewhile(lambda edge: edge < length, (2**power for power in itertools.count()))
    return [*powers, length]


def check_document(ids: Tensor, name: str) -> None:
    """Refuse what is not `[tokens]` or has fewer than two.

    Raises:
        InputError: it begins with `name`.
    """
    if ids.dim() != 1:
        raise InputError(f"{name} has shape {list(ids.shape)}: give one row of token ids each")
    if len(ids) < 2:
        raise InputError(f"{name} has {len(ids)} tokens: a loss needs at least 2")


def _check_edges(edges: Sequence[int], least: int) -> None:
    if len(edges) < 2 or edges[0] < least or any(low >= high for low, high in itertools.pairwise(edges)):
        raise InputError(f"the edges of position buckets must increase, from {least} or more, got {list(edges)}")
