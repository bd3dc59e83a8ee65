"""The command line: one short function per command.

Heavy imports are inside the commands. Results go to stdout, progress and errors to stderr; an error is one line,
and its exit code says whose it is: 2 usage, 3 bad input, 4 corrupt data, 5 out of resources, 130 interrupted.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .cli_eval import evaluate, report
from .cli_export import export
from .cli_generate import chat, generate
from .cli_hardware import NAMES, check_hardware, hardware_table
from .cli_model import Debug, Device, Json, Model, load_with_plan
from .cli_output import (
    INTERRUPTED,
    UsageError,
    at_least,
    exit_code,
    message,
    print_json,
    refuse_used,
    say,
    write_whole,
)
from .cli_plan import (
    PlanFlags,
    check_engine,
    cost_table,
    costed,
    described,
    engine_table,
    in_one_line,
    pairs,
    percent,
    takes_plan,
)
from .cli_select import select
from .cli_train import fetch, train
from .files import seal
from .serving.reserved import ENGINES
from .spans import Full, SpanPlan

app = typer.Typer(
    help="Mixed attention spans for pretrained decoders: full attention at a few layers, local at the others.",
    add_completion=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """The console entry point."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        code = app(args=list(arguments), prog_name="masformer", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        code = exit_code(error)
        if "--debug" in arguments:
            traceback.print_exception(error)
        print(f"masformer: {message(error, code)}", file=sys.stderr)
        return code
    if code == INTERRUPTED:  # typer turns Ctrl-C into this exit code
        print("masformer: interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(f"masformer {metadata.version('masformer')}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
@takes_plan
def plan(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A model folder, hub id or GGUF file.")] = None,
    *,
    flags: PlanFlags,
    layers: Annotated[
        int | None, typer.Option(callback=at_least(1), help="Number of layers, instead of a model.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(callback=at_least(1), help="Tokens of the document that is counted.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help=f"The KV it would reserve: {', '.join(ENGINES)}.")] = None,
    hardware: Annotated[str | None, typer.Option(help=f"The time it would take: {', '.join(NAMES)}.")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="By rates measured here, in minutes, not by a data sheet.")
    ] = False,
    svg: Annotated[Path | None, typer.Option(help="Write the picture to this file.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw who sees how far and count what it costs; loads no weights.

    Example: masformer plan MODEL --layout masformer --full 4 --block 1024 --length 32768
    """
    from .report.picture import default_length, plan_svg, plan_text

    if (model is None) == (layers is None):
        raise UsageError("give either MODEL or --layers")
    check_engine(engine, model)
    check_hardware(hardware, calibrate, model)
    if layers is not None:
        if not flags.given & {"plan", "layout"}:
            raise UsageError("--layers needs --plan or --layout")
        chosen = flags.plan_for(layers, SpanPlan((Full(),) * layers))
        length = length or default_length(chosen)
        facts: dict[str, Any] = {"model": None, **described(chosen, length), **pairs(chosen, length)}
        costs = None
    else:
        assert model is not None
        chosen, length, facts, costs = costed(model, flags, length, engine, hardware, calibrate)
    if svg is not None:
        write_whole(svg, lambda path: path.write_text(plan_svg(chosen, length=length), encoding="utf-8"))
        facts["svg"] = str(svg)
    if json:
        print_json(facts)
        return
    print(f"{chosen}\n\n{plan_text(chosen, length=length)}\n")
    if costs is None:
        print(f"At {length:,} tokens: {percent(facts['saved'])} of the pairs of full attention saved.")
    else:
        console = Console()
        console.print(cost_table(*costs))
        console.print(in_one_line(*costs), highlight=False, soft_wrap=True)
        if engine is not None:
            console.print(engine_table(facts["engine"], length))
            console.print(facts["engine"]["reason"], highlight=False, markup=False, soft_wrap=True)
        if hardware is not None:
            console.print(hardware_table(facts["hardware"], length))
            if not calibrate:
                print(
                    "By the data sheet's rates, which no program reaches: --calibrate measures those of this machine."
                )
        if facts["max_positions"] and length > facts["max_positions"]:
            print(f"Note: the model itself ends at {facts['max_positions']:,} positions.")


@app.command()
@takes_plan
def convert(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make; it must be new or empty.")],
    *,
    flags: PlanFlags,
    max_length: Annotated[
        int | None, typer.Option(callback=at_least(1), help="Extend the model to so many positions.")
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="How: theta, linear, dynamic, yarn; learned ones: tile, interpolate.")
    ] = None,
    device: Device = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Give a model the spans of a plan, check them, and save it with tokenizer and generation config.

    Example: masformer convert MODEL OUT --layout masformer --full 4 --block 1024
    """
    from .models.positions import extend
    from .models.tokenizer import has_tokenizer, load_tokenizer, quiet

    quiet()
    refuse_used(out)
    _check_extension(model, max_length, positions)
    loaded, chosen = load_with_plan(model, flags, device, check=True)
    if max_length and positions:
        extend(loaded, max_length, positions)
    tokenizer = None if Path(model).exists() and not has_tokenizer(model) else load_tokenizer(model)

    def write(folder: Path) -> None:
        loaded.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        seal(folder)

    write_whole(out, write)
    if json:
        facts = {"model": model, "out": str(out), "plan": str(chosen), "layers": len(chosen), "checked": True}
        print_json({**facts, "full_layers": list(chosen.full_layers), "tokenizer": tokenizer is not None})
        return
    full = len(chosen.full_layers)
    print(f"{out}: {len(chosen)} layers, {full} full and {len(chosen) - full} local ({chosen}); self-check passed")
    if tokenizer is None:
        print(f"Note: {model} holds no tokenizer, so none was saved.")


def _check_extension(model: str, length: int | None, method: str | None) -> None:
    """Refuse before the weights are read what `extend` would refuse, and a length without a method."""
    from .models.checkpoint import load_config
    from .models.positions import METHODS, check_positions, extended_config

    if method is not None and (length is None or method not in METHODS):
        needs = "needs --max-length" if length is None else f"knows {', '.join(METHODS)}, not {method!r}"
        raise UsageError(f"--positions {needs}")
    if length is None:
        return
    config, _ = load_config(model)
    if method is None:
        check_positions(config, length)
        raise UsageError(f"--max-length {length} is no more than {model} has: leave it out")
    extended_config(config, length, method)


app.command()(export)
app.command()(train)
app.command()(fetch)
app.command()(select)
app.command("eval")(takes_plan(evaluate))
app.command()(report)
app.command()(takes_plan(generate))
app.command()(takes_plan(chat))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo"),
    device: Device = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """The whole job on a small model and long speeches: convert, check, measure, generate, one HTML page.

    Example: masformer demo --out demo
    """
    from .demo import run as run_demo
    from .models.tokenizer import quiet

    quiet()
    facts = run_demo(out, device=device, say=say if json else print)
    if json:
        print_json(facts)
