"""Choices of full layers tried on held-out data, over several selections that differ in their seed alone.

    python -m benchmarks.selection runs/select-0 runs/select-1 runs/select-2 [--out docs/results/selection.json]

Every folder is one of `masformer select`. Recall items and documents of all seeds are put together: what a plan keeps
is the share of the items the parent gets right that it gets right too, with a Wilson interval; losses are differences
to the parent on the same documents, with a bootstrap interval over documents.
"""

from __future__ import annotations

import argparse
import collections
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from masformer.evaluation.results import read_run
from masformer.evaluation.statistics import bootstrap, wilson
from masformer.selection.outcome import HELD_OUT, TRAINED, read

Found = dict[tuple[Any, ...], dict[str, Any]]
"""Records of one plan by what they were measured on."""


def records_of(folder: Path, seed: int) -> dict[str, Found]:
    """By label; what was measured on is told apart by the seed too."""
    by_label: dict[str, Found] = collections.defaultdict(dict)
    for record in read_run(folder / HELD_OUT)[1]:
        key = (seed, record["suite"], record["task"], record["length"], record["item"])
        by_label[record["model"]][key] = record
    return by_label


def compared(plan: Found, parent: Found) -> dict[str, Any]:
    """What a plan keeps of its parent, on the items of both."""
    keys = [key for key in parent if key in plan]
    losses = [key for key in keys if key[1] == "loss"]
    gains = [plan[key]["nats"] - parent[key]["nats"] for key in losses]
    tokens = [parent[key]["tokens"] for key in losses]
    return {
        "documents": len(losses),
        "nats_to_the_parent": sum(gains) / sum(tokens),
        "interval": bootstrap(gains, tokens),
        "recall": kept(plan, parent, [key for key in keys if key[1] == "recall"]),
        "by_task": {
            f"{task}, {length}": kept(plan, parent, [key for key in keys if key[2:4] == (task, length)])
            for task, length in dict.fromkeys(key[2:4] for key in keys if key[1] == "recall")
        },
    }


def kept(plan: Found, parent: Found, keys: Iterable[tuple[Any, ...]]) -> dict[str, Any]:
    listed = list(keys)
    known = [key for key in listed if parent[key]["score"] == 1]
    right = sum(plan[key]["score"] == 1 for key in known)
    return {
        "items": len(listed),
        "right": sum(plan[key]["score"] == 1 for key in listed),
        "parent_right": len(known),
        "kept": right,
        "kept_interval": wilson(right, len(known)) if known else None,
        "log_probability": sum(plan[key]["log_probability"] for key in listed) / len(listed) if listed else None,
    }


def compared_facts(folder: Path, outcome: dict[str, Any]) -> dict[str, Any]:
    """What must be the same: the model as the evaluation knows it, since the search's mark is the program's, too; what
    was measured on; the training.
    """
    facts = {name: value for name, value in outcome["facts"].items() if name not in ("seed", "probes", "checks")}
    run, records = read_run(folder / HELD_OUT)
    tried = sorted({(record["suite"], str(record["task"]), record["length"]) for record in records})
    return {
        **facts,
        "identity": run["models"]["parent"]["identity"],
        "tried": tried,
        "train_steps": outcome["train_steps"],
    }


def gathered(folders: list[Path]) -> dict[str, Any]:
    outcomes = [read(folder) for folder in folders]
    found = [records_of(folder, outcome["facts"]["seed"]) for folder, outcome in zip(folders, outcomes, strict=True)]
    same = [compared_facts(folder, outcome) for folder, outcome in zip(folders, outcomes, strict=True)]
    if any(facts != same[0] for facts in same) or len({outcome["facts"]["seed"] for outcome in outcomes}) < len(same):
        raise SystemExit(
            "the selections must be of the same model, spans, tasks, lengths and training, and of different seeds"
        )
    result: dict[str, Any] = {"facts": [outcome["facts"] for outcome in outcomes], "budgets": {}}
    suffixes = ["", f", {TRAINED}"] if all(f"parent, {TRAINED}" in each for each in found) else [""]
    for suffix in suffixes:
        for budget in outcomes[0]["budgets"]:
            methods = ["parent", "all local", *budget["plans"]]
            rows = {}
            for method in methods:
                labels = [label_of(outcome, budget["words"], method) for outcome in outcomes]
                if any(f"{label}{suffix}" not in each for each, label in zip(found, labels, strict=True)):
                    continue
                plan = merged(each[f"{label}{suffix}"] for each, label in zip(found, labels, strict=True))
                parent = merged(each[f"parent{suffix}"] for each in found)
                rows[method] = {"labels": labels, **compared(plan, parent)}
            result["budgets"][f"{budget['words']}{suffix}"] = rows
    return result


def label_of(outcome: dict[str, Any], words: str, method: str) -> str | None:
    """What a method chose for a budget; None where it was not asked."""
    if method in ("parent", "all local"):
        return method
    [budget] = [budget for budget in outcome["budgets"] if budget["words"] == words]
    row = budget["plans"].get(method)
    return None if row is None else row["label"]


def merged(parts: Iterable[Found]) -> Found:
    return {key: record for part in parts for key, record in part.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = gathered(args.runs)
    for words, rows in result["budgets"].items():
        print(f"\n{words}")
        for method, row in sorted(rows.items(), key=lambda item: -item[1]["recall"]["kept"]):
            recall, (low, high) = row["recall"], row["interval"] or (float("nan"),) * 2
            tasks = "  ".join(f"{task} {each['right']}/{each['items']}" for task, each in row["by_task"].items())
            print(
                f"{method:12} kept {recall['kept']}/{recall['parent_right']}  log p {recall['log_probability']:7.2f}  "
                f"nats {row['nats_to_the_parent']:+.3f} ({low:+.3f} to {high:+.3f})  {tasks}  {row['labels']}"
            )
    if args.out:
        args.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
