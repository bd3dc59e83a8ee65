"""Loss by position against a plain loop over transformers' own logits, and the buckets against a hand count."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from masformer.errors import InputError
from masformer.evaluation.loss import default_edges, loss_by_position, token_losses
from masformer.models.convert import applied
from masformer.models.head import Head
from masformer.spans import SpanPlan

from ..models.helpers import tiny, tokens

VOCABULARY, POSITIONS = 61, 40


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.5,  # so that losses differ much from token to token
    )
    return LlamaForCausalLM(config).eval()


def document(tokens, seed=0):
    return torch.randint(0, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed))


def plain_losses(model, ids):
    with torch.no_grad():
        log_p = model(ids[None]).logits[0].log_softmax(-1)
    return [-float(log_p[t - 1, ids[t]]) for t in range(1, len(ids))]


@pytest.mark.parametrize("chunk", [1, 7, 39, 512])
def test_token_losses_are_those_of_a_plain_loop(model, chunk):
    ids = torch.stack([document(40, 1), document(40, 2)])
    expected = torch.tensor([plain_losses(model, row) for row in ids])
    torch.testing.assert_close(token_losses(model, ids, chunk=chunk), expected, atol=1e-6, rtol=1e-6)


def test_token_losses_are_those_of_a_converted_model(model):
    ids = document(40)
    with applied(model, SpanPlan.parse("window:3,block:4")):
        expected, got = plain_losses(model, ids), token_losses(model, ids[None])[0]
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-6, rtol=1e-6)
    assert float((got - torch.tensor(plain_losses(model, ids))).abs().max()) > 1e-2  # the spans made a difference


def test_no_more_logits_than_a_chunk_exist_at_once(model, monkeypatch):
    sizes, call = [], Head.__call__
    monkeypatch.setattr(Head, "__call__", lambda head, hidden: sizes.append(hidden.shape[1]) or call(head, hidden))
    token_losses(model, document(40)[None], chunk=16)
    assert sizes == [16, 16, 7]


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [("gemma2", "final_logit_softcapping", 3.0), ("granite", "logits_scaling", 3.0), ("cohere", "logit_scale", 0.3)],
)
def test_what_a_family_does_to_its_logits_is_in_the_losses(family, field, value):
    ids = tokens(20)
    losses = {}
    for number in (value, 1.0):
        other = tiny(family, torch.float32, **{field: number})
        losses[number] = token_losses(other, ids)[0]
        torch.testing.assert_close(losses[number], torch.tensor(plain_losses(other, ids[0])), atol=1e-5, rtol=1e-5)
    assert float((losses[value] - losses[1.0]).abs().max()) > 1e-2  # the field made a difference


def test_buckets_are_those_of_a_hand_count(model):
    documents = [document(11, 1), document(6, 2)]
    long, short = (plain_losses(model, ids) for ids in documents)
    result = loss_by_position(model, documents, edges=[1, 2, 4, 8, 20, 30])
    # The token at position p has the loss with index p - 1; positions 1, 2-3, 4-7, 8-19, 20-29.
    expected = [long[0] + short[0], sum(long[1:3] + short[1:3]), sum(long[3:7] + short[3:5]), sum(long[7:10]), 0]
    assert [bucket.tokens for bucket in result.buckets] == [2, 4, 6, 3, 0]
    assert [bucket.nats for bucket in result.buckets] == pytest.approx(expected, abs=1e-5)
    assert result.buckets[-1].nats_per_token is None
    assert result.tokens == 15
    assert result.nats_per_token == pytest.approx(sum(long + short) / 15, abs=1e-6)
    assert result.perplexity == pytest.approx(math.exp(sum(long + short) / 15), rel=1e-5)


def test_default_buckets_hold_every_predicted_token(model):
    assert default_edges(2) == [1, 2]
    assert default_edges(9) == [1, 2, 4, 8, 9]
    assert default_edges(16) == [1, 2, 4, 8, 16]
    result = loss_by_position(model, [document(n, n) for n in (2, 17, 40)])
    assert sum(bucket.tokens for bucket in result.buckets) == result.tokens == 1 + 16 + 39
    assert sum(bucket.nats for bucket in result.buckets) == pytest.approx(result.nats)


def test_bytes_and_json(model):
    documents = [document(5, 1), document(9, 2)]
    result = loss_by_position(model, documents, sizes=[20, 41])
    facts = result.to_json()
    assert facts["bytes"] == 61
    assert facts["bits_per_byte"] == pytest.approx(facts["nats"] / 61 / math.log(2))
    assert [bucket["low"] for bucket in facts["buckets"]] == [1, 2, 4, 8]
    assert facts["buckets"][-1]["high"] == 9
    assert loss_by_position(model, documents).to_json()["bits_per_byte"] is None


def test_progress_and_mode(model):
    done = []
    model.train()
    try:
        first = loss_by_position(model, [document(5), document(9)], progress=done.append)
        assert model.training
        assert model.model.layers[0].training
    finally:
        model.eval()
    assert done == [5, 9]
    assert first == loss_by_position(model, [document(5), document(9)])


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        ([], "no documents"),
        ([document(5), document(1)], "document 1 has 1 tokens"),
        ([document(0)], "document 0 has 0 tokens"),
        ([document(POSITIONS + 1)], f"{POSITIONS + 1} tokens are more than the model's {POSITIONS} positions"),
        ([document(6).reshape(2, 3)], r"document 0 has shape \[2, 3\]"),
    ],
)
def test_bad_documents_are_refused(model, documents, words):
    with pytest.raises(InputError, match=words):
        loss_by_position(model, documents)


@pytest.mark.parametrize("edges", [[1], [0, 4], [1, 4, 4], [4, 2]])
def test_bad_edges_are_refused(model, edges):
    with pytest.raises(InputError, match="edges of position buckets"):
        loss_by_position(model, [document(5)], edges=edges)


def test_a_loss_that_is_no_number_is_refused(model):
    weight = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight[0] = math.nan
    try:
        with pytest.raises(InputError, match="loss of document 0"):
            loss_by_position(model, [document(5)])
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(weight)
