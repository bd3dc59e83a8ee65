"""Requests cut into blocks, against the definition of the spans, key by key."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from masformer.serving.batches import block_batches
from masformer.spans import Block, PlanError


def seen_in(row, batches, table, page):
    """For every query of a row the keys that causal attention gives it, as places in the cache."""
    queries, keys = int(batches.queries[row]), int(batches.keys[row])
    places = [int(number) * page + slot for number in table[row] for slot in range(page)][:keys]
    return [places[: keys - queries + 1 + query] for query in range(queries)]


@given(
    requests=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=5),
    page=st.sampled_from([1, 2, 4, 8]),
    pages=st.integers(1, 3),
    lookback=st.integers(0, 3),
)
def test_every_query_gets_the_keys_that_its_span_sees(requests, page, pages, lookback):
    span = Block(page * pages, lookback)
    new = torch.tensor([fresh for fresh, _ in requests])
    lengths = torch.tensor([fresh + old for fresh, old in requests])
    width = -(-int(lengths.max()) // page) + 1
    table = torch.arange(len(requests) * width).view(len(requests), width)
    batches = block_batches(new, lengths, span, page)
    rows = batches.table(table)
    assert len(rows) == len(batches.queries)
    got = [keys for row in range(len(rows)) for keys in seen_in(row, batches, rows, page)]
    expected = []
    for request, (fresh, length) in enumerate(zip(new.tolist(), lengths.tolist(), strict=True)):
        cache = [int(number) * page + slot for number in table[request] for slot in range(page)]
        for t in range(length - fresh, length):
            expected.append([cache[s] for s in range(length) if span.sees(t, s)])
    assert got == expected


def test_blocks_that_do_not_begin_where_pages_do_are_refused():
    with pytest.raises(PlanError, match=r"block:100: .* serve it with a --block-size that divides 100"):
        block_batches(torch.tensor([1]), torch.tensor([1]), Block(100), 16)
