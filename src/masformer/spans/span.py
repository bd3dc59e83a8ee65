"""What one layer's query may see.

A span is one function, `start(t)`: the first position that the query at position t sees. The mask, the
length of the cache and the number of visible pairs all follow from it. Positions count from 0 at the first
token of the document. The first `sinks` positions of the document stay visible to every query.

Pure arithmetic on integers: no tensors here.
"""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar, TypeVar

T = TypeVar("T")


class PlanError(ValueError):
    """A span, a plan or a layout that cannot be: the message names the value and the remedy."""


def _triangle(n: int) -> int:
    """1 + 2 + ... + n, and 0 for n < 1."""
    return n * (n + 1) // 2 if n > 0 else 0


def _sum_min(bound: int, step: int, terms: int) -> int:
    """The sum of min(bound, i * step) for i = 1 .. terms."""
    below = min(terms, bound // step)
    return step * _triangle(below) + bound * max(0, terms - below)


def _whole(kind: str, name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PlanError(f"{kind} {name} must be a whole number of at least {least}, got {value!r}")


class Span:
    """The common part of `Full`, `Block` and `Window`; not used by itself."""

    __slots__ = ()
    kind: ClassVar[str] = ""

    @property
    def sinks(self) -> int:
        """How many first positions of the document stay visible to every query."""
        return 0

    @property
    def is_local(self) -> bool:
        """Whether the span is bounded, whatever the length."""
        return True

    def unclamped_start(self, t: T) -> T:
        """`start` before it is cut at 0; plain arithmetic, so t may be an integer or a tensor of them."""
        raise NotImplementedError

    def start(self, t: int) -> int:
        """The first position, beside sinks, that the query at position t sees; the last one is t itself."""
        return max(0, self.unclamped_start(t))

    def sees(self, t: int, position: int) -> bool:
        """Whether the query at position t sees the key at `position`."""
        return position <= t and (position >= self.start(t) or position < self.sinks)

    def visible(self, t: int) -> int:
        """How many keys the query at position t sees, itself included."""
        start = self.start(t)
        return t - start + 1 + min(self.sinks, start)

    def visible_pairs(self, n: int) -> int:
        """How many (query, key) pairs are visible in a document of n tokens: the sum of `visible(t)`, t < n."""
        return _triangle(n) - self._sum_start(n) + self._sum_sunk(n)

    def cache_length(self, n: int) -> int:
        """How many keys have to be held after n tokens, so that every later query finds what it sees."""
        start = self.start(n)
        return n - start + min(self.sinks, start)

    def peak_cache_length(self, n: int) -> int:
        """The largest `cache_length(i)` for i <= n."""
        raise NotImplementedError

    def _sum_start(self, n: int) -> int:
        """The sum of start(t) for t < n."""
        raise NotImplementedError

    def _sum_sunk(self, n: int) -> int:
        """The sum of min(sinks, start(t)) for t < n: sinks that lie before the start."""
        raise NotImplementedError

    def __str__(self) -> str:
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        size = values.pop("size", None)
        parts = [self.kind] if size is None else [self.kind, str(size)]
        return ":".join(parts + [f"{name}={value}" for name, value in values.items() if value])

    def to_json(self) -> dict[str, str | int]:
        """The span as a flat object, `{"kind": "window", "size": 128, "sinks": 4}`."""
        return {"kind": self.kind, **dataclasses.asdict(self)}  # type: ignore[call-overload]


@dataclasses.dataclass(frozen=True, slots=True)
class Full(Span):
    """Full causal attention: every query sees the whole document before it."""

    kind: ClassVar[str] = "full"

    @property
    def is_local(self) -> bool:
        return False

    def unclamped_start(self, t: T) -> T:
        return t * 0  # type: ignore[operator, return-value]  # a tensor of zeros where t is a tensor

    def peak_cache_length(self, n: int) -> int:
        return n

    def _sum_start(self, n: int) -> int:
        return 0

    def _sum_sunk(self, n: int) -> int:
        return 0


@dataclasses.dataclass(frozen=True, slots=True)
class Block(Span):
    """Block-sparse causal attention: own block, and `lookback` whole blocks before it.

    start(t) = max(0, (t // size - lookback) * size). With lookback 0 this is the block sparse attention of
    MASFormer (arXiv 2310.12442, Figure 1) and transformers' `chunked_attention`.
    """

    kind: ClassVar[str] = "block"
    size: int
    lookback: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        _whole("block", "size", self.size, 1)
        _whole("block", "lookback", self.lookback, 0)
        _whole("block", "sinks", self.sinks, 0)

    def unclamped_start(self, t: T) -> T:
        return (t // self.size - self.lookback) * self.size  # type: ignore[operator, return-value]

    def peak_cache_length(self, n: int) -> int:
        # The cache is longest just before a block ends; of the ends up to n, the last one holds the most.
        last_end = (n + 1) // self.size * self.size - 1
        return max(self.cache_length(n), self.cache_length(last_end) if last_end > 0 else 0)

    def _sum_start(self, n: int) -> int:
        blocks, rest = divmod(n, self.size)
        whole = self.size * self.size * _triangle(blocks - 1 - self.lookback)
        return whole + rest * max(0, blocks - self.lookback) * self.size

    def _sum_sunk(self, n: int) -> int:
        blocks, rest = divmod(n, self.size)
        whole = self.size * _sum_min(self.sinks, self.size, max(0, blocks - 1 - self.lookback))
        return whole + rest * min(self.sinks, max(0, blocks - self.lookback) * self.size)


@dataclasses.dataclass(frozen=True, slots=True)
class Window(Span):
    """Sliding-window causal attention: the last `size` keys, the token itself among them.

    start(t) = max(0, t - size + 1): the convention of transformers (`sliding_attention`) and of vLLM.
    """

    kind: ClassVar[str] = "window"
    size: int
    sinks: int = 0

    def __post_init__(self) -> None:
        _whole("window", "size", self.size, 1)
        _whole("window", "sinks", self.sinks, 0)

    def unclamped_start(self, t: T) -> T:
        return t - self.size + 1  # type: ignore[operator, return-value]

    def peak_cache_length(self, n: int) -> int:
        return self.cache_length(n)

    def _sum_start(self, n: int) -> int:
        return _triangle(n - self.size)

    def _sum_sunk(self, n: int) -> int:
        return _sum_min(self.sinks, 1, max(0, n - self.size))


KINDS: dict[str, type[Full] | type[Block] | type[Window]] = {"full": Full, "block": Block, "window": Window}


def parse_span(text: str) -> Span:
    """Read `full`, `block:1024`, `block:256:lookback=1:sinks=4` or `window:128:sinks=4`.

    Raises:
        PlanError: an unknown kind, a size that is missing, not a whole number or not positive, an unknown option.
    """
    kind, *rest = text.strip().split(":")
    if kind not in KINDS:
        raise PlanError(f"unknown span {text.strip()!r}: a span is one of full, block:SIZE, window:SIZE")
    values: dict[str, int] = {}
    for index, part in enumerate(rest):
        name, equals, number = part.partition("=")
        name, number = (name, number) if equals else ("size", name)
        if (not equals and index > 0) or name not in {f.name for f in dataclasses.fields(KINDS[kind])}:
            raise PlanError(f"span {text.strip()!r} has a part {part!r} that {kind} does not take")
        if name in values or not re.fullmatch(r"-?[0-9]+", number):
            raise PlanError(f"span {text.strip()!r}: {name} must be given once, as a whole number")
        values[name] = int(number)
    if kind != "full" and "size" not in values:
        raise PlanError(f"span {text.strip()!r} lacks its size: write {kind}:SIZE")
    return KINDS[kind](**values)
