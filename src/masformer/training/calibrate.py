"""The rates at which this machine does what a plan needs: measured on two layers of the model, with random weights.

    rates = calibrate(config, plan)
    predict(shape_of(config), plan, 32768, rates).training

What is measured is what will run: the family's own layers with every span of the plan, forward, backward and one
token at a time, the head with its loss, and AdamW. What the cost model does not count, as norms, rotations and the
copies of a cache, lowers these rates, and so is in the prediction. What it cannot tell: rates that change with the
length, layers unlike the first two, and memory that does not suffice.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..attention import Segments, attend
from ..models.cache import SpanCache
from ..models.convert import convert
from ..models.families import class_of, head_dim, native_plan, shape_of, shortened, spans_on
from ..models.head import Head
from ..models.positions import max_positions
from ..spans import Span, SpanPlan
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
    """Rates of this machine for the model that a config describes, in its own dtype, with its own spans and a plan's.

    Args:
        length: tokens that are learnt and prefilled; at most as many as the model has positions.
        context: tokens in the cache while one more is decoded: a cache that grows is copied, at a rate that depends
            on its size. Its keys are random.
        progress: called with a few words before each measurement.

    Raises:
        InputError: a family that is not supported.
    """
    length = min(length, max_positions(config) or length)
    context = min(context, max_positions(config) or context)
    bench, shape = _Bench(config, length, context, torch.device(device)), shape_of(config)
    spans = sorted(set(plan) | set(native_plan(config)), key=lambda span: span.visible_pairs(length))
    layers: dict[Span, _Times] = {}
    for span in spans:
        progress(f"layers with {span}, {length:,} tokens")
        layers[span] = bench.layer(span)
    rest = layers[spans[0]].less(bench.attention(spans[0]))  # the cheapest: an error there matters least
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
        start=bench.start(spans[0]),
    )


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
        self.length, self.device = length, device
        self.held = max(1, context - STEPS)
        self.dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.get_default_dtype()
        self.sizes = config.num_attention_heads, shape_of(config).kv_heads, head_dim(config)
        self.models = {layers: self._made(config, layers) for layers in (1, 2)}
        self.others = torch.zeros(OTHERS, device=device)
        self.ids = torch.randint(0, min(1000, config.vocab_size), (1, length), device=device)

    def _made(self, config: PreTrainedConfig, layers: int) -> Any:
        short = shortened(config, layers)
        short._attn_implementation = "eager"  # a conversion's is none to build a model with
        with torch.random.fork_rng(devices=[]), torch.device(self.device):
            return class_of(short)(copy.deepcopy(short)).to(self.dtype)

    def layer(self, span: Span) -> _Times:
        self._carry(span)
        return _Times(
            self._seconds(self._forward),
            self._seconds(self._backward),
            self._layer_of(self._decode(self.held)),
        )

    def attention(self, span: Span) -> _Times:
        """Of a layer's attention alone."""
        self._carry(span)
        heads, kv_heads, dim = self.sizes
        q, k, v = (
            torch.randn(1, self.length, n, dim, device=self.device, dtype=self.dtype).transpose(1, 2).requires_grad_()
            for n in (heads, kv_heads, kv_heads)
        )

        def forward() -> None:
            with torch.no_grad():
                attend(q, k, v, span)

        def backward() -> None:
            torch.autograd.grad(attend(q, k, v, span).sum(), (q, k, v))

        found = interleaved({"forward": forward, "backward": backward}, REPETITIONS, self.device)
        beside = self._layer_of(self._decode(self.held)) - self._layer_of(self._decode(1))
        return _Times(found["forward"]["median"], found["backward"]["median"], max(beside, 0.0))

    def start(self, span: Span) -> float:
        """Seconds of what a decoding step does once, beside its layers and the head."""
        self._carry(span)
        times = self._decode(1)
        return max(times[1] - self._layer_of(times), 0.0)

    def _carry(self, span: Span) -> None:
        for layers, model in self.models.items():
            convert(model, SpanPlan((span,) * layers), check=False)

    def _layer_of(self, times: Mapping[int, float]) -> float:
        return max(times[2] - times[1], 1e-9)

    def _seconds(self, run: Callable[[Any], Any]) -> float:
        """Of one layer, when every model takes its turn."""
        turns = {str(layers): functools.partial(run, model) for layers, model in self.models.items()}
        found = interleaved(turns, REPETITIONS, self.device)
        return self._layer_of({layers: found[str(layers)]["median"] for layers in self.models})

    @torch.no_grad()
    def _forward(self, model: Any) -> None:
        model.eval().base_model(input_ids=self.ids, use_cache=False)

    def _backward(self, model: Any) -> None:
        model.train().zero_grad(set_to_none=True)
        model.base_model(input_ids=self.ids, use_cache=False).last_hidden_state.sum().backward()

    @torch.no_grad()
    def _decode(self, held: int) -> dict[int, float]:
        """Seconds for one token of the models of one and of two layers, with so many tokens before it."""
        caches = {layers: self._filled(model.eval(), held) for layers, model in self.models.items()}

        def step(layers: int) -> None:
            self.models[layers].base_model(input_ids=self.ids[:, :1], past_key_values=caches[layers])

        turns = {str(layers): functools.partial(step, layers) for layers in self.models}
        found = interleaved(turns, STEPS - 1, self.device, before=self._forget)
        return {layers: found[str(layers)]["median"] for layers in self.models}

    def _filled(self, model: Any, held: int) -> SpanCache:
        """A cache as `held` tokens leave it."""
        cache = SpanCache(spans_on(model))
        cache.timeline.segments = Segments.of(1, held)
        for layer in range(len(cache.layers)):
            _, kv_heads, dim = self.sizes
            keys, values = (torch.randn(1, kv_heads, held, dim, device=self.device, dtype=self.dtype) for _ in range(2))
            cache.update(keys, values, layer)
        return cache

    def _forget(self) -> None:
        """Put other numbers into the processor's cache: two layers stay there, all layers of a model do not."""
        self.others += 1

    def head(self, parameters: int) -> Work:
        """Of all tokens with their loss, and of one token."""
        head = Head.of(self.models[1])
        hidden = torch.randn(1, self.length, head.weight.shape[1], device=self.device, dtype=self.dtype)
        hidden.requires_grad_()

        def one() -> Tensor:
            with torch.no_grad():
                return head(hidden[:, :1])

        turns = {"all": lambda: chunked_loss(hidden, self.ids, head, total=1.0).loss.backward(), "one": one}
        found = interleaved(turns, REPETITIONS, self.device, before=self._forget)
        seconds = found["one"]["median"]
        learnt = 6 * parameters * self.length / found["all"]["median"]
        return Work(2 * parameters / seconds, learnt, self.dtype.itemsize * parameters / seconds)

    def updates(self) -> float:
        """Parameters that AdamW updates in a second."""
        parameters = list(self.models[1].parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        step = torch.optim.AdamW(parameters).step
        seconds = interleaved({"": step}, REPETITIONS, self.device)[""]["median"]
        return sum(parameter.numel() for parameter in parameters) / seconds
