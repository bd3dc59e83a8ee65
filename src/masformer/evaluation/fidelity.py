"""How close a model stays to its parent on the same text: KL divergence, and whether both would say the same.

kl, agree = fidelity(model, parent, ids)                    ids: one document, [tokens]
bucketed(kl, torch.arange(1, len(ids)), edges)              by position, see loss.py
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..errors import InputError
from ..models.head import Head
from ..models.positions import check_positions
from ..models.selfcheck import evaluating
from .loss import check_document


@torch.no_grad()
def fidelity(
    model: PreTrainedModel, parent: PreTrainedModel, ids: Tensor, *, chunk: int = 512
) -> tuple[Tensor, Tensor]:
    """What `model` loses against `parent` at every token but the first of a document `[tokens]`; both on the CPU:

    - KL(parent || model) of the distributions of that token, in nats, float32 `[tokens - 1]`. It is computed in
      float32 from the logits, rounded to some 1e-6, and never below 0.
    - whether both give their highest logit to the same token, bool `[tokens - 1]`.

    At most `[chunk, vocabulary]` logits of each exist at once. The models may be on different devices, and be one.

    Raises:
        InputError: vocabularies of different sizes, a document of fewer than two tokens or beyond the positions of
            either, a head that is no plain linear layer, logits that are not numbers.
    """
    check_document(ids, "the document")
    models = (model, parent)
    heads = [Head.of(each) for each in models]
    sizes = [len(head.weight) for head in heads]
    if sizes[0] != sizes[1]:
        raise InputError(f"the model has a vocabulary of {sizes[0]:,} and the parent of {sizes[1]:,}: no KL divergence")
    for each in models:
        check_positions(each.config, len(ids))
    with evaluating(model), evaluating(parent):
        hidden = [_hidden(each, ids) for each in models]
        places = range(0, len(ids) - 1, chunk)
        parts = [_compared(*(head(x[at : at + chunk]) for head, x in zip(heads, hidden, strict=True))) for at in places]
    kl, agree = (torch.cat(pieces).cpu() for pieces in zip(*parts, strict=True))
    if not bool(kl.isfinite().all()):
        raise InputError("a KL divergence is not a finite number: the model or its parent is not usable")
    return kl, agree


def _hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """[tokens - 1, hidden]"""
    hidden: Tensor = model.base_model(input_ids=ids[None].to(model.device), use_cache=False).last_hidden_state
    return hidden[0, :-1]


def _compared(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """KL and agreement `[chunk]` of logits `[chunk, vocabulary]`."""
    ours, theirs = ours.float(), theirs.to(ours.device).float()
    kl = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return kl.clamp(min=0), ours.argmax(-1) == theirs.argmax(-1)
