"""Documents to choose by and to try on; how much memory a search is said to take; workers that are ended."""

import os
import signal
from typing import Any

import pytest

from masformer.data.documents import Document
from masformer.errors import InputError, ResourceError
from masformer.selection.choice import Asked, Prepared, drawn
from masformer.selection.methods import METHODS
from masformer.selection.space import Space, full_budget
from masformer.selection.workers import workers
from masformer.spans import Full, ModelShape, SpanPlan, Window

SHAPE = ModelShape(
    layers=4, hidden=8, heads=2, kv_heads=2, head_dim=4, linear_parameters=100, head_parameters=800, parameters=900
)


def documents(*texts: str) -> list[Document]:
    return [Document(f"d{number}", text) for number, text in enumerate(texts)]


def texts_of(found: list[Document]) -> set[str]:
    return {document.text for document in found}


@pytest.mark.parametrize("seed", range(5))
def test_no_text_is_on_both_sides_even_if_it_comes_twice(seed: int) -> None:
    chosen_by, others = drawn(documents("a", "b", "a", "b", "c", "d"), None, seed)
    assert not texts_of(chosen_by) & texts_of(others)
    assert len(chosen_by) == len(others) == 2
    chosen_by, others = drawn(documents("a", "b"), documents("b", "c", "a"), seed)
    assert (texts_of(chosen_by), texts_of(others)) == ({"a", "b"}, {"c"})


def test_held_out_documents_that_are_all_chosen_by_are_refused() -> None:
    with pytest.raises(InputError, match="every held-out document is one of those to choose by"):
        drawn(documents("a", "b"), documents("b"), 0)
    with pytest.raises(InputError, match="one document cannot be both"):
        drawn(documents("a", "a"), None, 0)


def prepared(*methods: str) -> Prepared:
    chosen = tuple(METHODS[name] for name in methods)
    asked = Asked(model="m", local=(Window(8),), budgets=(full_budget(1),), methods=chosen, length=512)
    return Prepared(asked, SHAPE, Space.of(SpanPlan((Full(),) * 4), asked.local), [], [], None, None, "")


def test_memory_counts_the_caller_beside_its_workers_and_what_gradients_need() -> None:
    alone = prepared("bottom")
    assert alone.memory(2) == 3 * alone.memory(1)
    hidden_states = 4 * 512 * 8 * 4  # layers, tokens, width, bytes of a float32
    assert prepared("gradient").memory(1) - alone.memory(1) > 32 * hidden_states


def test_what_does_not_fit_into_memory_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10}))
    with pytest.raises(ResourceError, match=r"the search needs about 0.6 GB of memory and 0.0 GB are free"):
        prepared("bottom").refuse_too_large(1)


def end_oneself(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_said_in_one_line() -> None:
    def work() -> None:
        with workers(2) as executor:
            assert executor is not None
            list(executor.map(end_oneself, range(2)))

    with pytest.raises(ResourceError, match="a process was ended"):
        work()
