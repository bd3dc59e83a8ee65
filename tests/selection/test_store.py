"""The store: on the disk when `put` returns, whole after a crash, and of one process at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from masformer.errors import CorruptError, InputError
from masformer.selection.store import Store

VALUES = {"a": [1.5, 0.1 + 0.2], "b é": None, "c": [1e-300, -0.0]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "measured.jsonl"


def test_values_are_the_same_to_the_bit_when_it_is_opened_again(file: Path) -> None:
    with Store.open(file) as store:
        assert not store
        store.put({"a": VALUES["a"], "b é": None})
        assert len(file.read_text().splitlines()) == 2  # on the disk already
        store.put({"c": VALUES["c"]})
        assert store == VALUES
    with Store.open(file) as store:
        assert store == VALUES
        assert str(store["c"][1]) == "-0.0"
        store.put({"d": 1})
    with Store.open(file) as store:
        assert store == VALUES | {"d": 1}


def test_without_a_file_it_is_a_dictionary() -> None:
    store = Store()
    store.put(VALUES)
    assert store == VALUES


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_torn_last_line_is_dropped_and_what_comes_next_is_whole(file: Path, cut: int) -> None:
    with Store.open(file) as store:
        store.put(VALUES)
    os.truncate(file, file.stat().st_size - cut)
    with Store.open(file) as store:
        assert store == {key: VALUES[key] for key in ("a", "b é")}
        store.put({"d": 2})
    with Store.open(file) as store:
        assert store == {**{key: VALUES[key] for key in ("a", "b é")}, "d": 2}


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        '{"b": 1, "c": 2}',
        "[[1], 2]",
        "[1, 2]",
        '"ab"',
        '["a"]',
        '["a", 1, 2]',
        '"ab',
        "7",
        "null",
        "",
        '["a", 1]x',
        "\xff",
        "[" * 100_000,
    ],
)
def test_a_damaged_line_is_refused_with_its_number_and_left_alone(file: Path, line: str) -> None:
    content = b'["a", 1]\n' + line.encode("latin-1") + b'\n["c", 2]\n'
    file.write_bytes(content)
    with pytest.raises(CorruptError, match=r"measured\.jsonl, line 2 is damaged"), Store.open(file):
        pytest.fail("opened")
    assert file.read_bytes() == content


def test_a_second_handle_is_refused_until_the_first_is_closed(file: Path) -> None:
    with Store.open(file) as store:
        store.put({"a": 1})
        with pytest.raises(InputError), Store.open(file):
            pytest.fail("opened")
        store.put({"b": 1})
    with Store.open(file) as store:
        assert [*store] == ["a", "b"]


def test_another_process_is_refused_and_the_lock_ends_with_a_process_that_is_killed(file: Path) -> None:
    held = "\n".join(
        [
            "import fcntl, sys, time",
            "handle = open(sys.argv[1], 'a')",
            "fcntl.flock(handle, fcntl.LOCK_EX)",
            "print('held', flush=True)",
            "time.sleep(60)",
        ]
    )
    process = subprocess.Popen([sys.executable, "-c", held, str(file)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.readline()
    with pytest.raises(InputError), Store.open(file):
        pytest.fail("opened")
    process.kill()
    process.communicate()
    with Store.open(file) as store:
        assert not store


def test_a_place_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError), Store.open(tmp_path / "absent" / "measured.jsonl"):
        pytest.fail("opened")


def test_a_number_that_json_has_not_is_not_kept(file: Path) -> None:
    with Store.open(file) as store:
        with pytest.raises(ValueError, match="not JSON compliant"):
            store.put({"a": 1, "b": float("nan")})
        assert not store
    assert file.read_text() == ""
