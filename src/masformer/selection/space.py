"""Which plans may be chosen, and what they may cost.

space = Space.of(parent, [Window(128, sinks=4)])
budget = full_budget(4)              # or kv_budget(shape, 2**30, 32768), flops_budget(shape, 1e15, 32768)
budget.fits(space.mixed([7, 18]))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

from ..errors import InputError
from ..spans import ModelShape, Span, SpanPlan, cost


@dataclasses.dataclass(frozen=True)
class Space:
    """The spans that each layer may get, the shortest first and the parent's own last.

    A layer that is local in the parent has no choice.
    """

    options: tuple[tuple[Span, ...], ...]

    @classmethod
    def of(cls, parent: SpanPlan, local: Sequence[Span]) -> Space:
        """All layers of `parent`, the full ones with these local spans to choose from.

        Raises:
            InputError: no bounded span, two of a size, or a parent without a full layer.
        """
        sizes = [getattr(span, "size", None) for span in local]
        if not local or not all(span.is_local for span in local) or sizes != sorted(set(sizes)):  # type: ignore[type-var]
            raise InputError(f"give bounded spans of ascending sizes, got {', '.join(map(str, local)) or 'none'}")
        if not parent.full_layers:
            raise InputError(f"the model has no full layer ({parent}): there is nothing to choose")
        return cls(tuple((*local, span) if not span.is_local else (span,) for span in parent))

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that have a choice."""
        return tuple(layer for layer, options in enumerate(self.options) if len(options) > 1)

    @property
    def shortest(self) -> SpanPlan:
        return SpanPlan(tuple(options[0] for options in self.options))

    @property
    def parent(self) -> SpanPlan:
        return SpanPlan(tuple(options[-1] for options in self.options))

    def mixed(self, full: Iterable[int]) -> SpanPlan:
        """These layers as in the parent, all others at their shortest."""
        chosen = set(full)
        return SpanPlan(tuple(spans[-1 if layer in chosen else 0] for layer, spans in enumerate(self.options)))

    def with_span(self, plan: SpanPlan, layer: int, span: Span) -> SpanPlan:
        return SpanPlan((*plan.spans[:layer], span, *plan.spans[layer + 1 :]))

    def longer(self, plan: SpanPlan) -> Iterator[SpanPlan]:
        """Every plan with the next longer span at one layer."""
        return self._neighbours(plan, 1)

    def shorter(self, plan: SpanPlan) -> Iterator[SpanPlan]:
        """Every plan with the next shorter span at one layer."""
        return self._neighbours(plan, -1)

    def _neighbours(self, plan: SpanPlan, step: int) -> Iterator[SpanPlan]:
        for layer in self.layers:
            options = self.options[layer]
            at = options.index(plan[layer]) + step
            if 0 <= at < len(options):
                yield self.with_span(plan, layer, options[at])


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a plan may cost at most, or how much worse than the parent it may be.

    words: for people. price: of a plan, which grows with its spans. most: the highest price; None where `within` rules.
    within: nats above the parent on the probes; the cheapest plan that keeps to it is wanted.
    """

    words: str
    price: Callable[[SpanPlan], float]
    most: float | None = None
    within: float | None = None
    counts: bool = False
    """Whether the price is the number of full layers, which says nothing of the sizes of the others."""

    def fits(self, plan: SpanPlan) -> bool:
        return self.most is None or self.price(plan) <= self.most

    def check(self, space: Space) -> None:
        """Refuse a budget that no plan keeps to, or that even the parent keeps to, or under which a longer span costs
        no more than a shorter one.

        Raises:
            InputError: with what the cheapest plan or the parent costs, or the spans.
        """
        options = space.options[space.layers[0]]
        prices = [self.price(space.with_span(space.shortest, space.layers[0], span)) for span in options]
        if prices != sorted({*prices}):
            raise InputError(
                f"by {self.words} some of {', '.join(map(str, options))} cost the same: leave out sizes, "
                "or give a length at which they differ"
            )
        if not self.fits(space.shortest):
            least = self.price(space.shortest)
            raise InputError(f"{self.words} are not enough: with no full layer the model takes {least:,.4g}")
        if self.most is not None and self.fits(space.parent):
            raise InputError(
                f"{self.words} are enough for the parent ({self.price(space.parent):,.4g}): nothing to choose"
            )

    def count(self, space: Space) -> int:
        """How many full layers it pays for where all others have their shortest span."""
        counts = range(len(space.layers) + 1)
        return max(count for count in counts if self.fits(space.mixed(space.layers[:count])))


def full_budget(count: int) -> Budget:
    """So many full layers."""
    words = f"{count} full layer" + ("s" if count != 1 else "")
    return Budget(words, lambda plan: len(plan.full_layers), most=count, counts=True)


def kv_budget(shape: ModelShape, most: float, length: int) -> Budget:
    """So many bytes of KV cache at its largest up to `length` tokens, batch 1."""
    words = f"{most:,.0f} bytes of KV cache up to {length:,} tokens"
    return Budget(words, lambda plan: cost(shape, plan, length).kv_bytes_peak, most=most)


def flops_budget(shape: ModelShape, most: float, length: int) -> Budget:
    """So many FLOPs of attention in the forward of one document of `length` tokens."""
    words = f"{most:,.4g} FLOPs of attention at {length:,} tokens"
    return Budget(words, lambda plan: cost(shape, plan, length).prefill_flops.attention, most=most)


def nats_budget(within: float) -> Budget:
    """As few full layers as keep within so many nats of the parent, on the probes."""
    return Budget(
        f"within {within:g} nats of the parent", lambda plan: len(plan.full_layers), within=within, counts=True
    )
