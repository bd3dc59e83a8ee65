"""A plan: one span per layer.

The tuple is the whole truth; patterns ("every fourth", "the last is always full") act when a plan is made,
in `layouts`, never afterwards. The text form is for people and for config.json:

    full*2,block:1024*20,full*2            window:128:sinks=4*3,full
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator

from .span import KINDS, Full, PlanError, Span, parse_span


@dataclasses.dataclass(frozen=True, slots=True)
class SpanPlan:
    """One span per layer, layer 0 first.

    Raises:
        PlanError: no layers, or something in the tuple that is not a span.
    """

    spans: tuple[Span, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", tuple(self.spans))
        if not self.spans:
            raise PlanError("a plan needs at least one layer")
        for layer, span in enumerate(self.spans):
            if not isinstance(span, tuple(KINDS.values())):
                raise PlanError(f"layer {layer} of the plan is {span!r}, not one of Full, Block, Window")

    @classmethod
    def mixed(cls, layers: int, full_layers: Iterable[int], local: Span) -> SpanPlan:
        """`Full()` at `full_layers`, `local` at every other of `layers` layers.

        Raises:
            PlanError: a layer that is out of range or named twice.
        """
        chosen = list(full_layers)
        for layer in chosen:
            if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < layers:
                raise PlanError(f"full layer {layer} is out of range: the model has layers 0 to {layers - 1}")
        if len(set(chosen)) != len(chosen):
            raise PlanError(f"full layers {chosen} name a layer twice")
        return cls(tuple(Full() if layer in chosen else local for layer in range(layers)))

    @classmethod
    def parse(cls, text: str) -> SpanPlan:
        """Read the text form: spans separated by commas, each with an optional `*COUNT`.

        Raises:
            PlanError: naming the part that cannot be read.
        """
        spans: list[Span] = []
        for part in text.split(","):
            match = re.fullmatch(r"\s*([^*]+?)\s*(?:\*\s*(\d+)\s*)?", part)
            if match is None:
                raise PlanError(f"cannot read {part.strip()!r} in plan {text!r}: write for example full*2,block:1024")
            count = int(match[2]) if match[2] is not None else 1
            if not 1 <= count <= 10_000:
                raise PlanError(f"{part.strip()!r} in plan {text!r} repeats its span {count} times")
            spans += [parse_span(match[1])] * count
        return cls(tuple(spans))

    @classmethod
    def from_json(cls, text: str) -> SpanPlan:
        """Read what `to_json` wrote.

        Raises:
            PlanError: not a JSON list of spans.
        """
        try:
            items = json.loads(text)
            return cls(tuple(KINDS[item.pop("kind")](**item) for item in items))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"not the JSON of a plan ({type(error).__name__}: {error})") from error

    def to_json(self) -> str:
        """A JSON list with one object per layer."""
        return json.dumps([span.to_json() for span in self.spans])

    @property
    def full_layers(self) -> tuple[int, ...]:
        """The layers whose span is not bounded."""
        return tuple(layer for layer, span in enumerate(self.spans) if not span.is_local)

    def __str__(self) -> str:
        runs = [(span, len(list(group))) for span, group in itertools.groupby(self.spans)]
        return ",".join(f"{span}*{count}" if count > 1 else str(span) for span, count in runs)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, layer: int) -> Span:
        return self.spans[layer]

    def __iter__(self) -> Iterator[Span]:
        return iter(self.spans)
