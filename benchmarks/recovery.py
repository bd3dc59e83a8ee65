"""What a training brings back: loss and recall of a model before it, and of runs of one recipe after it.

    python -m benchmarks.recovery RECIPE NAME=RUN ... [--out docs/results/recovery.json]

Every RUN is the output folder of that recipe with another plan. Each plan is measured untrained (the recipe's model,
converted) and trained (the run's last checkpoint), on the recipe's held-out documents: nats per token of the first
sequences, and passkeys hidden in these documents, whose wording and keys are not those of the recall items that were
trained on. Exact match is that of greedy decoding; probability is that of the whole answer.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from masformer.data.generators import DEPTHS, Filler, make_items
from masformer.data.items import Item
from masformer.evaluation.loss import loss_by_position
from masformer.evaluation.scoring import score
from masformer.evaluation.statistics import wilson
from masformer.models.checkpoint import load
from masformer.models.convert import convert
from masformer.models.tokenizer import quiet
from masformer.training.prepare import DOCUMENTS, Prepared, prepare
from masformer.training.recipe import Recipe, read_recipe

ITEMS = 6 * len(DEPTHS)
SEQUENCES = 8


def held_out(prepared: Prepared) -> tuple[list[Tensor], list[Item]]:
    """Pieces of held-out documents `[tokens]`, and passkey items in held-out documents."""
    length = prepared.held_out[DOCUMENTS].lengths[0][1]
    pieces = []
    for index in range(SEQUENCES):
        ids = torch.from_numpy(prepared.held_out[DOCUMENTS].sequence(index).input_ids)
        starts = torch.from_numpy(prepared.held_out[DOCUMENTS].sequence(index).position_ids) == 0
        pieces += [piece for piece in torch.tensor_split(ids, starts.nonzero()[1:, 0]) if len(piece) > 1]
    aside = prepared.aside
    filler = Filler.of(
        prepared.tokenizer,
        [prepared.tokenizer.decode(aside.document(n), skip_special_tokens=True) for n in range(len(aside))],
    )
    items = make_items("passkey", prepared.tokenizer, length=length, count=ITEMS, filler=filler, seed=1)
    return pieces, items


def measure(model: Any, tokenizer: Any, pieces: list[Tensor], items: list[Item]) -> dict[str, Any]:
    loss = loss_by_position(model, pieces)
    scores = score(model, tokenizer, items)
    found = sum(s.score for s in scores)
    by_depth = {
        depth: {
            "found": sum(s.score for s in scores if s.depth == depth),
            "probability": mean([math.exp(s.log_probability) for s in scores if s.depth == depth]),
        }
        for depth in DEPTHS
    }
    return {
        "nats": loss.nats_per_token,
        "tokens": loss.tokens,
        "found": found,
        "items": len(scores),
        "interval": wilson(found, len(scores)),
        "probability": mean([math.exp(s.log_probability) for s in scores]),
        "log_probability": mean([s.log_probability for s in scores]),
        "depths": by_depth,
    }


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def curve(run: Path) -> list[dict[str, float]]:
    """Held-out losses by step, as the run wrote them."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "eval_documents_loss" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--out", type=Path, default=Path("docs/results/recovery.json"))
    given = parser.parse_args()
    quiet()
    results: dict[str, Any] = {}
    for name, _, folder in (run.partition("=") for run in given.runs):
        run = Path(folder)
        recipe = Recipe.model_validate_json((run / "recipe.json").read_text(encoding="utf-8"))
        prepared = prepare(recipe)
        if prepared.train.identity != prepare(read_recipe(given.recipe)).train.identity:
            parser.error(f"{run} was trained on other sequences than {given.recipe} says")
        pieces, items = held_out(prepared)
        before = convert(load(recipe.model, dtype=torch.float32), prepared.plan)
        after = load(str(run / f"checkpoint-{recipe.training.steps}"), dtype=torch.float32)
        results[name] = {"plan": str(prepared.plan), "steps": recipe.training.steps, "curve": curve(run)}
        for when, model in (("untrained", before), ("trained", after)):
            results[name][when] = found = measure(model, prepared.tokenizer, pieces, items)
            print(f"{name:10} {when:10} {found['nats']:.4f} nats, {found['found']:.0f} of {found['items']}", flush=True)
        given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
