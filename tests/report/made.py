"""Run folders with made numbers, as `masformer eval` and `masformer train` write them."""

import itertools
import json
import random

from masformer.spans import GPT_NEO_1_3B, SpanPlan, cost

LENGTHS = (1024, 4096)
PLANS = {
    "parent": "full*24",
    "chosen": "full*2,window:252:sinks=4*10,full*2,window:252:sinks=4*10",
    "all local": "window:252:sinks=4*24",
}
WORSE = {"parent": 0.0, "chosen": 0.05, "all local": 0.4}
EDGES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]


def facts(plans=PLANS, lengths=LENGTHS, **changes):
    models = {}
    for label, text in plans.items():
        plan = SpanPlan.parse(text)
        costs = {str(length): cost(GPT_NEO_1_3B, plan, length).to_json() for length in lengths}
        models[label] = {
            "model": f"models/{label}",
            "plan": text,
            "layers": len(plan),
            "identity": label,
            "cost": costs,
        }
    return {
        "format": 1,
        "commands": ["masformer eval models/parent models/chosen --data speeches.jsonl --out runs/eval"],
        "versions": {"masformer": "0.1.0", "torch": "2.10.0", "transformers": "5.23.0", "python": "3.11.9"},
        "device": "cpu",
        "dtype": "float32",
        "settings": {"data": "speeches.jsonl", "data_digest": "d", "seed": 0, "lengths": list(lengths)},
        "models": models,
    } | changes


def loss(model, item, nats, tokens=100, length=4096, **more):
    """A record of the suite `loss`; `nats` is the sum."""
    place = {"model": model, "suite": "loss", "length": length, "item": item, "document": f"document {item}"}
    return {**place, "tokens": tokens, "bytes": 4 * tokens, "nats": nats, "buckets": [], "repeats": [], **more}


def recall(model, item, score, task="passkey", length=1024, depth=0.5, **more):
    place = {"model": model, "suite": "recall", "task": task, "length": length, "item": item, "depth": depth}
    return {
        **place,
        "score": score,
        "log_probability": -1.5 * (2 - score),
        "rank": 3.0 - 2 * score,
        "text": None,
        **more,
    }


def write_eval(folder, records, **changes):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(facts(**changes)), "utf-8")
    (folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return folder


def write_train(folder, steps=6, every=3, start=3.0, recipe=None):
    folder.mkdir(parents=True)
    lines = []
    for step in range(steps + 1):
        if step:
            nats = start - 0.1 * step
            lines.append(
                {"step": step, "loss": nats, "nats": nats, "tokens": 2048.0, "tokens_per_second": 100.0 + step}
            )
        if step % every == 0:
            lines.append({"step": step, "eval_documents_loss": start - 0.05 * step, "eval_recall_loss": 1 / (step + 1)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    plan = {"layout": "masformer", "full": [7, 18], "placement": None, "local": "window:252:sinks=4"}
    (folder / "recipe.json").write_text(json.dumps(recipe or {"model": "models/parent", "plan": plan}), "utf-8")
    return folder


def everything(models=tuple(PLANS), documents=6, seed=0):
    """Records of every suite, with noise, for a page that shows all it can."""
    records = []
    for model in models:
        rng = random.Random(seed)
        worse = WORSE.get(model, 0.2)
        for item in range(documents):
            records.append(_document(model, item, worse, rng.uniform(-0.3, 0.3), rng.uniform(0.8, 1.2)))
            records.append(_fidelity(model, item, worse * rng.uniform(0.8, 1.2)))
            records += [_summary(model, item, length, worse, rng.uniform(0, 0.1)) for length in LENGTHS]
        records += _recalls(model, worse, rng)
        metrics = [{"metric": "acc", "value": 0.5 - worse / 5, "stderr": 0.01}]
        place = {"model": model, "suite": "lm-eval", "task": "piqa", "length": 0, "item": 0}
        records.append({**place, "of": 1838, "metrics": metrics})
    return records


def _document(model, item, worse, level, noise):
    buckets, repeats = [], [[0, 0, 2000, 2000 * (3.5 + level)]]
    for low, high in itertools.pairwise(EDGES):
        n, extra = high - low, worse * noise if low >= 256 else 0.0
        buckets.append([low, high, n, n * (4.0 - 0.15 * low.bit_length() + level + extra)])
        repeats.append([low, high, n // 2, (n // 2) * (0.8 + level + 2 * extra)])
    nats, tokens = sum(b[3] for b in buckets), sum(b[2] for b in buckets)
    return loss(model, item, nats, tokens, buckets=buckets, repeats=repeats)


def _fidelity(model, item, kl):
    buckets = [[a, b, b - a, (b - a) * kl * (a >= 256), (b - a) * (1 - kl / 2)] for a, b in itertools.pairwise(EDGES)]
    place = {"model": model, "suite": "fidelity", "length": 4096, "item": item, "document": f"document {item}"}
    tokens, nats, agree = (sum(bucket[column] for bucket in buckets) for column in (2, 3, 4))
    return {**place, "tokens": tokens, "kl": nats, "agree": agree, "buckets": buckets}


def _summary(model, item, length, worse, noise):
    place = {"model": model, "suite": "summary", "length": length, "item": item, "document": f"report {item}"}
    scores = {name: top - worse / 4 + noise for name, top in (("rouge1", 0.4), ("rouge2", 0.2), ("rougeL", 0.3))}
    lead = {"rouge1": 0.25, "rouge2": 0.1, "rougeL": 0.2}
    return {**place, **scores, "lead": lead, "cut": item > 2, "text": f"A summary by {model}."}


def _recalls(model, worse, rng):
    records = []
    for task in ("passkey", "niah_multikey"):
        for length in LENGTHS:
            for item in range(10):
                depth = (0.1, 0.3, 0.5, 0.7, 0.9)[item % 5]
                right = float(rng.random() > 2 * worse * (length / 4096) * (1.2 - depth))
                records.append(recall(model, item, right, task, length, depth))
    return records
