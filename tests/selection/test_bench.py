"""The bench measures what a plain loop does, each plan once, in any order, in this process or in others."""

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from masformer.errors import InputError
from masformer.models.checkpoint import weights_digest
from masformer.models.convert import applied, convert
from masformer.models.families import attention_modules
from masformer.selection import bench as bench_module
from masformer.selection.bench import Bench, Measured
from masformer.selection.probes import DOCUMENTS, RECALL, Probe
from masformer.selection.store import Store
from masformer.selection.workers import loaded_from, workers
from masformer.spans import Block, Full, SpanPlan, Window
from tests.models.helpers import FULL, MIXED, state, tiny, tokens

LOCAL = Window(6, sinks=1)
PLANS = [
    FULL,
    SpanPlan((LOCAL,) * 4),
    MIXED,
    *(SpanPlan.mixed(4, full, LOCAL) for full in ([0], [0, 3], [1, 2], [0, 1, 2], [3])),
    SpanPlan((Full(), Full(), Block(5), Full())),
]


def probe(kind: str, length: int, seed: int, places: Tensor | None = None) -> Probe:
    ids = tokens(length, seed=seed)[0]
    return Probe(kind, ids, torch.arange(length // 2, length) if places is None else places)


def few() -> list[Probe]:
    return [
        probe(RECALL, 40, 1, torch.tensor([20, 21, 39])),
        probe(RECALL, 33, 2, torch.tensor([1])),
        probe(DOCUMENTS, 48, 3),
    ]


@pytest.fixture
def model() -> Any:
    return tiny(dtype=torch.float32)


@pytest.fixture
def forwards(model: Any) -> list[int]:
    """The layers whose attention ran since."""
    ran: list[int] = []
    for layer, module in enumerate(attention_modules(model)):
        module.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    return ran


def plainly(model: Any, probes: list[Probe], plan: SpanPlan, parent: SpanPlan = FULL) -> Measured:
    """All logits at once, in float64, without any of the bench's code."""
    nats: dict[str, list[float]] = {RECALL: [], DOCUMENTS: []}
    kls = []
    for each in probes:
        logits = []
        for which in (plan, parent):
            with applied(model, which), torch.no_grad():
                logits.append(model(input_ids=each.ids[None]).logits[0].double())
        ours, theirs = (x[each.places - 1] for x in logits)
        nats[each.kind].append(float(F.cross_entropy(ours, each.ids[each.places])))
        some = [round(place) for place in torch.linspace(0, len(each.places) - 1, min(256, len(each.places))).tolist()]
        p, q = theirs[some].log_softmax(-1), ours[some].log_softmax(-1)
        kls.append(float((p.exp() * (p - q)).sum(-1).mean()))
    recall, documents = (sum(x) / len(x) if x else None for x in nats.values())
    return Measured(recall, documents, sum(kls) / len(kls))


def same(got: Measured, expected: Measured) -> None:
    for name in ("recall", "documents", "kl"):
        value = getattr(expected, name)
        assert getattr(got, name) == (None if value is None else pytest.approx(value, abs=1e-5)), name


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "granite", "opt"])
def test_a_plan_measures_what_a_plain_loop_over_all_logits_does(family: str) -> None:
    model = tiny(family, torch.float32)
    made = Bench(model, few())
    found = dict(zip(PLANS, made.measure(PLANS), strict=True))
    assert (family == "gemma2") == (made.parent != FULL)
    for plan, measured in found.items():
        same(measured, plainly(model, few(), plan, made.parent))
    assert found[PLANS[1]].kl > 0.01
    assert made.measure([made.parent])[0].kl == 0


def test_so_does_a_text_whose_logits_do_not_exist_all_at_once(model: Any) -> None:
    long = [probe(DOCUMENTS, 900, 1, torch.arange(1, 900)), probe(RECALL, 700, 2, torch.arange(100, 700))]
    plans = [FULL, MIXED]
    for plan, measured in zip(plans, Bench(model, long).measure(plans), strict=True):
        same(measured, plainly(model, long, plan))


def test_a_kind_without_probes_is_none_and_counts_nothing(model: Any) -> None:
    [only] = Bench(model, few()[:1]).measure([MIXED])
    assert only.documents is None
    assert only.nats == only.recall
    [both] = Bench(model, few()).measure([MIXED])
    assert both.nats == both.recall + both.documents
    assert both.to_json() == {"recall": both.recall, "documents": both.documents, "kl": both.kl, "nats": both.nats}


@pytest.mark.parametrize("seed", range(3))
def test_no_order_and_no_batching_of_plans_changes_a_bit(model: Any, seed: int) -> None:
    expected = dict(zip(PLANS, Bench(model, few()).measure(PLANS), strict=True))
    order = [PLANS[i] for i in torch.randperm(len(PLANS), generator=torch.Generator().manual_seed(seed))]
    other = Bench(convert(model, MIXED, check=False), few())
    for at in range(0, len(order), 1 + seed):
        batch = order[at : at + 1 + seed]
        assert other.measure(batch) == [expected[plan] for plan in batch]


def test_nothing_is_measured_twice_and_shared_first_layers_run_once(model: Any, forwards: list[int]) -> None:
    counted: list[int] = []
    made = Bench(model, few(), progress=counted.append)
    one, other = PLANS[0], PLANS[8]  # differ at layer 2
    first = made.measure([other, one, other])
    assert sorted(forwards) == sorted([0, 1, 2, 3, 2, 3] * 3)
    assert counted == [2, 2, 2]
    forwards.clear()
    assert made.measure([one, other]) == [first[1], first[0]]
    assert forwards == []
    assert made.measure([one, MIXED])[0] == first[1]
    assert forwards == [0, 1, 2, 3] * 3
    assert counted == [2, 2, 2, 1, 1, 1]
    assert made.recall_by_probe(one) == [made.store[key][0] for key in made.store if key.endswith(f" {one}")][:2]


def test_the_model_is_given_back_as_it_was(model: Any) -> None:
    model.train()
    before = state(model)
    Bench(model, few()).measure(PLANS[:3])
    assert state(model) == before
    convert(model, MIXED, check=False)
    before = state(model)
    Bench(model, few()).measure(PLANS[:3])
    assert state(model) == before


def test_a_model_in_training_is_measured_without_dropout() -> None:
    model = tiny(dtype=torch.float32, attention_dropout=0.5)
    expected = Bench(model, few()).measure(PLANS[:3])
    assert Bench(model.train(), few()).measure(PLANS[:3]) == expected


def test_a_store_that_is_opened_again_has_the_results(model: Any, forwards: list[int], tmp_path: Any) -> None:
    with Store.open(tmp_path / "measured.jsonl") as store:
        expected = Bench(model, few(), store=store, identity="a").measure(PLANS[:3])
    content = (tmp_path / "measured.jsonl").read_bytes()
    forwards.clear()
    with Store.open(tmp_path / "measured.jsonl") as store:
        assert Bench(model, few()[::-1], store=store, identity="a").measure(PLANS[:3]) == expected
        assert forwards == []
        assert (tmp_path / "measured.jsonl").read_bytes() == content
        Bench(model, few(), store=store, identity="another model").measure(PLANS[:1])
        assert forwards == [0, 1, 2, 3] * 3
    assert (tmp_path / "measured.jsonl").read_bytes().startswith(content)


def test_what_was_cut_off_goes_on_with_the_next_probe(model: Any, forwards: list[int], tmp_path: Any) -> None:
    def stop(plans: int) -> None:
        raise KeyboardInterrupt

    expected = Bench(model, few()).measure(PLANS[:1])
    forwards.clear()
    with pytest.raises(KeyboardInterrupt), Store.open(tmp_path / "measured.jsonl") as store:
        Bench(model, few(), store=store, progress=stop).measure(PLANS[:1])
    assert forwards == [0, 1, 2, 3]
    with Store.open(tmp_path / "measured.jsonl") as store:
        assert Bench(model, few(), store=store).measure(PLANS[:1]) == expected
    assert forwards == [0, 1, 2, 3] * 3


def test_the_basis_tells_models_and_probes_apart(model: Any) -> None:
    bases = [
        Bench(model, few(), identity="a").basis,
        Bench(model, few(), identity="b").basis,
        Bench(model, few()[:2], identity="a").basis,
        Bench(model, [*few()[:2], probe(DOCUMENTS, 48, 4)], identity="a").basis,
    ]
    assert len({*bases}) == 4
    assert Bench(model, few(), identity="a").basis == bases[0]


def test_probes_are_told_apart_by_tokens_places_and_kind() -> None:
    first = few()[0]
    others = [
        Probe(DOCUMENTS, first.ids, first.places),
        Probe(RECALL, first.ids, first.places[:2]),
        Probe(RECALL, first.ids.flip(0), first.places),
    ]
    assert len({each.key for each in [first, *others]}) == 4
    assert Probe(RECALL, first.ids.clone(), first.places.clone()).key == first.key


def test_what_cannot_be_measured_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match="nothing to measure"):
        Bench(model, [])
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    made = Bench(model, few())
    with pytest.raises(InputError, match="a loss of nan nats was measured"):
        made.measure(PLANS[:2])
    assert not made.store


def test_fresh_items_are_no_probes_and_always_the_same(model: Any) -> None:
    class Items:
        def sequence(self, number: int) -> Any:
            ids = tokens(20, seed=number)[0].numpy()
            labels = ids.copy()
            labels[:15] = -100
            return type("Sequence", (), {"input_ids": ids, "labels": labels})

    probes = [bench_module.recall_probe(Items(), number) for number in range(2)]  # type: ignore[arg-type]
    made = Bench(model, [*probes, few()[2]], items=Items())  # type: ignore[arg-type]
    fresh = [each.key for each in made.fresh(5)]
    assert fresh == [each.key for each in made.fresh(5)]
    assert len({*fresh, *(each.key for each in made.probes)}) == 8
    assert [each.key for each in Bench(model, made.probes).fresh(5)] == [each.key for each in probes]


def saved(model: Any, folder: Path, weights: str = "") -> Callable[[], Any]:
    model.save_pretrained(folder)
    return loaded_from(str(folder), torch.float32, "cpu", weights or weights_digest(str(folder), model.config))


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["processes", "ray"])
def test_other_processes_measure_the_same_numbers(model: Any, tmp_path: Any, executor: str) -> None:
    if executor == "ray":
        pytest.importorskip("ray")
    loaded = saved(model, tmp_path / "model")
    expected = Bench(model, few()).measure(PLANS)
    with workers(2, "local" if executor == "ray" else None) as pool:
        assert pool is not None
        made = Bench(model, few(), executor=pool, loaded=loaded)
        handle = model.register_forward_hook(lambda *_: pytest.fail("measured here"))
        assert made.measure(PLANS[:4]) == expected[:4]
        assert made.measure(PLANS) == expected
        handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["processes", "ray"])
def test_a_machine_with_other_weights_is_refused(model: Any, tmp_path: Path, executor: str) -> None:
    if executor == "ray":
        pytest.importorskip("ray")
    loaded = saved(model, tmp_path / "model", weights="those of another model")
    where = "local" if executor == "ray" else None
    with workers(2, where) as pool, pytest.raises(InputError) as refused:
        Bench(model, few(), executor=pool, loaded=loaded).measure(PLANS)
    here = f"{tmp_path / 'model'} on {socket.gethostname()}"
    assert str(refused.value) == f"{here} is another model than here: give each machine the same"


@pytest.mark.slow  # imports Ray
@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
def test_a_ray_address_where_nothing_answers_is_refused_at_once(address: str) -> None:
    pytest.importorskip("ray")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused, and nobody else can take it
        place = address.format(port=taken.getsockname()[1])
        with pytest.raises(InputError, match=f"no Ray cluster answers at {place}"), workers(1, place):
            pass


CALLER = """
from masformer.selection.workers import workers
import time
if __name__ == "__main__":
    with workers(2) as pool:
        for _ in range(2):
            pool.submit(time.sleep, 600)
        print(*pool._processes, flush=True)
        time.sleep(600)
"""


@pytest.mark.slow
def test_processes_end_with_a_caller_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "caller.py"
    script.write_text(CALLER)
    caller = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    processes = [psutil.Process(int(pid)) for pid in caller.stdout.readline().split()]
    assert len(processes) == 2
    caller.kill()
    caller.communicate()
    assert psutil.wait_procs(processes, timeout=10)[1] == []


def test_one_process_without_an_address_is_the_callers_own() -> None:
    with workers(1) as executor:
        assert executor is None
