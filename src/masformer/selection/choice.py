"""The choice itself: every method's plan for every budget, with what it costs and what it measures on the checks.

prepared = prepare(Asked(model="models/smollm2", local=(Window(128, sinks=4),), ...), documents, folder)
outcome = choose(prepared, store)
outcome["budgets"][0]["chosen"]
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from ..data.documents import Document
from ..data.seeds import generator
from ..errors import InputError, ResourceError
from ..files import digest
from ..models.checkpoint import load, load_config, weights_digest
from ..models.convert import convert
from ..models.families import native_plan, shape_of
from ..models.positions import check_positions
from ..models.tokenizer import load_tokenizer
from ..spans import ModelShape, Span, SpanPlan, cost
from ..training.loss import CHUNK_BYTES
from ..training.prepare import LOGIT_COPIES, PROGRAM
from .bench import CHUNK, Bench, measure_probe
from .methods import METHODS, MOST_FRESH, Method, Task
from .outcome import CORPORA, best
from .probes import Probe, document_probes, recall_probe, recall_sequences
from .score import SCORES
from .space import Budget, Space
from .store import Store
from .workers import loaded_from

KEPT = 32
"""Hidden states' worth of what a layer keeps for a backward pass."""
MOST_DOCUMENTS = 100
"""How many documents of each half are used at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be chosen, and how.

    model: a folder, hub id or GGUF file of a model that is not converted.
    local: spans of the layers that are not full, ascending; several with methods that choose among sizes.
    budgets: for each of which every method chooses.
    methods: names of `METHODS`. length: tokens of the probes. probes: recall items; a quarter as many documents; and
        as many checks.
    dtype: what the model is measured in. device: where.
    """

    model: str
    local: tuple[Span, ...]
    budgets: tuple[Budget, ...]
    methods: tuple[Method, ...]
    length: int
    probes: int = 12
    seed: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __post_init__(self) -> None:
        if any(budget.within is not None for budget in self.budgets):
            for method in self.methods:
                if not method.within:
                    raise InputError(f"{method.name} needs a budget that says how many layers may be full, no --within")
        if len(self.local) > 1 and (wrong := [method.name for method in self.methods if not method.sizes]):
            able = [name for name, method in METHODS.items() if method.sizes]
            raise InputError(f"{wrong[0]} chooses which layers are full, not among sizes: use {', '.join(able)}")
        if len(self.local) > 1 and any(budget.counts for budget in self.budgets):
            raise InputError("with several sizes the budget must be one of KV bytes or FLOPs: layers differ in cost")
        if self.dtype == torch.float16 and (learning := [method.name for method in self.methods if method.learns]):
            raise InputError(f"{learning[0]} takes gradients, which float16 loses: use float32 or bfloat16")


def drawn(
    documents: Sequence[Document], held_out: Sequence[Document] | None, seed: int
) -> tuple[list[Document], list[Document]]:
    """Documents to choose by, and others to try the choices on: at random, at most a hundred of each.

    Args:
        held_out: where the others are drawn from; None takes half of `documents`.

    Raises:
        InputError: a single document for both, or none that is not chosen by.
    """
    shuffled = _shuffled(documents, seed)
    if held_out is None:
        if len(shuffled) < 2:
            raise InputError("one document cannot be both chosen by and tried on: give more, or --held-out ones")
        half = min(len(shuffled) // 2, MOST_DOCUMENTS)
        return shuffled[:half], shuffled[half : 2 * half]
    chosen_by = shuffled[:MOST_DOCUMENTS]
    known = {document.text for document in chosen_by}
    others = [document for document in _shuffled(held_out, seed) if document.text not in known]
    if not others:
        raise InputError("every held-out document is one of those to choose by: give others, or leave --held-out out")
    return chosen_by, others[:MOST_DOCUMENTS]


def _shuffled(documents: Sequence[Document], seed: int) -> list[Document]:
    """Each text once."""
    once = list({document.text: document for document in documents}.values())
    return [once[number] for number in generator("selection", seed).permutation(len(once))]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything but the weights; what cannot be done was refused.

    checks: what plans are compared on in the end: as many recall items as there are among the probes, which no method
        saw, and other documents, if any are long enough. Under budgets of nats, which are kept to on the probes, these.
    """

    asked: Asked
    shape: ModelShape
    space: Space
    probes: list[Probe]
    checks: list[Probe]
    items: Any
    weights: str | None
    identity: str

    def memory(self, processes: int) -> int:
        """Bytes: in each process, the caller's among them, weights, the states of all layers for a probe, twice for
        what is computed on, and logits; and what the layers keep where a method takes gradients.
        """
        asked, shape = self.asked, self.shape
        size, vocabulary = asked.dtype.itemsize, shape.head_parameters // shape.hidden
        states = shape.layers * asked.length * shape.hidden * size
        each = PROGRAM + shape.parameters * size + 2 * states + LOGIT_COPIES * CHUNK * vocabulary * 4
        gradients = KEPT * states + LOGIT_COPIES * CHUNK_BYTES if any(method.learns for method in asked.methods) else 0
        return each * (processes + 1 if processes > 1 else 1) + gradients

    def refuse_too_large(self, processes: int) -> None:
        """Raise a ResourceError if memory does not hold the search.

        Raises:
            ResourceError: with what is needed and what there is.
        """
        gpu = self.asked.device.startswith("cuda")
        free = torch.cuda.mem_get_info(self.asked.device)[0] if gpu else psutil.virtual_memory().available
        needed = self.memory(processes)
        if needed > free:
            raise ResourceError(
                f"the search needs about {needed / 1e9:.1f} GB of {'GPU ' if gpu else ''}memory and "
                f"{free / 1e9:.1f} GB are free: use fewer processes, shorter probes, or --dtype bfloat16"
            )

    def forwards(self) -> float:
        """About how many forwards of a probe the methods take, under the parent's spans."""
        asked, probes = self.asked, len(self.probes)
        moves = len(self.space.layers) * len(asked.local)
        total = float(probes * (2 + len(asked.methods) * len(asked.budgets)))
        for budget in asked.budgets:
            counts = [budget.count(self.space)] if budget.within is None else [0, len(self.space.layers)]
            total += sum(max(method.effort(moves, count, probes) for count in counts) for method in asked.methods)
        return total


def prepare(asked: Asked, documents: Sequence[Document], folder: Path) -> Prepared:
    """Read config and tokenizer and make the probes.

    Args:
        documents: those to choose by. folder: gets their tokens.

    Raises:
        InputError: a converted model, a length beyond its positions or that no document has, a budget that cannot be.
    """
    config, own = load_config(asked.model)
    if own != native_plan(config):
        raise InputError(f"{asked.model} is converted already ({own}): select for its parent, and train that")
    space = Space.of(own, asked.local)
    for budget in asked.budgets:
        budget.check(space)
    check_positions(config, asked.length)
    tokenizer = load_tokenizer(asked.model)
    items = recall_sequences(tokenizer, documents, folder / CORPORA, length=asked.length, seed=asked.seed)
    count = max(1, asked.probes // 4)
    texts = document_probes(tokenizer, documents, length=asked.length, count=2 * count)
    unseen = asked.probes + MOST_FRESH
    probes, checks = ([recall_probe(items, first + n) for n in range(asked.probes)] for first in (0, unseen))
    probes += texts[:count]
    checks += texts[count:] or texts
    if any(budget.within is not None for budget in asked.budgets):
        checks = probes
    weights = weights_digest(asked.model, config)
    known = [weights, digest(config.to_json_string()), str(asked.dtype), asked.device]
    known += [metadata.version(name) for name in ("masformer", "torch")]
    shape = shape_of(config, kv_dtype_bytes=asked.dtype.itemsize)
    return Prepared(asked, shape, space, probes, checks, items, weights, digest(known)[:16])


def choose(
    prepared: Prepared,
    store: Store,
    *,
    executor: Executor | None = None,
    beside: float = 0.0,
    say: Callable[[str], Any] = lambda line: None,
    progress: Callable[[int], Any] = lambda plans: None,
) -> dict[str, Any]:
    """JSON: `scores` by method, `parent` and `local`, and for each of `budgets` the `plans` by method with what they
    cost and measure on the checks, and which is `chosen`; held-out data has no say.

    Args:
        beside: forwards of a probe that are to follow the choice, for the estimate of time.

    Raises:
        InputError: a budget within which no method has a plan.
    """
    asked, space = prepared.asked, prepared.space
    model = load(asked.model, dtype=asked.dtype, device=asked.device)
    convert(model, space.mixed(space.layers[::2]), check=True)  # once: all plans differ from it by numbers alone
    on = functools.partial(
        Bench,
        model,
        items=prepared.items,
        store=store,
        identity=prepared.identity,
        executor=executor,
        loaded=loaded_from(asked.model, asked.dtype, asked.device, prepared.weights),
        progress=progress,
    )
    bench, judge = on(prepared.probes), on(prepared.checks)
    seconds = _seconds(bench)
    search, rest = (forwards * seconds / 60 for forwards in (prepared.forwards(), beside))
    say(f"about {search:.0f} minutes to choose and {rest:.0f} to try, in one process, less what was measured before")
    tasks = [Task(bench, space, budget, asked.seed) for budget in asked.budgets]
    budgets = [_for_budget(prepared, task, judge, say) for task in tasks]
    return {
        "budgets": budgets,
        "scores": {name: tasks[0].scores(score) for name, score in SCORES.items() if tasks[0].has(score)},
        "parent": _row(prepared, judge, space.parent),
        "local": _row(prepared, judge, space.shortest),
    }


def _for_budget(prepared: Prepared, task: Task, judge: Bench, say: Callable[[str], Any]) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {}
    budget = task.budget
    for method in prepared.asked.methods:
        plan = method.choose(task)
        if plan is None:
            say(f"{budget.words}, {method.name}: no plan")
            continue
        rows[method.name] = {**_row(prepared, judge, plan), "price": budget.price(plan)}
        say(f"{budget.words}, {method.name}: {label_of(plan, task.space)}, {rows[method.name]['nats']:.3f} nats")
    if not rows:
        names = ", ".join(method.name for method in prepared.asked.methods)
        raise InputError(f"none of {names} has a plan within {budget.words}")
    found: dict[str, Any] = {"words": budget.words, "plans": rows}
    if budget.within is not None:
        found["limit"] = task.bench.measure([task.space.parent])[0].nats + budget.within
    return {**found, "chosen": best(rows, found.get("limit"))}


def _seconds(bench: Bench) -> float:
    """Of one forward of a probe under the parent."""
    probe = bench.probes[0]
    measure_probe(bench.model, probe, [], bench.parent)  # the first one is slow
    started = time.perf_counter()
    measure_probe(bench.model, probe, [], bench.parent)
    return time.perf_counter() - started


def _row(prepared: Prepared, bench: Bench, plan: SpanPlan) -> dict[str, Any]:
    asked = prepared.asked
    measured = bench.measure([plan])[0]
    own = cost(prepared.shape, plan, asked.length)
    return {
        "plan": str(plan),
        "label": label_of(plan, prepared.space),
        "full_layers": list(plan.full_layers),
        **measured.to_json(),
        "by_probe": bench.recall_by_probe(plan),
        "cost": own.to_json(),
    }


def label_of(plan: SpanPlan, space: Space) -> str:
    """What a plan is called among the held-out results: the same for two methods that chose the same."""
    if plan == space.parent:
        return "parent"
    if plan == space.shortest:
        return "all local"
    return f"full {_listed(plan)}" if plan == space.mixed(plan.full_layers) else str(plan)


def _listed(plan: SpanPlan) -> str:
    return ",".join(map(str, plan.full_layers)) or "none"
