"""The KV memory that a serving engine takes for one request, beside the ideal that `cost` counts.

    vllm(shape, plan, 8192, VLLM_GPU).kv_bytes

Arithmetic only, read off the sources of transformers 5.23 (cache_utils.py) and vLLM 0.32 (config/, v1/core/
kv_cache_utils.py, v1/kv_cache_interface.py); tests/serving holds it against both.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Collection

from ..spans import Block, Full, ModelShape, PlanError, Span, SpanPlan, Window, cost

ENGINES = ("transformers", "vllm")
NO_SINKS = "none of its attention back ends sees first tokens beside a local span"


@dataclasses.dataclass(frozen=True, slots=True)
class Reserved:
    """What one engine takes for one request; all numbers are bytes of K and V.

    full_bytes: what the same engine takes for the model with full attention in all layers.
    ideal_bytes: what an exact cache needs at its largest moment, by `cost`.
    """

    engine: str
    kv_bytes: int
    full_bytes: int
    ideal_bytes: int

    def to_json(self) -> dict[str, str | int]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, slots=True)
class Vllm:
    """The settings of vLLM that a reservation depends on.

    page: tokens of one page, `--block-size`.
    batched: `--max-num-batched-tokens`.
    batches: batches in flight at once, 2 with asynchronous scheduling (`VllmConfig.max_concurrent_batches`).
    """

    name: str
    page: int
    batched: int
    batches: int

    @property
    def in_flight(self) -> int:
        """Tokens that are computed before a local layer lets go of what they do not see."""
        return self.batched * self.batches


VLLM_GPU = Vllm("vllm, GPU", page=16, batched=2048, batches=2)
VLLM_H100 = Vllm("vllm, GPU such as H100", page=16, batched=8192, batches=2)
VLLM_CPU = Vllm("vllm, CPU", page=128, batched=2048, batches=1)
"""The defaults of `vllm serve`: `EngineArgs.get_batch_defaults` (engine/arg_utils.py; an H100 is any GPU of 70 to 160
GiB but the A100), `CacheConfig.DEFAULT_BLOCK_SIZE`, `CpuPlatform.check_and_update_config` (platforms/cpu.py)."""
VLLM_DEFAULTS = (VLLM_GPU, VLLM_H100, VLLM_CPU)


def transformers(shape: ModelShape, plan: SpanPlan, length: int, cache: SpanPlan | None) -> list[Reserved]:
    """What transformers holds while decoding up to `length` tokens, and at the end of a one-shot prefill of them.

    A sliding layer keeps a view of its last tokens (`DynamicSlidingWindowLayer.update`), so the tensor behind it stays:
    window tokens while decoding, the whole prompt until the first token after it.

    Args:
        cache: the spans that stock transformers' cache follows; None where the model runs with this package's cache.

    Raises:
        PlanError: a plan for another number of layers, or a length below 1.
    """
    ideal = cost(shape, plan, length)
    full = len(plan) * length * shape.kv_bytes_per_key
    if cache is None:
        held, prefilled, name = ideal.kv_bytes_peak, ideal.prefill_kv_peak, "masformer"
    else:
        kept = (min(length, span.size) if isinstance(span, Window) else length for span in cache)
        held, prefilled, name = shape.kv_bytes_per_key * sum(kept), full, "transformers"
    return [
        Reserved(f"{name}, decoding", held, full, ideal.kv_bytes_peak),
        Reserved(f"{name}, one-shot prefill", prefilled, full, ideal.prefill_kv_peak),
    ]


def vllm(shape: ModelShape, plan: SpanPlan, length: int, settings: Vllm = VLLM_GPU) -> Reserved:
    """What vLLM has to reserve before it admits a request of `length` tokens, its `--max-model-len`.

    As `_max_memory_usage_bytes_from_groups` counts it, with the hybrid KV cache manager on, its default on GPU and CPU.

    Raises:
        PlanError: a plan for another number of layers, or a length below 1.
    """
    ideal = cost(shape, plan, length).kv_bytes_peak

    def reserved(spans: SpanPlan) -> int:
        blocks, layers = vllm_blocks(spans, length, settings)
        return blocks * layers * settings.page * shape.kv_bytes_per_key

    return Reserved(settings.name, reserved(plan), reserved(SpanPlan((Full(),) * len(plan))), ideal)


def vllm_blocks(plan: SpanPlan, length: int, settings: Vllm) -> tuple[int, int]:
    """Blocks that one request reserves, and how many layers have a page in each block."""
    alike = collections.Counter(vllm_span(span) for span in plan)
    layers = _layers_of_a_group(alike.values())
    return sum(math.ceil(n / layers) * _pages(span, length, settings) for span, n in alike.items()), layers


def vllm_span(span: Span) -> Span:
    """The span for which vLLM reserves: full, a block without lookback or a window.

    Raises:
        PlanError: sinks, which no attention of vLLM can see beside a local span.
    """
    if span.sinks:
        raise PlanError(f"{span} cannot be served by vLLM: {NO_SINKS}")
    if isinstance(span, Block) and span.lookback:
        return Window((span.lookback + 1) * span.size)  # SlidingWindowSpec: a chunk looks back at nothing
    return span


def _layers_of_a_group(counts: Collection[int]) -> int:
    """`_get_kv_cache_groups_uniform_page_size`: groups are equally large; the last of a kind may be padded."""
    least, most = min(counts), max(counts)
    return most if most < 1.5 * least else least


def _pages(span: Span, length: int, settings: Vllm) -> int:
    """`max_admission_blocks_per_request` of SlidingWindowSpec and ChunkedLocalAttentionSpec; all of it if full."""
    if isinstance(span, Window):  # one page more: the window need not begin where a page does
        return math.ceil(min(span.size - 1 + settings.in_flight, length) / settings.page) + 1
    if isinstance(span, Block):
        return math.ceil(min(span.size + settings.in_flight, length) / settings.page)
    return math.ceil(length / settings.page)


def vllm_reason(plan: SpanPlan, plugin: bool) -> str:
    """Why vLLM takes more than the ideal, in one line; `plugin` says that its own layers cannot run the plan."""
    alike = collections.Counter(vllm_span(span) for span in plan)
    if set(alike) == {Full()}:
        words = "all layers reserve the full length, in whole pages"
    else:
        flight = ", ".join(f"{it.in_flight:,} ({it.name.removeprefix('vllm, ')})" for it in VLLM_DEFAULTS)
        words = f"a local layer reserves whole pages for its span and the tokens in flight, {flight}, up to the length"
    layers = _layers_of_a_group(alike.values())
    if padding := sum(-n % layers for n in alike.values()):
        words += f"; groups of {layers} layers need {padding} layers of padding"
    if plugin:
        words += "; served through this package's plugin"
    return f"vLLM 0.32: {words}."


def transformers_reason(plan: SpanPlan, cache: SpanPlan | None, refusal: str = "") -> str:
    """Why transformers takes more than the ideal, or why it does not, in one line."""
    if cache is None:
        return f"No native form ({refusal}): this package's own cache runs it, and holds the ideal."
    if not any(span.is_local for span in plan):
        return "Full layers hold all tokens."
    if not any(span.is_local for span in cache):
        return "The native class makes a cache that holds all tokens in all layers."
    return (
        "A sliding layer's cache is a view: the tensor behind it holds one token more than the ideal, and after a "
        "one-shot prefill the whole prompt, until the next token."
    )
