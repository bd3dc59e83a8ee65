"""Packed documents and padding: equal to each document alone, and bit-independent of their neighbours."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from masformer.attention import UnsupportedSpan
from masformer.models.cache import SpanCache
from masformer.models.convert import applied, convert
from masformer.spans import Block, Full, SpanPlan, Window

from .helpers import FEW, FULL, MIXED, close, logits, tiny, tokens
from .test_cache import SPANS, pieces_of

FOLDED = SpanPlan((Block(64), Full(), Window(20, 2), Block(8, 2)))
"""Spans for rows of some hundred tokens."""


def packed(lengths: list[int], seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor]:
    """Documents, and the row that they make, with its position ids."""
    documents = [tokens(n, seed=1000 * seed + i) for i, n in enumerate(lengths)]
    return documents, torch.cat(documents, dim=1), torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.parametrize("mask", [None, "ones"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("plan", "lengths"),
    [(MIXED, [9, 1, 17, 5]), (MIXED, [3, 4, 2]), (FULL, [9, 1, 17, 5]), (FOLDED, [300, 1, 70, 29])],
    ids=str,
)
@pytest.mark.parametrize("family", FEW)
def test_packed_equals_apart(family: str, plan: SpanPlan, lengths: list[int], use_cache: bool, mask: Any) -> None:
    model = convert(tiny(family), plan, check=False)
    documents, ids, positions = packed(lengths)
    where = {} if mask is None else {"attention_mask": torch.ones_like(ids)}
    got = logits(model, ids, position_ids=positions, use_cache=use_cache, **where)
    close(got, torch.cat([logits(model, document, use_cache=False) for document in documents], dim=1))


@pytest.mark.parametrize("seed", range(30))
def test_random_packed_rows(seed: int) -> None:
    """Rows packed in different ways, padding on both sides, in one batch and in pieces."""
    r, model = random.Random(seed), tiny(num_hidden_layers=3)
    plan, length = SpanPlan(tuple(r.choice(SPANS) for _ in range(3))), r.choice([12, 40, 90])
    rows = []
    for row in range(3):
        left, lengths = r.choice([0, 0, r.randint(1, 5)]), []
        while left + sum(lengths) < length - 1 and r.random() < 0.8:
            lengths.append(r.randint(1, length - left - sum(lengths)))
        lengths = lengths or [length - left]
        rows.append((left, *packed(lengths, seed=10 * seed + row)))
    ids, mask, positions = (torch.zeros(3, length, dtype=torch.long) for _ in range(3))
    for row, (left, _, flat, position) in enumerate(rows):
        here = slice(left, left + flat.shape[1])
        ids[row, here], mask[row, here], positions[row, here] = flat[0], 1, position[0]
    with applied(convert(model, plan, check=False), plan):
        got = logits(model, ids, attention_mask=mask, position_ids=positions, use_cache=False)
        cache, parts, end = SpanCache(plan), [], 0
        for piece in pieces_of(r, length):
            here, end = slice(end, end + piece), end + piece
            where = {"attention_mask": mask[:, :end], "position_ids": positions[:, here]}
            parts.append(logits(model, ids[:, here], past_key_values=cache, **where))
        for row, (left, documents, flat, _) in enumerate(rows):
            expected = torch.cat([logits(model, document, use_cache=False)[0] for document in documents])
            here = slice(left, left + flat.shape[1])
            close(got[row, here], expected)
            close(torch.cat(parts, dim=1)[row, here], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [[5, 7], [9, 20], [130, 90]], ids=str)
@pytest.mark.parametrize("plan", [MIXED, FULL, FOLDED], ids=str)
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_neighbour_changes_no_bit(plan: SpanPlan, lengths: list[int], dtype: torch.dtype, use_cache: bool) -> None:
    model = convert(tiny(dtype=dtype), plan, check=False)
    _, ids, positions = packed(lengths)
    border = lengths[0]
    clean = logits(model, ids, position_ids=positions, use_cache=use_cache)
    for here, there in ((slice(0, border), slice(border, None)), (slice(border, None), slice(0, border))):
        changed = ids.clone()
        changed[:, here] = tokens(ids[:, here].shape[1], seed=77)
        got = logits(model, changed, position_ids=positions, use_cache=use_cache)
        assert torch.equal(got[:, there], clean[:, there])
        assert not torch.equal(got[:, here], clean[:, here])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [14, 40, 200])
@pytest.mark.parametrize("plan", [MIXED, FULL, FOLDED], ids=str)
def test_padding_changes_no_bit(plan: SpanPlan, length: int, dtype: torch.dtype) -> None:
    model, ids = convert(tiny(dtype=dtype), plan, check=False), tokens(length, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, -3:] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    changed = torch.where(mask == 1, ids, tokens(length, batch=2, seed=5))
    assert not torch.equal(changed, ids)
    for kwargs in ({"use_cache": False}, {"use_cache": True}):
        clean = logits(model, ids, attention_mask=mask, position_ids=positions, **kwargs)
        got = logits(model, changed, attention_mask=mask, position_ids=positions, **kwargs)
        assert torch.equal(got[mask == 1], clean[mask == 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_padding_holds_changes_no_bit_while_decoding(dtype: torch.dtype) -> None:
    model, ids = convert(tiny(dtype=dtype), MIXED), tokens(20, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions, results = (mask.cumsum(1) - 1).clamp(min=0), []
    for seed in (0, 5):
        changed = torch.where(mask == 1, ids, tokens(20, batch=2, seed=seed))
        cache, parts = SpanCache(MIXED), []
        for a, b in ((0, 17), (17, 18), (18, 19), (19, 20)):
            where = {"attention_mask": mask[:, :b], "position_ids": positions[:, a:b]}
            parts.append(logits(model, changed[:, a:b], past_key_values=cache, **where))
        results.append(torch.cat(parts, dim=1)[mask == 1])
    assert torch.equal(*results)


@pytest.mark.parametrize("plan", [MIXED, FULL], ids=str)
@pytest.mark.parametrize("seen", [4, 9, 25])
def test_gradients_stay_within_documents(plan: SpanPlan, seen: int) -> None:
    model = convert(tiny(), plan, check=False)
    _, ids, positions = packed([seen, 12])
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    out = model(inputs_embeds=inputs, position_ids=positions).logits[0]
    (grad,) = torch.autograd.grad(out[seen:].sum(), inputs, retain_graph=True)
    assert (grad[0, :seen] == 0).all()
    assert (grad[0, seen:].abs().sum(-1) != 0).all()
    (grad,) = torch.autograd.grad(out[:seen].sum(), inputs)
    assert (grad[0, seen:] == 0).all()


@pytest.mark.parametrize("lengths", [[9, 14], [30, 3], [4, 25]], ids=str)
@pytest.mark.parametrize("family", FEW)
def test_decoding_after_a_packed_prefill_goes_on_with_the_last_document(family: str, lengths: list[int]) -> None:
    model = convert(tiny(family), MIXED)
    documents, ids, positions = packed(lengths)
    more, cache = tokens(12, seed=3), SpanCache(MIXED)
    logits(model, ids, position_ids=positions, past_key_values=cache)
    got = []
    for a, b in ((0, 1), (1, 2), (2, 8), (8, 12)):
        place = torch.arange(lengths[-1] + a, lengths[-1] + b)[None]
        got.append(logits(model, more[:, a:b], position_ids=place, past_key_values=cache))
    whole = torch.cat([documents[-1], more], dim=1)
    close(torch.cat(got, dim=1), logits(model, whole, use_cache=False)[:, -12:])
    for layer, span in zip(cache.layers, MIXED, strict=True):
        assert layer.keys.shape[2] <= span.cache_length(lengths[-1] + 12) + span.sinks


def test_a_new_document_while_decoding() -> None:
    model, (one, two) = convert(tiny(), MIXED), (tokens(11), tokens(9, seed=1))
    cache = SpanCache(MIXED)
    logits(model, one, past_key_values=cache)
    parts = [
        logits(model, two[:, a:b], position_ids=torch.arange(a, b)[None], past_key_values=cache)
        for a, b in ((0, 1), (1, 2), (2, 9))
    ]
    close(torch.cat(parts, dim=1), logits(model, two, use_cache=False))


def test_positions_that_jump_are_refused() -> None:
    model: PreTrainedModel = convert(tiny(), MIXED)
    with pytest.raises(UnsupportedSpan, match="position_ids go from 3 to 9"):
        logits(model, tokens(6), position_ids=torch.tensor([[0, 1, 2, 3, 9, 10]]))


def test_decoding_without_positions_after_a_packed_prefill_is_refused_or_right() -> None:
    """transformers would count columns: token 10 of the row instead of token 4 of the document."""
    model = convert(tiny(), MIXED)
    documents, ids, positions = packed([6, 4])
    cache = SpanCache(MIXED)
    logits(model, ids, position_ids=positions, past_key_values=cache)
    more = tokens(1, seed=3)
    with pytest.raises(UnsupportedSpan, match="position"):
        logits(model, more, position_ids=torch.tensor([[10]]), past_key_values=cache)
    try:
        got = logits(model, more, past_key_values=cache)
    except UnsupportedSpan:
        return
    close(got, logits(model, torch.cat([documents[-1], more], dim=1))[:, -1:])


def test_holes_are_refused() -> None:
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[0, 4] = 0
    with pytest.raises(UnsupportedSpan, match="row 0 has padding between real tokens"):
        logits(convert(tiny(), MIXED), tokens(9), attention_mask=mask)
