"""A report as one HTML file: no network, readable on a phone, in the dark and by a screen reader.

    write_page(Path("demo/index.html"), title="SmolLM2 with 8 full layers", sections=[
        Section("Loss by position", ["Lower is better."], figures=[Figure("Three curves …", svg=plots…)]),
    ])

Text is escaped; only the SVG of a figure goes in as it is. A short script makes tables sortable and downloadable as
CSV; without it the page shows the same.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import errno
import math
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from masformer.errors import InputError, MasformerError, ResourceError

# 12, -0.3 ± 0.1, +0.1 to 0.2, 3/5, 1,024 MB, 3.1×, 72.9 %, ∞, or a dash (hyphen, en, em) for none; \u2212 is the minus
# sign. The page's script reads the same cells as numbers.
NUMBER = re.compile(
    r"[\u2212+~≤≥<>-]?\s?(\d[\d.,]*|∞)(/\d[\d.,]*)?(\s?([±\u2013]|to)\s?[\u2212+-]?[\d.,]+)?"
    r"\s?([%\u00d7]|[kKMGT]?i?B|ms|s|min|tokens/s)?"
    r"|[-\u2013\u2014]"
)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under headers; the first cell of a row names it. Columns of numbers are set to the right."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.headers):
                raise ValueError(f"table {self.caption!r}: row {list(row)} has not {len(self.headers)} cells")

    def is_numeric(self, column: int) -> bool:
        """Whether every cell of the column, at least one, reads as a number."""
        return bool(self.rows) and all(NUMBER.fullmatch(str(row[column])) for row in self.rows)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture, as an inline SVG string or as the bytes of a PNG file, and what it shows in words (`alt`).

    small: may stand beside others.
    """

    alt: str
    svg: str | None = None
    png: bytes | None = None
    caption: str = ""
    small: bool = False

    def __post_init__(self) -> None:
        if not self.alt.strip():
            raise ValueError("a figure needs an alt text")
        if (self.svg is None) == (self.png is None):
            raise ValueError(f"figure {self.alt!r} takes either svg or png")
        if self.svg is not None and not self.svg.startswith("<svg"):
            raise ValueError(f"figure {self.alt!r}: the svg must begin with <svg, without an XML prologue")
        if self.png is not None and not self.png.startswith(b"\x89PNG"):
            raise ValueError(f"figure {self.alt!r}: these bytes are no PNG")

    @property
    def png_url(self) -> str:
        """The PNG as a data URL."""
        return "data:image/png;base64," + base64.b64encode(self.png or b"").decode()


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and below it, in this order: prose, figures, tables, and text kept as it is (`verbatim`)."""

    heading: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    verbatim: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("paragraphs", "verbatim"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} of section {self.heading!r} is a list of strings, not one string")


def write_page(path: Path | str, *, title: str, sections: Sequence[Section]) -> Path:
    """Write the page; `path` holds the old page or the whole new one, never a part.

    Raises:
        InputError: jinja2 is not installed, or the file cannot be written.
        ResourceError: the disk is full.
    """
    path = Path(path)
    text = _render(title, sections)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        _remove(part)
    return path


def _render(title: str, sections: Sequence[Section]) -> str:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise InputError("the report page needs jinja2: pip install 'masformer[eval]'") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("masformer.report").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(title=title, sections=_apart(sections)) + "\n"


def _apart(sections: Sequence[Section]) -> list[Section]:
    """The sections, with other ids in an SVG that was there before: no id may stand twice in a page."""
    seen: collections.Counter[str] = collections.Counter()

    def renamed(figure: Figure) -> Figure:
        ids = sorted(re.findall(r' id="([^"]+)"', figure.svg or ""), key=len, reverse=True)
        if figure.svg is None or not ids:
            return figure
        seen[figure.svg] += 1
        if seen[figure.svg] == 1:
            return figure
        pattern = rf"(?<=[\"# ])({'|'.join(map(re.escape, ids))})(?=[\") ])"
        return dataclasses.replace(figure, svg=re.sub(pattern, rf"\1-{seen[figure.svg]}", figure.svg))

    return [dataclasses.replace(section, figures=[renamed(f) for f in section.figures]) for section in sections]


def _write_error(path: Path, error: OSError) -> MasformerError:
    kind = ResourceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else InputError
    return kind(f"cannot write {path}: {error.strerror}")


def _remove(part: Path) -> None:
    try:
        part.unlink(missing_ok=True)
    except OSError:
        return  # the folder itself is not one; the error that says so is on its way


def number(value: float | None, digits: int = 3, *, sign: bool = False, percent: bool = False) -> str:
    """A cell: `1,024.500`, `\u22120.012`, `+0.3`, `72.9 %` of 0.729; a dash for None."""
    if value is None:
        return "\u2013"
    if math.isinf(value):
        return "∞"
    text = f"{100 * value if percent else value:{'+' if sign else ''},.{digits}f}"
    if not text.strip("+-0.,"):
        text = text.lstrip("+-")  # what rounds to 0 has no sign
    return text.replace("-", "\u2212") + (" %" if percent else "")


def interval(
    low: float | None, high: float | None, digits: int = 3, *, sign: bool = False, percent: bool = False
) -> str:
    """A cell: `\u22120.012 to 0.300`; a dash where there is none."""
    if low is None or high is None:
        return "\u2013"
    first, last = (number(value, digits, sign=sign, percent=percent) for value in (low, high))
    return f"{first.removesuffix(' %')} to {last}"
