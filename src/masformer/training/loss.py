"""The loss of next tokens from hidden states, by chunks: the logits of all tokens never exist at once.

    hidden = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    losses = chunked_loss(hidden, labels, Head.of(model), total=tokens_of_the_step)
    losses.loss.backward()

At 8,192 tokens and a vocabulary of 128,000, float32 logits are 4 GiB, and the backward pass would hold them several
times. Here the forward pass makes the logits of one chunk, takes the gradients from them at once and drops them, so
that the backward pass has nothing left to do but to hand those gradients on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.sequences import IGNORED
from ..errors import InputError
from ..models.head import Head

CHUNK_BYTES = 2**27
"""Size of the float32 logits of one chunk, 128 MiB, if no chunk is given."""


class Losses(NamedTuple):
    """What one call of `chunked_loss` measured.

    loss: the scalar to call backward on.
    nats: the sum of -log p over the predicted tokens, a scalar without gradient, float32 (float64 for float64 logits).
    kl: the sum of KL(teacher || student) over the same tokens, in nats, likewise; 0 without a teacher.
    tokens: how many were predicted.
    """

    loss: Tensor
    nats: Tensor
    kl: Tensor
    tokens: int


def chunked_loss(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    *,
    total: float | Tensor,
    teacher: tuple[Head, Tensor] | None = None,
    weight: float = 0.0,
    chunk: int | None = None,
) -> Losses:
    """(1 - weight) * nats / total + weight * kl / total, of hidden states [batch, tokens, hidden].

    Only positions that predict a token cost anything. With none the loss is a 0 whose gradients are zeros, so that
    a rank without tokens takes part in the step like all others. The backward pass runs once: not with a retained
    graph a second time, and not twice differentiated.

    Args:
        labels: [batch, tokens]; hidden states at t predict the label at t + 1, and -100 is not predicted.
        total: predicted tokens of the whole optimiser step, over all micro-batches and ranks, so that the sum of
            their losses is the mean over tokens.
        teacher: a head of the same vocabulary and its hidden states [batch, tokens, hidden of the teacher]; neither
            gets gradients.
        weight: part of the teacher in the loss, 0 to 1.
        chunk: predicted tokens whose logits exist at once; by default as many as make 128 MiB.

    Raises:
        InputError: shapes or vocabularies that do not fit each other; a total, weight or chunk out of range; a weight
            for no teacher.
    """
    _check(hidden, labels, head, total, teacher, weight, chunk)
    wanted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()
    predicted = (wanted != IGNORED).nonzero()[:, 0]

    def select(states: Tensor) -> Tensor:
        return states.flatten(0, 1).index_select(0, predicted)

    objective, sums = _Chunked.apply(
        select(hidden),
        head.weight,
        head.bias,
        head,
        wanted[predicted],
        None if teacher is None else (teacher[0], select(teacher[1].detach())),
        weight,
        chunk or max(1, CHUNK_BYTES // (4 * len(head.weight))),
        torch.is_grad_enabled(),
    )
    return Losses(objective / total, sums[0], sums[1], len(predicted))


class _Chunked(torch.autograd.Function):
    """The objective of rows [rows, hidden], and [nats, kl] that it is made of, summed over `chunk` rows at a time.

    Gradients, made in the forward pass where `learn` says so, are sums too: multiplied only in the backward pass, no
    scale makes them overflow or vanish in a half-precision dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        wanted: Tensor,
        teacher: tuple[Head, Tensor] | None,
        mix: float,
        chunk: int,
        learn: bool,
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(rows.dtype, torch.float32)
        needs = [learn and need for need in ctx.needs_input_grad[:3]]
        row_grads = torch.zeros_like(rows) if needs[0] else None
        weight_grad = torch.zeros_like(weight, dtype=exact) if needs[1] else None
        bias_grad = torch.zeros_like(bias, dtype=exact) if bias is not None and needs[2] else None
        sums = torch.zeros(2, dtype=torch.float64, device=rows.device)
        head = _constant(head)
        head.weight.requires_grad_(needs[1])
        if head.bias is not None:
            head.bias.requires_grad_(needs[2])
        if teacher is not None:
            teacher = (_constant(teacher[0]), teacher[1])
        for begin in range(0, len(rows), chunk):
            part = slice(begin, begin + chunk)
            with torch.set_grad_enabled(any(needs)):
                piece = _computed(rows[part]).requires_grad_(needs[0])
                theirs = None if teacher is None else teacher[0](teacher[1][part])
                nats, kl = _nats_and_kl(head(piece), wanted[part], theirs)
                objective = _mixed(nats, kl, mix)
            sums += torch.stack((nats, kl)).detach()
            sinks = (None if row_grads is None else row_grads[part], weight_grad, bias_grad)
            _add_gradients(objective, (piece, head.weight, head.bias), sinks)
        ctx.save_for_backward(row_grads, weight_grad, bias_grad)
        sums = sums.to(exact)
        ctx.mark_non_differentiable(sums)
        return _mixed(sums[0], sums[1], mix), sums

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise InputError("the loss by chunks has no second derivative: go backward without create_graph=True")
        # In place, since that of the weight may be gigabytes: torch refuses to go through a retained graph again.
        # Autograd casts what is returned to the dtypes of the inputs.
        grads = [None if grad is None else grad.mul_(scale) for grad in ctx.saved_tensors]
        return (*grads, *(None,) * 6)


def _add_gradients(objective: Tensor, leaves: Sequence[Tensor | None], sinks: Sequence[Tensor | None]) -> None:
    """Add the gradient of every leaf that needs one to its sink; the others have none."""
    pairs = [(leaf, sink) for leaf, sink in zip(leaves, sinks, strict=True) if leaf is not None and sink is not None]
    if pairs:
        gradients = torch.autograd.grad(objective, [leaf for leaf, _ in pairs])
        for (_, sink), gradient in zip(pairs, gradients, strict=True):
            sink += gradient


def _mixed(nats: Tensor, kl: Tensor, mix: float) -> Tensor:
    return (1 - mix) * nats + mix * kl


def _nats_and_kl(logits: Tensor, wanted: Tensor, theirs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Summed over rows: -log p of the wanted tokens, and KL to the student's logits from the teacher's."""
    log_p = _log_p(logits)
    nats = F.nll_loss(log_p, wanted, reduction="sum")
    if theirs is None:
        return nats, torch.zeros_like(nats)
    return nats, F.kl_div(log_p, _log_p(theirs), reduction="sum", log_target=True)


def _log_p(logits: Tensor) -> Tensor:
    """Log-probabilities in float32 or better, as transformers' own loss takes them."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _constant(head: Head) -> Head:
    bias = None if head.bias is None else _computed(head.bias)
    return dataclasses.replace(head, weight=_computed(head.weight), bias=bias)


def _computed(tensor: Tensor) -> Tensor:
    """The tensor detached, in the dtype that autocast would give it: a weight is cast once, not once per chunk."""
    if torch.is_autocast_enabled(tensor.device.type) and tensor.dtype != torch.float64:
        tensor = tensor.to(torch.get_autocast_dtype(tensor.device.type))
    return tensor.detach()


def _check(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    total: float | Tensor,
    teacher: tuple[Head, Tensor] | None,
    weight: float,
    chunk: int | None,
) -> None:
    if labels.shape != hidden.shape[:-1] or labels.dim() != 2:
        raise InputError(
            f"hidden states {list(hidden.shape)} and labels {list(labels.shape)} do not fit: "
            "give [batch, tokens, hidden] and [batch, tokens]"
        )
    if not total > 0:
        raise InputError(f"the total is {float(total)} tokens: count the predicted tokens of the whole step")
    if chunk is not None and chunk < 1:
        raise InputError(f"a chunk of {chunk} tokens is none: give at least 1")
    if not 0 <= weight <= 1:
        raise InputError(f"the teacher's weight is {weight}: give a part of the loss, 0 to 1")
    if teacher is None:
        if weight:
            raise InputError(f"the teacher's weight is {weight}, but there is no teacher: give one, or weight 0")
        return
    if len(teacher[0].weight) != len(head.weight):
        raise InputError(
            f"the teacher has {len(teacher[0].weight)} tokens in its vocabulary and the student {len(head.weight)}: "
            "their probabilities can be compared only within one vocabulary"
        )
    if teacher[1].shape[:-1] != labels.shape:
        raise InputError(
            f"hidden states of the teacher {list(teacher[1].shape)} do not fit labels {list(labels.shape)}"
        )
