"""The published layouts: rules that make a plan for a number of layers.

    layout("gemma-3", 26)                                             as published
    layout("masformer", 24, full=4, placement="top", local=Block(512))
    layout("masformer", 30, full=[0, 7, 8, 17])                       chosen layers

A layout is a function of the number of layers; its keyword arguments are the options that it takes and hold
its defaults. Layers count from 0. Only the spans of a system are here: not its position encoding, its learned
sink logits, its latents or its state-space heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

from .plan import SpanPlan
from .span import Block, Full, PlanError, Span, Window

MASFORMER_BLOCK = Block(1024)
"""Local span of `masformer` and `local`. The size is unverified: the paper's abstract does not give it."""

FullLayers = int | Sequence[int] | None


def _bottom(layers: int, count: int) -> list[int]:
    return list(range(count))


def _top(layers: int, count: int) -> list[int]:
    return list(range(layers - count, layers))


def _middle(layers: int, count: int) -> list[int]:
    first = (layers - count) // 2
    return list(range(first, first + count))


def _interleaved(layers: int, count: int) -> list[int]:
    # int((k + 0.5) * layers / count) in whole numbers: each full layer sits in the middle of its share.
    return [(2 * k + 1) * layers // (2 * count) for k in range(count)]


PLACEMENTS: dict[str, Callable[[int, int], list[int]]] = {
    "bottom": _bottom,
    "top": _top,
    "middle": _middle,
    "interleaved": _interleaved,
}
"""Where a number of full layers go: (layers, count) -> the layers."""


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_sixth(layers: int) -> int:
    return max(1, layers // 6)


def _choose(layers: int, full: int | Sequence[int], placement: str) -> list[int]:
    """The layers that `full` of them at `placement` are, or `full` itself where it is a list."""
    if not isinstance(full, int):
        chosen = list(full)
        if not all(map(_is_whole, chosen)):
            raise PlanError(f"full layers must be whole numbers, got {full!r}")
        return chosen
    if placement not in PLACEMENTS:
        raise PlanError(f"unknown placement {placement!r}: choose one of {', '.join(PLACEMENTS)}")
    if isinstance(full, bool) or not 0 <= full <= layers:
        raise PlanError(f"cannot make {full!r} of {layers} layers full: give a number from 0 to {layers}")
    return PLACEMENTS[placement](layers, full)


def _no_placement_of_a_list(full: FullLayers, placement: str | None) -> None:
    if placement is not None and full is not None and not isinstance(full, int):
        raise PlanError(f"placement {placement!r} cannot be given together with the list of full layers {full!r}")


def _last_of_each(layers: int, group: int) -> list[int]:
    """The last layer of every `group` layers: (i + 1) % group == 0."""
    return list(range(group - 1, layers, group))


def full_layout(layers: int) -> SpanPlan:
    """Full attention at every layer: the unconverted model."""
    return SpanPlan((Full(),) * layers)


def local_layout(layers: int, *, local: Span = MASFORMER_BLOCK) -> SpanPlan:
    """Local attention at every layer: the lower bound that any mixed plan has to beat."""
    return SpanPlan.mixed(layers, [], local)


def masformer(
    layers: int, *, full: FullLayers = None, placement: str | None = None, local: Span = MASFORMER_BLOCK
) -> SpanPlan:
    """MASFormer (arXiv 2310.12442): full attention at a small number of layers, block sparse at the others.

    `full` is how many (default a sixth, at least one: ours) or which; `placement` defaults to the bottom layers,
    which is the paper's choice by second-hand account.
    """
    _no_placement_of_a_list(full, placement)
    chosen = _choose(layers, _one_sixth(layers) if full is None else full, placement or "bottom")
    return SpanPlan.mixed(layers, chosen, local)


def gpt_neo(layers: int, *, local: Span = Window(256)) -> SpanPlan:
    """GPT-Neo: even layers full, odd layers local.

    Source: transformers models/gpt_neo/configuration_gpt_neo.py (`attention_types`, `window_size`).
    """
    return SpanPlan.mixed(layers, range(0, layers, 2), local)


def zebra(layers: int, *, local: Span = Window(513)) -> SpanPlan:
    """Zebra (arXiv 2312.08618): the first layer of every four full.

    Source of the rule and of b + 1 keys a query: tencent-ailab/zebra-inference, zebra_patch/modeling_zebra.py.
    Groups of 4 and b = 512 are unverified.
    """
    return SpanPlan.mixed(layers, range(0, layers, 4), local)


def transformer_xl(
    layers: int, *, full: FullLayers = None, placement: str | None = None, local: Span = Window(256 + 1)
) -> SpanPlan:
    """Long and short Transformer-XL memories (Rae & Razavi, arXiv 2007.03356): no layer is full.

    `full` is how many layers have the long memory (default a sixth: "6X fewer long range memories", abstract) or
    which; `placement` is first, last or interleaved (default: their best, second-hand), `local` the short memory.
    A memory of m is Window(m + 1). The lengths 2048 and 256 are our defaults: the abstract does not give theirs.
    """
    _no_placement_of_a_list(full, placement)
    names = {"first": "bottom", "bottom": "bottom", "last": "top", "top": "top", "interleaved": "interleaved"}
    if placement is not None and placement not in names:
        raise PlanError(f"unknown placement {placement!r} for transformer-xl: choose one of {', '.join(names)}")
    chosen = _choose(layers, _one_sixth(layers) if full is None else full, names[placement or "interleaved"])
    long = Window(2048 + 1)
    return SpanPlan(tuple(long if not span.is_local else span for span in SpanPlan.mixed(layers, chosen, local)))


def longgen(layers: int, *, local: Span = Window(1024, sinks=4)) -> SpanPlan:
    """LongGen (arXiv 2410.01485): the middle third full, sinks and a window (or strided blocks) at the others.

    The outer thirds are rounded down. The sizes are our default, not in the abstract; with them Llama-2-7B (12 of
    32 layers full) holds 62 % less KV at 128K tokens, as the abstract reports.
    """
    third = layers // 3
    return SpanPlan.mixed(layers, range(third, layers - third), local)


def gemma_3(layers: int, *, local: Span = Window(1024)) -> SpanPlan:
    """Gemma 3: five local layers, then a full one.

    Source: the Gemma 3 report (window); transformers models/gemma3/configuration_gemma3.py (rule).
    """
    return SpanPlan.mixed(layers, _last_of_each(layers, 6), local)


def llama_4(layers: int, *, local: Span = Block(8192)) -> SpanPlan:
    """Llama 4: three layers of blocks, then a full one.

    Source: transformers models/llama4/configuration_llama4.py (`no_rope_layer_interval`, `attention_chunk_size`).
    """
    return SpanPlan.mixed(layers, _last_of_each(layers, 4), local)


def olmo_3(layers: int, *, local: Span = Window(4096)) -> SpanPlan:
    """OLMo 3: three local layers, then a full one; the last layer is always full.

    Source: allenai/OLMo-core (pattern 4096, 4096, 4096, -1; `force_full_attention_on_last_layer`). transformers'
    models/olmo3/configuration_olmo3.py has the groups of four alone, the same for 4, 8, 12 ... layers.
    """
    return SpanPlan.mixed(layers, sorted({*_last_of_each(layers, 4), layers - 1}), local)


def gpt_oss(layers: int, *, local: Span = Window(128)) -> SpanPlan:
    """gpt-oss: even layers local, odd layers full.

    Source: transformers models/gpt_oss/configuration_gpt_oss.py.
    """
    return SpanPlan.mixed(layers, _last_of_each(layers, 2), local)


def hymba(layers: int, *, local: Span = Window(1024)) -> SpanPlan:
    """Hymba (arXiv 2411.13676): the first, the middle and the last layer full; 0, 15 and 31 of 32, second-hand."""
    return SpanPlan.mixed(layers, sorted({0, (layers - 1) // 2, layers - 1}), local)


def mimo_v2(layers: int, *, local: Span = Window(128 + 1)) -> SpanPlan:
    """MiMo-V2-Flash (arXiv 2601.02780): the first layer and the last of every six full; 128 tokens back and itself.

    Source: transformers models/mimo_v2_flash/configuration_mimo_v2_flash.py.
    """
    return SpanPlan.mixed(layers, [0, *_last_of_each(layers, 6)], local)


LAYOUTS: dict[str, Callable[..., SpanPlan]] = {
    "full": full_layout,
    "local": local_layout,
    "masformer": masformer,
    "gpt-neo": gpt_neo,
    "zebra": zebra,
    "transformer-xl": transformer_xl,
    "longgen": longgen,
    "gemma-3": gemma_3,
    "llama-4": llama_4,
    "olmo-3": olmo_3,
    "gpt-oss": gpt_oss,
    "hymba": hymba,
    "mimo-v2": mimo_v2,
}
"""Layouts by name: a function of the number of layers and of the options in its signature."""


def layout(
    name: str,
    layers: int,
    *,
    full: FullLayers = None,
    placement: str | None = None,
    local: Span | None = None,
) -> SpanPlan:
    """The plan that the layout `name` makes for `layers` layers; None leaves an option at the layout's default.

    Args:
        full: how many layers are full, or a list of them.
        placement: where `full` of them go, one of `PLACEMENTS`.
        local: the span of the layers that are not full.

    Raises:
        PlanError: an unknown layout or placement, an option that the layout does not take, a number or a list of
            full layers that does not fit, a `local` that is not bounded.
    """
    if name not in LAYOUTS:
        raise PlanError(f"unknown layout {name!r}: choose one of {', '.join(LAYOUTS)}")
    if not _is_whole(layers) or layers < 1:
        raise PlanError(f"layout {name} needs a whole number of at least 1 layer, got {layers!r}")
    if local is not None and (not isinstance(local, Span) or not local.is_local):
        raise PlanError(f"local must be a bounded span, Block or Window, got {local!r}")
    if full is not None and (isinstance(full, str) or not (_is_whole(full) or isinstance(full, Sequence))):
        raise PlanError(f"full must be a number of layers or a list of them, got {full!r}")
    options = {"full": full, "placement": placement, "local": local}
    given = {option: value for option, value in options.items() if value is not None}
    takes = [option for option in inspect.signature(LAYOUTS[name]).parameters if option in options]
    for option, value in given.items():
        if option not in takes:
            raise PlanError(
                f"layout {name} does not take {option} (got {value!r}): its options are {', '.join(takes) or 'none'}"
            )
    return LAYOUTS[name](layers, **given)
