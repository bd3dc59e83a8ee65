"""What a model answers to some prompts, in words that need nothing but torch and transformers.

    answers(model, prompts)                                  of a live model
    python -P stock.py FOLDER QUESTIONS ANSWERS DEVICE       of a folder, in a process without this package

The file runs as a script of its own to prove an export: it imports nothing of the package it lies in.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

NEW = 16
"""Tokens that are generated after each prompt."""
MOST = 512
"""Positions of a prompt whose logits are compared, at most."""


def positions(length: int) -> Tensor:
    """The positions of a prompt that are compared, ascending, the last one always: `[min(length, MOST)]`."""
    return torch.linspace(0, length - 1, min(length, MOST)).round().long()


@torch.no_grad()
def answers(model: Any, prompts: list[list[int]]) -> dict[str, Tensor]:
    """For every prompt, by its number: `logits.N` at `positions`, `tokens.N` that follow greedily, with a cache, and
    `steps.N`, the logits these were taken from, all on the CPU.
    """
    model.generation_config = GenerationConfig()  # what a model brings along may sample, or change its logits
    found = {}
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt], device=model.device)
        keep = positions(len(prompt)).to(model.device)
        found[f"logits.{number}"] = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0]
        grown = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True
            ),
        )
        found[f"tokens.{number}"] = grown.sequences[0, len(prompt) :]
        found[f"steps.{number}"] = torch.cat(grown.logits)
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def encoded(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The tokens of some texts."""
    return [list(tokenizer(text)["input_ids"]) for text in texts]


def main(folder: str, questions: str, written: str, device: str) -> None:
    """Load `folder` as anybody would, in float32, and write its answers, with what kind of model it is."""
    with open(questions, encoding="utf-8") as file:
        asked = json.load(file)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    about = {"class": type(model).__name__, "attention": model.config._attn_implementation}
    if asked["texts"]:
        about["texts"] = json.dumps(encoded(AutoTokenizer.from_pretrained(folder), asked["texts"]))
    save_file(answers(model, asked["prompts"]), written, metadata=about)
    if "masformer" in sys.modules:
        raise SystemExit("masformer was imported: this proves nothing")


if __name__ == "__main__":
    main(*sys.argv[1:])
