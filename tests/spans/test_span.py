"""Spans: the definition as 0/1 grids, and every closed form against a counted mask."""

import itertools
from pathlib import Path

import pytest

from masformer.spans import Block, Full, PlanError, Span, Window, parse_span

BLOCKS = [Block(*sizes) for sizes in itertools.product((1, 2, 3, 5), (0, 1, 2), (0, 1, 3, 7))]
WINDOWS = [Window(*sizes) for sizes in itertools.product((1, 2, 3, 6), (0, 1, 2, 5))]
SPANS: list[Span] = [Full(), *BLOCKS, *WINDOWS]
LENGTHS = range(20)


def in_words(span: Span, t: int, position: int) -> bool:
    """Visibility as the words say it, without `start`."""
    if position > t:
        return False
    if isinstance(span, Block):
        return t // span.size - position // span.size <= span.lookback or position < span.sinks
    if isinstance(span, Window):
        return t - position < span.size or position < span.sinks
    return True


def grid(span: Span, n: int) -> list[str]:
    return ["".join(str(int(span.sees(t, position))) for position in range(n)) for t in range(n)]


@pytest.mark.parametrize(
    ("span", "rows"),
    [
        (Full(), ["1000", "1100", "1110", "1111"]),
        (Block(3), ["1000000", "1100000", "1110000", "0001000", "0001100", "0001110", "0000001"]),
        (Block(2, lookback=1), ["100000", "110000", "111000", "111100", "001110", "001111"]),
        (Block(2, sinks=1), ["100000", "110000", "101000", "101100", "100010", "100011"]),
        (Window(1), ["1000", "0100", "0010", "0001"]),
        (Window(3), ["100000", "110000", "111000", "011100", "001110", "000111"]),
        (Window(2, sinks=1), ["10000", "11000", "11100", "10110", "10011"]),
        (Window(2, sinks=3), ["100000", "110000", "111000", "111100", "111110", "111011"]),
    ],
    ids=str,
)
def test_mask(span: Span, rows: list[str]) -> None:
    assert grid(span, len(rows)) == rows


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_sees_is_what_the_words_say(span: Span) -> None:
    for t, position in itertools.product(LENGTHS, LENGTHS):
        assert span.sees(t, position) == in_words(span, t, position), (t, position)


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_visible_counts_the_row(span: Span) -> None:
    assert [span.visible(t) for t in LENGTHS] == [sum(in_words(span, t, j) for j in range(t + 1)) for t in LENGTHS]


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_visible_pairs_counts_the_mask(span: Span) -> None:
    for n in LENGTHS:
        assert span.visible_pairs(n) == sum(in_words(span, t, j) for t in range(n) for j in range(n)), n


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_cache_holds_exactly_the_keys_that_later_queries_see(span: Span) -> None:
    for n in LENGTHS:
        needed = {j for j in range(n) for t in range(n, n + 40) if in_words(span, t, j)}
        assert span.cache_length(n) == len(needed), n


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_peak_cache_length_is_the_largest_so_far(span: Span) -> None:
    for n in range(30):
        assert span.peak_cache_length(n) == max(span.cache_length(i) for i in range(n + 1)), n


@pytest.mark.parametrize("span", [*BLOCKS, *WINDOWS], ids=str)
def test_a_local_cache_stops_growing(span: Span) -> None:
    assert span.is_local
    assert span.peak_cache_length(10_000) == span.peak_cache_length(100)


def test_full_is_not_local() -> None:
    assert not Full().is_local
    assert Full().cache_length(1000) == Full().peak_cache_length(1000) == 1000


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Block(0), "block size .* got 0"),
        (lambda: Block(-3), "block size .* got -3"),
        (lambda: Block("8"), "block size .* got '8'"),  # type: ignore[arg-type]
        (lambda: Block(True), "block size .* got True"),
        (lambda: Block(4, lookback=-1), "block lookback .* got -1"),
        (lambda: Block(4, sinks=1.5), r"block sinks .* got 1\.5"),  # type: ignore[arg-type]
        (lambda: Window(0), "window size .* got 0"),
        (lambda: Window(2.0), r"window size .* got 2\.0"),  # type: ignore[arg-type]
        (lambda: Window(4, sinks=-2), "window sinks .* got -2"),
    ],
)
def test_a_value_that_cannot_be_is_named(make, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        make()


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_text_round_trip(span: Span) -> None:
    assert parse_span(str(span)) == span


@pytest.mark.parametrize(
    ("text", "span"),
    [
        (" full ", Full()),
        ("block:1024", Block(1024)),
        ("block:256:sinks=4:lookback=1", Block(256, lookback=1, sinks=4)),
        ("window:size=128:sinks=4", Window(128, sinks=4)),
    ],
)
def test_parse(text: str, span: Span) -> None:
    assert parse_span(text) == span


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "unknown span ''"),
        ("blok:3", "unknown span 'blok:3'"),
        ("block", "lacks its size"),
        ("window:sinks=4", "lacks its size"),
        ("block:many", "size must be given once"),
        ("block:1.5", "size must be given once"),
        ("block:3:size=3", "size must be given once"),
        ("block:3:4", "'4' that block does not take"),
        ("window:3:lookback=1", "'lookback=1' that window does not take"),
        ("full:3", "'3' that full does not take"),
        ("window:-4", "at least 1, got -4"),
    ],
)
def test_text_that_cannot_be_read_is_named(text: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        parse_span(text)


def test_json_form() -> None:
    assert Full().to_json() == {"kind": "full"}
    assert Block(8, sinks=2).to_json() == {"kind": "block", "size": 8, "lookback": 0, "sinks": 2}
    assert Window(8).to_json() == {"kind": "window", "size": 8, "sinks": 0}


@pytest.mark.parametrize(
    "texts", [("full", "block:3", "block:2:lookback=1"), ("block:2:sinks=1", "window:3", "window:2:sinks=1")]
)
def test_the_pictures_in_the_guide_are_the_masks(texts: tuple[str, ...]) -> None:
    columns = [[text, *grid(parse_span(text), 6)] for text in texts]
    picture = "\n".join("".join(f"{cell:22}" for cell in row).rstrip() for row in zip(*columns, strict=True))
    assert picture in (Path(__file__).parents[2] / "docs" / "spans.md").read_text(encoding="utf-8")
