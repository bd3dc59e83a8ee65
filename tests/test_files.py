import errno
import hashlib
import json
import os

import pytest

from masformer import files
from masformer.errors import CorruptError, InputError, ResourceError


def test_sums_are_those_of_the_bytes(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert files.sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()
    assert files.digest({"b": [1, None], "a": "é"}) == files.digest({"a": "é", "b": [1, None]})
    assert files.digest([1, 2]) != files.digest([2, 1])


@pytest.mark.parametrize(
    ("found", "expected", "line"),
    [
        ({"a": 1, "b": {"c": [2]}}, {"a": 1, "b": {"c": [2]}}, ""),
        ({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}, "b.c is 2 in the state and 3 here"),
        ({"a": 1}, {"b": 2}, "b is None in the state and 2 here"),
        ({"a": {"b": 1}}, {"a": 4}, "a is {'b': 1} in the state and 4 here"),
    ],
)
def test_the_first_difference_is_named_with_both_values(found, expected, line):
    assert files.difference(found, expected) == line


def test_a_manifest_comes_back_as_json(tmp_path):
    files.write_manifest(tmp_path, {"text": "é\ud800", "sizes": (1, 2.5e-300, None), "steps": {10: 1, 9: 2}})
    expected = {"text": "é\ud800", "sizes": [1, 2.5e-300, None], "steps": {"10": 1, "9": 2}}
    assert files.read_manifest(tmp_path) == expected
    assert json.loads((tmp_path / "manifest.json").read_bytes()).keys() == expected.keys() | {"digest"}
    with pytest.raises(FileExistsError):
        files.write_manifest(tmp_path, {})
    assert files.read_manifest(tmp_path) == expected


def test_every_other_byte_in_a_manifest_is_found(tmp_path):
    files.write_manifest(tmp_path, {"step": 1, "loss": 1e-05, "text": "é"})
    file = tmp_path / "manifest.json"
    content = file.read_bytes()
    damaged = [content[:place] for place in range(len(content))] + [content + b"\n", b"[]", b"1", b"[" * 100_000]
    for place in range(len(content)):
        for bit in range(8):
            damaged.append(bytearray(content))
            damaged[-1][place] ^= 1 << bit
    for other in damaged:
        file.write_bytes(other)
        with pytest.raises(CorruptError, match=r"manifest\.json is damaged: delete"):
            files.read_manifest(tmp_path)
    file.unlink()
    with pytest.raises(CorruptError, match=r"is not complete, delete it: manifest\.json: No such file"):
        files.read_manifest(tmp_path)


@pytest.fixture
def built(tmp_path):
    (tmp_path / "built" / "sub").mkdir(parents=True)
    (tmp_path / "built" / "sub" / "x").write_text("new")
    return tmp_path / "built"


def test_a_folder_gets_its_name_once_it_is_on_the_disk(built, tmp_path, monkeypatch):
    calls = []

    def waited(handle):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))

    monkeypatch.setattr(os, "fsync", waited)
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *names: (calls.append("rename"), rename(*names)))
    files.put(built, tmp_path / "target")
    assert sorted(calls[:3]) == ["built", "sub", "x"]
    assert calls[3:] == ["rename", tmp_path.name]
    assert (tmp_path / "target" / "sub" / "x").read_text() == "new"


def test_a_folder_takes_the_name_of_an_empty_one_only(built, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("")
    with pytest.raises(FileExistsError):
        files.put(built, target)
    assert [path.name for path in target.iterdir()] == ["old"]
    assert built.is_dir()
    (target / "old").unlink()
    files.put(built, target)
    assert [path.name for path in target.iterdir()] == ["sub"]


def refusal(number):
    return OSError(number, os.strerror(number), "some/file")


@pytest.mark.parametrize(
    "error",
    [
        *(refusal(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
        OSError(errno.ENOSPC, "other words"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_a_resource_error(tmp_path, error):
    line = f"^cannot write {tmp_path}: the disk is full; free some space$"
    with pytest.raises(ResourceError, match=line), files.disk_errors(tmp_path):
        raise error


def test_a_place_that_cannot_be_written_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"^cannot write some/file: Permission denied$"), files.disk_errors(tmp_path):
        raise refusal(errno.EACCES)
    with pytest.raises(InputError, match=f"^cannot write {tmp_path}: [?]$"), files.disk_errors(tmp_path):
        raise OSError("?")


@pytest.mark.parametrize("error", [ValueError("x"), CorruptError("No space left on device"), KeyboardInterrupt()])
def test_other_errors_are_not_disguised(tmp_path, error):
    with pytest.raises(type(error)) as caught, files.disk_errors(tmp_path):
        raise error
    assert caught.value is error


@pytest.fixture
def sealed(tmp_path):
    for name in ("config.json", "model.safetensors", "README.md", "optimizer.pt"):
        (tmp_path / name).write_text(name)
    files.seal(tmp_path)
    return tmp_path


def test_a_sealed_model_is_whole_until_a_byte_that_is_loaded_changes(sealed):
    files.check_files(sealed)
    (sealed / "README.md").write_text("edited by its owner")
    (sealed / "optimizer.pt").unlink()
    files.check_files(sealed)
    (sealed / "model.safetensors").write_text("Model.safetensors")
    files.check_files(sealed, "config.json")
    with pytest.raises(CorruptError, match=r"model\.safetensors is not what was written, manifest\.json has another"):
        files.check_files(sealed)


def test_a_missing_file_and_a_damaged_manifest_are_refused(sealed):
    (sealed / "config.json").unlink()
    with pytest.raises(CorruptError, match=r"config\.json is not what was written"):
        files.check_files(sealed)
    (sealed / "manifest.json").write_text((sealed / "manifest.json").read_text().replace('"bytes": 11', '"bytes": 12'))
    with pytest.raises(CorruptError, match=r"manifest\.json is damaged"):
        files.check_files(sealed)


def test_a_model_without_a_manifest_has_nothing_to_be_held_against(tmp_path):
    files.check_files(tmp_path)


def test_weights_that_were_added_are_refused_for_they_might_be_loaded(sealed):
    (sealed / "model-00001.safetensors").write_text("others")
    with pytest.raises(CorruptError, match=r"model-00001\.safetensors was not there when manifest\.json was written"):
        files.check_files(sealed)


@pytest.mark.parametrize("content", ['{"name": "x"}', "[1]"])
def test_a_manifest_of_somebody_else_is_let_be(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    (tmp_path / "model.safetensors").write_text("x")
    files.check_files(tmp_path)
