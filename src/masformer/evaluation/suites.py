"""What `masformer eval` measures: suites of items, the same for every model, one record an item.

    work = prepare(subjects, settings, Data(documents, pairs))       refuses, before any weights are read
    evaluate(subjects, work, settings, run)                          measures what `run` does not hold yet

A suite is two functions: one makes its items for a model's tokenizer, the other measures some of them. Documents are
measured one by one, recall items in batches of equal length, so nothing is ever padded.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..data.corpus import fingerprint
from ..data.documents import Document
from ..data.filler import Filler
from ..data.generators import DEPTHS, TASKS, make_items
from ..errors import InputError
from ..files import digest
from ..models.positions import check_positions
from ..spans import SpanPlan
from .fidelity import fidelity
from .loss import bucketed, default_edges, repeat_distances, sliding_losses, token_losses
from .results import Key, Record, Run, key_of
from .scoring import score, work
from .summary import Pair, check_room, lead, rouge, summarise
from .texts import cut_documents

USUAL = ("passkey", "niah_multikey")
"""The tasks of the suite `recall` where none are named."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured, and how.

    suites: of `SUITES`. lengths: tokens of the items of `recall` and of the inputs of `summary`; the suites `loss` and
        `fidelity` take documents of the longest one, whose positions hold the shorter ones.
    items: documents of `loss` and `fidelity`; of every task, and pairs of `summary`, at each length.
    tasks: of `recall` (`masformer.data.generators.TASKS`). harness: tasks of lm-eval, of which
        `limit` items are taken, all if None; `include` is a folder with some of the user's own.
    stride: whole documents, in windows of the longest length that begin so many tokens apart; None cuts them.
    batch: recall items in one forward; changes no result beyond rounding.
    """

    suites: tuple[str, ...] = ("loss", "recall")
    lengths: tuple[int, ...] = ()
    items: int = 10
    tasks: tuple[str, ...] = USUAL
    depths: tuple[float, ...] = DEPTHS
    harness: tuple[str, ...] = ()
    limit: int | None = None
    include: Path | None = None
    stride: int | None = None
    new_tokens: int = 96
    beams: int = 1
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for kind, names, known in (("suite", self.suites, SUITES), ("task", self.tasks, TASKS)):
            if wrong := [name for name in names if name not in known]:
                raise InputError(f"unknown {kind} {wrong[0]!r}: choose of {', '.join(known)}")
        if not self.suites or ("recall" in self.suites and not self.tasks):
            raise InputError("nothing to measure: name a suite, and tasks for recall")
        if ("lm-eval" in self.suites) != bool(self.harness):
            raise InputError("the suite lm-eval and its tasks go together: --suite lm-eval --tasks ...")
        if not self.lengths and self.suites != ("lm-eval",):
            raise InputError("no length to measure at")
        if self.lengths and min(self.lengths) < 2:
            raise InputError(f"lengths must be at least 2, got {list(self.lengths)}")
        if self.stride is not None and self.lengths and not 1 <= self.stride < max(self.lengths):
            raise InputError(f"the stride must be 1 to {max(self.lengths) - 1} (below the length), got {self.stride}")

    def of_items(self) -> dict[str, Any]:
        """What decides the numbers of an item, beside its place: a run must agree in it."""
        return {name: getattr(self, name) for name in ("depths", "stride", "new_tokens", "beams", "seed")}


@dataclasses.dataclass(frozen=True)
class Data:
    """Documents, and the pairs of document and summary if the suite `summary` is asked for."""

    documents: Sequence[Document] = ()
    pairs: Sequence[Pair] = ()


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model under its label; `load` reads its weights and gives it the spans of `plan`."""

    label: str
    source: str
    config: PreTrainedConfig
    plan: SpanPlan
    tokenizer: Any
    load: Callable[[], PreTrainedModel]

    @functools.cached_property
    def mark(self) -> str:
        """The same for two tokenizers that encode alike; of a slow one its vocabulary alone is compared.

        Kept, since it takes a second for a large vocabulary.
        """
        tokenizer = self.tokenizer
        return fingerprint(tokenizer) if tokenizer.is_fast else digest(sorted(tokenizer.get_vocab().items()))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One thing to measure: its place among the results, how many tokens it takes, and what a suite made for it."""

    suite: str
    task: str | None
    length: int
    item: int
    tokens: int
    what: Any

    def place(self, label: str) -> Record:
        """The fields that a record of it begins with."""
        return {"model": label, **{name: getattr(self, name) for name in ("suite", "task", "length", "item")}}

    def key(self, label: str) -> Key:
        return key_of(self.place(label))


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a suite measures with. parent: the first model, for `fidelity` alone."""

    model: PreTrainedModel
    tokenizer: Any
    parent: PreTrainedModel | None


Say = Callable[[str], Any]
Prepare = Callable[[Subject, Settings, Data, Say], list[Entry]]
Measure = Callable[[Loaded, list[Entry], Settings], Iterator[list[tuple[Entry, Record]]]]


def prepare(
    subjects: Sequence[Subject], settings: Settings, data: Data, say: Say = lambda line: None
) -> list[list[Entry]]:
    """All that is to be measured, a list for every model.

    Args:
        say: called with a line for documents that were passed over, or that are fewer than were asked for.

    Raises:
        InputError: documents or positions that do not suffice, a task that needs more tokens or of lm-eval one whose
            data cannot be had, models that cannot be compared.
    """
    if len({subject.label for subject in subjects}) < len(subjects):
        labels = [subject.label for subject in subjects]
        twice = next(label for label in labels if labels.count(label) > 1)
        raise InputError(f"two models are called {twice}: write NAME=MODEL to give them names of their own")
    if "fidelity" in settings.suites:
        _refuse_incomparable(subjects)
    if "loss" in settings.suites and len({subject.mark for subject in subjects}) > 1:
        say("models of different tokenizers read different tokens: compare their bits per byte")
    made: dict[tuple[Any, ...], list[Entry]] = {}
    work = []
    for subject in subjects:
        suites = [suite for suite in settings.suites if suite != "fidelity" or subject is not subjects[0]]
        check_positions(subject.config, max(settings.lengths, default=1))
        kind = subject.mark, subject.tokenizer.bos_token, subject.tokenizer.eos_token  # lm-eval heeds these two
        for suite in suites:
            if (suite, kind) not in made:
                made[suite, kind] = SUITES[suite][0](subject, settings, data, say)
        work.append([entry for suite in suites for entry in made[suite, kind]])
        _refuse_long_prompts(subject, work[-1])
    return work


def _refuse_long_prompts(subject: Subject, entries: list[Entry]) -> None:
    """The tasks of lm-eval bring their own lengths: what models of one tokenizer share may fit one of them alone."""
    for entry in entries:
        if entry.suite == "lm-eval" and entry.what is not None:
            entry.what.check(subject.config)


def _refuse_incomparable(subjects: Sequence[Subject]) -> None:
    if len(subjects) < 2:
        raise InputError("fidelity compares models with the first one: give the parent and a conversion of it")
    first = subjects[0]
    for subject in subjects:
        if subject.mark != first.mark:
            raise InputError(
                f"fidelity compares models of one tokenizer: {subject.label} has another than {first.label}"
            )
        sizes = [each.config.get_text_config().vocab_size for each in (subject, first)]
        if sizes[0] != sizes[1]:
            raise InputError(f"{subject.label} has {sizes[0]:,} logits, {first.label} {sizes[1]:,}: no fidelity")


def evaluate(
    subjects: Sequence[Subject],
    work: Sequence[list[Entry]],
    settings: Settings,
    run: Run,
    progress: Callable[[str, int], Any] = lambda label, tokens: None,
) -> None:
    """Measure what `run` does not hold; a record is written as soon as its batch is measured.

    A model without anything left to measure is not loaded; the first one stays loaded while others are compared
    with it.

    Args:
        progress: called with a label and the tokens that were done since.
    """
    first: PreTrainedModel | None = None
    for number, (subject, entries) in enumerate(zip(subjects, work, strict=True)):
        left = [entry for entry in entries if entry.key(subject.label) not in run.done]
        if not left:
            continue
        if first is None and any(entry.suite == "fidelity" for entry in left):
            first = subjects[0].load()
        model = subject.load()
        if number == 0 and "fidelity" in settings.suites:
            first = model
        loaded = Loaded(model, subject.tokenizer, first)
        for suite in settings.suites:
            of_suite = [entry for entry in left if entry.suite == suite]
            for batch in SUITES[suite][1](loaded, of_suite, settings):
                run.add([{**entry.place(subject.label), **record} for entry, record in batch])
                progress(subject.label, sum(entry.tokens for entry, _ in batch))
        del model, loaded


def _document_entries(suite: str, subject: Subject, settings: Settings, data: Data, say: Say) -> list[Entry]:
    """The same documents, cut to the longest length or whole, for the suites that read documents."""
    longest = max(settings.lengths)
    length = None if suite == "loss" and settings.stride is not None else longest
    cut = cut_documents(subject.tokenizer, data.documents, length=length, items=settings.items)
    if cut.short:
        least = "two" if length is None else f"{length:,}"
        say(f"{subject.label}: {cut.short} documents of less than {least} tokens passed over ({suite})")
    if len(cut.ids) < settings.items:
        say(f"{subject.label}: {len(cut.ids)} documents instead of {settings.items} ({suite})")
    sizes: Sequence[int | None] = cut.sizes or [None] * len(cut.ids)
    return [
        Entry(suite, None, longest, n, len(ids), (ids, size, name))
        for n, (ids, size, name) in enumerate(zip(cut.ids, sizes, cut.names, strict=True))
    ]


def _measure_loss(loaded: Loaded, entries: list[Entry], settings: Settings) -> Iterator[list[tuple[Entry, Record]]]:
    for entry in entries:
        ids, size, name = entry.what
        if settings.stride is None:
            losses = token_losses(loaded.model, ids[None].to(loaded.model.device))[0].double().cpu()
        else:
            losses = sliding_losses(loaded.model, ids, length=entry.length, stride=settings.stride).double().cpu()
        if not bool(losses.isfinite().all()):
            raise InputError(f"the loss of document {name} is not a finite number: the model is not usable")
        distances, edges = repeat_distances(ids), default_edges(len(ids))
        never = distances == 0
        repeats = [(0, 0, int(never.sum()), float(losses[never].sum())), *bucketed(losses, distances, edges)]
        buckets = bucketed(losses, torch.arange(1, len(ids)), edges)
        record = {"document": name, "tokens": len(losses), "bytes": size, "nats": float(losses.sum())}
        yield [(entry, {**record, "buckets": buckets, "repeats": repeats})]


def _measure_fidelity(loaded: Loaded, entries: list[Entry], settings: Settings) -> Iterator[list[tuple[Entry, Record]]]:
    for entry in entries:
        assert loaded.parent is not None
        ids, _, name = entry.what
        kl, agree = (values.double().cpu() for values in fidelity(loaded.model, loaded.parent, ids))
        places, edges = torch.arange(1, len(ids)), default_edges(len(ids))
        pairs = zip(bucketed(kl, places, edges), bucketed(agree, places, edges), strict=True)
        buckets = [(low, high, count, nats, right) for (low, high, count, nats), (*_, right) in pairs]
        record = {"document": name, "tokens": len(kl), "kl": float(kl.sum()), "agree": float(agree.sum())}
        yield [(entry, {**record, "buckets": buckets})]


def _recall_entries(subject: Subject, settings: Settings, data: Data, say: Say) -> list[Entry]:
    filler = Filler.of(subject.tokenizer, [document.text for document in data.documents] or None)
    entries = []
    for length in settings.lengths:
        for task in settings.tasks:
            items = make_items(
                task,
                subject.tokenizer,
                length=length,
                count=settings.items,
                filler=filler,
                depths=settings.depths,
                seed=settings.seed,
            )
            entries += [Entry("recall", task, length, n, work([item]), item) for n, item in enumerate(items)]
    return entries


def _measure_recall(loaded: Loaded, entries: list[Entry], settings: Settings) -> Iterator[list[tuple[Entry, Record]]]:
    for begin in range(0, len(entries), settings.batch):
        batch = entries[begin : begin + settings.batch]
        scores = score(loaded.model, loaded.tokenizer, [entry.what for entry in batch], batch=settings.batch)
        yield [
            (
                entry,
                {
                    "depth": entry.what.depth,
                    "score": result.score,
                    "log_probability": result.log_probability,
                    "rank": result.rank,
                    "text": result.text,
                },
            )
            for entry, result in zip(batch, scores, strict=True)
        ]


def _summary_entries(subject: Subject, settings: Settings, data: Data, say: Say) -> list[Entry]:
    if not data.pairs:
        raise InputError('the suite summary needs documents with a "summary" beside their "text"')
    check_room(subject.tokenizer, min(settings.lengths), settings.new_tokens)
    if len(data.pairs) < settings.items:
        say(f"{subject.label}: {len(data.pairs)} documents instead of {settings.items} (summary)")
    return [
        Entry("summary", None, length, n, length, pair)
        for length in settings.lengths
        for n, pair in enumerate(data.pairs[: settings.items])
    ]


def _measure_summary(loaded: Loaded, entries: list[Entry], settings: Settings) -> Iterator[list[tuple[Entry, Record]]]:
    for entry in entries:
        pair = entry.what
        how = {"length": entry.length, "new_tokens": settings.new_tokens, "beams": settings.beams}
        made = summarise(loaded.model, loaded.tokenizer, pair.text, **how)
        baseline = rouge(pair.summary, lead(pair.text))
        record = {"document": pair.id, **rouge(pair.summary, made.text), "lead": baseline}
        yield [(entry, {**record, "prompt_tokens": made.prompt_tokens, "cut": made.cut, "text": made.text})]


def _harness_entries(subject: Subject, settings: Settings, data: Data, say: Say) -> list[Entry]:
    """Each holds what its longest request takes, which every subject needs positions for (`prepare`)."""
    from .harness import check_tasks, longest_request  # an extra

    check_tasks(settings.harness, settings.include)
    if subject.tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {subject.label} has no end token, which lm-eval needs")
    how: dict[str, Any] = {"limit": settings.limit, "include": settings.include, "seed": settings.seed}
    entries = []
    for task in settings.harness:
        longest = longest_request(subject.config, subject.tokenizer, [task], **how)
        entries.append(Entry("lm-eval", task, 0, settings.limit or 0, 0, longest))
    return entries


def _measure_harness(loaded: Loaded, entries: list[Entry], settings: Settings) -> Iterator[list[tuple[Entry, Record]]]:
    if entries:
        from .harness import run_tasks
    for entry in entries:
        assert entry.task is not None
        rows = run_tasks(
            loaded.model,
            loaded.tokenizer,
            [entry.task],
            limit=settings.limit,
            batch=settings.batch,
            include=settings.include,
            seed=settings.seed,
        )
        yield [(entry, {"metrics": [{name: value for name, value in row.items() if name != "values"} for row in rows]})]


SUITES: dict[str, tuple[Prepare, Measure]] = {
    "loss": (functools.partial(_document_entries, "loss"), _measure_loss),
    "recall": (_recall_entries, _measure_recall),
    "summary": (_summary_entries, _measure_summary),
    "fidelity": (functools.partial(_document_entries, "fidelity"), _measure_fidelity),
    "lm-eval": (_harness_entries, _measure_harness),
}
"""By name: what makes the entries of a suite, and what measures them."""
