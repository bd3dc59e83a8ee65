"""The head as tensors and numbers against the logits that every family's own forward gives."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from masformer.errors import InputError
from masformer.models.convert import convert
from masformer.models.families import FAMILIES
from masformer.models.head import Head

from .helpers import MIXED, config_of, logits, tiny, tokens

UNSET = {"final_logit_softcapping": 3.0}
"""Fields that are no number by default, so that a family with them would go unseen."""
INSIDE = {"attn_logit_softcapping", "output_router_logits"}
"""Fields of that kind of name that touch no logits of tokens."""


def unusual(family):
    """Every number of the config that is not whole, and every field that may touch the logits, is nobody's default."""
    config = config_of(family)
    fields = config.to_dict()
    changes = {name: 0.7 * value + 0.01 for name, value in fields.items() if isinstance(value, float)}
    touching = {name for name in fields if "logit" in name or "lm_head" in name} - INSIDE
    return changes | {name: UNSET.get(name, 0.37) for name in touching}


def hidden_states(model, ids):
    with torch.no_grad():
        return model.base_model(input_ids=ids).last_hidden_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_model_to_the_bit(family, dtype):
    model, ids = tiny(family, dtype, **unusual(family)), tokens(20, batch=2)
    for _ in range(2):
        with torch.no_grad():
            got = Head.of(model)(hidden_states(model, ids))
        assert torch.equal(got, logits(model, ids))
        convert(model, MIXED)


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.logits])
def test_the_unusual_numbers_matter(family):
    model, ids = tiny(family, torch.float32, **unusual(family)), tokens(20)
    head = Head.of(model)
    with torch.no_grad():
        plain = Head(head.weight, head.bias)(hidden_states(model, ids))
    assert float((plain - logits(model, ids)).abs().max()) > 1e-2


def test_a_field_of_another_family_changes_nothing():
    model = tiny("llama")
    model.config.logit_scale = 0.5
    assert Head.of(model).scale == 1


def test_weights_are_the_models_own():
    model = tiny("phi", tie_word_embeddings=True)
    head = Head.of(model)
    assert head.weight is model.get_input_embeddings().weight
    assert head.bias is model.lm_head.bias


def test_what_wraps_the_head_is_refused():
    model = tiny("llama")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        lora = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(InputError, match=r"peft.*Linear.*merge or leave out"):
        Head.of(lora.get_base_model())
    merged = lora.merge_and_unload()
    assert Head.of(merged).weight is merged.lm_head.weight
    merged.lm_head.forward = lambda x: 2 * x  # as offloading does
    with pytest.raises(InputError, match="forward of its own"):
        Head.of(merged)


def test_no_head_is_refused():
    with pytest.raises(InputError, match="LlamaModel has no output embedding"):
        Head.of(tiny("llama").base_model)
