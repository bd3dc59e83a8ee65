"""The commands that measure and show: `eval` and `report`."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .cli_model import Debug, Device, Json, device_name, load_with_plan
from .cli_output import UsageError, at_least, print_json, progress, say
from .cli_plan import PlanFlags, in_words
from .errors import InputError

if TYPE_CHECKING:
    from .evaluation.suites import Data, Settings, Subject
    from .report.tables import Estimate

QUICK: dict[str, Any] = {
    "suites": ("loss", "recall", "summary", "fidelity"),
    "lengths": (1024, 2048, 4096, 8192),
    "items": 2,
    "tasks": ("passkey",),
    "depths": (0.25, 0.75),
}
"""What --quick sets where nothing else is said."""


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="[NAME=]MODEL...", help="Folders, hub ids or GGUF files.")],
    *,
    flags: PlanFlags,
    data: Annotated[str | None, typer.Option(help="Documents: .txt, .jsonl, .parquet, a folder, a hub id.")] = None,
    suite: Annotated[str | None, typer.Option(help="Of loss, recall, summary, fidelity, lm-eval.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Tokens, 1024,4096; loss and fidelity take the longest.")] = None,
    items: Annotated[
        int | None, typer.Option(callback=at_least(1), help="Documents, and items of a task and length.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Of recall, like passkey,babi_1, or of lm-eval.")] = None,
    include: Annotated[Path | None, typer.Option(help="A folder with lm-eval tasks of your own.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Four suites, 1k to 8k tokens, few items.")] = False,
    stride: Annotated[int | None, typer.Option(help="Loss of whole documents, in windows so far apart.")] = None,
    beams: Annotated[int, typer.Option(callback=at_least(1), help="Beams of a summary; 1 is greedy.")] = 1,
    batch: Annotated[int, typer.Option(callback=at_least(1), help="Recall items in one forward.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the recall items.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; the same command goes on there.")] = None,
    device: Device = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Loss, recall, summaries and fidelity of models on the same items; a plan given here holds for every MODEL.

    Example: masformer eval MODEL OUT --data speeches.jsonl --lengths 1024,4096 --out runs/eval
    """
    from .evaluation.facts import facts_of
    from .evaluation.results import Run
    from .evaluation.suites import evaluate as measure
    from .evaluation.suites import prepare
    from .models.tokenizer import quiet

    quiet()
    given = _given(suite, lengths, items)
    chosen: dict[str, Any] = {"suites": ("loss", "recall"), **(QUICK if quick else {}), **given}
    if "lengths" not in chosen and chosen["suites"] != ("lm-eval",):
        raise UsageError("say at which --lengths, or --quick")
    _refuse_idle(chosen["suites"], tasks=tasks, include=include, stride=stride, beams=beams > 1, batch=batch > 1)
    limit = chosen["items"] if quick else items
    settings = _settings(
        chosen, tasks, limit=limit, include=include, stride=stride, beams=beams, batch=batch, seed=seed
    )
    where = device_name(device)
    subjects = [_subject(model, flags, where) for model in models]
    if quick:
        settings = _reduced(settings, subjects, data, given)
    documents = _data(data, settings)
    work = prepare(subjects, settings, documents, say)
    facts = facts_of(subjects, settings, data, documents, where)
    with _folder(out) as folder:
        with Run.open(folder, facts, compared="fidelity" in settings.suites) as run:
            pairs = [(subject.label, e) for subject, entries in zip(subjects, work, strict=True) for e in entries]
            left = sum(entry.tokens for label, entry in pairs if entry.key(label) not in run.done)
            with progress("evaluating", left) as advance:
                measure(subjects, work, settings, run, lambda label, tokens: advance(tokens))
        _show(folder, out, json)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that eval, select or train wrote.")],
    out: Annotated[Path | None, typer.Option(help="The page; RUN/report.html of the first if not given.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """One HTML page of evaluations, selections and trainings, which needs no network.

    Example: masformer report runs/eval runs/smollm2-sotu --out report.html
    """
    from .report.sections import write_report

    page = write_report(runs, out or runs[0] / "report.html")
    if json:
        print_json({"page": str(page), "runs": [str(run) for run in runs]})
    else:
        print(page)


def _given(suite: str | None, lengths: str | None, items: int | None) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if suite is not None:
        given["suites"] = names_of("suite", suite)
    if lengths is not None:
        given["lengths"] = numbers_of("lengths", lengths)
    if items is not None:
        given["items"] = items
    return given


def numbers_of(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers of an option, each once, ascending."""
    try:
        return tuple(sorted({int(number) for number in names_of(option, text)}))
    except ValueError as error:
        raise UsageError(f"cannot read --{option} {text!r}: write numbers like 1024,4096") from error


def names_of(option: str, text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UsageError(f"--{option} is empty")
    return names


USES = {
    "tasks": ("recall", "lm-eval"),
    "include": ("lm-eval",),
    "stride": ("loss",),
    "beams": ("summary",),
    "batch": ("recall", "lm-eval"),
}
"""Which suites an option says something of."""


def _refuse_idle(suites: Sequence[str], **options: Any) -> None:
    for name, value in options.items():
        if value and not set(suites) & set(USES[name]):
            raise UsageError(f"--{name} is for the suite {' or '.join(USES[name])}, which is not asked for")


def _reduced(settings: Settings, subjects: Sequence[Subject], data: str | None, given: dict[str, Any]) -> Settings:
    """What --quick can do with these models and documents, with a line for what it leaves out."""
    from .evaluation.summary import read_pairs
    from .models.positions import max_positions

    suites, lengths = settings.suites, settings.lengths
    if "suites" not in given:
        if len(subjects) < 2:
            suites = _without(suites, "fidelity", "it compares models, and there is one")
        try:
            read_pairs(Path(data or ""))
        except (InputError, OSError) as error:
            suites = _without(suites, "summary", str(error))
    if "lengths" not in given:
        most = min(max_positions(subject.config) or max(lengths) for subject in subjects)
        lengths = tuple(length for length in lengths if length <= most)
        if lengths != settings.lengths:
            say(f"--quick ends at {max(lengths, default=0):,} tokens: a model has {most:,} positions")
    return dataclasses.replace(settings, suites=suites, lengths=lengths)


def _without(suites: tuple[str, ...], left_out: str, why: str) -> tuple[str, ...]:
    say(f"--quick leaves out {left_out}: {why}")
    return tuple(suite for suite in suites if suite != left_out)


def _settings(chosen: dict[str, Any], tasks: str | None, **rest: Any) -> Settings:
    """Tasks that are not ours are lm-eval's, if that suite is asked for."""
    from .data.generators import TASKS
    from .evaluation.suites import Settings

    if tasks is not None:
        names = names_of("tasks", tasks)
        asked = [suite in chosen["suites"] for suite in ("recall", "lm-eval")]
        foreign = tuple(name for name in names if asked[1] and not (asked[0] and name in TASKS))
        own = tuple(name for name in names if name not in foreign)
        chosen = chosen | {"harness": foreign} | ({"tasks": own} if own else {})
    try:
        return Settings(**chosen, **rest)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _data(data: str | None, settings: Settings) -> Data:
    from .data.documents import read_documents
    from .evaluation.suites import Data
    from .evaluation.summary import read_pairs

    if data is None:
        if needs := [suite for suite in settings.suites if suite in ("loss", "summary", "fidelity")]:
            raise UsageError(f"the suite {needs[0]} needs --data")
        return Data()
    pairs = read_pairs(Path(data)) if "summary" in settings.suites else []
    return Data(read_documents(data), pairs)


def _subject(model: str, flags: PlanFlags, device: str) -> Subject:
    from .evaluation.suites import Subject
    from .models.checkpoint import load_config
    from .models.tokenizer import load_tokenizer

    name, equals, source = model.partition("=")
    if not equals or Path(model).exists():
        name, source = Path(model).name, model
    if not name or not source:
        raise UsageError(f"{model!r} is no NAME=MODEL: one of the two is empty")
    config, own = load_config(source)
    plan = flags.plan_for(len(own), own)
    tokenizer = load_tokenizer(source)
    return Subject(name, source, config, plan, tokenizer, lambda: load_with_plan(source, flags, device)[0])


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Where results are kept: for this call alone if no folder was named."""
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _show(folder: Path, out: Path | None, json: bool) -> None:
    """The results so far, those of earlier calls in the same folder too."""
    from .report import tables
    from .report.runs import harness_rows, read_results

    results = read_results([folder])
    made: dict[str, list[Any]] = {
        "models": tables.overview(results),
        "loss": tables.loss(results),
        "recall": tables.recall(results, by=("task", "length")),
        "summary": tables.summary(results),
        "fidelity": tables.fidelity(results),
        "lm-eval": [
            {"model": record["model"], **row}
            for record in results.records.get("lm-eval", [])
            for row in harness_rows(record)
        ],
    }
    if json:
        facts = {
            name: [row if isinstance(row, dict) else dataclasses.asdict(row) for row in found]
            for name, found in made.items()
            if found
        }
        print_json({"out": str(out) if out else None, **facts})
        return
    for title, header, rows in _printed(made):
        table = Table(*header, title=title, title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    if out is not None:
        say(f"{out} holds the results; masformer report {out} makes a page of them")


def _printed(made: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, headers and rows of the tables on the terminal."""
    rows = [
        [
            row.model,
            row.plan,
            estimate_in_words(row.nats, 3),
            estimate_in_words(row.difference, 3),
            estimate_in_words(row.recall, 0, percent=True),
            in_words(row.kv_bytes, "B") if row.kv_bytes is not None else "-",
        ]
        for row in made["models"]
    ]
    first = made["models"][0]
    kv = f"KV at {first.cost_length:,}" if first.cost_length else "KV"
    yield "Models (95 % intervals)", ["model", "plan", "nats/token", "to the first", "recall", kv], rows
    if made["recall"]:
        rows = [
            [
                *(row.model, row.task, f"{row.length:,}", f"{row.items}"),
                *(estimate_in_words(row.score, 0, percent=True), f"{row.log_probability:.1f}", f"{row.rank:.1f}"),
            ]
            for row in made["recall"]
        ]
        yield "Recall", ["model", "task", "tokens", "items", "score", "log p", "rank"], rows
    if made["summary"]:
        names = ("rouge1", "rouge2", "rougeL")
        rows = [
            [
                *(row.model, f"{row.length:,}", f"{row.documents}"),
                *(estimate_in_words(row.scores[name], 3) for name in names),
                f"{row.lead['rougeL']:.3f}",
            ]
            for row in made["summary"]
        ]
        headers = ["model", "tokens", "documents", "ROUGE-1", "ROUGE-2", "ROUGE-L", "ROUGE-L of the lead"]
        yield "Summaries", headers, rows
    if made["fidelity"]:
        rows = [
            [
                row.model,
                f"{row.length:,}",
                estimate_in_words(row.kl, 4),
                estimate_in_words(row.agreement, 1, percent=True),
            ]
            for row in made["fidelity"]
        ]
        yield "Fidelity to the first model", ["model", "tokens", "KL (nats)", "same first token"], rows
    if made["lm-eval"]:
        rows = [
            [
                row["model"],
                row["task"],
                row["metric"],
                "-" if row["value"] is None else f"{row['value']:.4f}",
                f"{row['items']}",
            ]
            for row in made["lm-eval"]
        ]
        yield "lm-eval", ["model", "task", "metric", "value", "items"], rows


def estimate_in_words(estimate: Estimate | None, digits: int, *, percent: bool = False) -> str:
    """`3.071 (3.021 to 3.120)`, without the interval where there is none."""
    value = in_short(estimate, digits, percent=percent)
    if estimate is None or estimate.low is None or estimate.high is None:
        return value
    scale = 100 if percent else 1
    return f"{value} ({scale * estimate.low:.{digits}f} to {scale * estimate.high:.{digits}f})"


def in_short(estimate: Estimate | None, digits: int, *, percent: bool = False) -> str:
    """The value alone."""
    if estimate is None:
        return "-"
    return f"{100 * estimate.value:.{digits}f} %" if percent else f"{estimate.value:.{digits}f}"
