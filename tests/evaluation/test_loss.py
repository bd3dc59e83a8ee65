"""Loss by position against a plain loop over transformers' own logits, and the buckets against a hand count."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from masformer.data.fetch import smollm2
from masformer.errors import InputError
from masformer.evaluation import loss as loss_module
from masformer.evaluation.loss import (
    bucketed,
    default_edges,
    loss_by_position,
    repeat_distances,
    sliding_losses,
    token_losses,
)
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


def test_losses_over_a_large_vocabulary_are_exact():
    """With the vocabulary as the middle one of three axes they are 4e-5 too low at this size, now 5e-7."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    large = LlamaForCausalLM(LlamaConfig(vocab_size=50_000, initializer_range=0.5, **sizes)).eval()
    ids = torch.randint(0, 50_000, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = large(ids).logits.double()
    exact = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, 39)
    assert abs(float((token_losses(large, ids).double() - exact).mean())) < 1e-5


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


def plain_sliding(model, ids, length, stride):
    """The loop of transformers' documentation, with full logits and its own count of what is new in a window."""
    losses, done = {}, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        begin = max(end - length, 0)
        with torch.no_grad():
            logits = model(ids[None, begin:end]).logits[0]
        for t in range(max(begin + 1, done), end):
            losses[t] = float(F.cross_entropy(logits[t - 1 - begin], ids[t]))
        done = end
        if end == len(ids):
            break
    assert sorted(losses) == list(range(1, len(ids)))
    return torch.tensor([losses[t] for t in range(1, len(ids))])


@pytest.mark.parametrize("stride", [1, 3, 8, 15])
@pytest.mark.parametrize("tokens", [2, 15, 16, 17, 18, 40, 61, 100])
def test_sliding_losses_are_those_of_a_plain_loop(model, tokens, stride):
    ids = document(tokens)
    got, expected = sliding_losses(model, ids, length=16, stride=stride, chunk=5), plain_sliding(model, ids, 16, stride)
    assert got.shape == (tokens - 1,)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-6)
    assert abs(float(got.double().mean() - expected.double().mean())) < 1e-6


def test_a_document_within_the_length_runs_whole(model):
    ids = document(40)
    assert torch.equal(sliding_losses(model, ids, length=40, stride=7), token_losses(model, ids[None])[0])


def test_windows_are_full_overlap_as_asked_and_predict_each_token_once(model, monkeypatch):
    seen, ids = [], torch.arange(23) % VOCABULARY

    def noted(model, ids, *, chunk, first):
        seen.append((ids[0].tolist(), first))
        return token_losses(model, ids, chunk=chunk, first=first)

    monkeypatch.setattr(loss_module, "token_losses", noted)
    sliding_losses(model, ids, length=10, stride=4)
    assert [(window[0], window[-1], first) for window, first in seen] == [
        (0, 9, 1), (4, 13, 6), (8, 17, 6), (12, 21, 6), (13, 22, 9)
    ]  # fmt: skip


def test_sliding_losses_leave_the_mode_and_use_the_evaluation_mode(model):
    dropping = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "attention_dropout": 0.5})).train()
    ids = document(30)
    once, again = (sliding_losses(dropping, ids, length=10, stride=4) for _ in range(2))
    assert torch.equal(once, again)
    assert dropping.training


@pytest.mark.parametrize(
    ("ids", "length", "stride", "words"),
    [
        (document(50), 16, 0, r"must be 1 to 15, got 0"),
        (document(50), 16, 16, r"must be 1 to 15, got 16"),
        (document(5), POSITIONS + 1, 8, f"{POSITIONS + 1} tokens are more than the model's {POSITIONS} positions"),
        (document(1), 16, 8, "the document has 1 tokens"),
        (document(6).reshape(2, 3), 16, 8, r"the document has shape \[2, 3\]"),
    ],
)
def test_what_no_window_can_do_is_refused(model, ids, length, stride, words):
    with pytest.raises(InputError, match=words):
        sliding_losses(model, ids, length=length, stride=stride)


def test_a_sliding_loss_that_is_no_number_is_refused(model):
    broken = LlamaForCausalLM(model.config)
    with torch.no_grad():
        broken.lm_head.weight[0] = math.nan
    with pytest.raises(InputError, match="loss of the document is not a finite"):
        sliding_losses(broken, document(50), length=16, stride=8)


@pytest.mark.slow
@pytest.mark.parametrize("stride", [64, 200])
def test_sliding_losses_of_a_real_model_are_those_of_transformers(stride):
    folder = smollm2(Path(__file__).parents[2] / "models" / "smollm2-135m-instruct")  # fetched if it is not there
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = " ".join(f"The {n}th visitor of the old library asked for {n * n} books." for n in range(40))
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
    assert len(ids) > 600
    got, expected = sliding_losses(model, ids, length=256, stride=stride), plain_sliding(model, ids, 256, stride)
    assert abs(float(got.double().mean() - expected.double().mean())) < 1e-6
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("ids", "n", "distances"),
    [
        ([7, 8, 9, 7, 8, 9], 3, [0, 0, 0, 0, 3]),
        ([5, 5, 5, 5, 5], 3, [0, 0, 1, 1]),
        ([1, 2, 3, 4, 1, 2, 9, 1, 2], 2, [0, 0, 0, 0, 4, 0, 0, 3]),  # the last of several
        ([4, 6, 4, 4], 1, [0, 2, 1]),
        ([1, 2], 3, [0]),
    ],
)
def test_repeat_distances_by_hand(ids, n, distances):
    assert repeat_distances(torch.tensor(ids), n).tolist() == distances


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_repeat_distances_are_those_of_brute_force(n):
    ids = torch.randint(0, 4, (150,), generator=torch.Generator().manual_seed(n)).tolist()

    def slow(t):
        places = (s for s in range(t - 1, n - 2, -1) if ids[s - n + 1 : s + 1] == ids[t - n + 1 : t + 1])
        return t - next(places, t) if t >= n - 1 else 0

    got = repeat_distances(torch.tensor(ids), n)
    assert got.dtype == torch.int64
    assert got.tolist() == [slow(t) for t in range(1, 150)]
    assert 0 < int((got == 0).sum()) < 149


def test_runs_of_no_token_are_refused():
    with pytest.raises(InputError, match="got 0"):
        repeat_distances(document(5), 0)


def test_rows_by_place_are_those_of_a_hand_count():
    values, places = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), torch.tensor([0, 1, 2, 3, 9, 10])
    assert bucketed(values, places, [1, 3, 4, 10]) == [(1, 3, 2, 6.0), (3, 4, 1, 8.0), (4, 10, 1, 16.0)]
    assert bucketed(values, places, [0, 1, 100]) == [(0, 1, 1, 1.0), (1, 100, 5, 62.0)]
    assert bucketed(values > 3, places, [20, 30]) == [(20, 30, 0, 0.0)]
    assert bucketed(values > 3, places, [0, 30]) == [(0, 30, 6, 4.0)]


def test_rows_are_summed_in_float64():
    ((*_, total),) = bucketed(torch.full((100_000,), 0.1), torch.ones(100_000, dtype=torch.int64), [1, 2])
    assert total == pytest.approx(100_000 * float(torch.tensor(0.1)), rel=1e-12)


@pytest.mark.parametrize("edges", [[], [1], [-1, 3], [2, 2]])
def test_rows_without_increasing_edges_are_refused(edges):
    with pytest.raises(InputError, match="edges"):
        bucketed(torch.ones(3), torch.arange(3), edges)
