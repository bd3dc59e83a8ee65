"""What a plan costs: query-key pairs, FLOPs and bytes of KV cache, by exact arithmetic on whole numbers.

    shape = ModelShape(layers=24, hidden=2048, heads=16, kv_heads=16, head_dim=128, ...)
    cost(shape, layout("masformer", 24), 8192).training_flops.total

Every number follows from the spans' own `visible_pairs`, `visible` and `cache_length`; docs/cost.md states each
convention. These are counts, not predictions of time: a kernel that does not skip what is invisible saves nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import math

from .layouts import layout
from .plan import SpanPlan
from .span import Block, PlanError


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlanError(f"{name} must be a whole number of at least 1, got {value!r}")


@dataclasses.dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder that its cost depends on.

    linear_parameters: weights that one token is multiplied with, over all layers (of a mixture of experts: the
        active ones); neither the embedding lookup nor the output head.
    head_parameters: the output head, hidden times vocabulary, also where it is tied to the embedding.
    parameters: all parameters, tied ones once.
    kv_dtype_bytes: bytes of one number in the KV cache.

    Raises:
        PlanError: a size that is not a positive whole number, heads that the KV heads do not divide, or fewer
            parameters than are multiplied.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    linear_parameters: int
    head_parameters: int
    parameters: int
    kv_dtype_bytes: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _positive(field.name, getattr(self, field.name))
        if self.heads % self.kv_heads:
            raise PlanError(f"{self.heads} heads cannot share {self.kv_heads} KV heads evenly")
        used = self.linear_parameters + self.head_parameters
        if self.parameters < used:
            raise PlanError(f"{self.parameters} parameters are fewer than the {used} that a token is multiplied with")

    @property
    def flops_per_pair(self) -> int:
        """Forward FLOPs of one visible (query, key) pair in one layer: QK^T and PV, over all query heads."""
        return 4 * self.head_dim * self.heads

    @property
    def kv_bytes_per_key(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.kv_dtype_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations; a multiply-add is two."""

    attention: int
    other: int

    @property
    def total(self) -> int:
        return self.attention + self.other

    def to_json(self) -> dict[str, int]:
        return {"attention": self.attention, "other": self.other, "total": self.total}


@dataclasses.dataclass(frozen=True, slots=True)
class PlanCost:
    """What one document of `length` tokens costs, batch 1.

    attention_pairs: visible (query, key) pairs of one head, summed over the layers.
    training_flops: forward and backward of the whole document.
    prefill_flops: forward of the whole document, the output head at its last token only.
    decode_flops: forward of one more token, at position `length`.
    kv_bytes_held: the cache after `length` tokens.
    kv_bytes_peak: the largest cache between two tokens, decoding one by one from the first to `length`.
    prefill_kv_peak: the most K and V alive during a one-shot prefill, bytes.
    """

    length: int
    attention_pairs: int
    training_flops: Flops
    prefill_flops: Flops
    decode_flops: Flops
    kv_bytes_held: int
    kv_bytes_peak: int
    prefill_kv_peak: int

    @property
    def kv_bytes_read(self) -> int:
        """Cache that decoding the token at position `length` reads: all of it, for no span holds an unseen key."""
        return self.kv_bytes_held

    def to_json(self) -> dict[str, int | dict[str, int]]:
        """All numbers as one object; FLOPs as objects with attention, other and total."""
        numbers = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {name: value.to_json() if isinstance(value, Flops) else value for name, value in numbers.items()}
        return {**plain, "kv_bytes_read": self.kv_bytes_read}


@dataclasses.dataclass(frozen=True, slots=True)
class Savings:
    """The share of the parent's cost that a plan saves: 0.25 is a quarter less, below 0 is more."""

    attention_pairs: float
    training_flops: float
    prefill_flops: float
    decode_flops: float
    kv_bytes_held: float
    kv_bytes_peak: float
    prefill_kv_peak: float

    def to_json(self) -> dict[str, float]:
        return dataclasses.asdict(self)


GPT_NEO_1_3B = ModelShape(
    layers=24,
    hidden=2048,
    heads=16,
    kv_heads=16,
    head_dim=128,
    linear_parameters=24 * 12 * 2048**2,
    head_parameters=2048 * 50257,
    # Beside the above: 2048 learned positions; per layer 10 d of biases and norms; the final norm.
    parameters=24 * (12 * 2048**2 + 10 * 2048) + 2048 * 50257 + 2048 * 2048 + 2 * 2048,
)
"""GPT-Neo 1.3B: MLP of 4 d, tied head (transformers models/gpt_neo/configuration_gpt_neo.py)."""


def check(shape: ModelShape, plan: SpanPlan, length: int) -> None:
    """Refuse a plan for another number of layers, or a length below 1."""
    _positive("length", length)
    if len(plan) != shape.layers:
        raise PlanError(f"the plan is for {len(plan)} layers, the model has {shape.layers}")


def _period(plan: SpanPlan) -> int:
    """Any cache is at least as long one period later: moving by it keeps every layer's place in its block."""
    return math.lcm(*(span.size for span in plan if isinstance(span, Block)))


def _keys_held(plan: SpanPlan, n: int) -> int:
    return sum(layers * span.cache_length(n) for span, layers in collections.Counter(plan).items())


def _peak_keys(plan: SpanPlan, length: int) -> int:
    # Only a block's border shortens a cache: the longest is at the end, or one token before a border of the last
    # period.
    moments = {length}
    first = max(0, length - _period(plan) + 1)
    for size in {span.size for span in plan if isinstance(span, Block)}:
        moments.update(range((first + size) // size * size - 1, length + 1, size))
    return max(_keys_held(plan, moment) for moment in moments)


def _piece_peak_keys(plan: SpanPlan, begin: int, end: int) -> int:
    """The most keys alive while the tokens begin .. end - 1 run through the layers, one layer after another."""
    before = {span: span.cache_length(begin) for span in set(plan)}
    change = {span: span.cache_length(end) - before[span] for span in before}
    alive = end - begin + sum(before[span] for span in plan)
    peak = alive
    for span in plan.spans[:-1]:
        alive += change[span]
        peak = max(peak, alive)
    return peak


def chunked_prefill_kv_peak(shape: ModelShape, plan: SpanPlan, length: int, chunk: int) -> int:
    """The most bytes of K and V alive while a prompt is prefilled in pieces of `chunk` tokens.

    While a layer runs, it has its cache and the piece; the layers before it hold their new cache, those after it
    their old one. Pieces do not have to end at a block's border.

    Raises:
        PlanError: a plan for another number of layers; a length or chunk below 1.
    """
    check(shape, plan, length)
    _positive("chunk", chunk)
    rest = length % chunk
    # A whole piece is outdone by the one that lies a common period of pieces and blocks later: the last ones suffice.
    first = max(0, length - rest - math.lcm(chunk, _period(plan)))
    pieces = [(begin, begin + chunk) for begin in range(first, length - rest, chunk)]
    if rest:
        pieces.append((length - rest, length))
    return shape.kv_bytes_per_key * max(_piece_peak_keys(plan, begin, end) for begin, end in pieces)


def cost(shape: ModelShape, plan: SpanPlan, length: int) -> PlanCost:
    """What `plan` costs in a model of `shape` for a document of `length` tokens, batch 1.

    Raises:
        PlanError: a plan for another number of layers, or a length below 1.
    """
    check(shape, plan, length)
    pairs = sum(layers * span.visible_pairs(length) for span, layers in collections.Counter(plan).items())
    forward = shape.flops_per_pair * pairs
    linear, head = 2 * shape.linear_parameters, 2 * shape.head_parameters
    return PlanCost(
        length=length,
        attention_pairs=pairs,
        training_flops=Flops(3 * forward, 3 * (linear + head) * length),
        prefill_flops=Flops(forward, linear * length + head),
        decode_flops=Flops(shape.flops_per_pair * sum(span.visible(length) for span in plan), linear + head),
        kv_bytes_held=shape.kv_bytes_per_key * _keys_held(plan, length),
        kv_bytes_peak=shape.kv_bytes_per_key * _peak_keys(plan, length),
        prefill_kv_peak=chunked_prefill_kv_peak(shape, plan, length, chunk=length),
    )


def savings(parent: PlanCost, converted: PlanCost) -> Savings:
    """What `converted` saves of `parent`, as fractions of the whole model's cost.

    Raises:
        PlanError: costs of two lengths or of two models; a parent that holds no cache where `converted` does.
    """
    if parent.length != converted.length:
        raise PlanError(f"cannot compare a cost at {parent.length} tokens with one at {converted.length}")
    if parent.training_flops.other != converted.training_flops.other:
        raise PlanError("cannot compare the costs of two models: their FLOPs outside of attention differ")
    saved: dict[str, float] = {}
    for field in dataclasses.fields(Savings):
        before, after = getattr(parent, field.name), getattr(converted, field.name)
        if isinstance(before, Flops):
            before, after = before.total, after.total
        if before == 0 and after > 0:
            raise PlanError(f"the parent's {field.name} is 0 at {parent.length} tokens: no share of it can be saved")
        saved[field.name] = 1 - after / before if before else 0.0
    return Savings(**saved)


def paper_setting() -> tuple[PlanCost, PlanCost]:
    """The setting that MASFormer's "up to 75 %" is read as: (all full, 4 full and blocks of 1,024), GPT-Neo 1.3B.

    24 layers and 8,192 tokens. The abstract (arXiv 2310.12442) gives none of these numbers; they are the ones
    whose arithmetic comes close, and only in attention pairs.
    """
    shape, length = GPT_NEO_1_3B, 8192
    full, mixed = layout("full", shape.layers), layout("masformer", shape.layers, full=4, local=Block(1024))
    return cost(shape, full, length), cost(shape, mixed, length)
