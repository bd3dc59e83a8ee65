"""Settings that a converted model would otherwise take and not follow, and those that it must follow."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoFlashAttention2, GPTNeoSelfAttention

from masformer.attention import UnsupportedSpan
from masformer.errors import InputError
from masformer.models import fronts
from masformer.models.cache import SpanCache
from masformer.models.convert import applied, convert, is_converted, restore
from masformer.models.positions import extend
from masformer.models.selfcheck import selfcheck
from masformer.models.spanned import fronts_of

from .helpers import MIXED, logits, state, tiny, tokens


def test_attention_in_both_directions() -> None:
    model = convert(tiny(), MIXED)
    with pytest.raises(UnsupportedSpan, match="is_causal"):
        model(tokens(8), is_causal=False)
    model.config.is_causal = False
    with pytest.raises(UnsupportedSpan, match="is_causal"):
        model(tokens(8))
    with pytest.raises(InputError, match="is_causal"):
        convert(tiny(is_causal=False), MIXED)


def test_packed_documents_told_apart_by_lengths_alone() -> None:
    model = convert(tiny(), MIXED)
    borders = torch.tensor([0, 5, 12], dtype=torch.int32)
    with pytest.raises(UnsupportedSpan, match="cu_seq_lens_q without position_ids"):
        model(tokens(12), cu_seq_lens_q=borders, cu_seq_lens_k=borders, use_cache=False)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = model(tokens(12), cu_seq_lens_q=borders, cu_seq_lens_k=borders, position_ids=positions, use_cache=False)
    assert torch.equal(packed.logits, model(tokens(12), position_ids=positions, use_cache=False).logits)


def test_more_is_not_taken_back_than_is_held() -> None:
    model = convert(tiny(), MIXED)
    cache = SpanCache(MIXED)
    cache.activate_past_recording()
    model(tokens(20), past_key_values=cache)
    with pytest.raises(UnsupportedSpan, match="only 20 are held"):
        cache.crop(-30)
    assert cache.get_seq_length() == 20


def test_training_keeps_no_cache_unless_it_is_asked_for() -> None:
    model = convert(tiny(), MIXED).train()
    assert model(tokens(12)).past_key_values is None
    assert isinstance(model(tokens(12), use_cache=True).past_key_values, SpanCache)
    assert isinstance(model.eval()(tokens(12)).past_key_values, SpanCache)


def test_a_forward_replaced_on_the_object() -> None:
    model = tiny()
    model.model.forward = model.model.forward
    with pytest.raises(InputError, match="convert the model first"):
        convert(model, MIXED)
    assert not is_converted(model)


def test_a_class_that_another_library_changed_on_top() -> None:
    model = convert(tiny(), MIXED)
    ours = type(model)
    model.__class__ = type("Sharded", (ours,), {})
    with pytest.raises(InputError, match="another library"):
        restore(model)
    expected = logits(model, tokens(9))
    model.__class__ = ours
    assert torch.equal(logits(model, tokens(9)), expected)
    restore(model)


def test_settings_given_at_load_reach_the_parent(tmp_path: Path) -> None:
    convert(tiny(), MIXED).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, output_hidden_states=True, attention_dropout=0.25)
    assert model.config.attention_dropout == 0.25
    assert len(model(tokens(6)).hidden_states) == 5
    assert AutoModelForCausalLM.from_pretrained(tmp_path, use_cache=False)(tokens(6)).past_key_values is None


def test_settings_saved_with_the_parent_are_kept(tmp_path: Path) -> None:
    model = convert(tiny(), MIXED)
    model.config.output_hidden_states = True
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.output_hidden_states is True
    assert len(loaded(tokens(6)).hidden_states) == 5


def test_layers_without_output_pass_the_selfcheck() -> None:
    """Depth up-scaling adds layers whose output projection is zero."""
    model = tiny()
    nn.init.zeros_(model.model.layers[1].self_attn.o_proj.weight)
    selfcheck(convert(model, MIXED, check=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_that_drifts_passes_the_selfcheck(dtype: torch.dtype) -> None:
    """Large weights let rounding grow over the layers, as in pretrained models, until logits say nothing."""
    model = tiny(dtype=dtype, initializer_range=1.0, num_hidden_layers=16)
    plan = type(MIXED)(MIXED.spans * 4)
    selfcheck(convert(model, plan, check=False))


def test_a_forward_beyond_the_positions_leaves_the_cache_as_it_was() -> None:
    model, ids = convert(tiny(max_position_embeddings=64), MIXED), tokens(40)
    cache = SpanCache(MIXED)
    logits(model, ids[:, :20], past_key_values=cache)
    with pytest.raises(InputError, match="80 tokens are more than the model's 64 positions"):
        logits(model, tokens(60), past_key_values=cache)
    got = logits(model, ids[:, 20:], past_key_values=cache)
    torch.testing.assert_close(got, logits(model, ids)[:, 20:], rtol=0, atol=1e-10)


def test_applied_does_not_hide_an_error_of_its_body() -> None:
    model = tiny()

    def body() -> None:
        with applied(model, MIXED):
            restore(model)
            raise KeyError("own")

    with pytest.raises(KeyError, match="own"):
        body()
    assert not is_converted(model)


@pytest.mark.parametrize("family", ["llama", "gpt_neo"])
def test_positions_of_an_earlier_document_of_a_packed_row(family: str) -> None:
    model = convert(tiny(family, max_position_embeddings=64), MIXED)
    positions = torch.cat([torch.arange(58, 68), torch.arange(10)])[None]
    with pytest.raises(InputError, match="68 tokens are more than the model's 64 positions"):
        logits(model, tokens(20), position_ids=positions)
    logits(model, tokens(20), position_ids=torch.cat([torch.arange(54, 64), torch.arange(10)])[None])


@pytest.mark.parametrize("start", [-5, -1])
def test_negative_positions(start: int) -> None:
    model = convert(tiny(), MIXED)
    one = torch.arange(start, start + 10)[None]
    with pytest.raises(UnsupportedSpan, match=f"begin at {start}"):
        logits(model, tokens(10), position_ids=one)
    with pytest.raises(UnsupportedSpan, match=f"begin at {start}"):
        logits(model, tokens(20), position_ids=torch.cat([one, torch.arange(10)[None]], dim=1))


def test_a_gpt_neo_that_was_restored_inside_inference_mode_can_be_trained() -> None:
    model, ids = tiny("gpt_neo"), tokens(20)
    with torch.inference_mode(), applied(model, MIXED):
        model(ids)
    with torch.inference_mode():
        extend(model, 2048, "tile")
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize(
    ("family", "part"), [("llama", 0), ("llama", 1), ("gpt_neo", 0), ("gpt_neo", 2), ("gpt_neo", 5)]
)
def test_a_conversion_that_stops_half_way_is_taken_back(
    family: str, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stops it, after however many classes are in front."""
    model, ids = tiny(family), tokens(20)
    before, expected = state(model), logits(model, ids)
    left = part

    def stopping(*args: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        fronts.enter(*args)

    monkeypatch.setattr(importlib.import_module("masformer.models.convert"), "enter", stopping)
    assert part < len(fronts_of(model))
    with pytest.raises(KeyboardInterrupt):
        convert(model, MIXED)
    assert state(model) == before
    assert torch.equal(logits(model, ids), expected)


def test_a_gpt_neo_with_flash_attention_is_refused() -> None:
    model = tiny("gpt_neo")
    before = state(model)
    model.transformer.h[1].attn.attention.__class__ = GPTNeoFlashAttention2
    with pytest.raises(InputError, match="load it with 'eager'"):
        convert(model, MIXED)
    model.transformer.h[1].attn.attention.__class__ = GPTNeoSelfAttention
    assert state(model) == before
