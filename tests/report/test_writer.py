"""The made runs have the format of those that `masformer eval` writes."""

import json

import torch
from transformers.utils import logging as transformers_logging

from masformer.cli import run
from tests.small import TEXT, small_llama, small_tokenizer

from .made import everything, facts, write_eval


def shape(folder):
    """The fields of the facts, of their parts, and of the records of every suite, each in its order."""
    facts = json.loads((folder / "run.json").read_text("utf-8"))
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text("utf-8").splitlines()]
    models = list(facts["models"].values())
    suites = [{line["suite"] for line in lines if line["model"] == label} for label in facts["models"]]
    records = {line["suite"]: list(line) for line in lines if line["suite"] != "lm-eval"}
    settings = [name for name in facts["settings"] if name != "summaries"]
    return list(facts), settings, [list(model) for model in models], records, [s - {"lm-eval"} for s in suites]


def test_a_made_run_looks_like_a_real_one(tmp_path):
    model, tokenizer, data = tmp_path / "model", small_tokenizer(), tmp_path / "data.jsonl"
    torch.manual_seed(0)
    for part in (small_llama(tokenizer, max_position_embeddings=512, initializer_range=0.3), tokenizer):
        part.save_pretrained(model)
    data.write_text(json.dumps({"id": "a", "text": TEXT * 40, "summary": "the fox"}) + "\n", "utf-8")
    what = ["--suite", "loss,recall,summary,fidelity", "--tasks", "passkey", "--lengths", "256", "--items", "1"]
    models = [f"parent={model}", f"chosen={model}"]
    verbosity = transformers_logging.get_verbosity()
    try:
        assert run(["eval", *models, "--data", str(data), *what, "--out", str(tmp_path / "real")]) == 0
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
    plans = dict.fromkeys(("parent", "chosen"), "full*24")
    made = write_eval(tmp_path / "made", everything(tuple(plans), documents=1), models=facts(plans)["models"])
    assert shape(made) == shape(tmp_path / "real")
