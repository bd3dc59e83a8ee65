"""The plan on the command line: the flags that plan, convert, eval and generate share, and the cost table.

    @takes_plan
    def command(model: str, flags: PlanFlags) -> None:
        plan = flags.plan_for(layers, own)

Needs neither torch nor transformers: mistyped flags are refused before a model is looked at.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
from rich.table import Table

from .cli_hardware import seconds
from .cli_output import UsageError
from .errors import InputError
from .serving import reserved
from .spans import (
    LAYOUTS,
    PLACEMENTS,
    Block,
    Full,
    ModelShape,
    PlanCost,
    PlanError,
    Savings,
    Span,
    SpanPlan,
    Window,
    cost,
    layout,
    savings,
)

T = TypeVar("T")

PANEL = "Spans (default: the model's own)"
NEEDS: dict[str, tuple[str, ...]] = {
    "full": ("layout",),
    "placement": ("layout",),
    "block": ("layout",),
    "window": ("layout",),
}
NEEDS |= {"lookback": ("block",), "sinks": ("block", "window")}
CONFLICTS = [("block", "window"), *(("plan", name) for name in ("layout", *NEEDS))]


def _option(name: str, words: str, **kwargs: Any) -> Any:
    return typer.Option(f"--{name}", help=words, rich_help_panel=PANEL, **kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """What the user said about spans: nothing, a whole plan, or a layout with its options."""

    plan: Annotated[str | None, _option("plan", "One span per layer: full*2,block:1024*20,full*2.")] = None
    layout: Annotated[str | None, _option("layout", f"A rule: {', '.join(LAYOUTS)}.")] = None
    full: Annotated[str | None, _option("full", "Full layers: how many (4), or which (0,7,8; a single one: 7,).")] = (
        None
    )
    placement: Annotated[str | None, _option("placement", f"Where they go: {', '.join(PLACEMENTS)}.")] = None
    block: Annotated[int | None, _option("block", "Local layers see their block of this many tokens.")] = None
    lookback: Annotated[int | None, _option("lookback", "Whole blocks seen before the own one.")] = None
    window: Annotated[int | None, _option("window", "Local layers see this many last tokens.")] = None
    sinks: Annotated[int | None, _option("sinks", "First tokens that every token sees.")] = None

    def __post_init__(self) -> None:
        given = self.given
        for one, other in CONFLICTS:
            if one in given and other in given:
                raise UsageError(f"--{one} and --{other} cannot be given together")
        for name, needed in NEEDS.items():
            if name in given and not given & set(needed):
                raise UsageError(f"--{name} needs {' or '.join(f'--{other}' for other in needed)}")
        _as_usage(self._readable)

    @property
    def given(self) -> set[str]:
        return {field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None}

    def _readable(self) -> None:
        """Refuse before a model is looked at what no model can make right."""
        if self.plan is not None:
            SpanPlan.parse(self.plan)
        if self.layout is not None and self.layout not in LAYOUTS:
            raise PlanError(f"unknown layout {self.layout!r}: choose one of {', '.join(LAYOUTS)}")
        self._local()
        self._full()

    def _local(self) -> Span | None:
        if self.block is not None:
            return Block(self.block, self.lookback or 0, self.sinks or 0)
        return Window(self.window, self.sinks or 0) if self.window is not None else None

    def _full(self) -> int | list[int] | None:
        if self.full is None:
            return None
        try:
            numbers = [int(part) for part in self.full.split(",") if part.strip()]
        except ValueError:
            numbers = []
        if not numbers:
            raise PlanError(f"cannot read --full {self.full!r}: write a number of layers, or layers like 0,7,8")
        return numbers if "," in self.full else numbers[0]

    def plan_for(self, layers: int, own: SpanPlan) -> SpanPlan:
        """The plan that was asked for, for a model of `layers` layers; `own` where nothing was.

        Raises:
            UsageError: a layout that cannot be made so.
            PlanError: a plan for another number of layers.
        """
        if self.plan is not None:
            plan = SpanPlan.parse(self.plan)
            if len(plan) != layers:
                raise PlanError(f"the plan has {len(plan)} layers, the model has {layers}: give one span per layer")
            return plan
        if self.layout is None:
            return own
        name, full, local = self.layout, self._full(), self._local()
        return _as_usage(lambda: layout(name, layers, full=full, placement=self.placement, local=local))


def _as_usage(make: Callable[[], T]) -> T:
    """A plan that cannot be made from flags is a mistake in their use."""
    try:
        return make()
    except PlanError as error:
        raise UsageError(str(error)) from error


def takes_plan(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` the plan's flags as options; it gets them as its one argument `flags`."""
    hints = typing.get_type_hints(PlanFlags, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(field.name, keyword, default=field.default, annotation=hints[field.name])
        for field in dataclasses.fields(PlanFlags)
    ]

    @functools.wraps(command)
    def with_flags(**kwargs: Any) -> None:
        flags = PlanFlags(**{option.name: kwargs.pop(option.name) for option in options})
        command(flags=flags, **kwargs)

    own = [p.replace(kind=keyword) for p in inspect.signature(command, eval_str=True).parameters.values()]
    parameters = [parameter for parameter in own if parameter.name != "flags"]
    with_flags.__signature__ = inspect.Signature([*parameters, *options])  # type: ignore[attr-defined]
    with_flags.__annotations__ = {parameter.name: parameter.annotation for parameter in (*parameters, *options)}
    return with_flags


COST_ROWS: dict[str, tuple[str, str, str]] = {
    "attention pairs": ("attention_pairs", "", ""),
    "training FLOPs": ("training_flops", "total", "FLOP"),
    "  attention": ("training_flops", "attention", "FLOP"),
    "  rest": ("training_flops", "other", "FLOP"),
    "prefill FLOPs": ("prefill_flops", "total", "FLOP"),
    "  attention ": ("prefill_flops", "attention", "FLOP"),
    "  rest ": ("prefill_flops", "other", "FLOP"),
    "FLOPs of one more token": ("decode_flops", "total", "FLOP"),
    "  attention  ": ("decode_flops", "attention", "FLOP"),
    "  rest  ": ("decode_flops", "other", "FLOP"),
    "KV cache held": ("kv_bytes_held", "", "B"),
    "KV cache at its peak": ("kv_bytes_peak", "", "B"),
    "KV cache read per token": ("kv_bytes_read", "", "B"),
    "KV peak during prefill": ("prefill_kv_peak", "", "B"),
}
"""Row: (number of the cost, part of it, unit). Trailing spaces keep equal words apart."""


def cost_table(parent: PlanCost, planned: PlanCost) -> Table:
    """What the plan costs beside its parent, with the share that it saves."""
    table = Table("one document", f"{parent.length:,} tokens", title=None)
    table.columns[1].header = "parent"
    for name in ("this plan", "saved"):
        table.add_column(name)
    for column in table.columns[1:]:
        column.justify = "right"
    for words, (field, part, unit) in COST_ROWS.items():
        before, after = (
            getattr(getattr(cost, field), part) if part else getattr(cost, field) for cost in (parent, planned)
        )
        saved = percent(1 - after / before) if before else "-"
        table.add_row(words.rstrip(), in_words(before, unit), in_words(after, unit), saved)
    return table


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def in_words(number: float, unit: str) -> str:
    """`1.5 GiB` for bytes, `2.4 T` for anything else: four digits at most."""
    step, names = (1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB")) if unit == "B" else (1000, ("", *"kMGTPEZ"))
    value, index = float(number), 0
    while value >= step and index < len(names) - 1:
        value, index = value / step, index + 1
    text = f"{value:.0f}" if index == 0 else f"{value:.4g}" if value >= 1000 else f"{value:.3g}"
    return f"{text} {names[index]}".strip()


def in_one_line(parent: PlanCost, planned: PlanCost) -> str:
    """What is gained, of the whole model and not of its attention alone."""
    saved: Savings = savings(parent, planned)
    if parent == planned:
        return "This plan costs what the parent costs."
    changes = {
        "attention pairs": saved.attention_pairs,
        "training FLOPs of the whole model": saved.training_flops,
        "KV cache held": saved.kv_bytes_held,
        "KV at the peak of a one-shot prefill": saved.prefill_kv_peak,
    }
    said = ", ".join(f"{words} {-100 * share:+.1f} %" for words, share in changes.items())
    return f"Against the parent at {parent.length:,} tokens: {said}."


def described(chosen: SpanPlan, length: int) -> dict[str, Any]:
    """A plan for `--json`."""
    return {"plan": str(chosen), "layers": len(chosen), "full_layers": list(chosen.full_layers), "length": length}


def pairs(chosen: SpanPlan, length: int) -> dict[str, Any]:
    """How many pairs of query and key a plan has, and full attention."""
    seen, all_of_them = sum(span.visible_pairs(length) for span in chosen), len(chosen) * Full().visible_pairs(length)
    return {"attention_pairs": seen, "full_attention_pairs": all_of_them, "saved": 1 - seen / all_of_them}


def costed(
    model: str,
    flags: PlanFlags,
    length: int | None,
    engine: str | None = None,
    hardware: str | None = None,
    calibrate: bool = False,
) -> tuple[SpanPlan, int, dict[str, Any], tuple[PlanCost, PlanCost]]:
    """Plan, length, facts for `--json`, and what the model costs by itself and with the plan; loads no weights."""
    from .models.checkpoint import load_config
    from .models.families import native_plan, shape_of
    from .models.positions import max_positions
    from .models.tokenizer import quiet
    from .report.picture import default_length

    quiet()
    config, own = load_config(model)
    chosen, parent = flags.plan_for(len(own), own), native_plan(config)
    most = max_positions(config)
    length = length or most or default_length(chosen)
    shape = shape_of(config, kv_dtype_bytes=getattr(config.dtype, "itemsize", 2))
    costs = cost(shape, parent, length), cost(shape, chosen, length)
    numbers = {"parent": costs[0].to_json(), "planned": costs[1].to_json(), "saved": savings(*costs).to_json()}
    facts = {"model": model, **described(chosen, length), "parent_plan": str(parent), "max_positions": most}
    if engine is not None:
        facts["engine"] = _engine(engine, config, shape, chosen, length)
    if hardware is not None:
        facts["hardware"] = seconds(hardware, calibrate, config, shape, chosen, length)
    return chosen, length, {**facts, **numbers, "in_words": in_one_line(*costs)}, costs


def check_engine(engine: str | None, model: str | None) -> None:
    """Refuse before a model is looked at an engine that is not known, or one without a model."""
    if engine is not None and engine not in reserved.ENGINES:
        raise UsageError(f"unknown engine {engine!r}: choose one of {', '.join(reserved.ENGINES)}")
    if engine is not None and model is None:
        raise UsageError("--engine needs MODEL: bytes follow from its heads")


def _engine(engine: str, config: Any, shape: ModelShape, plan: SpanPlan, length: int) -> dict[str, Any]:
    """What the engine takes for the plan, for `--json`."""
    from transformers import DynamicCache

    from .models.export import native_config
    from .models.families import native_plan
    from .models.rope import refuse_for_vllm
    from .serving.vllm import ARCHITECTURES

    native, refusal = config, ""
    if plan != native_plan(config):
        try:
            native = native_config(config, plan, engine) if any(span.is_local for span in plan) else None
        except InputError as error:
            refusal = str(error)
    if engine == "vllm":
        if refusal and config.model_type not in ARCHITECTURES:
            raise InputError(f"vLLM cannot serve a converted {config.model_type}: {refusal}")
        if refusal:
            refuse_for_vllm(getattr(config, "rope_parameters", None) or {}, "use masformer.load")
        fitting = _aligned(plan) if refusal else reserved.VLLM_DEFAULTS
        rows = [reserved.vllm(shape, plan, length, settings) for settings in fitting]
        reason = reserved.vllm_reason(plan, plugin=bool(refusal))
    else:
        layers = DynamicCache(config=native).layers if native is not None else []
        windows = [getattr(layer, "sliding_window", None) for layer in layers] or [None] * len(plan)
        cache = None if refusal else SpanPlan(tuple(Window(size) if size else Full() for size in windows))
        rows = reserved.transformers(shape, plan, length, cache)
        reason = reserved.transformers_reason(plan, cache, refusal.split(": ")[0])
    return {"name": engine, "reserved": [row.to_json() for row in rows], "reason": reason}


def _aligned(plan: SpanPlan) -> list[reserved.Vllm]:
    """The defaults of vLLM whose pages divide all blocks; refused where there is none."""
    from .serving.batches import refuse_unaligned

    blocks = [span for span in plan if isinstance(span, Block)]
    fitting = [it for it in reserved.VLLM_DEFAULTS if not any(block.size % it.page for block in blocks)]
    for block in () if fitting else blocks:
        refuse_unaligned(block, min(it.page for it in reserved.VLLM_DEFAULTS))
    return fitting


def engine_table(facts: dict[str, Any], length: int) -> Table:
    """What an engine takes, beside the all-full model in it and the ideal."""
    table = Table(f"one request, {length:,} tokens", "KV reserved", "of the all-full model", "of the ideal")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in facts["reserved"]:
        ideal = f"{row['kv_bytes'] / row['ideal_bytes']:.2f} times" if row["ideal_bytes"] else "-"
        share = percent(row["kv_bytes"] / row["full_bytes"])
        table.add_row(row["engine"], in_words(row["kv_bytes"], "B"), share, ideal)
    return table
