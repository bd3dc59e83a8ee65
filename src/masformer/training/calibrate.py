"""The rates at which this machine does what a plan needs: measured on two layers of the model, with random weights.

    rates = calibrate(config, plan)
    predict(shape_of(config), plan, 32768, rates).training

What is measured is what will run: the family's own layers with every span of the plan, forward, backward and one
token at a time, the head with its loss, and AdamW. What the cost model does not count, as norms, rotations and the
copies of a cache, lowers these rates, and so is in the prediction. What it cannot tell: rates that change with the
length, layers unlike the first two, and memory that does not suffice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from ..attention import Segments
from ..errors import InputError
from ..models.cache import SpanCache
from ..models.convert import convert
from ..models.families import (
    attention_modules,
    class_of,
    dtype_of,
    native_plan,
    shape_of,
    shortened,
    spans_on,
)
from ..models.head import Head
from ..models.interface import watched
from ..models.positions import max_positions
from ..spans import ModelShape, Span, SpanPlan
from ..spans.hardware import Rates, Work
from .loss import chunked_loss
from .meter import interleaved

LENGTH = 4096
"""Tokens of what is timed, where the model has as many positions."""
REPETITIONS, STEPS = 3, 8
"""Turns of each measurement; tokens that are decoded, the first to warm up."""
OTHERS = 2**26
"""Numbers, 256 MiB, that no processor's cache holds."""
LEAST = 0.01
"""Least share of a layer's time that a part of it is taken to have: differences below drown in noise."""


def calibrate(
    config: PreTrainedConfig,
    plan: SpanPlan,
    *,
    length: int = LENGTH,
    context: int = LENGTH,
    device: str = "cpu",
    progress: Callable[[str], Any] = lambda words: None,
) -> Rates:
    """Rates of this machine for the model that a config describes, with its own spans and a plan's.

    Prefill and decoding are timed in the config's own dtype; training, as `masformer train` does it, with float32
    weights, under bfloat16 autocast if the config's dtype is a half one.

    Args:
        length: tokens that are learnt and prefilled; at most as many as the model has positions.
        context: tokens in the cache while one more is decoded: a cache that grows is copied, at a rate that depends
            on its size. Its keys are random.
        progress: called with a few words before each measurement.

    Raises:
        InputError: a family that is not supported, a model of one layer.
    """
    length = min(length, max_positions(config) or length)
    context = min(context, max_positions(config) or context)
    bench = _Bench(config, length, context, torch.device(device))
    shape = bench.shape
    spans = sorted(set(plan) | set(native_plan(config)), key=lambda span: span.visible_pairs(length))
    layers: dict[Span, _Times] = {}
    for span in spans:
        progress(f"layers with {span}, {length:,} tokens")
        layers[span] = bench.layer(span)
    rest, start = bench.rest(spans[0], layers[spans[0]])  # of the cheapest: an error there matters least
    linear = shape.linear_parameters // shape.layers
    attention = {}
    for span in spans:
        times, flops = layers[span].less(rest), shape.flops_per_pair * span.visible_pairs(length)
        held = 2 * shape.kv_heads * shape.head_dim * bench.dtype.itemsize * max(1, span.cache_length(bench.held))
        attention[span] = Work(flops / times.forward, 3 * flops / times.training, held / times.decode)
    progress("the head and the optimizer")
    return Rates(
        name=torch.cuda.get_device_name(device) if bench.device.type == "cuda" else "this CPU",
        linear=Work(
            2 * linear * length / rest.forward,
            6 * linear * length / rest.training,
            bench.dtype.itemsize * linear / rest.decode,
        ),
        head=bench.head(shape.head_parameters),
        attention=attention,
        updates=bench.updates(),
        start=start,
    )


def fill(cache: DynamicCache, shape: ModelShape, tokens: int, *, dtype: torch.dtype, device: Any = None) -> None:
    """Give every layer of an empty cache the random keys and values of so many tokens, batch 1."""
    if isinstance(cache, SpanCache):
        cache.timeline.segments = Segments.of(1, tokens)
    for layer in range(len(cache.layers)):
        size = 1, shape.kv_heads, tokens, shape.head_dim
        keys, values = (torch.randn(size, device=device, dtype=dtype) for _ in range(2))
        cache.update(keys, values, layer)


@dataclasses.dataclass(frozen=True, slots=True)
class _Times:
    """Seconds: forward; forward and backward; of one more token."""

    forward: float
    training: float
    decode: float

    def less(self, other: _Times) -> _Times:
        """What is left of each, but never less than a share of it."""
        return _Times(
            max(self.forward - other.forward, LEAST * self.forward),
            max(self.training - other.training, LEAST * self.training),
            max(self.decode - other.decode, LEAST * self.decode),
        )


class _Bench:
    """Models of one and of two layers, the difference of whose times is that of a layer."""

    def __init__(self, config: PreTrainedConfig, length: int, context: int, device: torch.device) -> None:
        if config.num_hidden_layers < 2:
            raise InputError("a model of one layer cannot be calibrated: two are compared")
        self.length, self.device = length, device
        self.held = max(1, context - STEPS)
        self.dtype = dtype_of(config)
        self.shape = shape_of(config)
        self.models = {layers: self._made(config, layers, self.dtype) for layers in (1, 2)}
        self.learners = self.models
        if self.dtype != torch.float32:
            self.learners = {layers: self._made(config, layers, torch.float32) for layers in (1, 2)}
        self.others = torch.zeros(OTHERS, device=device)
        self.ids = torch.randint(0, min(1000, config.vocab_size), (1, length), device=device)

    def _made(self, config: PreTrainedConfig, layers: int, dtype: torch.dtype) -> Any:
        short = shortened(config, layers)
        short._attn_implementation = "eager"  # a conversion's is none to build a model with
        with torch.device(self.device):
            return class_of(short)(short).to(dtype)

    def _learning(self) -> Any:
        """As `masformer train` does it: float32 weights, autocast for what is kept in half precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype != torch.float32)

    def layer(self, span: Span) -> _Times:
        self._carry(span)
        return _Times(
            self._seconds(self.models, self._forward),
            self._seconds(self.learners, self._backward),
            self._layer_of(self._decode(self.held)),
        )

    def rest(self, span: Span, layer: _Times) -> tuple[_Times, float]:
        """What a layer with a span does beside attention, and the seconds of what a decoding step does once.

        Decoding, that is all a layer does with next to nothing in its cache.
        """
        self._carry(span)
        token = self._decode(1)
        one = self._layer_of(token)
        attention = self._attention(self.models[1], False), self._attention(self.learners[1], True)
        return layer.less(_Times(*attention, layer.decode - one)), max(token[1] - one, 0.0)

    def _attention(self, model: Any, learn: bool) -> float:
        """Seconds of the first layer's attention in a forward pass, with its gradients where it learns."""
        found: list[float] = []

        def watch(span: Span, over: Callable[[Span], Tensor], q: Tensor, k: Tensor, softmax: Any) -> Tensor:
            def run() -> Tensor:
                out = over(span)
                return torch.autograd.grad(out.sum(), (q, k))[0] if learn else out

            found.append(interleaved({"": run}, REPETITIONS, self.device)[""]["median"])
            return over(span)

        with watched(attention_modules(model), [watch]):
            if learn:
                self._backward(model)
            else:
                self._forward(model)
        return found[0]

    def _carry(self, span: Span) -> None:
        for layers, model in [*self.models.items(), *self.learners.items()]:
            convert(model, SpanPlan((span,) * layers), check=False)

    def _layer_of(self, times: Mapping[int, float]) -> float:
        return max(times[2] - times[1], 1e-9)

    def _seconds(self, models: Mapping[int, Any], run: Callable[[Any], Any]) -> float:
        """Of one layer, when every model takes its turn."""
        turns = {str(layers): functools.partial(run, model) for layers, model in models.items()}
        found = interleaved(turns, REPETITIONS, self.device)
        return self._layer_of({layers: found[str(layers)]["median"] for layers in models})

    @torch.no_grad()
    def _forward(self, model: Any) -> None:
        model.eval().base_model(input_ids=self.ids, use_cache=False)

    def _backward(self, model: Any) -> None:
        model.train().zero_grad(set_to_none=True)
        with self._learning():
            hidden = model.base_model(input_ids=self.ids, use_cache=False).last_hidden_state
        hidden.sum().backward()

    @torch.no_grad()
    def _decode(self, held: int) -> dict[int, float]:
        """Seconds for one token of the models of one and of two layers, with so many tokens before it."""
        caches = {layers: SpanCache(spans_on(model.eval())) for layers, model in self.models.items()}
        for cache in caches.values():
            fill(cache, self.shape, held, dtype=self.dtype, device=self.device)

        def step(layers: int) -> None:
            self.models[layers].base_model(input_ids=self.ids[:, :1], past_key_values=caches[layers])

        turns = {str(layers): functools.partial(step, layers) for layers in self.models}
        found = interleaved(turns, STEPS - 1, self.device, before=self._forget)
        return {layers: found[str(layers)]["median"] for layers in self.models}

    def _forget(self) -> None:
        """Put other numbers into the processor's cache: two layers stay there, all layers of a model do not."""
        self.others += 1

    def head(self, parameters: int) -> Work:
        """Of all tokens with their loss, and of one token."""
        head, learner = Head.of(self.models[1]), Head.of(self.learners[1])
        hidden = torch.randn(1, self.length, head.weight.shape[1], device=self.device, requires_grad=True)
        last = hidden.detach()[:, :1].to(self.dtype)

        def every() -> None:
            with self._learning():
                loss = chunked_loss(hidden, self.ids, learner, total=1.0).loss
            loss.backward()

        def one() -> Tensor:
            with torch.no_grad():
                return head(last)

        turns = {"all": every, "one": one}
        found = interleaved(turns, REPETITIONS, self.device, before=self._forget)
        seconds = found["one"]["median"]
        learnt = 6 * parameters * self.length / found["all"]["median"]
        return Work(2 * parameters / seconds, learnt, self.dtype.itemsize * parameters / seconds)

    def updates(self) -> float:
        """Parameters that AdamW updates in a second."""
        parameters = list(self.learners[1].parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        step = torch.optim.AdamW(parameters).step
        seconds = interleaved({"": step}, REPETITIONS, self.device)[""]["median"]
        return sum(parameter.numel() for parameter in parameters) / seconds
