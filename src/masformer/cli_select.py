"""The command that chooses which layers stay full: `select`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from .cli_eval import in_short, names_of, numbers_of
from .cli_model import Debug, Device, Dtype, Json, Model, check_dtype, device_name
from .cli_output import UsageError, at_least, print_json, say
from .errors import InputError
from .spans import Block, PlanError, Span, Window

if TYPE_CHECKING:
    from .selection.space import Budget
    from .spans import ModelShape

BUDGETS = ("full", "kv_bytes", "flops", "within")
BY_COST = ("kv_bytes", "flops")


@dataclasses.dataclass(frozen=True)
class BudgetFlags:
    """The kind of budget, its amounts and the length it holds at, as they were typed."""

    budget: str
    amounts: tuple[float, ...]
    at: int | None

    @classmethod
    def of(cls, typed: dict[str, str | None], at: int | None) -> BudgetFlags:
        given = [name for name in BUDGETS if typed[name] is not None]
        if len(given) != 1:
            raise UsageError("give one kind of budget: --full, --kv-bytes, --flops or --within")
        [budget] = given
        if at is not None and budget not in BY_COST:
            raise UsageError("--at says at which length --kv-bytes or --flops hold")
        option, text = budget.replace("_", "-"), typed[budget] or ""
        try:
            amounts = tuple(sorted({float(part) for part in names_of(option, text)}))
        except ValueError as error:
            raise UsageError(f"cannot read --{option} {text!r}: write a number, or several like 4,8") from error
        if not all(0 <= amount < float("inf") for amount in amounts):
            raise UsageError(f"--{option} must be 0 or more, got {text}")
        if budget == "full" and any(amount != int(amount) for amount in amounts):
            raise UsageError(f"--full counts layers, got {text}")
        return cls(budget, amounts, at)

    def budgets(self, shape: ModelShape, positions: int | None) -> tuple[Budget, ...]:
        from .selection.space import flops_budget, full_budget, kv_budget, nats_budget

        if self.budget == "full":
            return tuple(full_budget(int(amount)) for amount in self.amounts)
        if self.budget == "within":
            return tuple(nats_budget(amount) for amount in self.amounts)
        length = self.at or positions
        if length is None:
            raise UsageError("the model has no maximum of positions: say --at which length the budget holds")
        make = kv_budget if self.budget == "kv_bytes" else flops_budget
        return tuple(make(shape, amount, length) for amount in self.amounts)


def local_spans(
    block: int | None, window: int | None, lookback: int | None, sinks: int | None, sizes: str | None
) -> tuple[Span, ...]:
    """The spans that a local layer may get, ascending."""
    if (block is None) == (window is None):
        raise UsageError("say what local layers see: either --block or --window")
    if lookback is not None and block is None:
        raise UsageError("--lookback needs --block")
    every = sorted({block or window or 0, *(numbers_of("sizes", sizes) if sizes is not None else ())})
    try:
        if block is not None:
            return tuple(Block(size, lookback or 0, sinks or 0) for size in every)
        return tuple(Window(size, sinks or 0) for size in every)
    except PlanError as error:
        raise UsageError(str(error)) from error


def select(
    model: Model,
    data: Annotated[str, typer.Option(help="Documents, half to choose by and half to try the choices on.")],
    out: Annotated[Path, typer.Option(help="Folder for everything; the same command goes on there.")],
    held_out: Annotated[str | None, typer.Option(help="Other documents to try the choices on.")] = None,
    full: Annotated[str | None, typer.Option(help="Budget: so many full layers; 4,8 chooses for each.")] = None,
    kv_bytes: Annotated[str | None, typer.Option(help="Budget: bytes of KV cache --at a length.")] = None,
    flops: Annotated[str | None, typer.Option(help="Budget: attention FLOPs of a forward --at a length.")] = None,
    within: Annotated[str | None, typer.Option(help="As few full layers as stay within so many nats.")] = None,
    at: Annotated[int | None, typer.Option(callback=at_least(1), help="Tokens; the model's positions.")] = None,
    block: Annotated[int | None, typer.Option(help="Local layers see their block of this many tokens.")] = None,
    lookback: Annotated[int | None, typer.Option(help="Whole blocks seen before the own one.")] = None,
    window: Annotated[int | None, typer.Option(help="Local layers see this many last tokens.")] = None,
    sinks: Annotated[int | None, typer.Option(help="First tokens that every token sees.")] = None,
    sizes: Annotated[str | None, typer.Option(help="More sizes that a local layer may get: 512,1024.")] = None,
    methods: Annotated[str, typer.Option(help="Methods, or the groups rules, scores, searches.")] = (
        "rules,path,prune"
    ),
    length: Annotated[int, typer.Option(callback=at_least(512), help="Tokens of what is chosen by.")] = 2048,
    probes: Annotated[int, typer.Option(callback=at_least(1), help="Recall items to choose by.")] = 12,
    lengths: Annotated[str | None, typer.Option(help="Tokens of held-out items; as --length.")] = None,
    items: Annotated[int, typer.Option(callback=at_least(1), help="Held-out items of a task and length.")] = 10,
    tasks: Annotated[str | None, typer.Option(help="Held-out recall tasks, those of eval.")] = None,
    train_steps: Annotated[
        int, typer.Option(callback=at_least(0), help="Train each choice so long and try it again.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of documents, items and draws.")] = 0,
    dtype: Dtype = None,
    workers: Annotated[int, typer.Option(callback=at_least(1), help="Processes that measure.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Measure on a Ray cluster: its address, or local.")] = None,
    device: Device = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Choose which layers stay full: measured, searched, and tried on documents and tasks that had no say.

    Example: masformer select MODEL --data speeches.jsonl --full 4 --window 128 --sinks 4 --out runs/select
    """
    spans = local_spans(block, window, lookback, sinks, sizes)
    typed = {"full": full, "kv_bytes": kv_bytes, "flops": flops, "within": within}
    flags = BudgetFlags.of(typed, at)
    check_dtype(dtype)
    where = device_name(device)

    import torch

    from .evaluation.suites import Settings
    from .models.checkpoint import load_config
    from .models.families import shape_of
    from .models.positions import max_positions
    from .models.tokenizer import quiet

    try:
        from .selection.choice import Asked
        from .selection.run import select as run
        from .selection.trial import TASKS, Trial
    except ModuleNotFoundError as error:
        raise InputError(f"selection needs {error.name}: pip install 'masformer[select]'") from error
    from .selection.methods import named

    quiet()
    config, _ = load_config(model)
    kind = getattr(torch, dtype) if dtype is not None else getattr(config, "dtype", None) or torch.float32
    shape = shape_of(config, kv_dtype_bytes=kind.itemsize)
    asked = Asked(
        model=model,
        local=spans,
        budgets=flags.budgets(shape, max_positions(config)),
        methods=named(names_of("methods", methods)),
        length=length,
        probes=probes,
        seed=seed,
        dtype=kind,
        device=where,
    )
    settings = Settings(
        suites=("loss", "recall"),
        lengths=numbers_of("lengths", lengths) if lengths is not None else (length,),
        items=items,
        tasks=names_of("tasks", tasks) if tasks is not None else TASKS,
        seed=seed,
    )
    chosen_by, others = _documents(data, held_out, seed)
    trial = Trial(
        asked=asked,
        documents=others,
        chosen_by=chosen_by,
        settings=settings,
        data=held_out or data,
    )
    with _shown() as show:
        outcome = run(asked, trial, out, train_steps=train_steps, processes=workers, ray=ray, say=say, progress=show)
    _print(out, outcome, json)


def _documents(data: str, held_out: str | None, seed: int) -> tuple[list[Any], list[Any]]:
    from .data.documents import read_documents
    from .selection.choice import drawn

    return drawn(read_documents(data), None if held_out is None else read_documents(held_out), seed)


@contextlib.contextmanager
def _shown() -> Iterator[Callable[[str, int], None]]:
    """What is going on, on stderr if that is a terminal."""
    with Console(stderr=True).status("choosing") as status:
        done: dict[str, int] = {}

        def show(what: str, more: int) -> None:
            done[what] = done.get(what, 0) + more
            unit = "plans on a probe" if what == "choosing" else "tokens"
            status.update(f"{what}: {done[what]:,} {unit}")

        yield show


def _print(out: Path, outcome: dict[str, Any], json: bool) -> None:
    """Every choice with what it costs and what it measures on the checks and on held-out data; scores by layer."""
    from .report.picture import scores_text
    from .report.runs import read_results
    from .report.tables import overview
    from .selection.outcome import HELD_OUT

    held_out = {row.model: row for row in overview(read_results([out / HELD_OUT]))}
    if json:
        rows = {name: dataclasses.asdict(row) for name, row in held_out.items()}
        print_json({"out": str(out), **outcome, "held_out": rows})
        return
    for budget in outcome["budgets"]:
        Console().print(_table(outcome, budget, held_out))
        if outcome["train_steps"]:
            Console().print(_trained(outcome, budget, held_out))
    chosen = {budget["words"]: budget["plans"][budget["chosen"]] for budget in outcome["budgets"]}
    if outcome["scores"]:
        marked = {f"chosen, {words}": row["full_layers"] for words, row in chosen.items()}
        typer.echo(f"\nscores by layer\n{scores_text(outcome['scores'], marked)}")
    for words, row in chosen.items():
        say(f"{words}: --plan {row['plan']}")
    say(f"{out} holds the results; masformer report {out} makes a page of them, with intervals")


def _table(outcome: dict[str, Any], budget: dict[str, Any], held_out: dict[str, Any]) -> Table:
    """The choices within a budget, the fewest nats first; for 80 columns, so without intervals.

    KV (at its largest) and attention FLOPs are shares of the parent's.
    """
    from .selection.outcome import compared_on

    table = _empty(f"{budget['words']}: chosen by {budget['chosen']}")
    table.add_column("full layers", overflow="fold", min_width=14)
    for header in ("KV", "FLOPs", compared_on(outcome), "held-out", "to parent", "recall"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, row in _by_nats(outcome, budget):
        found = held_out[row["label"]]  # of a budget that was asked for before, too
        layers = row["label"].removeprefix("full ").replace(",", ", ")
        cells = [f"{row['nats']:.3f}", in_short(found.nats, 3), in_short(found.difference, 3)]
        cells.append(in_short(found.recall, 0, percent=True))
        table.add_row(name, layers, *_shares(row["cost"], outcome["parent"]["cost"]), *cells)
    return table


def _trained(outcome: dict[str, Any], budget: dict[str, Any], held_out: dict[str, Any]) -> Table:
    """The same plans after their training."""
    from .selection.outcome import TRAINED

    table = _empty(f"{budget['words']}, trained for {outcome['train_steps']} steps")
    for header in ("held-out", "recall"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, row in _by_nats(outcome, budget):
        found = held_out.get(f"{row['label']}, {TRAINED}")
        cells = [in_short(found.nats, 3), in_short(found.recall, 0, percent=True)] if found else ["-", "-"]
        table.add_row(name, *cells)
    return table


def _empty(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("method", no_wrap=True)
    return table


def _by_nats(outcome: dict[str, Any], budget: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    rows = {"parent": outcome["parent"], "all local": outcome["local"], **budget["plans"]}
    return sorted(rows.items(), key=lambda item: item[1]["nats"])


def _shares(own: dict[str, Any], parent: dict[str, Any]) -> list[str]:
    """Of the parent's KV cache and attention FLOPs."""
    shares = (
        own["kv_bytes_peak"] / parent["kv_bytes_peak"],
        own["prefill_flops"]["attention"] / parent["prefill_flops"]["attention"],
    )
    return [f"{100 * share:.0f} %" for share in shares]
