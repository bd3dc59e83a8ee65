"""Probes that run after every conversion: does this model really do what its plan says?

Each probe runs the model itself on a few random tokens. Where a real span is too long for that, the layer
carries a short one of the same kind while the probe runs: what is proved is the wiring (every layer reaches
`attend` with its own span, documents and cache), which is the same for every size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import MasformerError
from ..spans import Block, Span, Window
from .cache import SpanCache
from .families import attention_modules, spans_on

TOKENS = 24
"""Length of the probes, longer than every span that stands in for a real one."""


class SelfCheckError(MasformerError):
    """A converted model does not do what its plan says; the message names the probe and what it saw."""


def selfcheck(model: PreTrainedModel) -> None:
    """Run all probes on a converted model: no future leaks, each layer sees its span and no more, prefill agrees
    with decoding, left padding and packed neighbours change nothing.

    The model is left as it was (mode, spans, random state). Models on the meta device are not probed.

    Raises:
        SelfCheckError: naming the probe, the layer and the difference.
    """
    if model.device.type == "meta":
        return
    with _short_spans(model), _evaluating(model), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.config.vocab_size, (1, TOKENS), generator=generator).to(model.device)
        probe = _Probe(model, ids)
        for name, run in probe.all().items():
            try:
                run()
            except (ValueError, RuntimeError, IndexError, TypeError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise SelfCheckError(f"self-check {name!r} failed: {error}") from error


@contextlib.contextmanager
def _short_spans(model: PreTrainedModel) -> Iterator[None]:
    modules = attention_modules(model)
    before = [module.span for module in modules]
    for module in modules:
        module.span = _short(module.span)  # type: ignore[arg-type, assignment]
    try:
        yield
    finally:
        for module, span in zip(modules, before, strict=True):
            module.span = span


def _short(span: Span) -> Span:
    """A span of the same kind that shows its borders within the probe."""
    if isinstance(span, Block):
        return Block(min(span.size, 5), min(span.lookback, 1), min(span.sinks, 2))
    if isinstance(span, Window):
        return Window(min(span.size, 6), min(span.sinks, 2))
    return span


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module for module in model.modules() if module.training}
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Probe:
    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []
        handles = [m.register_forward_hook(self._record, with_kwargs=True) for m in attention_modules(model)]
        try:
            self.logits = self._logits(ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        # Half-precision models differ by rounding where the number of rows of a product changes.
        self.tolerance = 2e-4 if model.dtype in (torch.float32, torch.float64) else 6e-2

    def all(self) -> dict[str, Callable[[], None]]:
        """The probes by name; one that fails raises ValueError with what it saw."""
        return {
            "span": self.spans,
            "future": self.future,
            "prefill against decoding": self.decoding,
            "left padding": self.left_padding,
            "packed documents": self.packing,
        }

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.calls.append((args, kwargs, output[0]))

    def _logits(self, ids: Tensor, **kwargs: Any) -> Tensor:
        return self.model(input_ids=ids, **kwargs).logits.float()

    def _same(self, got: Tensor, expected: Tensor) -> None:
        difference = float((got - expected).abs().max())
        limit = self.tolerance * max(1.0, float(expected.abs().max()))
        if not difference <= limit:  # also catches NaN
            raise ValueError(f"logits differ by {difference:.2e}, allowed {limit:.2e}")

    def spans(self) -> None:
        """Each layer's last query must change with the first key of its span, and not with the key before."""
        modules, plan = attention_modules(self.model), spans_on(self.model)
        if len(self.calls) != len(plan):
            raise ValueError(f"{len(self.calls)} of {len(plan)} layers ran attention")
        last = TOKENS - 1
        for layer, (module, span, call) in enumerate(zip(modules, plan, self.calls, strict=True)):
            change = _changer(module, *call)
            start = span.start(last)
            if change(start)[last] == 0:
                raise ValueError(f"layer {layer} does not see token {start} ({span})")
            hidden = start - 1
            if hidden >= span.sinks and change(hidden)[last] != 0:
                raise ValueError(f"layer {layer} sees token {hidden} beyond {span}")
            if span.sinks and change(0)[last] == 0:
                raise ValueError(f"layer {layer} does not see its sinks ({span})")

    def future(self) -> None:
        changed = self.ids.clone()
        changed[0, -1] = (changed[0, -1] + 1) % self.model.config.vocab_size
        self._same(self._logits(changed, use_cache=False)[:, :-1], self.logits[:, :-1])

    def decoding(self) -> None:
        cache, parts = SpanCache(spans_on(self.model)), []
        for piece in self.ids.split([11, 6, 1, 1, 5], dim=1):
            parts.append(self._logits(piece, past_key_values=cache))
        self._same(torch.cat(parts, dim=1), self.logits)

    def left_padding(self) -> None:
        pad = 5
        ids = torch.cat([self.ids[:, :pad], self.ids], dim=1)
        mask = torch.ones_like(ids)
        mask[:, :pad] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        got = self._logits(ids, attention_mask=mask, position_ids=positions, use_cache=False)[:, pad:]
        self._same(got, self.logits)

    def packing(self) -> None:
        border = 10
        positions = torch.arange(TOKENS, device=self.ids.device)[None]
        positions = torch.where(positions < border, positions, positions - border)
        got = self._logits(self.ids, attention_mask=torch.ones_like(self.ids), position_ids=positions)
        apart = [self._logits(ids, use_cache=False) for ids in self.ids.split([border, TOKENS - border], dim=1)]
        self._same(got, torch.cat(apart, dim=1))


def _changer(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Callable[[int], list[float]]:
    """A function: how much each query's output of `module` changes when the input at one token does."""

    def change(token: int) -> list[float]:
        hidden = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).clone()
        hidden[:, token] = hidden[:, token].flip(-1) + 1
        if "hidden_states" in kwargs:
            got = module(*args, **{**kwargs, "hidden_states": hidden})[0]
        else:
            got = module(hidden, *args[1:], **kwargs)[0]
        return (got - output).abs().amax(-1)[0].tolist()

    return change
