"""Block spans for kernels that know full causal attention alone: every block of a request becomes a request of its own.

Queries of one block, right-aligned with the keys from the first block that they see to their own place, have exactly
the keys of `spans.Block`; a paged cache gives them by its block table, as long as blocks begin where pages do.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..spans import Block, PlanError


@dataclasses.dataclass(frozen=True)
class Batches:
    """One row for every block of queries; whole numbers, on the CPU.

    queries: how many `[rows]`, in the order of the requests, so that the rows' queries are the requests' queries.
    keys: how many they see `[rows]`, up to the last query.
    requests: whose they are `[rows]`.
    columns: where in the request's block table their pages stand `[rows, pages]`.
    """

    queries: Tensor
    keys: Tensor
    requests: Tensor
    columns: Tensor

    def table(self, table: Tensor) -> Tensor:
        """The rows' own block table, from that of the requests `[requests, pages]`."""
        columns = self.columns.clamp(max=table.shape[1] - 1)  # pages after the last key, which no query sees
        return table[self.requests.to(table.device)[:, None], columns.to(table.device)]


def block_batches(queries: Tensor, lengths: Tensor, span: Block, page: int) -> Batches:
    """Cut requests into blocks.

    Args:
        queries: new tokens of each request `[requests]`; the last ones of it.
        lengths: tokens of each request with these `[requests]`.
        page: tokens of a page of the cache.

    Raises:
        PlanError: blocks that do not begin where pages do.
    """
    refuse_unaligned(span, page)
    size = span.size
    begin = lengths - queries
    first, last = begin // size, (lengths - 1) // size
    counts = torch.where(queries > 0, last - first + 1, 0)
    requests = torch.repeat_interleave(torch.arange(len(counts)), counts)
    before = (counts.cumsum(0) - counts)[requests]
    blocks = first[requests] + torch.arange(len(requests)) - before
    start = torch.maximum(begin[requests], blocks * size)
    end = torch.minimum(lengths[requests], (blocks + 1) * size)
    seen = span.unclamped_start(start).clamp(min=0)
    columns = (seen // page)[:, None] + torch.arange((span.lookback + 1) * size // page)
    return Batches(end - start, end - seen, requests, columns)


def refuse_unaligned(span: Block, page: int) -> None:
    """Raise PlanError for blocks that do not begin where pages of so many tokens do."""
    if span.size % page:
        raise PlanError(
            f"{span}: its blocks do not begin where pages of {page} tokens do: serve it with a --block-size that "
            f"divides {span.size}"
        )
