"""The walls between the folders of the code, read from its imports."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "masformer"
FILES = sorted(SOURCE.rglob("*.py"))

ORDER = [
    "errors spans",
    "files attention",
    "models data",
    "training evaluation",
    "selection",
    "report",
    "serving demo",
    "cli",
]
"""From the bottom up: a part imports itself and the parts before it, never those beside or after it."""
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names.split()}

TRANSFORMERS = {"models", "training", "evaluation", "serving"}
"""Parts that may import transformers at the top of a file."""
TRANSFORMERS_INSIDE = {"data/fetch.py", "cli", "demo"}
"""Files and parts that may import it inside a function."""


class Import(NamedTuple):
    """One imported module, absolute, as a tuple of names."""

    module: tuple[str, ...]
    top: bool
    """At the top of the file, not inside a function."""
    line: int

    def __str__(self) -> str:
        return f"line {self.line}: {'.'.join(self.module)}"


def imports(file: Path) -> Iterator[Import]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    package = ("masformer", *file.relative_to(SOURCE).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(tuple(alias.name.split(".")), id(node) not in inside, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            for alias in node.names:  # `from . import x` may import a module
                name = (alias.name,) if module == ("masformer",) or not node.module else ()
                yield Import((*module, *name), id(node) not in inside, node.lineno)


def part(file: Path) -> str:
    """The folder, or the name of a file at the top."""
    return whole(file.relative_to(SOURCE).parts[0].removesuffix(".py"))


def whole(first: str) -> str:
    """`cli_plan` is a part of `cli`, as `demo_page` is of `demo`."""
    return first.split("_")[0] if first.startswith(("cli_", "demo_")) else first


def name(file: Path) -> str:
    return file.relative_to(SOURCE).as_posix()


def outside(file: Path) -> list[Import]:
    """Imports of other packages than this one and the standard library."""
    return [i for i in imports(file) if i.module[0] not in sys.stdlib_module_names | {"masformer"}]


def files_of(*parts: str) -> list[Path]:
    return [file for file in FILES if part(file) in parts]


def test_the_reader_finds_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests below rest on."""
    monkeypatch.setitem(globals(), "SOURCE", tmp_path)
    (tmp_path / "spans").mkdir()
    file = tmp_path / "spans" / "x.py"
    file.write_text(
        "import a.b\nfrom ..models.c import d\nfrom . import e\nfrom .. import f\ndef g():\n    from h import i\n"
    )
    assert [(".".join(i.module), i.top) for i in imports(file)] == [
        ("a.b", True),
        ("masformer.models.c", True),
        ("masformer.spans.e", True),
        ("masformer.f", True),
        ("h", False),
    ]
    assert [str(i) for i in outside(file)] == ["line 1: a.b", "line 6: h"]


def test_every_part_has_its_place() -> None:
    parts = {part(file) for file in FILES} - {"__init__", "__main__"}
    assert {"spans", "attention", "models", "errors"} <= parts
    assert parts <= set(RANK)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_no_import_goes_up(file: Path) -> None:
    if part(file) in ("__init__", "__main__"):
        return
    for one in imports(file):
        if one.module[0] != "masformer":
            continue
        assert len(one.module) > 1, f"{one} imports the whole package"
        target = whole(one.module[1])
        assert target == part(file) or RANK[target] < RANK[part(file)], one


@pytest.mark.parametrize("file", files_of("spans", "errors", "files"), ids=name)
def test_spans_and_files_import_the_standard_library_only(file: Path) -> None:
    assert not outside(file)
    assert {i.module[1] for i in imports(file) if i.module[0] == "masformer"} <= {part(file), "errors"}


@pytest.mark.parametrize("file", files_of("attention"), ids=name)
def test_attention_imports_torch_only(file: Path) -> None:
    assert {i.module[0] for i in outside(file)} <= {"torch"}
    assert {i.module[1] for i in imports(file) if i.module[0] == "masformer"} <= {"attention", "spans"}


@pytest.mark.parametrize("file", FILES, ids=name)
def test_transformers_has_its_places(file: Path) -> None:
    found = [i for i in outside(file) if i.module[0] in ("transformers", "accelerate", "peft")]
    if part(file) in TRANSFORMERS:
        return
    if {name(file), part(file)} & TRANSFORMERS_INSIDE:
        found = [i for i in found if i.top]
    assert not found, [str(i) for i in found]


@pytest.mark.parametrize("file", files_of("report"), ids=name)
def test_the_report_needs_no_torch(file: Path) -> None:
    read = ("evaluation/results", "evaluation/statistics", "selection/outcome", "selection/__init__", "files")
    for light in (file, *(SOURCE / f"{name}.py" for name in read)):
        assert not {i.module[0] for i in outside(light)} & {"torch", "transformers"}
    used = {i.module[1:3] for i in imports(file) if i.module[0] == "masformer"}
    of_evaluation = {module[1] for module in used if module[0] == "evaluation"}
    assert of_evaluation <= {"results", "statistics"}  # what it shows is handed to it as numbers
    assert {module[1] for module in used if module[0] == "selection"} <= {"outcome"}
    assert {module[0] for module in used} <= {"report", "spans", "errors", "evaluation", "selection"}


@pytest.mark.parametrize("file", files_of("__init__", "cli", "data"), ids=name)
def test_starting_is_quick(file: Path) -> None:
    """Heavy packages are imported where they are used: `masformer --help` must not wait for torch."""
    heavy = {"torch", "transformers", "matplotlib", "accelerate", "datasets"}
    assert not [str(i) for i in outside(file) if i.top and i.module[0] in heavy]


@pytest.mark.parametrize("file", FILES, ids=name)
def test_files_are_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400
