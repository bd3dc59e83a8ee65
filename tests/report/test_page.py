import errno
import os
from html.parser import HTMLParser
from pathlib import Path

import pytest

from masformer.errors import InputError, ResourceError
from masformer.report.page import Figure, Section, Table, interval, number, write_page

pytest.importorskip("jinja2")

VOID = {"meta", "link", "img", "br", "hr", "input"}
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"><path d="M0 0"></path></svg>'
PNG = b"\x89PNG\r\n\x1a\n rest"
TABLE = Table(
    ["plan", "loss", "note"], [["parent", "2.31 ± 0.02", "-"], ["local", "2.9", "worse"]], "Loss of <two> plans"
)
SECTIONS = [
    Section(
        "First & foremost", ["Prose with <b>tags</b>."], [TABLE], [Figure('Two "curves"', SVG, caption="A caption")]
    ),
    Section("Second", figures=[Figure("A photograph", png=PNG)], verbatim=["  kept <as>\n  it is"]),
    Section("Third"),
]


class Page(HTMLParser):
    """Elements in order, as (tag, attributes, text up to the next tag); a tag that is not closed is an error."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.elements:
            tag, attributes, text = self.elements[-1]
            self.elements[-1] = (tag, attributes, text + data)

    def all(self, tag):
        return [(attributes, text.strip()) for name, attributes, text in self.elements if name == tag]


@pytest.fixture
def page(tmp_path):
    return Page(write_page(tmp_path / "new" / "index.html", title="A <title>", sections=SECTIONS).read_text("utf-8"))


def test_text_is_escaped_and_kept(page):
    assert page.all("title")[0][1] == page.all("h1")[0][1] == "A <title>"
    assert [text for _, text in page.all("h2")] == ["First & foremost", "Second", "Third"]
    assert page.all("p") == [({}, "Prose with <b>tags</b>.")]
    assert [text.rstrip() for tag, _, text in page.elements if tag == "pre"] == ["  kept <as>\n  it is"]


def test_there_are_landmarks_a_language_and_a_way_past_the_contents(page):
    assert page.all("html")[0][0] == {"lang": "en"}
    assert [len(page.all(tag)) for tag in ("header", "nav", "main", "h1")] == [1, 1, 1, 1]
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for attributes, _ in page.all("a")]
    assert links == ["#main", "#s1", "#s2", "#s3"]
    assert {link[1:] for link in links} <= set(ids)
    labels = [attributes["aria-labelledby"] for _, attributes, _ in page.elements if "aria-labelledby" in attributes]
    assert labels == ["s1", "s1t1", "s2", "s3"]
    assert set(labels) <= set(ids)


def test_a_table_has_a_caption_and_scopes_and_sets_numbers_right(page):
    assert [text for _, text in page.all("caption")] == ["Loss of <two> plans"]
    scopes = [(attributes["scope"], attributes.get("class"), text) for attributes, text in page.all("th")]
    assert scopes == [
        ("col", None, "plan"),
        ("col", "number", "loss"),
        ("col", None, "note"),
        ("row", None, "parent"),
        ("row", None, "local"),
    ]
    cells = [(attributes.get("class"), text) for attributes, text in page.all("td")]
    assert cells == [("number", "2.31 ± 0.02"), (None, "-"), ("number", "2.9"), (None, "worse")]


def test_figures_are_inside_the_page_and_described(page):
    assert ({"role": "img", "aria-label": 'Two "curves"'}, "") in page.all("div")
    assert page.all("path") == [({"d": "M0 0"}, "")]
    assert page.all("img")[0][0] == {"src": "data:image/png;base64,iVBORw0KGgogcmVzdA==", "alt": "A photograph"}
    assert page.all("figcaption") == [({}, "A caption")]


def test_the_page_asks_for_nothing_outside_itself(page):
    for _, attributes, _ in page.elements:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert [attributes for attributes, _ in page.all("script")] == [{}], "one script, inline"
    policies = [meta["content"] for meta, _ in page.all("meta") if "http-equiv" in meta]
    assert policies[0].startswith("default-src 'none'; ")


def test_it_fits_phones_and_the_dark(page):
    assert ({"name": "viewport", "content": "width=device-width, initial-scale=1"}, "") in page.all("meta")
    assert "@media (prefers-color-scheme: dark)" in page.all("style")[0][1]


def test_a_short_page_has_no_contents(tmp_path):
    assert "<nav" not in write_page(tmp_path / "a.html", title="t", sections=SECTIONS[:2]).read_text("utf-8")


@pytest.mark.parametrize(
    ("cell", "is_number"),
    [
        *[(cell, True) for cell in ("3", "-0.5", "2.31 ± 0.02", "188.7 MB", "72.9%", "12.1 tokens/s", "1,024", "-")],
        *[(cell, True) for cell in ("3/5", "\u22120.1 to +0.2", "16 to 31", "72.9 %", "59.6 to 98.2 %", "∞", "\u2013")],
        *[(cell, False) for cell in ("all 30", "", "0, 7, 8", "block 8", "3 layers", "3 of 5", "one to 2")],
    ],
)
def test_what_counts_as_a_number(cell, is_number):
    assert Table(["a"], [[cell]], "c").is_numeric(0) == is_number


def test_cells_of_numbers():
    assert [number(x) for x in (2.5, -0.0123, None, float("inf"), -0.0001)] == [
        "2.500",
        "\u22120.012",
        "\u2013",
        "∞",
        "0.000",
    ]
    assert [number(x, 1, sign=True) for x in (1234.56, -3, 0.01)] == ["+1,234.6", "\u22123.0", "0.0"]
    assert number(0.729, 1, percent=True) == "72.9 %"
    assert interval(-0.1, 0.2, 1, sign=True) == "\u22120.1 to +0.2"
    assert interval(0.5, 1, 1, percent=True) == "50.0 to 100.0 %"
    assert interval(None, None) == "\u2013"


def test_the_same_picture_twice_has_ids_of_its_own(tmp_path):
    body = '<title id="x-t">x</title><g id="x"></g><use href="#x"/><g clip-path="url(#x)"/>'
    svg = f'<svg aria-labelledby="x-t x">{body}</svg>'
    figures = [Figure("One", svg), Figure("Two", svg), Figure("Three", SVG), Figure("Four", SVG)]
    html = write_page(tmp_path / "a.html", title="t", sections=[Section("s", figures=figures)]).read_text("utf-8")
    assert svg in html
    other = '<svg aria-labelledby="x-t-2 x-2"><title id="x-t-2">x</title><g id="x-2"></g><use href="#x-2"/>'
    assert other + '<g clip-path="url(#x-2)"/></svg>' in html


def test_small_figures_stand_side_by_side(tmp_path):
    figures = [Figure("One", SVG, small=True), Figure("Two", SVG)]
    page = Page(write_page(tmp_path / "a.html", title="t", sections=[Section("s", figures=figures)]).read_text("utf-8"))
    assert [attributes.get("class") for attributes, _ in page.all("figure")] == ["small", None]


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOSPC, ResourceError), (errno.EACCES, InputError)], ids=["full disk", "forbidden"]
)
def test_a_failed_write_keeps_the_old_page_and_leaves_no_part(tmp_path, monkeypatch, code, kind):
    path = write_page(tmp_path / "a.html", title="old", sections=[])
    old = path.read_bytes()

    def fail(self, target):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(kind, match=r"cannot write .*a\.html: "):
        write_page(path, title="new", sections=SECTIONS)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["a.html"]


def test_an_interrupt_leaves_no_part(tmp_path, monkeypatch):
    def interrupt(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_page(tmp_path / "a.html", title="new", sections=[])
    assert list(tmp_path.iterdir()) == []


def test_a_path_below_a_file_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_page(tmp_path / "file" / "a.html", title="t", sections=[])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Table(["a", "b"], [["1"]], "c"), "has not 2 cells"),
        (lambda: Figure(" ", svg=SVG), "alt text"),
        (lambda: Figure("x"), "either svg or png"),
        (lambda: Figure("x", svg=SVG, png=PNG), "either svg or png"),
        (lambda: Figure("x", svg="<?xml?><svg/>"), "prologue"),
        (lambda: Figure("x", png=b"GIF89a"), "no PNG"),
        (lambda: Section("h", "one string"), "list of strings"),
        (lambda: Section("h", verbatim="one string"), "list of strings"),
    ],
)
def test_parts_that_cannot_be_shown_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
