"""The config that vLLM gets of a conversion; that vLLM serves it is tested in test_served.py."""

import json
import pickle

import pytest
from transformers import AutoModelForCausalLM

from masformer.errors import CorruptError, InputError
from masformer.models.config import MasformerConfig
from masformer.serving.vllm import ARCHITECTURES, PLAN, ServedConfig
from masformer.spans import SpanPlan

from ..models.helpers import config_of

SPANS = "block:128*3,full"


def written(family, **changes):
    """What config.json of a conversion holds."""
    return json.loads(MasformerConfig.of(config_of(family, **changes), SpanPlan.parse(SPANS)).to_json_string())


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_it_is_the_parents_under_an_architecture_that_knows_spans(family):
    parent = config_of(family)
    config = ServedConfig.from_dict(written(family))
    assert config.model_type == ("llama" if family == "ministral" else family)
    assert config.architectures == [ARCHITECTURES[family]]
    assert getattr(config, PLAN) == SPANS
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "head_dim",
        "rope_parameters",
        "vocab_size",
    ):
        assert getattr(config, name, None) == getattr(parent, name, None)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 24}),
        ("ministral", {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("qwen2", {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 0}),
        ("qwen3", {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 2}),
    ],
)
def test_windows_of_the_parent_are_gone_for_the_plan_has_them(family, changes):
    config = ServedConfig.from_dict(written(family, **changes))
    assert not getattr(config, "sliding_window", None)
    assert set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}


def test_keywords_reach_the_parents_config_as_transformers_would_have_it():
    config, unused = ServedConfig.from_dict(written("llama"), return_unused_kwargs=True, bos_token_id=7, other=1)
    assert config.bos_token_id == 7
    assert unused == {"other": 1}


def test_other_families_and_configs_are_refused():
    with pytest.raises(InputError, match="a converted gpt_neo cannot be served by vLLM, only llama, "):
        ServedConfig.from_dict(written("gpt_neo"))
    with pytest.raises(CorruptError, match="lacks its parent or its plan"):
        ServedConfig.from_dict({"model_type": "masformer"})


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_transformers_auto_classes_refuse_it_and_other_processes_find_it(family):
    config = ServedConfig.from_dict(written(family))
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForCausalLM.from_config(config)
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()


def test_positions_that_vllm_computes_otherwise_are_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(InputError, match=r"RoPE of type 'dynamic' cannot be served by vLLM, .*: use masformer.load"):
        ServedConfig.from_dict(written("llama", rope_parameters=rope))
