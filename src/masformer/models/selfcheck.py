"""Probes that run after every conversion: does this model really do what its plan says?

Each probe runs the model itself on a few random tokens. Where a real span is too long for that, the layer
carries a short one of the same kind while the probe runs: what is proved is the wiring (every layer reaches
`attend` with its own span, documents and cache), which is the same for every size.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
    with _short_spans(model), evaluating(model), torch.no_grad():
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
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode inside the block, every module as it was afterwards."""
    training = {module for module in model.modules() if module.training}
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclasses.dataclass
class _Recording:
    """What went into and came out of every attention module in one forward, `[1, tokens, hidden]`."""

    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = dataclasses.field(default_factory=list)

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.calls.append((args, kwargs, output[0]))

    def hidden(self, layer: int) -> Tensor:
        return _hidden(*self.calls[layer][:2])


class _Probe:
    """Layers are compared one by one, each fed what it was fed in the recording: over many layers half precision
    would drift further apart than any bug (35 of 34 in the logits of a bfloat16 SmolLM2 between two kernels of torch).
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self.exact = model.dtype in (torch.float32, torch.float64)
        self.tolerance = 2e-4 if self.exact else 6e-2
        self.whole = self._recorded(ids)

    def all(self) -> dict[str, Callable[[], None]]:
        """The probes by name; one that fails raises ValueError with what it saw."""
        return {
            "span": self.spans,
            "future": self.future,
            "prefill against decoding": self.decoding,
            "left padding": self.left_padding,
            "packed documents": self.packing,
        }

    def _recorded(self, ids: Tensor) -> _Recording:
        recording = _Recording()
        handles = [m.register_forward_hook(recording.hook, with_kwargs=True) for m in attention_modules(self.model)]
        try:
            self.model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return recording

    def _replay(self, ids: Tensor, sources: list[tuple[int, int, _Recording, int]], **kwargs: Any) -> None:
        """Run the model; columns from `low` to `high` of every layer's input are those from `at` on of a recording,
        and its output there must be the recorded one. `sources` lists (low, high, recording, at).
        """
        handles = []
        for layer, module in enumerate(attention_modules(self.model)):
            before, after = _feed(layer, sources), self._compare(layer, sources)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        try:
            self.model(input_ids=ids, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def _compare(self, layer: int, sources: list[tuple[int, int, _Recording, int]]) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for low, high, recording, at in sources:
                expected = recording.calls[layer][2][:, at : at + high - low].float()
                difference = float((output[0][:, low:high].float() - expected).abs().max())
                limit = self.tolerance * max(1e-3, float(expected.abs().max()))
                if not difference <= limit:  # also catches NaN
                    raise ValueError(f"layer {layer} differs by {difference:.2e}, allowed {limit:.2e}")

        return after

    def spans(self) -> None:
        """Each layer's last query must change with the first key of its span, and not with the key before."""
        modules, plan = attention_modules(self.model), spans_on(self.model)
        if len(self.whole.calls) != len(plan):
            raise ValueError(f"{len(self.whole.calls)} of {len(plan)} layers ran attention")
        last = TOKENS - 1
        for layer, (module, span, call) in enumerate(zip(modules, plan, self.whole.calls, strict=True)):
            change = _changer(module, *call)
            if change(last)[last] == 0:
                continue  # a layer whose output is zero, as depth up-scaling makes them, shows nothing
            start = span.start(last)
            if not self._sees_its_first(change, span):
                raise ValueError(f"layer {layer} does not see token {start} ({span})")
            hidden = start - 1
            if hidden >= span.sinks and change(hidden)[last] != 0:
                raise ValueError(f"layer {layer} sees token {hidden} beyond {span}")
            if span.sinks and self.exact and change(0)[last] == 0:
                raise ValueError(f"layer {layer} does not see its sinks ({span})")

    def _sees_its_first(self, change: Callable[[int], list[float]], span: Span) -> bool:
        """Whether some query that reaches back as far as any changes with the first key of its span.

        In half precision a sharp softmax rounds the weight of a far key to nothing, which proves nothing.
        """
        reach = max(t - span.start(t) for t in range(TOKENS))
        queries = [t for t in range(TOKENS - 1, 0, -1) if t - span.start(t) == reach] or [TOKENS - 1]
        return any(change(span.start(t))[t] != 0 for t in queries) or not self.exact

    def future(self) -> None:
        changed = self.ids.clone()
        changed[0, -1] = (changed[0, -1] + 1) % self.model.config.vocab_size
        self._replay(changed, [(0, TOKENS - 1, self.whole, 0)], use_cache=False)
        before, after = (self.model(input_ids=ids, use_cache=False).logits[:, :-1] for ids in (self.ids, changed))
        # Not to the bit: which tokens an expert of a mixture computes together depends on the last one too, and in
        # half precision that may send a token to another expert.
        difference = float((before - after).abs().max())
        if self.exact and not difference <= self.tolerance * float(before.abs().max()):
            raise ValueError(f"a later token changes logits before it by {difference:.2e}")

    def decoding(self) -> None:
        cache, at = SpanCache(spans_on(self.model)), 0
        for tokens in (11, 6, 1, 1, 5):
            sources = [(0, tokens, self.whole, at)]
            self._replay(self.ids[:, at : at + tokens], sources, past_key_values=cache)
            at += tokens

    def left_padding(self) -> None:
        pad = 5
        ids = torch.cat([self.ids[:, :pad], self.ids], dim=1)
        mask = torch.ones_like(ids)
        mask[:, :pad] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        sources = [(pad, pad + TOKENS, self.whole, 0)]
        self._replay(ids, sources, attention_mask=mask, position_ids=positions, use_cache=False)

    def packing(self) -> None:
        border = 10
        positions = torch.arange(TOKENS, device=self.ids.device)[None]
        positions = torch.where(positions < border, positions, positions - border)
        first, second = (self._recorded(ids) for ids in (self.ids[:, :border], self.ids[:, border:]))
        sources = [(0, border, first, 0), (border, TOKENS, second, 0)]
        self._replay(self.ids, sources, attention_mask=torch.ones_like(self.ids), position_ids=positions)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return found


def _with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": hidden}
    return (hidden, *args[1:]), kwargs


def _feed(layer: int, sources: list[tuple[int, int, _Recording, int]]) -> Callable[..., Any]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = _hidden(args, kwargs).clone()
        for low, high, recording, at in sources:
            hidden[:, low:high] = recording.hidden(layer)[:, at : at + high - low]
        return _with_hidden(args, kwargs, hidden)

    return before


def _changer(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Callable[[int], list[float]]:
    """A function: how much each query's output of `module` changes when the input at one token does."""

    def change(token: int) -> list[float]:
        hidden = _hidden(args, kwargs).clone()
        hidden[:, token] = hidden[:, token].flip(-1) + 1
        args_changed, kwargs_changed = _with_hidden(args, kwargs, hidden)
        got = module(*args_changed, **kwargs_changed)[0]
        changes: list[float] = (got - output).abs().amax(-1)[0].tolist()
        return changes

    return change
