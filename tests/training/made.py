"""A tiny model, its documents and recipes for them."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from masformer.training.recipe import Recipe
from tests.models.helpers import tiny
from tests.small import small_tokenizer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs", "away"]
MIXED = "full,window:16:sinks=2*2,block:32"


def make(folder: Path) -> Path:
    """`folder` with a model of 4 layers and documents of 20 to 300 words."""
    tokenizer = small_tokenizer()
    model: PreTrainedModel = tiny("llama", torch.float32, vocab_size=len(tokenizer), max_position_embeddings=1024)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    drawn = random.Random(0)
    texts = [" ".join(drawn.choices(WORDS, k=drawn.randint(20, 300))) for _ in range(60)]
    lines = [json.dumps({"id": str(number), "text": text}) for number, text in enumerate(texts)]
    (folder / "documents.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def recipe(folder: Path, output: Path | str, *, data: Any = None, training: Any = None, **parts: Any) -> Recipe:
    """Ten steps of four sequences of 64 tokens; nothing is saved before the end unless `parts` say so."""
    values = {
        "model": str(folder / "model"),
        "output": str(output),
        "plan": MIXED,
        "data": {
            "documents": str(folder / "documents.jsonl"),
            "held_out": 0.1,
            "lengths": 64,
            "cache": str(folder / "corpora"),
            **(data or {}),
        },
        "training": {"steps": 10, "batch": 4, "learning_rate": 1e-3, "warmup_steps": 2, **(training or {})},
        "evaluation": {"every": 4, "sequences": 3},
        "saving": {"every": 1000},
        **parts,
    }
    return Recipe.model_validate(values)
