import contextlib
import errno
import functools
import itertools
import os
import random
import resource
import shutil
import signal
import time
import traceback
import warnings

import pytest

from masformer.errors import CorruptError, InputError, ResourceError
from masformer.files import read_manifest, write_manifest
from masformer.training import checkpoints as module
from masformer.training.checkpoints import Checkpoint, Checkpoints, verify

IDENTITY = {"recipe": {"rate": 1e-3, "spans": [1, 2]}, "data": "abc"}
FILES = ["model.bin", "ranks/0.bin", "manifest.json"]
SMALL = 300


def contents(step, size=SMALL):
    made = random.Random(step)
    return {"model.bin": made.randbytes(size), "ranks/0.bin": made.randbytes(size)}


def fill(folder, step, size=SMALL):
    (folder / "ranks").mkdir()
    for name, content in contents(step, size).items():
        (folder / name).write_bytes(content)


def save(checkpoints, step, size=SMALL):
    with checkpoints.writing(step, {"at": step}) as folder:
        fill(folder, step, size)


def saved(run, steps, keep=2, identity=IDENTITY):
    with Checkpoints(run, identity, keep) as checkpoints:
        for step in steps:
            save(checkpoints, step)
    return run


def newest(run, identity=IDENTITY, said=None):
    with Checkpoints(run, identity) as checkpoints:
        return checkpoints.newest([].append if said is None else said.append)


def require(checkpoint, step, size=SMALL):
    """Every byte is what was written, wherever the checkpoint came from."""
    assert (checkpoint.step, checkpoint.facts) == (step, {"at": step})
    assert checkpoint.folder.name == f"checkpoint-{step}"
    for name, content in contents(step, size).items():
        assert (checkpoint.folder / name).read_bytes() == content, name
    assert verify(checkpoint.folder) == checkpoint


def names(run):
    return sorted(path.name for path in run.iterdir() if path.name != ".lock")


@pytest.fixture
def run(tmp_path):
    return tmp_path / "runs" / "first"


@pytest.fixture
def two(run):
    return saved(run, [1, 2])


def test_what_was_written_comes_back(run):
    with Checkpoints(run, IDENTITY) as checkpoints:
        assert checkpoints.newest(pytest.fail) is None
        save(checkpoints, 0)
        require(checkpoints.newest(pytest.fail), 0)
        save(checkpoints, 9)
        save(checkpoints, 10)  # by number, not by name
        found = checkpoints.newest(pytest.fail)
    require(found, 10)
    assert found == Checkpoint(run / "checkpoint-10", 10, IDENTITY, {"at": 10})
    assert names(run) == ["checkpoint-10", "checkpoint-9"]
    require(newest(run), 10)


def test_what_is_json_alike_is_the_same_training(run):
    saved(run, [1], identity={"plan": (1, 2), "by": {3: 4}})
    require(newest(run, {"by": {"3": 4}, "plan": [1, 2]}), 1)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(run, keep):
    with Checkpoints(run, IDENTITY, keep) as checkpoints:
        for step in range(1, 6):
            save(checkpoints, step)
            assert names(run) == [f"checkpoint-{n}" for n in range(max(1, step - keep + 1), step + 1)]


def test_fewer_than_one_cannot_be_kept(run):
    with pytest.raises(InputError, match="keeps at least 1 checkpoint, got keep=0"):
        Checkpoints(run, IDENTITY, 0)


def test_saving_reads_no_older_checkpoint(two, monkeypatch):
    opened = []
    whole = module.described
    monkeypatch.setattr(module, "described", lambda file: (opened.append(file.parts), whole(file))[1])
    saved(two, [3])
    assert all(".scratch" in parts for parts in opened)
    assert len(opened) == 4  # two files, when they are described and when they are read back


def damage(folder, name, content):
    (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_or_longer_is_found(two, name):
    whole = (two / "checkpoint-2" / name).read_bytes()
    for cut in (0, 1, 8, len(whole) // 2, len(whole) - 1):
        said = []
        damage(two / "checkpoint-2", name, whole[:cut])
        require(newest(two, said=said), 1)
        assert len(said) == 1
        assert "checkpoint-2" in said[0]
        assert name in said[0]
        assert "\n" not in said[0]
    damage(two / "checkpoint-2", name, whole + b"\n")
    require(newest(two), 1)
    damage(two / "checkpoint-2", name, whole)
    require(newest(two, said=said), 2)


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(two, name):
    whole = (two / "checkpoint-2" / name).read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 200):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        damage(two / "checkpoint-2", name, flipped)
        with pytest.raises(CorruptError, match=f"checkpoint-2.*{name}"):
            verify(two / "checkpoint-2")


BAD = {
    "mixed with another step": lambda run, bad: shutil.copy(run / "checkpoint-1" / "model.bin", bad),
    "manifest of another step": lambda run, bad: shutil.copy(run / "checkpoint-1" / "manifest.json", bad),
    "another step": lambda run, bad: (shutil.rmtree(bad), shutil.copytree(run / "checkpoint-1", bad)),
    "missing file": lambda run, bad: (bad / "model.bin").unlink(),
    "missing folder": lambda run, bad: shutil.rmtree(bad / "ranks"),
    "missing manifest": lambda run, bad: (bad / "manifest.json").unlink(),
    "manifest is a folder": lambda run, bad: ((bad / "manifest.json").unlink(), (bad / "manifest.json").mkdir()),
    "extra file": lambda run, bad: (bad / "ranks" / "1.bin").write_bytes(b""),
    "empty folder": lambda run, bad: (shutil.rmtree(bad), bad.mkdir()),
    "a file": lambda run, bad: (shutil.rmtree(bad), bad.write_text("")),
    "a link": lambda run, bad: (bad.rename(run / "elsewhere"), bad.symlink_to(run / "elsewhere")),
    "a link to nothing": lambda run, bad: (shutil.rmtree(bad), bad.symlink_to(run / "nothing")),
    "a file is a link": lambda run, bad: (
        (bad / "model.bin").rename(run / "model.bin"),
        (bad / "model.bin").symlink_to(run / "model.bin"),
    ),
    "a folder is a link": lambda run, bad: (
        (bad / "ranks").rename(run / "ranks"),
        (bad / "ranks").symlink_to(run / "ranks"),
    ),
    "a pipe": lambda run, bad: ((bad / "model.bin").unlink(), os.mkfifo(bad / "model.bin")),
    "the manifest is a pipe": lambda run, bad: ((bad / "manifest.json").unlink(), os.mkfifo(bad / "manifest.json")),
}


@pytest.mark.parametrize("how", BAD)
def test_what_is_not_whole_is_passed_over_and_replaced(two, how):
    BAD[how](two, two / "checkpoint-2")
    with pytest.raises(CorruptError, match="checkpoint-2"):
        verify(two / "checkpoint-2")
    said = []
    with Checkpoints(two, IDENTITY) as checkpoints:
        require(checkpoints.newest(said.append), 1)
        assert len(said) == 1
        assert said[0].startswith(f"passed over: {two / 'checkpoint-2'}")
        save(checkpoints, 2)
        require(checkpoints.newest(pytest.fail), 2)
    assert {"checkpoint-1", "checkpoint-2"} <= set(names(two))
    assert not {".scratch", ".replaced"} & set(names(two))


@pytest.mark.parametrize(
    "name", ["checkpoint-07", "checkpoint-", "checkpoint-7x", "checkpoint--7", "checkpoint-\u0667", "7"]
)
def test_other_names_are_none_of_ours(two, name):
    shutil.copytree(two / "checkpoint-2", two / name)
    require(newest(two), 2)
    with pytest.raises(CorruptError, match="is no folder of the name checkpoint-STEP"):
        verify(two / name)
    saved(two, [7, 8, 9])
    assert name in names(two)


def test_a_file_that_cannot_be_read_is_named(two, monkeypatch):
    def refused(file):
        raise OSError(errno.EIO, "Input/output error", str(file))

    monkeypatch.setattr(module, "described", refused)
    with pytest.raises(CorruptError, match=r"checkpoint-2 cannot be read: .*model\.bin: Input/output error"):
        verify(two / "checkpoint-2")


def forge(folder, **changes):
    manifest = {**read_manifest(folder), **changes}
    (folder / "manifest.json").unlink()
    write_manifest(folder, {field: value for field, value in manifest.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"files": {"../checkpoint-1/model.bin": {}}}, r"'../checkpoint-1/model\.bin' is missing"),
        ({"files": {"/etc/passwd": {}}}, "'/etc/passwd' is missing"),
        ({"files": {"model.bin": None, "ranks/0.bin": []}}, r"'model\.bin' has other bytes"),
        ({"files": []}, "is damaged"),
        ({"files": None}, "is damaged"),
        ({"step": True}, "is damaged"),
        ({"more": 1}, "is damaged"),
        ({"step": 5}, "checkpoint-2 holds step 5"),
        ({"format": 2}, "has format 2, this version reads 1"),
        ({"format": None}, "has format None, this version reads 1"),
    ],
)
def test_a_manifest_that_was_made_by_hand_is_refused(two, changes, reason):
    forge(two / "checkpoint-2", **changes)
    with pytest.raises(CorruptError, match=reason):
        verify(two / "checkpoint-2")


def test_when_none_is_whole_that_is_an_error(two):
    for name in names(two):
        (two / name / "model.bin").unlink()
    said = []
    with pytest.raises(CorruptError, match=r"no checkpoint in .* is whole, .*: checkpoint-2, checkpoint-1$"):
        newest(two, said=said)
    assert len(said) == 2
    assert names(two) == ["checkpoint-1", "checkpoint-2"]


def test_another_training_is_refused_not_passed_over(two):
    other = {**IDENTITY, "recipe": {"rate": 2e-3, "spans": [1, 2]}}
    with pytest.raises(
        InputError, match=r"checkpoint-2 is of another training.*: recipe\.rate is 0\.001 .* and 0\.002"
    ):
        newest(two, other)
    assert names(two) == ["checkpoint-1", "checkpoint-2"]


def test_a_bad_one_holds_no_place_of_a_good_one(two):
    (two / "checkpoint-2" / "model.bin").unlink()
    with Checkpoints(two, IDENTITY, keep=1) as checkpoints:
        require(checkpoints.newest([].append), 1)
        with contextlib.suppress(ZeroDivisionError), checkpoints.writing(2, {}):
            raise ZeroDivisionError
        require(checkpoints.newest([].append), 1)
        save(checkpoints, 2)
        assert names(two) == ["checkpoint-2"]
    saved(two, [5, 6], keep=2)
    (two / "checkpoint-6" / "model.bin").unlink()
    with Checkpoints(two, IDENTITY) as checkpoints:
        require(checkpoints.newest([].append), 5)
        save(checkpoints, 4)  # 4 and 5 are the two good ones; 6 counts for nothing
        assert names(two) == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]


def test_a_checkpoint_that_went_bad_while_training_no_longer_counts(run):
    with Checkpoints(run, IDENTITY, keep=1) as checkpoints:
        save(checkpoints, 3)
        shutil.rmtree(run / "checkpoint-3")
        save(checkpoints, 1)
        require(checkpoints.newest(pytest.fail), 1)
        save(checkpoints, 2)
        require(checkpoints.newest(pytest.fail), 2)
        assert names(run) == ["checkpoint-2"]
        save(checkpoints, 4)
        (run / "checkpoint-4" / "model.bin").unlink()
        with pytest.raises(CorruptError, match="no checkpoint"):
            checkpoints.newest([].append)
        save(checkpoints, 3)
        require(checkpoints.newest([].append), 3)


def test_what_a_killed_process_left_is_cleared_by_the_next_save(two):
    (two / ".scratch" / "checkpoint-3").mkdir(parents=True)
    (two / ".scratch" / "checkpoint-3" / "half").write_text("")
    (two / ".replaced").mkdir()
    (two / "checkpoint-2").rename(two / ".replaced" / "checkpoint-2")
    with Checkpoints(two, IDENTITY) as checkpoints, checkpoints.writing(3, {"at": 3}) as folder:
        assert list(folder.iterdir()) == []
        assert names(two) == [".scratch", "checkpoint-1", "checkpoint-2"]
        fill(folder, 3)
    require(newest(two), 3)


def test_what_is_not_ours_is_never_deleted(two):
    (two / "checkpoint-0").mkdir()
    (two / "checkpoint-0" / "thesis.txt").write_text("years of work")
    (two / "notes").write_text("")
    saved(two.parent / "other", [1], identity={"other": 1})
    shutil.rmtree(two / "checkpoint-1")
    shutil.copytree(two.parent / "other" / "checkpoint-1", two / "checkpoint-1")
    saved(two, [3, 4, 5])
    assert names(two) == ["checkpoint-0", "checkpoint-1", "checkpoint-4", "checkpoint-5", "notes"]


def stop(folder, error):
    fill(folder, 5)
    raise error


def test_an_exception_leaves_everything_as_it_was(two):
    for error in (ZeroDivisionError(), KeyboardInterrupt()):
        with Checkpoints(two, IDENTITY, keep=1) as checkpoints:
            with pytest.raises(type(error)), checkpoints.writing(2, {}) as folder:
                stop(folder, error)
            assert names(two) == ["checkpoint-1", "checkpoint-2"]
            require(checkpoints.newest(pytest.fail), 2)


def test_the_same_step_is_replaced_whole(two):
    with Checkpoints(two, IDENTITY) as checkpoints:
        with checkpoints.writing(2, {"at": "new"}) as folder:
            require(verify(two / "checkpoint-2"), 2)
            (folder / "x").write_text("new")
        found = checkpoints.newest(pytest.fail)
    assert found.facts == {"at": "new"}
    assert sorted(path.name for path in found.folder.iterdir()) == ["manifest.json", "x"]
    assert names(two) == ["checkpoint-1", "checkpoint-2"]


def test_the_folder_to_fill_holds_files_only(two):
    with Checkpoints(two, IDENTITY) as checkpoints:
        for make in (
            lambda folder: (folder / "x").symlink_to(two / "checkpoint-1" / "model.bin"),
            lambda folder: os.mkfifo(folder / "x"),
        ):
            with pytest.raises(CorruptError, match="'x' is no plain file"), checkpoints.writing(3, {}) as folder:
                make(folder)
        refusal = pytest.raises(InputError, match=r"cannot write .*manifest\.json: File exists")
        with refusal, checkpoints.writing(3, {}) as folder:
            (folder / "manifest.json").write_text("mine")
        with pytest.raises(TypeError), checkpoints.writing(3, {"not": {"json"}}):
            pass
        require(checkpoints.newest(pytest.fail), 2)
    assert names(two) == ["checkpoint-1", "checkpoint-2"]


def test_a_disk_that_gives_other_bytes_back_is_found_at_once(two, monkeypatch):
    monkeypatch.setattr(module, "_forget", lambda folder: (folder / "model.bin").write_bytes(b"?" * SMALL))
    with Checkpoints(two, IDENTITY, keep=1) as checkpoints:
        with pytest.raises(CorruptError, match=r"'model\.bin' has other bytes"):
            save(checkpoints, 3)
        require(checkpoints.newest(pytest.fail), 2)
    assert names(two) == ["checkpoint-1", "checkpoint-2"]


def test_files_are_as_open_as_the_user_wants_them(run):
    before = os.umask(0o027)
    try:
        saved(run, [1])
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (run / "checkpoint-1").rglob("*") if path.is_file()}
    assert modes == {0o640}
    assert (run / "checkpoint-1").stat().st_mode & 0o777 == 0o750


def test_a_run_belongs_to_one_process(two):
    with Checkpoints(two, IDENTITY) as first:
        with pytest.raises(InputError, match=f"^another process writes into {two}: .*name another folder$"):
            Checkpoints(two, IDENTITY)
        save(first, 3)
    require(newest(two), 3)


def test_a_run_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="cannot write"):
            Checkpoints(run, IDENTITY)


# The disk fills up, or the process dies, at every single step of a save.

TOUCHED = [(os, name) for name in ("mkdir", "rename", "fsync", "unlink", "rmdir")]
TOUCHED += [(module, name) for name in ("write_manifest", "verify")]
SCENES = {
    "a new step": (3, 2),
    "a new step, keep one": (3, 1),
    "the same step": (2, 2),
    "the same step, keep one": (2, 1),
}
"""Which step is written with how many to be kept, where 1 and 2 are there."""


@contextlib.contextmanager
def before_call(number, act):
    """Calls `act` before call `number`, counted from 0, of all that changes the disk; gives the names of the calls."""
    calls = []

    def call(name, original, *args, **options):
        calls.append(name)
        if len(calls) == number + 1:
            act()
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        for place, name in TOUCHED:
            patch.setattr(place, name, functools.partial(call, name, getattr(place, name)))
        yield calls


@pytest.fixture
def quick(monkeypatch):
    """The machine lives on: what was written counts without waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def stages(tmp_path, scene):
    """The calls of a save in this scene."""
    step, keep = SCENES[scene]
    run = saved(tmp_path / "undisturbed", [1, 2])
    with Checkpoints(run, IDENTITY, keep) as checkpoints:
        require(checkpoints.newest(pytest.fail), 2)
        with before_call(-1, pytest.fail) as calls:
            save(checkpoints, step)
    return calls


def test_the_order_of_a_save(tmp_path):
    def order(scene):
        return [name for name, _ in itertools.groupby(stages(tmp_path / scene, scene))]

    new, same = order("a new step"), order("the same step")
    assert new[:4] == same[:4] == ["mkdir", "write_manifest", "fsync", "verify"]
    assert new[4:8] == ["fsync", "rename", "fsync", "rmdir"]
    assert new[8:10] == ["mkdir", "rename"]  # the oldest one leaves, before it is taken apart
    assert same[4:9] == ["mkdir", "rename", "fsync", "rename", "fsync"]
    assert set(new[10:]) == set(same[9:]) == {"unlink", "rmdir"}


@pytest.mark.parametrize("scene", SCENES)
def test_a_disk_that_is_full_at_any_call_loses_nothing(tmp_path, scene, quick):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    step, keep = SCENES[scene]
    calls = stages(tmp_path, scene)
    assert len(calls) > 15
    for number in range(len(calls)):
        run = saved(tmp_path / str(number), [1, 2])
        with Checkpoints(run, IDENTITY, keep) as checkpoints:
            checkpoints.newest(pytest.fail)
            with pytest.raises(ResourceError, match="the disk is full"), before_call(number, full):
                save(checkpoints, step)
            placed = (run / "checkpoint-3").exists()
            require(checkpoints.newest(pytest.fail), 3 if placed else 2)
            assert not {".scratch", ".replaced"} & set(names(run)), calls[number]
            assert placed or step == 2 or names(run) == ["checkpoint-1", "checkpoint-2"]
            save(checkpoints, 3)
            require(checkpoints.newest(pytest.fail), 3)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99, 1])
@pytest.mark.parametrize("step", [2, 3])
def test_a_limit_on_the_size_of_files_loses_nothing(two, share, step):
    """Real writes that fail: at 1 the files fit and the manifest does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(two, IDENTITY, keep=1) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * SMALL), hard))
        try:
            with pytest.raises(ResourceError, match=f"cannot write .*checkpoint-{step}: the disk is full"):
                save(checkpoints, step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert names(two) == ["checkpoint-1", "checkpoint-2"]
        require(checkpoints.newest(pytest.fail), 2)


class Child:
    """A process that runs `work(tell)`; what it told before its end is read by `lines`."""

    def __init__(self, work):
        self.pipe, told = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads that the child does not use
            self.pid = os.fork()
        if self.pid == 0:
            try:
                work(lambda line: os.write(told, f"{line}\n".encode()))
            except BaseException:
                os.write(told, traceback.format_exc().encode())
            finally:
                os._exit(0)
        os.close(told)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def lines(self):
        with os.fdopen(self.pipe) as stream:
            told = stream.read().splitlines()
        assert os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == -signal.SIGKILL, told
        return told


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("scene", SCENES)
def test_a_process_that_dies_before_any_call_loses_nothing(tmp_path, scene, quick):
    step, keep = SCENES[scene]
    calls = stages(tmp_path, scene)
    assert {"write_manifest", "fsync", "verify", "rename", "rmdir", "unlink"} <= set(calls)
    for number in range(len(calls)):
        run = saved(tmp_path / str(number), [1, 2])

        def work(tell, run=run, number=number):
            with Checkpoints(run, IDENTITY, keep) as checkpoints:
                checkpoints.newest(pytest.fail)
                with before_call(number, die):
                    save(checkpoints, step)
                tell("it lives")

        assert Child(work).lines() == []
        placed = (run / "checkpoint-3").exists()
        said = []
        with Checkpoints(run, IDENTITY, keep) as checkpoints:
            require(checkpoints.newest(said.append), 3 if placed else 2)
            assert not {".scratch", ".replaced"} & set(names(run)), calls[number]
            save(checkpoints, 3)
            require(checkpoints.newest(said.append), 3)
        assert said == []
        assert not {".scratch", ".replaced"} & set(names(run))


@pytest.mark.parametrize("point", ["in the files", "after the files", "in the manifest", "after the manifest"])
def test_a_process_that_dies_while_it_writes_loses_nothing(two, point, monkeypatch):
    def half_a_manifest(folder, manifest):
        (folder / "manifest.json").write_text('{"format": 1, "st')
        die()

    def work(tell):
        if point == "in the manifest":
            monkeypatch.setattr(module, "write_manifest", half_a_manifest)
        if point == "after the manifest":
            monkeypatch.setattr(module, "sync", lambda folder: die())
        with Checkpoints(two, IDENTITY, keep=1) as checkpoints, checkpoints.writing(3, {}) as folder:
            (folder / "model.bin").write_bytes(b"half")
            if point == "in the files":
                die()
            fill(folder, 3)
            if point == "after the files":
                die()

    assert Child(work).lines() == []
    assert ".scratch" in names(two)
    require(newest(two), 2)
    assert names(two) == ["checkpoint-1", "checkpoint-2"]


LARGE = 1 << 20
KILLS = 50


def save_for_ever(run, keep, tell):
    with Checkpoints(run, IDENTITY, keep) as checkpoints:
        last = checkpoints.newest(pytest.fail)
        for step in itertools.count(last.step + 1 if last else 0):
            for _ in range(1 + (step % 3 == 0)):  # every third step is replaced
                with checkpoints.writing(step, {"at": step}) as folder:
                    tell(f"begins {step}")
                    fill(folder, step, LARGE)
                tell(f"ends {step}")


def test_fifty_kills_at_random_lose_nothing(run):
    chance = random.Random(0)
    complete, begun, inside = -1, -1, 0
    for number in range(KILLS):
        keep = 1 + number % 2
        child = Child(lambda tell, keep=keep: save_for_ever(run, keep, tell))
        time.sleep(chance.uniform(0.01, 0.2))
        child.kill()
        lines = [line.split() for line in child.lines()]
        assert {what for what, _ in lines} <= {"begins", "ends"}, lines
        inside += bool(lines) and lines[-1][0] == "begins"
        complete = max([complete, *(int(step) for what, step in lines if what == "ends")])
        begun = max([begun, *(int(step) for _, step in lines)])
        found = newest(run, said=(said := []))
        assert said == []
        assert not {".scratch", ".replaced"} & set(names(run))
        if found is None:
            assert complete == -1
        else:
            assert complete <= found.step <= begun
            require(found, found.step, LARGE)
            assert len(names(run)) <= 3  # what is kept, and one that was to be deleted
    print(f"{inside} of {KILLS} kills fell inside a save, {complete} steps were saved")
    assert inside >= 14
    assert complete > 10
