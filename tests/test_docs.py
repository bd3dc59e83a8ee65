"""The words of the project: links that lead somewhere, no gaps left to fill, the README's Python runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_gap_is_left(page):
    assert not re.findall(r"\b[A-Z][A-Z0-9]+_[A-Z0-9_]+\b|TODO|FIXME|XXX", page.read_text(encoding="utf-8"))


def test_the_readme_names_what_exists():
    import masformer

    names = set(re.findall(r"masformer\.(\w+)\(", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert names
    assert not [name for name in names if not hasattr(masformer, name)]
    assert all(hasattr(masformer, name) for name in masformer.__all__)
