"""The folder of an evaluation: whole records, and a run that goes on after anything."""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest

from masformer.errors import CorruptError, InputError
from masformer.evaluation.results import RECORDS, Run, key_of, read_run

MODEL = {"plan": "full*2", "identity": "a", "cost": {"8": {"pairs": 1}}}
FACTS = {
    "versions": {"torch": "2"},
    "device": "cpu",
    "settings": {"seed": 0},
    "models": {"one": MODEL},
    "commands": ["masformer eval one"],
}


def record(item, model="one", **more):
    return {"model": model, "suite": "loss", "task": None, "length": 8, "item": item, **more}


def test_a_run_holds_what_was_added_and_knows_it_again(tmp_path):
    with Run.open(tmp_path / "run", FACTS) as run:
        assert run.done == set()
        run.add([record(0, nats=1.5), record(1, text="é\n\u2028")])
        assert key_of(record(0)) in run.done
    with Run.open(tmp_path / "run", FACTS) as run:
        assert run.done == {key_of(record(0)), key_of(record(1))}
        run.add([record(2)])
    facts, records = read_run(tmp_path / "run")
    assert records == [record(0, nats=1.5), record(1, text="é\n\u2028"), record(2)]
    assert facts == {"format": 1, **FACTS}


def test_a_line_that_was_cut_off_is_dropped_and_the_next_one_stands_alone(tmp_path):
    with Run.open(tmp_path, FACTS) as run:
        run.add([record(0), record(1)])
    whole = (tmp_path / RECORDS).read_bytes()
    for cut in range(len(whole) - 1, whole.index(b"\n"), -1):
        (tmp_path / RECORDS).write_bytes(whole[:cut])
        assert read_run(tmp_path)[1] == [record(0)]
        with Run.open(tmp_path, FACTS) as run:
            assert run.done == {key_of(record(0))}
            run.add([record(1)])
        assert (tmp_path / RECORDS).read_bytes() == whole


@pytest.mark.parametrize("bad", [b"{", b"[1]", b"\xff", b"3", b"[" * 100_000])
def test_a_damaged_line_is_refused_by_its_number(tmp_path, bad):
    with Run.open(tmp_path, FACTS) as run:
        run.add([record(0)])
    with (tmp_path / RECORDS).open("ab") as stream:
        stream.write(bad + b"\n")
    with pytest.raises(CorruptError, match="line 2 is damaged"):
        read_run(tmp_path)
    with pytest.raises(CorruptError, match="line 2 is damaged"), Run.open(tmp_path, FACTS):
        pass


def test_an_item_that_stands_twice_is_refused(tmp_path):
    with Run.open(tmp_path, FACTS) as run:
        run.add([record(0), record(0)])
    with pytest.raises(CorruptError, match="line 2 repeats an item"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": {"seed": 1}}, "settings.seed is 0 in the state and 1 here"),
        ({"versions": {"torch": "3"}}, "versions.torch is '2'"),
        ({"device": "cuda"}, "'cpu'"),
        ({"models": {"one": MODEL | {"identity": "b"}}}, "another model of this name"),
        ({"models": {"one": MODEL | {"plan": "full"}}}, "another model of this name"),
    ],
)
def test_another_evaluation_in_the_folder_is_refused_and_left_alone(tmp_path, change, words):
    with Run.open(tmp_path, FACTS):
        pass
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(InputError, match=words), Run.open(tmp_path, FACTS | change):
        pass
    assert (tmp_path / "run.json").read_bytes() == before


def test_models_lengths_and_commands_can_be_added(tmp_path):
    more = {"two": MODEL, "one": MODEL | {"cost": {"16": {"pairs": 4}}}}
    for facts in (FACTS, FACTS | {"models": more, "commands": ["masformer eval two"]}, FACTS):
        with Run.open(tmp_path, facts):
            pass
    facts, _ = read_run(tmp_path)
    assert list(facts["models"]) == ["one", "two"]
    assert facts["models"]["one"]["cost"] == {"8": {"pairs": 1}, "16": {"pairs": 4}}
    assert facts["commands"] == ["masformer eval one", "masformer eval two"]


def test_two_processes_cannot_write_into_one_folder(tmp_path):
    with (
        Run.open(tmp_path, FACTS),
        pytest.raises(InputError, match="another process writes"),
        Run.open(tmp_path, FACTS),
    ):
        pass
    with Run.open(tmp_path, FACTS):
        pass


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="is not empty and holds no evaluation"), Run.open(tmp_path, FACTS):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="holds no evaluation"):
        read_run(tmp_path)


def test_records_without_facts_are_nobodys(tmp_path):
    with Run.open(tmp_path, FACTS) as run:
        run.add([record(0)])
    (tmp_path / "run.json").unlink()
    with pytest.raises(InputError, match="holds no evaluation"), Run.open(tmp_path, FACTS):
        pass


def test_settings_that_only_one_call_uses_are_joined(tmp_path):
    later = FACTS | {"settings": {"seed": 0, "include": "x"}, "versions": {"torch": "2", "lm-eval": "1"}}
    for facts in (FACTS, later, FACTS):
        with Run.open(tmp_path, facts):
            pass
    facts, _ = read_run(tmp_path)
    assert facts["settings"] == {"seed": 0, "include": "x"}
    changed = later | {"versions": {"torch": "2", "lm-eval": "2"}}
    with pytest.raises(InputError, match=r"versions\.lm-eval is '1'"), Run.open(tmp_path, changed):
        pass


def test_what_is_compared_has_one_reference(tmp_path):
    with Run.open(tmp_path, FACTS, compared=True):
        pass
    other = FACTS | {"models": {"two": MODEL, "one": MODEL}}
    with pytest.raises(InputError, match="compares models with one"), Run.open(tmp_path, other, compared=True):
        pass
    with Run.open(tmp_path, other):
        pass


def test_facts_that_cannot_be_read_are_refused(tmp_path):
    with Run.open(tmp_path, FACTS):
        pass
    for content, error in (("{", CorruptError), ("[]", CorruptError), ('{"format": 9}', InputError)):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(error):
            read_run(tmp_path)


ITEMS = 400


def _go_on(folder):
    with Run.open(folder, FACTS) as run:
        for item in range(ITEMS):
            if key_of(record(item)) not in run.done:
                run.add([record(item, text="x" * 500)])
                time.sleep(0.001)


def test_killed_at_any_moment_no_item_is_lost_or_repeated(tmp_path):
    context, generator, kills = multiprocessing.get_context("fork"), random.Random(0), 0
    while True:
        process = context.Process(target=_go_on, args=(tmp_path,))
        process.start()
        process.join(generator.uniform(0.005, 0.06))
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        if (tmp_path / "run.json").exists():
            _, records = read_run(tmp_path)  # whole at every moment
            assert [r["item"] for r in records] == list(range(len(records)))
    assert process.exitcode == 0
    assert kills >= 3
    _, records = read_run(tmp_path)
    assert records == [record(item, text="x" * 500) for item in range(ITEMS)]
    assert json.loads((tmp_path / "run.json").read_text())["commands"] == FACTS["commands"]
