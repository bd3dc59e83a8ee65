"""Padding masks and position ids to documents, over one call and over several."""

import pytest
import torch

from masformer.attention import Segments, UnsupportedSpan
from masformer.attention.segments import Piece
from masformer.spans import Block, Full, Span, Window


def of(new: int, *rows: list[int], mask: list[list[int]] | None = None, previous: Segments | None = None) -> Segments:
    """`rows` are position ids, one list per row, or nothing."""
    return Segments.of(
        len(rows) or len(mask or [0]),
        new,
        previous=previous,
        attention_mask=None if mask is None else torch.tensor(mask),
        position_ids=torch.tensor(rows) if rows else None,
    )


def pieces(segments: Segments) -> list[tuple[int, ...]]:
    assert segments.pieces is not None
    return [tuple(piece) for piece in segments.pieces]


def test_one_document_needs_no_pieces() -> None:
    for segments in (of(4), of(4, [0, 1, 2, 3]), of(4, [0, 1, 2, 3], mask=[[1, 1, 1, 1]]), of(4, mask=[[1, 1, 1, 1]])):
        assert (segments.seen, segments.new, segments.pieces, segments.rows) == (0, 4, None, None)


def test_positions_need_not_start_at_zero() -> None:
    assert of(3, [5, 6, 7]).pieces is None
    assert of(2, [8, 9], previous=of(3, [5, 6, 7])).pieces is None


def test_one_row_of_positions_serves_a_batch() -> None:
    segments = Segments.of(3, 2, position_ids=torch.tensor([[0, 0]]))
    assert pieces(segments) == [(row, begin, begin, begin + 1) for row in range(3) for begin in range(2)]


def test_a_position_zero_starts_a_document() -> None:
    assert pieces(of(6, [0, 1, 2, 0, 1, 0])) == [(0, 0, 0, 3), (0, 3, 3, 5), (0, 5, 5, 6)]


def test_all_ones_is_no_mask() -> None:
    positions = [0, 1, 2, 0, 1]
    assert of(5, positions, mask=[[1] * 5]) == of(5, positions)


def test_left_and_right_padding() -> None:
    mask = [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0]]
    got = of(5, [0, 0, 0, 1, 2], [0, 1, 2, 0, 0], [1, 0, 1, 2, 1], mask=mask)
    assert pieces(got) == [(0, 2, 2, 5), (1, 0, 0, 3), (2, 1, 1, 4)]


def test_padding_without_positions() -> None:
    assert pieces(of(4, mask=[[0, 1, 1, 1], [1, 1, 1, 1]])) == [(0, 1, 1, 4), (1, 0, 0, 4)]


def test_packed_behind_left_padding() -> None:
    assert pieces(of(6, [0, 0, 0, 1, 0, 1], mask=[[0, 0, 1, 1, 1, 1]])) == [(0, 2, 2, 4), (0, 4, 4, 6)]


def test_rows_of_padding_only() -> None:
    got = of(3, mask=[[0, 0, 0], [1, 1, 1]])
    assert pieces(got) == [(1, 0, 0, 3)]
    assert got.begins(torch.device("cpu")).tolist() == [[-1, -1, -1], [0, 0, 0]]


def test_booleans_and_numbers_are_the_same_mask() -> None:
    mask = torch.tensor([[0, 1, 1]])
    assert Segments.of(1, 3, attention_mask=mask.bool()) == Segments.of(1, 3, attention_mask=mask)


# Several calls


def test_a_document_goes_on() -> None:
    first = of(3, [0, 1, 2], [0, 0, 1], mask=[[1, 1, 1], [0, 1, 1]])
    second = of(2, [3, 4], [2, 3], mask=[[1] * 5, [0, 1, 1, 1, 1]], previous=first)
    assert (second.seen, second.new) == (3, 2)
    assert pieces(second) == [(0, 0, 3, 5), (1, 1, 3, 5)]


def test_a_document_starts_in_a_later_call() -> None:
    second = of(3, [4, 0, 1], previous=of(4, [0, 1, 2, 3]))
    assert pieces(second) == [(0, 0, 4, 5), (0, 5, 5, 7)]
    third = of(1, [2], previous=second)
    assert pieces(third) == [(0, 5, 7, 8)]


def test_a_document_that_starts_with_a_call() -> None:
    assert pieces(of(2, [0, 1], previous=of(2, [0, 1]))) == [(0, 2, 2, 4)]


def test_padding_longer_than_a_call() -> None:
    first = of(2, [0, 0], [0, 1], mask=[[0, 0], [1, 1]])
    second = of(2, [0, 0], [2, 3], mask=[[0, 0, 0, 1], [1] * 4], previous=first)
    assert pieces(first) == [(1, 0, 0, 2)]
    assert pieces(second) == [(0, 3, 3, 4), (1, 0, 2, 4)]


def test_after_left_padding_the_mask_may_be_left_out() -> None:
    first = of(3, [0, 0, 1], mask=[[0, 1, 1]])
    assert pieces(of(1, [2], previous=first)) == [(0, 1, 3, 4)]


# Refusals


@pytest.mark.parametrize(
    ("positions", "said"), [([0, 1, 3, 4], "from 1 to 3"), ([0, 1, 1, 2], "from 1 to 1"), ([3, 2, 1, 0], "from 3 to 2")]
)
def test_positions_that_jump(positions: list[int], said: str) -> None:
    with pytest.raises(UnsupportedSpan, match=f"row 0: position_ids go {said}"):
        of(4, positions)


def test_positions_that_jump_between_calls() -> None:
    for previous in (of(3, [0, 1, 2]), of(3, [2, 0, 1])):
        expected = 3 if previous.rows is None else 2
        with pytest.raises(UnsupportedSpan, match=f"from {expected - 1} to 7"):
            of(2, [7, 8], previous=previous)


def test_holes_in_the_mask() -> None:
    with pytest.raises(UnsupportedSpan, match=r"row 1 has padding between real tokens \(columns 0 to 3\)"):
        of(4, mask=[[1, 1, 1, 1], [1, 0, 0, 1]])


@pytest.mark.parametrize("shape", [(2, 4), (1, 3), (1, 1, 4, 4), (4,)])
def test_masks_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedSpan) as error:
        Segments.of(1, 4, attention_mask=torch.ones(shape))
    assert str(shape) in str(error.value)
    assert "(1, 4)" in str(error.value)


@pytest.mark.parametrize("shape", [(2, 4), (1, 3), (3, 1, 4), (4,)])
def test_positions_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedSpan) as error:
        Segments.of(3, 4, position_ids=torch.zeros(shape, dtype=torch.long))
    assert str(shape) in str(error.value)


def test_a_mask_must_cover_the_cache() -> None:
    with pytest.raises(UnsupportedSpan, match=r"\(1, 2\)"):
        of(2, mask=[[1, 1]], previous=of(3))


def test_a_mask_that_changes() -> None:
    with pytest.raises(
        UnsupportedSpan, match="row 0: the mask of this call begins at column 1, that of earlier calls at 0"
    ):
        of(1, mask=[[0, 1, 1, 1]], previous=of(3))


@pytest.mark.parametrize("later", [[[1, 1, 1, 1], [1, 1, 1, 1]], [[1, 1, 1, 1], [0, 1, 1, 1]]])
def test_a_mask_that_shows_what_it_hid(later: list[list[int]]) -> None:
    first = of(3, mask=[[0, 1, 1], [0, 1, 1]])
    with pytest.raises(UnsupportedSpan, match="row 0"):
        of(1, mask=later, previous=first)


def test_real_tokens_after_right_padding() -> None:
    first = of(3, [0, 1, 1], mask=[[1, 1, 0]])
    with pytest.raises(UnsupportedSpan, match="row 0"):
        of(1, [2], mask=[[1, 1, 0, 1]], previous=first)
    with pytest.raises(UnsupportedSpan, match="row 0 has real tokens after right padding"):
        of(1, [2], previous=first)


def test_more_right_padding_is_fine() -> None:
    first = of(3, [0, 1, 1], [0, 1, 2], mask=[[1, 1, 0], [1, 1, 1]])
    assert pieces(of(1, [1], [3], mask=[[1, 1, 0, 0], [1, 1, 1, 1]], previous=first)) == [(1, 0, 3, 4)]


def test_another_batch() -> None:
    with pytest.raises(UnsupportedSpan, match="the cache holds 1 rows, the batch has 2"):
        Segments.of(2, 1, previous=of(2, [0, 0]))


# What a cache asks


@pytest.mark.parametrize("span", [Full(), Block(3), Block(3, 1, 2), Window(1), Window(4), Window(4, 3)], ids=str)
def test_first_needed_matches_cache_length(span: Span) -> None:
    for n in range(1, 30):
        first = Segments(0, n).first_needed(span)
        assert n - first + (span.sinks if first else 0) == span.cache_length(n)
        assert first == 0 or first > span.sinks


def test_first_needed_is_that_of_the_neediest_row() -> None:
    mask = [[1] * 10, [0] * 6 + [1] * 4]
    segments = of(10, mask=mask)
    assert segments.first_needed(Window(3)) == 8
    assert segments.first_needed(Block(4)) == 8  # row 0 keeps 8 and 9, row 1 has just finished a block
    assert segments.first_needed(Block(5)) == 6  # row 1 is inside its first block


def test_select() -> None:
    segments = of(3, [0, 0, 1], [0, 1, 2], mask=[[0, 1, 1], [1, 1, 1]])
    turned = segments.select([1, 0, 0])
    assert [row.begin for row in turned.rows or ()] == [0, 1, 1]
    after = of(1, [3], [2], [2], previous=turned)
    assert pieces(after) == [(0, 0, 3, 4), (1, 1, 3, 4), (2, 1, 3, 4)]
    assert of(3).select([0, 0]) == of(3)


def test_crop() -> None:
    assert of(2, [3, 4], previous=of(5, [0, 1, 2, 3, 4]).crop(2)).pieces is None
    with pytest.raises(UnsupportedSpan, match="from 4 to 3"):
        of(2, [3, 4], previous=of(5, [0, 1, 2, 3, 4]))
    padded = of(5, [0, 0, 1, 2, 3], mask=[[0, 1, 1, 1, 1]])
    assert pieces(of(1, [2], previous=padded.crop(2))) == [(0, 1, 3, 4)]


def test_crop_refuses_to_take_back_the_start_of_a_document() -> None:
    packed = of(5, [0, 1, 2, 0, 1])
    packed.crop(2)
    with pytest.raises(UnsupportedSpan, match="cannot take back 3 tokens"):
        packed.crop(3)
    with pytest.raises(UnsupportedSpan, match="cannot take back 1 tokens"):
        of(3, mask=[[1, 1, 0]]).crop(1)


def test_pieces_name_their_fields() -> None:
    assert of(2, [0, 0]).pieces == (Piece(row=0, begin=0, first=0, stop=1), Piece(row=0, begin=1, first=1, stop=2))
