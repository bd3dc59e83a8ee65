"""KL and agreement against whole logits in float64."""

import math

import pytest
import torch

from masformer.errors import InputError
from masformer.evaluation.fidelity import fidelity
from masformer.models.convert import applied
from masformer.models.head import Head
from masformer.spans import SpanPlan

from ..models.helpers import logits, tiny, tokens


@pytest.fixture(scope="module")
def parent():
    return tiny(dtype=torch.float32)


def plain(model, parent, ids):
    ours, theirs = (logits(each, ids[None])[0, :-1].double() for each in (model, parent))
    p = theirs.softmax(-1)
    kl = (p * (p.log() - ours.softmax(-1).log())).sum(-1)
    return kl.float(), ours.argmax(-1) == theirs.argmax(-1)


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_numbers_are_those_of_whole_logits(parent, chunk):
    model, ids = tiny(dtype=torch.float32, seed=1), tokens(30)[0]
    kl, agree = fidelity(model, parent, ids, chunk=chunk)
    expected, agreed = plain(model, parent, ids)
    assert kl.shape == agree.shape == (29,)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl, expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(agree, agreed)
    other, _ = fidelity(parent, model, ids)
    assert float((kl - other).abs().max()) > 1e-2, "the direction makes a difference"


def test_a_model_agrees_with_itself(parent):
    for model in (parent, tiny(dtype=torch.float32)):
        kl, agree = fidelity(model, parent, tokens(30)[0])
        assert float(kl.abs().max()) == 0
        assert bool(agree.all())


def test_shorter_spans_cost_fidelity_where_they_end(parent):
    ids = tokens(30)[0]
    model = tiny(dtype=torch.float32)
    with applied(model, SpanPlan.parse("window:8*4")):
        kl, agree = fidelity(model, parent, ids, chunk=4)
        expected, agreed = plain(model, parent, ids)
    torch.testing.assert_close(kl, expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(agree, agreed)
    assert float(kl[:8].max()) < 2e-6 < 1e-3 < float(kl[8:].max())
    assert float(kl.min()) >= 0


def test_heads_with_a_softcap_are_heeded():
    model, parent = (tiny("gemma2", torch.float32, final_logit_softcapping=cap) for cap in (3.0, 30.0))
    ids = tokens(12)[0]
    torch.testing.assert_close(fidelity(model, parent, ids)[0], plain(model, parent, ids)[0], atol=2e-6, rtol=1e-5)


def test_no_more_logits_than_a_chunk_exist_at_once(parent, monkeypatch):
    sizes, call = [], Head.__call__
    monkeypatch.setattr(Head, "__call__", lambda head, hidden: sizes.append(len(hidden)) or call(head, hidden))
    fidelity(parent, parent, tokens(40)[0], chunk=16)
    assert sizes == [16, 16, 16, 16, 7, 7]


def test_the_mode_of_both_is_kept(parent):
    model = tiny(dtype=torch.float32, attention_dropout=0.5).train()
    kl, _ = fidelity(model, parent, tokens(30)[0])
    assert float(kl.max()) == 0
    assert model.training
    assert not parent.training


def test_what_cannot_be_compared_is_refused(parent):
    ids = tokens(30)[0]
    with pytest.raises(InputError, match="vocabulary of 50 and the parent of 64"):
        fidelity(tiny(dtype=torch.float32, vocab_size=50), parent, ids % 50)
    with pytest.raises(InputError, match="30 tokens are more than the model's 20"):
        fidelity(parent, tiny(dtype=torch.float32, max_position_embeddings=20), ids)
    with pytest.raises(InputError, match="the document has 1 tokens"):
        fidelity(parent, parent, ids[:1])
    with pytest.raises(InputError, match="the document has shape"):
        fidelity(parent, parent, ids[None])


def test_a_divergence_that_is_no_number_is_refused(parent):
    broken = tiny(dtype=torch.float32)
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    for models in ((broken, parent), (parent, broken)):
        with pytest.raises(InputError, match="not a finite number"):
            fidelity(*models, tokens(30)[0])
