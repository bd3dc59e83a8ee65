"""The RFCs, some 9,100 long technical documents, as a corpus to train on: fetched through apt and cleaned.

    python -m masformer.data.rfc OUT    # rfc-train.jsonl, rfc-val.jsonl, rfc-test.jsonl, rfc-summaries.jsonl in OUT
    rfc(Path("data/rfc"), progress=print)          # the same

One RFC a line, `{"id": "rfc9110", "title": ..., "abstract": ..., "text": ...}`: the whole text without page headers,
page footers and form feeds, and the RFC Editor's own title and abstract (each may be empty). RFCs that replace one
another stay on one side, so that no revision of a test document is trained on; quotation across sides remains.

`rfc-summaries.jsonl` has `{"id", "text", "summary"}` for those of val and test whose abstract sums up a long body: see
`pair`.

They come from Debian's packages doc-rfc-*, of the mirror that apt is configured to use and checked by its keys; this
takes no root, and nothing of the system's apt is changed. A folder appears complete or not at all.

Licence: "as long as an individual RFC is kept intact, it can be copied freely" (Debian's component non-free). So the
cleaned texts, and whatever holds pieces of them, stay on the machine that made them: never commit or publish them.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import html
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import CorruptError, InputError, MasformerError, ResourceError
from ..files import digest, disk_errors, put, read_manifest, write_manifest

VERSION = "20230121-1"
PARTS = ("std", "std-proposed", "informational", "experimental", "others", "old-std", "fyi-bcp", "misc")
PACKAGES = [f"doc-rfc-{part}={VERSION}" for part in PARTS]
SIDES = ("train", "val", "test")
FILES = (*SIDES, "summaries")
ABOUT = {"format": 2, "packages": PACKAGES}
ROOM = 1_500_000_000  # bytes of free disk; building takes 1.03e9 at most
SHORTEST = 400  # characters; below are only notes that an RFC exists as PostScript alone

FOOTER = re.compile(r"\[Page\s+[\divxlc]+\]\s*$", re.I)
HEADER = re.compile(r"\s*(RFC|Request for Comments|Internet[- ]Draft|NWG/RFC)\b.*\b(19[6-9]|20[0-4])\d\s*$", re.I)

ABSTRACT = re.compile(r"\s*(\d+\.?\s+|[ivx]+\.\s+)?abstract\s*[:.]?\s*", re.I)
ABSTRACT_WITHIN = 200  # lines from the top
HEADING = re.compile(
    r"\s*(\d+(\.\d+)*\.?\s+[A-Z]|[IVX]+\.\s+[A-Z]|((table of )?contents|introduction|overview|status of th\w+ memo|"
    r"copyright( and licen[sc]e)?( notice)?|acknowledge?ments?|iesg note|foreword|preface|terminology)\s*[:.]?\s*$)",
    re.I,
)
STATUS = re.compile(
    r"\s*\bThis (memo|document) (provides information|defines an experimental protocol|specifies an? [^.]{0,60})"
    r" for the Internet community\b.{0,250}$",
    re.I,
)
SUMMARY = (150, 1600)  # characters
BODY = 8000  # characters at least
RUN = 8  # words

# The components of an apt source: in a line `deb [options] URI suite component...`, and in a deb822 stanza.
LINE = re.compile(r"^([ \t]*deb(?:-src)?[ \t]+(?:\[[^]\n]*\][ \t]+)?[^\s[]+[ \t]+\S+)[ \t]+[^#\s].*$", re.M)
FIELD = re.compile(r"^Components:.*(?:\n[ \t].*)*$", re.M | re.I)

APT_CONFIGURATION = """\
#clear APT::Update;
APT::Sandbox::User "root";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{private}/sources";
Dir::State::lists "{private}/lists";
Dir::Cache "{private}/cache";
"""
"""What apt reads after the system's own settings. No hooks of `update`; and no other user, who could not write here."""


def rfc(folder: Path | str, progress: Callable[[str], Any] | None = None) -> Path:
    """The RFCs in `folder`, which is returned: some 3 minutes and 480 MB of download, and at once the second time.

    Args:
        folder: where the four files shall lie; must be absent, empty, or an earlier result.
        progress: called with one line of text before every step.

    Raises:
        InputError: no apt-get or dpkg-deb, or a folder that cannot be written.
        CorruptError: a folder with something else in it.
        ResourceError: apt cannot download the packages, or the disk is too full.
    """
    target = Path(folder).absolute()
    with disk_errors(target):
        if not _is_complete(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _require_room(target.parent)
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
                built = _build(Path(scratch), progress or (lambda line: None))
                with contextlib.suppress(FileExistsError):  # of another process; it is checked below
                    put(built, target)
            _is_complete(target)
    return Path(folder)


def _is_complete(folder: Path) -> bool:
    """Whether `folder` holds the corpus; False where there is nothing yet.

    Raises:
        CorruptError: it holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    with contextlib.suppress(CorruptError, OSError, KeyError):
        manifest = read_manifest(folder)
        if manifest["about"] == ABOUT and manifest["bytes"] == _sizes(folder):
            return True
    raise CorruptError(f"{folder} exists and is not what was fetched: delete it or name another folder")


def _sizes(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in map("rfc-{}.jsonl".format, FILES)}


def _require_room(parent: Path) -> None:
    free = shutil.disk_usage(parent).free
    if free < ROOM:
        raise ResourceError(f"{parent} has {free / 1e6:,.0f} MB free; fetching the RFCs takes {ROOM / 1e6:,.0f} MB")


def _build(scratch: Path, progress: Callable[[str], Any]) -> Path:
    """The finished folder, inside `scratch`."""
    packages, tree, built = scratch / "packages", scratch / "tree", scratch / "built"
    for made in (packages, tree, built):
        made.mkdir()
    progress(f"downloading {len(PACKAGES)} packages doc-rfc-* {VERSION}")
    download(packages)
    progress("unpacking")
    unpack(packages, tree)
    progress("cleaning")
    counts = write(tree, built)
    write_manifest(built, {"about": ABOUT, "documents": counts, "bytes": _sizes(built)})
    progress(", ".join(f"{count:,} documents in rfc-{name}.jsonl" for name, count in counts.items()))
    return built


def download(into: Path) -> None:
    """The Debian packages, through an apt configuration of our own in `into`.

    Raises:
        InputError: a tool of Debian is missing.
        ResourceError: apt cannot get them.
    """
    for tool in ("apt-config", "apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise InputError(f"there is no {tool} on this system: the RFCs are Debian packages, so use Debian 12")
    private = into / "apt"
    for name in ("sources", "lists/partial", "cache/archives/partial"):
        (private / name).mkdir(parents=True)
    _write_sources(private / "sources")
    configuration = private / "apt.conf"
    configuration.write_text(APT_CONFIGURATION.format(private=private), encoding="utf-8")
    apt = ["apt-get", "-qq", "-c", str(configuration)]
    update = _run([*apt, "update"])  # fails for any of the system's sources; ours need not be among these
    result = _run([*apt, "download", *PACKAGES], cwd=into)
    if result.returncode != 0:
        lines = [line for line in (update.stderr + result.stderr).splitlines() if line.startswith("E:")]
        reason = lines[0].removeprefix("E: ") if lines else f"exit status {result.returncode}"
        remedy = "check the network, and that apt's sources are those of Debian 12"
        raise ResourceError(f"apt-get could not download {PACKAGES[0]} and the like ({reason}): {remedy}")


def _run(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace", check=False)


def _write_sources(into: Path) -> None:
    """Copies of the system's apt sources, with the component non-free in place of theirs."""
    named = _run(["apt-config", "shell", "list", "Dir::Etc::sourcelist/f", "parts", "Dir::Etc::sourceparts/d"]).stdout
    places = dict(token.split("=", 1) for token in shlex.split(named))
    parts = Path(places["parts"])
    for file in [Path(places["list"]), *parts.glob("*.list"), *parts.glob("*.sources")]:
        if file.is_file():
            (into / file.name).write_text(non_free(file.read_text(encoding="utf-8")), encoding="utf-8")


def non_free(sources: str) -> str:
    """apt sources, of either format, with the component non-free alone; mirror, suite and keys are kept."""
    return FIELD.sub("Components: non-free", LINE.sub(r"\1 non-free", sources))


def unpack(packages: Path, tree: Path) -> None:
    """Unpack Debian packages, and delete each that is unpacked.

    Raises:
        ResourceError: dpkg-deb cannot unpack one.
    """
    for package in sorted(packages.glob("*.deb")):
        result = _run(["dpkg-deb", "-x", str(package), str(tree)])
        if result.returncode != 0:
            reason = " ".join(result.stderr.split()) or f"exit status {result.returncode}"
            raise ResourceError(f"{package.name} could not be unpacked ({reason}): free some disk and try again")
        package.unlink()


def write(tree: Path, out: Path) -> dict[str, int]:
    """Write the four files from the unpacked packages; how many documents each has."""
    about = {number: json.loads(_text(file)) for number, file in _files(tree, r"\.json")}
    sides = split({number: _numbers(record.get("obsoletes") or []) for number, record in about.items()})
    counts = dict.fromkeys(FILES, 0)
    with contextlib.ExitStack() as stack:
        paths = {name: out / f"rfc-{name}.jsonl" for name in FILES}
        files = {n: stack.enter_context(path.open("w", encoding="utf-8", newline="\n")) for n, path in paths.items()}

        def add(name: str, record: dict[str, str]) -> None:
            files[name].write(json.dumps(record, ensure_ascii=False) + "\n")
            counts[name] += 1

        for number, file in _files(tree, r"\.txt(\.gz)?"):  # Debian compresses files from 4 KiB on
            text, side = clean(_text(file)), sides[number]
            if len(text) >= SHORTEST:
                texts = {key: tidy(about[number].get(key) or "") for key in ("title", "abstract")}
                add(side, {"id": f"rfc{number}", **texts, "text": text})
                if side != "train" and (parts := pair(text, texts["abstract"])):
                    add("summaries", {"id": f"rfc{number}", "text": parts[0], "summary": parts[1]})
    return counts


def _files(tree: Path, suffix: str) -> Iterator[tuple[int, Path]]:
    """The RFCs' own files of one kind, by number; the packages also have links to them."""
    matches = ((re.fullmatch(rf"rfc(\d+){suffix}", file.name), file) for file in tree.rglob("rfc*"))
    return iter(sorted((int(match[1]), file) for match, file in matches if match and not file.is_symlink()))


def _text(file: Path) -> str:
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _numbers(names: Iterable[str]) -> list[int]:
    return [int(name[3:]) for name in names if re.fullmatch(r"RFC\d+", name)]


def split(obsoletes: dict[int, list[int]], seed: int = 0) -> dict[int, str]:
    """The side of every RFC, given those that each replaces: 90 % train, 5 % val, 5 % test.

    All that are joined by replacing, also through others, are on one side, which depends on the lowest number among
    them and the seed, and on nothing else.
    """
    parent: dict[int, int] = {}

    def first(number: int) -> int:
        while parent.setdefault(number, number) != number:
            number = parent[number]
        return number

    for number, replaced in obsoletes.items():
        for other in replaced:
            low, high = sorted((first(number), first(other)))
            parent[high] = low
    drawn = {number: int(digest([seed, first(number)]), 16) % 20 for number in obsoletes}
    return {number: {0: "test", 1: "val"}.get(draw, "train") for number, draw in drawn.items()}


def clean(raw: str) -> str:
    """An RFC without page headers, page footers and form feeds; a paragraph goes on over the end of a page."""
    pages = raw.replace("\r\n", "\n").replace("\r", "\n").split("\f")
    lines: list[str] = []
    for number, page in enumerate(pages):
        kept = _page([line.rstrip() for line in page.split("\n")], first=number == 0)
        if lines and kept and not _goes_on(lines[-1], kept[0]):
            lines.append("")
        lines += kept
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def _page(lines: list[str], first: bool) -> list[str]:
    """A page without its header, which the first page has not, its footer, and empty lines at both ends."""
    lines = _trimmed(lines)
    if lines and not first and HEADER.match(lines[0]):
        lines = _trimmed(lines[1:])
    if lines and FOOTER.search(lines[-1]):
        lines = _trimmed(lines[:-1])
    return lines


def _trimmed(lines: list[str]) -> list[str]:
    filled = [number for number, line in enumerate(lines) if line]
    return lines[filled[0] : filled[-1] + 1] if filled else []


def _goes_on(before: str, after: str) -> bool:
    """Whether a paragraph goes on from the last line of a page to the first of the next."""
    return _indent(before) == _indent(after) and len(before) > 55 and before[-1] not in ".:!?"


def tidy(value: str) -> str:
    """A title or abstract as one line of plain text, without the mark of the standards track."""
    return re.sub(r" ?\[STANDARDS[- ]*(TRACK)?\]$", "", " ".join(html.unescape(value).split()))


def pair(text: str, abstract: str) -> tuple[str, str] | None:
    """(body, summary) of a cleaned RFC and its tidied abstract; None where they do not fit.

    The summary is the abstract without the closing sentences on the memo's status, 150 to 1,600 characters. The body,
    8,000 characters or more, is what follows the RFC's own abstract; the whole text where it has none. At most half of
    the summary's runs of 8 words may stand in the body: else it is copied from there, or the RFC's own was not found.
    """
    summary, body = STATUS.sub("", abstract), _body(text)
    if SUMMARY[0] <= len(summary) <= SUMMARY[1] and len(body) >= BODY and copied(summary, body) <= 0.5:
        return body, summary
    return None


def _body(text: str) -> str:
    """What follows the section "Abstract": from the first heading on, or from the first paragraph that is indented
    less than the section's first. Empty where the section has no end.
    """
    lines = text.split("\n")
    start = next((at for at, line in enumerate(lines[:ABSTRACT_WITHIN]) if ABSTRACT.fullmatch(line)), None)
    if start is None:
        return text
    filled = [at for at in range(start + 1, len(lines)) if lines[at]]
    paragraphs = (at for at in filled[1:] if not lines[at - 1])
    least = _indent(lines[filled[0]]) if filled else 0
    end = next((at for at in paragraphs if HEADING.match(lines[at]) or _indent(lines[at]) < least), len(lines))
    return "\n".join(lines[end:])


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def copied(summary: str, body: str) -> float:
    """The share of the summary's runs of 8 words that stand in the body, case and punctuation aside."""
    words, inside = re.findall(r"\w+", summary.lower()), " ".join(["", *re.findall(r"\w+", body.lower()), ""])
    runs = [words[at : at + RUN] for at in range(max(1, len(words) - RUN + 1))]
    return sum(f" {' '.join(run)} " in inside for run in runs) / len(runs)


def main(arguments: list[str] | None = None) -> int:
    """`python -m masformer.data.rfc OUT`; the exit codes are those of `masformer`."""
    parser = argparse.ArgumentParser(prog="python -m masformer.data.rfc", description="Fetch the RFCs as a corpus.")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder that is made")
    try:
        print(rfc(parser.parse_args(arguments).out, progress=print))
    except MasformerError as error:
        print(f"masformer: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("masformer: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
