"""How long a plan takes on a machine: the counts of `cost`, each divided by the rate at which the machine does them.

predict(shape, plan, 32768, HARDWARE["h100"])       no faster than this: its data sheet
predict(shape, plan, 32768, rates)                  measured rates (`masformer.training.calibrate`)
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

from .cost import ModelShape, check
from .plan import SpanPlan
from .span import PlanError, Span


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What a layer's attention, or its rest, is done at.

    forward: FLOPs per second of a forward pass.
    training: of forward and backward together, which are three times the FLOPs.
    decode: bytes per second that one new token reads: of the cache, or of the weights.
    """

    forward: float
    training: float
    decode: float

    def to_json(self) -> dict[str, float]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a machine reaches.

    linear: the products with weights, and all that is done to a token beside attention.
    head: the output head; in training with the loss.
    attention: useful FLOPs, those of visible pairs alone, by span; `every` stands for spans that are not listed.
    updates: parameters that the optimizer updates per second.
    start: seconds of what a decoding step does once, whatever it reads.
    """

    name: str
    linear: Work
    head: Work
    attention: Mapping[Span, Work]
    updates: float
    start: float = 0.0
    every: Work | None = None

    def of(self, span: Span) -> Work:
        """The rate of a span's attention.

        Raises:
            PlanError: a span that was not measured.
        """
        work = self.attention.get(span, self.every)
        if work is None:
            raise PlanError(f"the rate of {span} was not measured")
        return work

    def to_json(self) -> dict[str, Any]:
        """FLOPs, bytes and parameters per second; `start` in seconds."""
        attention = {str(span): work.to_json() for span, work in self.attention.items()}
        attention |= {} if self.every is None else {"every": self.every.to_json()}
        parts = {"linear": self.linear.to_json(), "head": self.head.to_json(), "attention": attention}
        return {**parts, "updates": self.updates, "start": self.start}


def _sheet(name: str, flops: float, bandwidth: float) -> Rates:
    every = Work(flops, flops, bandwidth)
    # AdamW reads a parameter, its gradient and two moments, and writes all but the gradient: 7 float32 numbers.
    return Rates(name, every, every, {}, bandwidth / 28, every=every)


HARDWARE = {
    "h100": _sheet("H100 SXM, data sheet", 989e12, 3.35e12),
    "a100": _sheet("A100 SXM 80 GB, data sheet", 312e12, 2.039e12),
}
"""Dense bfloat16 FLOP/s and bytes/s of memory that NVIDIA's data sheets give: no program reaches either."""


@dataclasses.dataclass(frozen=True, slots=True)
class Seconds:
    """Of one document, batch 1.

    training: forward, backward and the optimizer's step.
    recomputed: the same with gradient checkpointing: every layer's forward pass runs twice.
    prefill: the document, logits at its last token only.
    decode: one more token.
    """

    training: float
    recomputed: float
    prefill: float
    decode: float

    def to_json(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def predict(shape: ModelShape, plan: SpanPlan, length: int, rates: Rates) -> Seconds:
    """Seconds for a document of `length` tokens.

    Raises:
        PlanError: as `cost`; a span whose rate was not measured.
    """
    check(shape, plan, length)
    linear, head = 2 * shape.linear_parameters * length, 2 * shape.head_parameters
    forward = linear / rates.linear.forward
    training = 3 * linear / rates.linear.training
    decode = rates.start + shape.kv_dtype_bytes * shape.linear_parameters / rates.linear.decode
    for span, layers in collections.Counter(plan).items():
        work, flops = rates.of(span), layers * shape.flops_per_pair * span.visible_pairs(length)
        forward += flops / work.forward
        training += 3 * flops / work.training
        decode += layers * shape.kv_bytes_per_key * span.cache_length(length) / work.decode
    updates = shape.parameters / rates.updates
    learnt = training + 3 * head * length / rates.head.training + updates
    return Seconds(
        training=learnt,
        recomputed=learnt + forward,
        prefill=forward + head / rates.head.forward,
        decode=decode + shape.kv_dtype_bytes * shape.head_parameters / rates.head.decode,
    )
