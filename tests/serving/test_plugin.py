"""vLLM serves random conversions of every family of the plugin as they are: its log-probabilities are ours."""

import os
from pathlib import Path

import pytest
import torch

from masformer.errors import InputError
from masformer.models import stock
from masformer.models.convert import convert
from masformer.models.proof import prove_in_vllm, questions
from masformer.spans import SpanPlan

from ..models.helpers import tiny

VLLM = os.environ.get("MASFORMER_VLLM", str(Path(__file__).parents[2] / ".venv-vllm/bin/python"))
MIXED = "block:128,full,block:128:lookback=1,window:40"

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


def saved(folder, family, plan, **changes):
    """A conversion on disk whose heads vLLM's CPU kernel knows."""
    model = tiny(family, torch.float32, head_dim=64, max_position_embeddings=2048, **changes)
    convert(model, SpanPlan.parse(plan), check=False).save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("family", "plan", "changes"),
    [
        ("llama", MIXED, {}),
        ("llama", "window:24,full,window:40,window:24", {}),
        ("mistral", MIXED, {"sliding_window": 24}),
        ("ministral", MIXED, {}),
        ("qwen2", MIXED, {"hidden_size": 256}),  # vLLM divides the width by the heads, whatever head_dim says
        ("qwen3", MIXED, {}),
    ],
)
def test_log_probabilities_are_those_of_the_conversion(family, plan, changes, tmp_path):
    model = saved(tmp_path, family, plan, **changes)
    asked = questions(model.config, 128 if plan == MIXED else 40)
    proof = prove_in_vllm(tmp_path, asked, stock.answers(model, asked["prompts"]), VLLM)
    assert proof.error < (proof.tolerance if changes.get("hidden_size") else 5e-5)  # a wide random model rounds more
    assert proof.same == proof.generated


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("window:24:sinks=4,full*3", "window:24:sinks=4 cannot be served by vLLM: none of its attention back ends"),
        ("block:100,full*3", "its blocks do not begin where pages of 128 tokens do"),
    ],
)
def test_what_it_cannot_compute_is_refused(plan, words, tmp_path):
    model = saved(tmp_path, "llama", plan)
    with pytest.raises(InputError, match=words):
        prove_in_vllm(tmp_path, questions(model.config, 24), {}, VLLM)


def test_the_classes_of_transformers_which_know_no_plan_are_refused(tmp_path):
    model = saved(tmp_path, "llama", MIXED)
    with pytest.raises(InputError, match="vLLM cannot load the export"):
        prove_in_vllm(tmp_path, questions(model.config, 24), {}, VLLM, classes="transformers")
