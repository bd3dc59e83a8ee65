"""The oracle: masks drawn as 0/1 grids, and its values against torch's attention under an explicit mask."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from masformer.attention.reference import reference, visible
from masformer.spans import Block, Full, Span, Window

from .cases import dense, dense_mask, documents, inputs, random_case


def grid(span: Span, keys: int, queries: int | None = None, **where: Tensor) -> list[str]:
    """Which keys get weight: with equal scores and one-hot values the output is the row of weights."""
    q, k = torch.zeros(1, 1, queries or keys, 1), torch.zeros(1, 1, keys, 1)
    weights = reference(q, k, torch.eye(keys)[None, None], span, **where)[0, 0]
    seen = weights > 0
    expected = seen / seen.sum(-1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(weights, expected)  # equal shares of what is seen, zero for padding
    return ["".join(str(int(x)) for x in row) for row in seen]


@pytest.mark.parametrize(
    ("span", "rows"),
    [
        (Full(), ["1000", "1100", "1110", "1111"]),
        (Block(3), ["1000000", "1100000", "1110000", "0001000", "0001100", "0001110", "0000001"]),
        (Block(2, lookback=1), ["100000", "110000", "111000", "111100", "001110", "001111"]),
        (Block(2, sinks=1), ["100000", "110000", "101000", "101100", "100010", "100011"]),
        (Block(2, 1, 1), ["1000000", "1100000", "1110000", "1111000", "1011100", "1011110", "1000111"]),
        (Window(1), ["1000", "0100", "0010", "0001"]),
        (Window(3), ["100000", "110000", "111000", "011100", "001110", "000111"]),
        (Window(2, sinks=1), ["10000", "11000", "11100", "10110", "10011"]),
        (Window(2, sinks=9), ["1000", "1100", "1110", "1111"]),
    ],
    ids=str,
)
def test_grid_of_one_document(span: Span, rows: list[str]) -> None:
    assert grid(span, len(rows)) == rows


def test_grid_of_the_last_queries() -> None:
    assert grid(Window(2, sinks=1), 5, queries=2) == ["10110", "10011"]


@pytest.mark.parametrize(
    ("span", "rows"),
    [
        # padding | document of 4 | document of 3 | padding
        (Full(), "000000000 010000000 011000000 011100000 011110000 000001000 000001100 000001110 000000000"),
        (Block(2), "000000000 010000000 011000000 000100000 000110000 000001000 000001100 000000010 000000000"),
        (Window(2, 1), "000000000 010000000 011000000 011100000 010110000 000001000 000001100 000001110 000000000"),
    ],
    ids=str,
)
def test_grid_of_packed_documents_between_padding(span: Span, rows: str) -> None:
    where = {
        "documents": torch.tensor([[-1, 0, 0, 0, 0, 1, 1, 1, -1]]),
        "positions": torch.tensor([[0, 0, 1, 2, 3, 0, 1, 2, 0]]),
    }
    assert grid(span, 9, **where) == rows.split()


@pytest.mark.parametrize("span", [Full(), Block(3, 1, 2), Window(4, 1)], ids=str)
def test_visible_is_sees(span: Span) -> None:
    query, key = torch.arange(3, 12), torch.arange(12)
    expected = [[span.sees(t, s) for s in key.tolist()] for t in query.tolist()]
    assert visible(span, query, key).tolist() == expected


@pytest.mark.parametrize("seed", range(40))
def test_equals_torch_under_an_explicit_mask(seed: int) -> None:
    case = random_case(seed)
    q, k, v, _ = (x.double() for x in inputs(case))
    numbers, positions = documents(case)
    got = reference(q, k, v, case.span, documents=numbers, positions=positions)
    torch.testing.assert_close(got, dense(q, k, v, dense_mask(case), numbers >= 0), rtol=0, atol=1e-12)


def test_equals_torch_with_scale_groups_and_wider_values() -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    k = torch.randn(2, 2, 9, 4, dtype=torch.float64)
    v = torch.randn(2, 2, 9, 7, dtype=torch.float64)
    mask = torch.tensor([[Window(3, 1).sees(t, s) for s in range(9)] for t in range(4, 9)])
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0, enable_gqa=True)
    got = reference(q, k, v, Window(3, 1), scale=1.0)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
