"""Does the model still find what stands far back? Scored by the answer's probability and by exact match."""

from __future__ import annotations

import dataclasses

import torch
from transformers import PreTrainedModel

from ..data.tasks import Item
from ..models.positions import check_positions


@dataclasses.dataclass(frozen=True)
class Recall:
    """Score of one item."""

    depth: float
    found: bool
    """Whether greedy decoding gives the answer, token for token."""
    log_probability: float
    """Log-probability of the whole answer in nats, given the prompt."""


def recall(model: PreTrainedModel, item: Item) -> Recall:
    """Score one item in a single forward: with the answer given (teacher forcing), greedy decoding finds it
    exactly if every answer token is the most probable one.

    Raises:
        InputError: an item that is longer than the model's positions.
    """
    ids = torch.tensor([item.prompt + item.answer], device=model.device)
    check_positions(model.config, ids.shape[1])
    answer = len(item.answer)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=answer + 1).logits[0, :-1].float()
    target = ids[0, -answer:]
    log_probability = logits.log_softmax(-1).gather(1, target[:, None]).sum()
    return Recall(item.depth, bool((logits.argmax(-1) == target).all()), float(log_probability))
