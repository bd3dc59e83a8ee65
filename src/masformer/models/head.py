"""The head of a causal language model as plain tensors and numbers.

    head = Head.of(model)
    head(model.base_model(input_ids=ids).last_hidden_state)     the model's logits, to the bit

What needs the logits of some positions alone, or of a few at a time, gets them from hidden states this way.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..errors import InputError
from .families import family_of


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """A linear map to logits, and what the family does to them then, in the order of the fields.

    weight: [vocabulary, hidden], the model's own parameter; tied to the embedding in many models.
    bias: [vocabulary].
    scale: multiplies the logits (Cohere).
    divisor: divides them (Granite); no 1 / scale, which would round differently.
    softcap: the logits x become softcap * tanh(x / softcap) (Gemma 2 and 3).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    divisor: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head:
        """The head of a causal language model of a supported family, converted or not.

        Raises:
            InputError: a family that is not supported, a model without a head, a head that is no plain linear layer.
        """
        field = family_of(model.config).logits
        linear: Any = model.get_output_embeddings()
        if linear is None:
            raise InputError(f"{type(model).__name__} has no output embedding: give the causal language model")
        if type(linear) is not nn.Linear or "forward" in vars(linear):
            raise InputError(
                f"the output embedding is a {type(linear).__module__}.{type(linear).__name__} or has a forward "
                "of its own: a plain torch.nn.Linear is needed, so merge or leave out what wraps it (LoRA, offloading)"
            )
        head = cls(linear.weight, linear.bias)
        if not field:
            return head
        name = {"logit_scale": "scale", "logits_scaling": "divisor", "final_logit_softcapping": "softcap"}[field]
        return dataclasses.replace(head, **{name: getattr(model.config, field)})

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] of hidden states [..., hidden], in the dtype of the model's own."""
        logits = F.linear(hidden, self.weight, self.bias)
        if self.scale != 1:
            logits = logits * self.scale
        if self.divisor != 1:
            logits = logits / self.divisor
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits
