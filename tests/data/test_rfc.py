"""RFC texts may only be copied intact, so every page here is made up."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
from collections import Counter

import pytest

from masformer.data import rfc
from masformer.data.documents import read_documents
from masformer.errors import CorruptError, InputError, ResourceError
from masformer.files import read_manifest

FULL_LINE = "   A spoon that rests in a drawer is a spoon at rest, and stays at rest"
LONG = "Nothing is known of it. " * 20
HEAD = f"""\
Kitchen Group                                  A. Cook
Request for Comments: 77777                        May 2031

                   The Spoon Protocol

{LONG.strip()}

1.  Spoons

{FULL_LINE}
"""
KNIVES = "     RFC 66666   The Knife Protocol   June 2030"
HEADER = "\nRFC 77777              Spoons              May 2031\n\n\n"
PAGES = [
    f"\n\n{HEAD}\n\n\nCook           Standards Track           [Page 1]\n",
    f"{HEADER}   until it is taken out.\n\n   Then it moves.\n\n\n\n\nCook   [Page 2]\n",
    f"{HEADER}2.  Forks\n\n{KNIVES}\n\nCook   [Page iii]\n",
]
CLEAN = f"{HEAD}   until it is taken out.\n\n   Then it moves.\n\n2.  Forks\n\n{KNIVES}\n"
SUMS = {
    "train": "a9f687577ab6ef28578859fb7d2c12669c9ef622addc99bf3a8bf54ed6bb8396",
    "val": "060edcdfe651864a6c6dfdc3e62fc17389f89d7ec5c1a9e0cb9135e47fd1656e",
    "test": "c8aa112f5d5e5c0aad55981f027075a76833f1191bcbff1b0f9cb5409a43a387",
}
WHERE = "usr/share/doc/RFC/standard"


def test_pages_lose_their_furniture_and_nothing_else():
    assert rfc.clean("\f".join(PAGES)) == CLEAN
    assert rfc.clean("\f".join(PAGES).replace("\n", "\r\n") + "\f\n") == CLEAN
    assert rfc.clean(CLEAN) == CLEAN


@pytest.mark.parametrize(
    ("before", "after", "goes_on"),
    [
        (FULL_LINE, "   and goes on", True),
        (FULL_LINE + ".", "   And begins", False),
        (FULL_LINE, "and is a heading", False),
        ("   a short line", "   a list", False),
    ],
)
def test_a_paragraph_goes_on_over_a_page_only_in_the_middle_of_a_sentence(before, after, goes_on):
    assert rfc.clean(f"{before}\n\f\n{after}\n") == f"{before}\n{'' if goes_on else chr(10)}{after}\n"


def test_revisions_stay_on_one_side_whatever_the_order():
    chains = {number: [number - 1] if number % 4 != 1 else [] for number in range(1, 4000)}
    sides = rfc.split(chains)
    assert all(sides[number] == sides[other] for number, others in chains.items() for other in others)
    assert sides == rfc.split(dict(reversed(chains.items())))
    joined = rfc.split({10: [7], 11: [7], 12: [11, 3], 3: []})  # 7 itself is not among them
    assert len(set(joined.values())) == 1


def test_the_split_has_its_shares_and_its_seed():
    alone = {number: [] for number in range(10_000)}
    counts = Counter(rfc.split(alone).values())
    assert 8_900 < counts["train"] < 9_100
    assert 430 < counts["val"] < 570
    assert 430 < counts["test"] < 570
    assert rfc.split(alone) == rfc.split(alone, seed=0) != rfc.split(alone, seed=1)
    assert {number: rfc.split(alone)[number] for number in range(5)} == rfc.split({key: [] for key in range(5)})


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("deb http://mirror/debian bookworm main contrib # ours", "deb http://mirror/debian bookworm non-free"),
        ("deb [signed-by=/a b=c] http://m x main", "deb [signed-by=/a b=c] http://m x non-free"),
        ("# deb http://m x main", "# deb http://m x main"),
        ("deb http://m ./", "deb http://m ./"),
        ("Types: deb\nComponents: main\n contrib\nSigned-By: /k", "Types: deb\nComponents: non-free\nSigned-By: /k"),
        ("Suites: a\ncomponents: main\n\nSuites: b\nComponents: x\n", "Suites: a\n{0}\n\nSuites: b\n{0}\n"),
    ],
)
def test_only_the_components_of_a_source_change(theirs, ours):
    assert rfc.non_free(theirs) == ours.format("Components: non-free")


def make_tree(tree):
    """What the packages unpack to: compressed and short texts, links, drafts, and a note in place of a text."""
    folder = tree / WHERE
    folder.mkdir(parents=True)
    (tree / "usr/share/doc/RFC/links").mkdir()

    def add(number, raw, *, compressed=True, **about):
        file = folder / f"rfc{number}.txt{'.gz' if compressed else ''}"
        file.write_bytes(gzip.compress(raw) if compressed else raw)
        (folder / f"rfc{number}.json").write_text(json.dumps(about))
        (tree / "usr/share/doc/RFC/links" / file.name).symlink_to(file)

    add(
        77777, "\f".join(PAGES).encode(), title=" Spoons ", abstract="Of\r\nspoons &amp; forks.  [STANDARDS-\r\nTRACK] "
    )
    add(9, ("Café. " + LONG).encode("latin-1"), compressed=False, title="Cafés", obsoletes=["RFC0008", "IEN 1"])
    add(10, ("\ufeffÜber. " + LONG).encode(), title="Over", abstract=None, obsoletes=["RFC0009"])
    add(8, b"RFC 8 is available in PostScript only.", compressed=False, title="Lost")
    (folder / "draft-rfc-1.txt").write_text("a draft")
    return tree


def lines_of(folder):
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def test_every_rfc_is_written_once_with_its_title_and_abstract(tmp_path):
    counts = rfc.write(make_tree(tmp_path / "tree"), tmp_path)
    written = {line["id"]: line for line in lines_of(tmp_path)}
    assert sum(counts.values()) == len(lines_of(tmp_path)) == len(written) == 3
    assert written["rfc77777"] == {
        "id": "rfc77777", "title": "Spoons", "abstract": "Of spoons & forks.", "text": CLEAN
    }  # fmt: skip
    assert written["rfc9"]["text"].startswith("Café. Nothing")
    assert written["rfc10"]["text"].startswith("Über. Nothing")
    assert written["rfc10"]["abstract"] == ""


SUMMARY = " ".join(f"Rule {number} says how a spoon of size {number} is put down." for number in range(6))
BODY = "1.  Introduction\n\n" + "".join(f"   Spoons of kind {n} are washed on day {n} and dried.\n" for n in range(200))
TITLE = "Kitchen Group    A. Cook\n\n          The Spoon Protocol\n\n"


def indented(text, by=3):
    return "".join(f"{' ' * by}{line}\n" for line in text.replace(". ", ".\n").split("\n"))


@pytest.mark.parametrize(
    "own",
    [
        f"Abstract\n\n{indented(SUMMARY)}\n",
        f"Abstract:\n{indented(SUMMARY)}\n",
        f"Status of this Memo\n\n   It is a memo.\n\n1. ABSTRACT\n\n{indented(SUMMARY)}\n",
        f"                 Abstract\n\n{indented(SUMMARY, 0)}\n",
        f"Abstract\n\n{indented(SUMMARY[:150])}\n      * a list\n\n{indented(SUMMARY[150:])}\n",
    ],
)
def test_a_body_begins_behind_its_own_abstract(own):
    assert rfc.pair(TITLE + own + BODY, SUMMARY) == (BODY, SUMMARY)


def test_what_follows_the_abstract_stays_in_the_body():
    for rest in ("Status of This Memo\n\n   It is a memo.\n\n", "Kitchen Note\n\n   Be careful.\n\n"):
        text = f"{TITLE}Abstract\n\n{indented(SUMMARY)}\n{rest}{BODY}"
        assert rfc.pair(text, SUMMARY) == (rest + BODY, SUMMARY)


def test_a_text_without_an_abstract_of_its_own_is_kept_whole():
    assert rfc.pair(TITLE + BODY, SUMMARY) == (TITLE + BODY, SUMMARY)
    late = TITLE + "   A line.\n" * 200 + f"Abstract\n\n   of something else\n\n{BODY}"
    assert rfc.pair(late, SUMMARY) == (late, SUMMARY)


@pytest.mark.parametrize(
    ("body", "summary", "kept"),
    [
        (BODY, SUMMARY[:149], False),
        (BODY, SUMMARY[:150], True),
        (BODY, "word " * 319 + "words", True),
        (BODY, "word " * 319 + "wordss", False),
        (BODY[:7999], SUMMARY, False),
        (BODY[:8000], SUMMARY, True),
    ],
)
def test_pairs_have_the_sizes_that_are_told(body, summary, kept):
    assert (rfc.pair(f"Abstract\n\n   It.\n\n{body}", summary) is not None) == kept


def test_an_abstract_whose_end_is_not_found_makes_no_pair():
    text = f"{TITLE}Abstract\n\n{indented(SUMMARY, 0)}\n{BODY.replace('1.  Introduction', 'and so on')}"
    assert rfc.pair(text.replace("   Spoons", "Spoons"), SUMMARY) is None
    assert rfc.pair(TITLE + "Abstract\n", SUMMARY) is None


def test_a_copied_abstract_makes_no_pair():
    words = [f"word{number}" for number in range(28)]  # 21 runs of 8
    summary = " ".join(words) + "." * 10
    for copied in (17, 18):  # 10 and 11 of the runs
        part = " ".join(words[:copied]).upper().replace(" ", ",\n   ")
        assert rfc.copied(summary, f"{BODY}\n   {part} {BODY}") == (copied - 7) / 21
        assert (rfc.pair(f"{BODY}\n   {part}\n{BODY}", summary) is None) == (copied == 18)
    assert rfc.copied("a spoon is", "it is a spoon, is it") == 1
    assert rfc.copied("a spoon is", "a spoon isle") == 0


@pytest.mark.parametrize(
    "status",
    [
        "This memo provides information for the Internet community. It does not specify an Internet standard.",
        "This memo defines an Experimental Protocol for the Internet community.",
        "This document specifies an Internet standards track protocol for the Internet community, and requests more.",
    ],
)
def test_the_status_of_a_memo_is_no_part_of_a_summary(status):
    assert rfc.pair(BODY, f"{SUMMARY} {status}") == (BODY, SUMMARY)
    early = f"{status} {SUMMARY}"
    assert rfc.pair(BODY, early) == (BODY, early), "in front of the abstract it may be a part of it"


def test_summaries_are_those_of_val_and_test_alone(tmp_path):
    folder = tmp_path / "tree" / WHERE
    folder.mkdir(parents=True)
    numbers = range(1, 61)
    for number in numbers:
        (folder / f"rfc{number}.txt").write_text(f"{TITLE}Abstract\n\n{indented(SUMMARY)}\n{BODY}")
        (folder / f"rfc{number}.json").write_text(json.dumps({"abstract": SUMMARY + " [STANDARDS-TRACK]"}))
    counts = rfc.write(tmp_path / "tree", tmp_path)
    sides = rfc.split({number: [] for number in numbers})
    expected = [f"rfc{number}" for number in numbers if sides[number] != "train"]
    assert 0 < len(expected) < 20
    pairs = [json.loads(line) for line in (tmp_path / "rfc-summaries.jsonl").read_text().splitlines()]
    assert pairs == [{"id": name, "text": BODY, "summary": SUMMARY} for name in expected]
    assert counts["summaries"] == len(pairs)
    assert counts["train"] + counts["val"] + counts["test"] == len(numbers)


@pytest.fixture
def target(tmp_path):
    """The folder to fetch into; alone in its parent, so that a test sees what is left there."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "rfc"


@pytest.fixture
def downloads(monkeypatch):
    """Replaces apt and dpkg; a list that grows with every download."""
    done = []
    monkeypatch.setattr(rfc, "download", done.append)
    monkeypatch.setattr(rfc, "unpack", lambda packages, tree: make_tree(tree))
    return done


def left_beside(target):
    return sorted(path.name for path in target.parent.iterdir())


def test_a_folder_is_made_once_and_read_as_documents(target, downloads):
    said = []
    assert rfc.rfc(target, said.append) == rfc.rfc(str(target)) == target
    assert len(downloads) == 1
    assert left_beside(target) == ["rfc"]
    assert sorted(file.name for file in target.iterdir()) == [
        "manifest.json", "rfc-summaries.jsonl", "rfc-test.jsonl", "rfc-train.jsonl", "rfc-val.jsonl"
    ]  # fmt: skip
    assert said[0] == "downloading 8 packages doc-rfc-* 20230121-1"
    assert "documents in rfc-train.jsonl" in said[-1]
    assert said[-1].endswith(", 0 documents in rfc-summaries.jsonl")
    assert read_manifest(target)["documents"].keys() == {"train", "val", "test", "summaries"}
    full = [file for file in target.glob("*.jsonl") if file.stat().st_size]
    assert sum(len(read_documents(file)) for file in full) == 3


def test_an_interrupted_build_leaves_nothing(target, downloads, monkeypatch):
    def interrupted(tree, out):
        (out / "rfc-train.jsonl").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(rfc, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rfc.rfc(target)
    assert left_beside(target) == []


@pytest.mark.parametrize("damage", ["truncated", "removed", "no summaries", "other packages", "own file"])
def test_a_damaged_or_foreign_folder_is_refused_and_kept(target, downloads, monkeypatch, damage):
    if damage == "own file":
        target.mkdir()
        (target / "thesis.txt").write_text("years of work")
    else:
        rfc.rfc(target)
    if damage == "truncated":
        max(target.glob("*.jsonl"), key=lambda file: file.stat().st_size).write_text("{")
    elif damage == "removed":
        (target / "rfc-val.jsonl").unlink()
    elif damage == "no summaries":
        (target / "rfc-summaries.jsonl").unlink()
    elif damage == "other packages":
        monkeypatch.setattr(rfc, "ABOUT", {"format": 1, "packages": rfc.PACKAGES})
    before = left_beside(target / "x")
    with pytest.raises(CorruptError, match="delete it or name another folder"):
        rfc.rfc(target)
    assert left_beside(target / "x") == before


def test_another_process_that_finishes_first_wins(target, downloads, monkeypatch):
    build = rfc._build

    def overtaken(scratch, progress):
        return shutil.copytree(build(scratch, progress), target) and scratch / "built"

    monkeypatch.setattr(rfc, "_build", overtaken)
    rfc.rfc(target)
    assert len(lines_of(target)) == 3
    assert left_beside(target) == ["rfc"]


def test_too_little_room_is_said_before_the_download(target, downloads, monkeypatch):
    monkeypatch.setattr(rfc, "ROOM", 2**62)
    with pytest.raises(ResourceError, match="MB free; fetching the RFCs takes"):
        rfc.rfc(target)
    assert downloads == []


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Makes a shell script the system's tool of that name; there are no other tools."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def make(name, script):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    make("apt-config", f"echo \"list='{tmp_path}/no.list'\"; echo \"parts='{tmp_path}/no.d/'\"")
    make("dpkg-deb", "exit 1")
    return make


def test_a_system_without_apt_is_told_what_to_use(target, tools):
    with pytest.raises(InputError, match=r"there is no apt-get on this system: .* use Debian 12$"):
        rfc.rfc(target)
    assert left_beside(target) == []


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'W: slow' >&2; echo 'E: Version was not found' >&2; exit 100", r"\(Version was not found\)"),
        ("exit 9", r"\(exit status 9\)"),
    ],
)
def test_what_apt_cannot_get_is_one_line_with_its_reason(target, tools, script, reason):
    tools("apt-get", script)
    with pytest.raises(ResourceError, match=rf"^apt-get could not .*=20230121-1 .*{reason}: check the .* Debian 12$"):
        rfc.rfc(target)
    assert left_beside(target) == []


def test_a_package_that_cannot_be_unpacked_is_one_line(target, tools):
    tools("apt-get", "case $* in *download*) : > doc-rfc-std_1_all.deb;; esac")
    tools("dpkg-deb", "printf 'no space\\nleft\\n' >&2; exit 2")
    with pytest.raises(ResourceError, match=r"^doc-rfc-std_1_all\.deb could not be unpacked \(no space left\): free"):
        rfc.rfc(target)
    assert left_beside(target) == []


def test_the_command_prints_one_line_and_the_exit_code(target, tools, downloads, capsys):
    assert rfc.main([str(target)]) == 0
    assert capsys.readouterr().out.endswith(f"{target}\n")
    (target / "rfc-val.jsonl").unlink()
    assert rfc.main([str(target)]) == 4
    assert capsys.readouterr().err.startswith(f"masformer: {target} exists and is not")


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A mirror on the disk with one package in non-free, and the real apt that is configured for its main."""
    package, suite = tmp_path / "package", tmp_path / "mirror/dists/bookworm"
    make_tree(package)
    control = (
        "Package: doc-rfc-std\nVersion: 20230121-1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: made up\n"
    )
    (package / "DEBIAN").mkdir()
    (package / "DEBIAN/control").write_text(control)
    deb = tmp_path / "mirror/std.deb"
    arch = subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True, check=True).stdout.strip()
    index = suite / f"non-free/binary-{arch}/Packages"
    index.parent.mkdir(parents=True)
    subprocess.run(["dpkg-deb", "--build", package, deb], capture_output=True, check=True)

    def fingerprint(file):
        return hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_size

    digest, size = fingerprint(deb)
    index.write_text(f"{control}Filename: std.deb\nSize: {size}\nSHA256: {digest}\n")
    digest, size = fingerprint(index)
    head = f"Suite: bookworm\nCodename: bookworm\nComponents: main non-free\nArchitectures: {arch}\n"
    (suite / "Release").write_text(f"{head}SHA256:\n {digest} {size} {index.relative_to(suite)}\n")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/ours.list").write_text(f"deb [trusted=yes] file:{tmp_path}/mirror bookworm main\n")
    settings = f'Dir::Etc::sourcelist "/dev/null";\nDir::Etc::sourceparts "{tmp_path}/parts";\n'
    (tmp_path / "apt.conf").write_text(f'{settings}APT::Update::Post-Invoke {{ "touch {tmp_path}/hook"; }};\n')
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    monkeypatch.setattr(rfc, "PACKAGES", ["doc-rfc-std=20230121-1"])
    return tmp_path


NEEDS_APT = pytest.mark.skipif(not (shutil.which("apt-get") and shutil.which("dpkg")), reason="needs apt and dpkg")


@NEEDS_APT
def test_apt_itself_gets_the_packages_and_the_system_stays_as_it_is(target, mirror):
    before = sorted(os.listdir("/var/lib/apt/lists"))
    rfc.rfc(target)
    assert {line["id"] for line in lines_of(target)} == {"rfc9", "rfc10", "rfc77777"}
    assert sorted(os.listdir("/var/lib/apt/lists")) == before
    assert not (mirror / "hook").exists()


def test_a_folder_below_a_file_is_an_input_error(tmp_path, downloads):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        rfc.rfc(tmp_path / "file" / "rfc")


@NEEDS_APT
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_packages_give_the_recorded_sums(tmp_path):
    rfc.rfc(tmp_path / "rfc")
    for side, expected in SUMS.items():
        file = tmp_path / "rfc" / f"rfc-{side}.jsonl"
        assert hashlib.sha256(file.read_bytes()).hexdigest() == expected, side
        file.unlink()  # pytest keeps what is left
    pairs = lines_of(tmp_path / "rfc")  # of the summaries, which alone are left
    assert len(pairs) > 200
    for line in pairs:
        assert len(line["text"]) >= 8000
        assert 150 <= len(line["summary"]) <= 1600
