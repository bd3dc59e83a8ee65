"""How good plans are: the loss of answers and of documents under each, and how far each is from the parent.

    bench = Bench(model, probes)
    results = bench.measure([plan, ...])
    results[0].recall, results[0].documents, results[0].kl           nats per token

Plans are measured text by text and in an order in which neighbours begin with the same spans, so that layers which
would compute the same again are passed over (`models/resume.py`): to try every layer in turn takes half the work.
What was measured is in the bench's store, and never measured again.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.recall import RecallSequences
from ..errors import InputError
from ..files import digest
from ..models.convert import applied
from ..models.families import native_plan
from ..models.head import Head
from ..models.resume import States, resumed, shared
from ..models.selfcheck import evaluating
from ..spans import SpanPlan
from .probes import DOCUMENTS, RECALL, Probe, recall_probe
from .store import Store

CHUNK, KL_PLACES = 512, 256
"""Places whose logits exist at once; places of a probe at which the KL from the parent is taken."""

Pair = tuple[float, float]
"""Nats and KL(parent || model) per predicted token of a probe."""


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """Means over probes, each counted once, of nats per predicted token; None where there is no probe of the kind.

    recall: of the tokens of answers. documents: of all tokens of documents. kl: from the parent, over all probes.
    """

    recall: float | None
    documents: float | None
    kl: float

    @property
    def nats(self) -> float:
        """What searches lower: a nat at an answer counts as much as a nat at every token of the documents."""
        return (self.recall or 0.0) + (self.documents or 0.0)

    def to_json(self) -> dict[str, float | None]:
        return {**dataclasses.asdict(self), "nats": self.nats}


class Bench:
    """A model, and the probes that plans for it are measured on.

    Args:
        model: converted or not; it is given back as it was. Its own native spans are the parent's.
        store: where results are kept; without one, as long as the bench is.
        items: recall items without end, of which the first are probes; methods that learn take fresh ones.
        identity: tells this model, in its dtype, from others that use the same store.
        executor: where else probes are measured, by `loaded()`, which must give the same model there.
        progress: called with the number of plans that were measured on a probe.

    Raises:
        InputError: no probes.
    """

    def __init__(
        self,
        model: Any,
        probes: Sequence[Probe],
        *,
        items: RecallSequences | None = None,
        store: Store | None = None,
        identity: str = "",
        executor: Executor | None = None,
        loaded: Callable[[], Any] | None = None,
        progress: Callable[[int], Any] = lambda plans: None,
    ) -> None:
        if not probes:
            raise InputError("there is nothing to measure plans on: give recall items or documents")
        self.model, self.probes, self.identity, self.progress = model, list(probes), identity, progress
        self.store = Store() if store is None else store
        self.items = items
        self.executor, self.loaded = executor, loaded
        self.parent = native_plan(model.config)
        self.references: dict[str, Tensor] = {}

    def measure(self, plans: Sequence[SpanPlan]) -> list[Measured]:
        """What each of these plans gives, in their order."""
        distinct = sorted(set(plans), key=in_order)
        missing = [(probe, [p for p in distinct if self._key(probe, p) not in self.store]) for probe in self.probes]
        jobs = [(probe, wanted) for probe, wanted in missing if wanted]
        for (probe, wanted), pairs in zip(jobs, self._run(jobs), strict=True):
            self.store.put({self._key(probe, plan): pair for plan, pair in zip(wanted, pairs, strict=True)})
            self.progress(len(wanted))
        return [self._measured(plan) for plan in plans]

    def fresh(self, count: int) -> list[Probe]:
        """Recall items that are no probes, always the same; as many of the recall probes where there are no items."""
        probes = [probe for probe in self.probes if probe.kind == RECALL]
        if self.items is None:
            return probes[:count]
        return [recall_probe(self.items, len(probes) + number) for number in range(count)]

    @property
    def basis(self) -> str:
        """Tells this model and these probes from others."""
        return digest([self.identity, [probe.key for probe in self.probes]])[:24]

    def recall_by_probe(self, plan: SpanPlan) -> list[float]:
        """Nats per answer token of each recall probe, of a plan that was measured."""
        return [self.store[self._key(probe, plan)][0] for probe in self.probes if probe.kind == RECALL]

    def _key(self, probe: Probe, plan: SpanPlan) -> str:
        return f"{self.identity} {probe.key} {plan}"

    def _measured(self, plan: SpanPlan) -> Measured:
        found = {probe: self.store[self._key(probe, plan)] for probe in self.probes}
        nats = {kind: [pair[0] for probe, pair in found.items() if probe.kind == kind] for kind in (RECALL, DOCUMENTS)}
        recall, documents = (statistics.fmean(nats[kind]) if nats[kind] else None for kind in (RECALL, DOCUMENTS))
        return Measured(recall, documents, statistics.fmean(kl for _, kl in found.values()))

    def _run(self, jobs: list[tuple[Probe, list[SpanPlan]]]) -> Iterable[list[Pair]]:
        if self.executor is None:
            kept = self.references
            return (measure_probe(self.model, probe, plans, self.parent, kept) for probe, plans in jobs)
        probes, plans = zip(*jobs, strict=True) if jobs else ((), ())
        return self.executor.map(_elsewhere, [self.loaded] * len(jobs), probes, plans, [self.parent] * len(jobs))


def _elsewhere(loaded: Callable[[], Any], probe: Probe, plans: list[SpanPlan], parent: SpanPlan) -> list[Pair]:
    return measure_probe(loaded(), probe, plans, parent)


def in_order(plan: SpanPlan) -> tuple[str, ...]:
    """Sorted by this, plans stand beside those with which they share most of their first layers."""
    return tuple(map(str, plan))


@torch.no_grad()
def measure_probe(
    model: Any,
    probe: Probe,
    plans: Sequence[SpanPlan],
    parent: SpanPlan,
    references: dict[str, Tensor] | None = None,
) -> list[Pair]:
    """Nats and KL from the parent per predicted token of a probe, of each plan, in their order.

    The KL is the mean over at most `KL_PLACES` places, evenly spaced: it takes the head a second time.

    Args:
        references: the parent's hidden states of probes by their key, kept for the next call.

    Raises:
        InputError: a loss that is not a finite number, a head that is no plain linear layer.
    """
    head, results = Head.of(model), dict[SpanPlan, Pair]()
    ids, places = probe.ids[None].to(model.device), probe.places.to(model.device)
    references = {} if references is None else references
    first = [] if probe.key in references else [parent]
    states: States = []
    last: SpanPlan | None = None
    with evaluating(model):
        for plan in [*first, *sorted({*plans} - {*first}, key=in_order)]:
            with applied(model, plan), resumed(model, states, 0 if last is None else shared(last, plan)):
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, places - 1]
            last = plan
            some = torch.linspace(0, len(places) - 1, min(KL_PLACES, len(places))).round().long().to(hidden.device)
            reference = references.setdefault(probe.key, hidden[some])
            results[plan] = _nats(head, hidden, ids[0, places]), _kl(head, hidden[some], reference)
    return [results[plan] for plan in plans]


def _nats(head: Head, hidden: Tensor, wanted: Tensor) -> float:
    """The mean over hidden states `[places, hidden]` and the tokens `[places]` that they predict."""
    pieces = zip(hidden.split(CHUNK), wanted.split(CHUNK), strict=True)
    nats = sum(float(F.cross_entropy(head(x).float(), y, reduction="sum").double()) for x, y in pieces) / len(wanted)
    if not abs(nats) < float("inf"):  # also catches NaN
        raise InputError(f"a loss of {nats} nats was measured: the model is not usable")
    return nats


def _kl(head: Head, ours: Tensor, theirs: Tensor) -> float:
    """The mean KL(parent || model) over hidden states `[places, hidden]` of both."""
    log_p, log_q = (head(hidden).float().log_softmax(-1) for hidden in (theirs, ours))
    return float(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).clamp(min=0).double().mean())
