"""Run folders with made numbers, as `masformer eval` and `masformer train` write them."""

import itertools
import json
import random

from masformer.evaluation.results import Run
from masformer.spans import GPT_NEO_1_3B, SpanPlan, cost

LENGTHS = (1024, 4096)
PLANS = {
    "parent": "full*24",
    "chosen": "full*2,window:252:sinks=4*10,full*2,window:252:sinks=4*10",
    "all local": "window:252:sinks=4*24",
}
WORSE = {"parent": 0.0, "chosen": 0.05, "all local": 0.4}
EDGES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]


LAYERS = 24
CHOICES = {"top": (20, 21), "recall": (7, 18), "mass": (3, 4), "lazy": (3, 4)}
NATS = {"parent": 2.0, "all local": 5.0, "top": 4.5, "recall": 2.25, "mass": 4.0, "lazy": 4.0}
"""On the checks, of the answers; documents have 3.0."""
MEASURED = {
    "parent": (200.0, (1, 1, 1, 1)),
    "all local": (260.0, (0, 0, 0, 0)),
    "full 20,21": (250.0, (1, 0, 0, 0)),
    "full 7,18": (210.0, (1, 1, 1, 0)),
    "full 3,4": (240.0, (1, 1, 0, 0)),
}
"""By label: nats of a document of 100 tokens (the next one has 10 more), and scores of the recall items."""
SETTINGS = {"depths": [0.1, 0.3, 0.5, 0.7, 0.9], "stride": None, "new_tokens": 96, "beams": 1, "seed": 0, "data": "d"}


def facts(plans=PLANS, lengths=LENGTHS, **changes):
    """What `masformer.cli_eval` gives to `Run.open`."""
    models = {}
    for label, text in plans.items():
        plan = SpanPlan.parse(text)
        costs = {str(length): cost(GPT_NEO_1_3B, plan, length).to_json() for length in lengths}
        models[label] = {
            "model": f"models/{label}",
            "plan": text,
            "layers": len(plan),
            "dtype": "float32",
            "identity": label,
            "cost": costs,
        }
    return {
        "versions": {"masformer": "0.1.0", "torch": "2.10.0", "transformers": "5.23.0", "python": "3.11.9"},
        "device": "cpu",
        "data": "speeches.jsonl",
        "settings": SETTINGS,
        "models": models,
        "commands": ["masformer eval models/parent models/chosen --data speeches.jsonl --out runs/eval"],
    } | changes


def _place(model, suite, task, length, item):
    return {"model": model, "suite": suite, "task": task, "length": length, "item": item}


def loss(model, item, nats, tokens=100, length=4096, **more):
    """A record of the suite `loss`; `nats` is the sum."""
    place = _place(model, "loss", None, length, item)
    place["document"] = f"document {item}"
    return {**place, "tokens": tokens, "bytes": 4 * tokens, "nats": nats, "buckets": [], "repeats": [], **more}


def recall(model, item, score, task="passkey", length=1024, depth=0.5, **more):
    return {
        **_place(model, "recall", task, length, item),
        "depth": depth,
        "score": score,
        "log_probability": -1.5 * (2 - score),
        "rank": 3.0 - 2 * score,
        "text": None,
        **more,
    }


def harness(model, *rows, task="piqa", limit=0):
    """A record of the suite `lm-eval`; `rows` are (metric, value, stderr, items), or of a group (task, metric, ...)."""
    names = ("task", "metric", "value", "stderr", "items")
    metrics = [dict(zip(names, row if len(row) == len(names) else (task, *row), strict=True)) for row in rows]
    return {**_place(model, "lm-eval", task, 0, limit), "metrics": metrics}


def write_eval(folder, records, **changes):
    with Run.open(folder, facts(**changes)) as run:
        run.add(list(records))
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
            noise = rng.uniform(0.8, 1.2)
            if model != next(iter(PLANS)):
                records.append(_fidelity(model, item, worse * noise))
            records += [_summary(model, item, length, worse, rng.uniform(0, 0.1)) for length in LENGTHS]
        records += _recalls(model, worse, rng)
        rows = [(name, 0.5 - worse / 5, 0.01, 1838) for name in ("acc", "acc_norm")]
        records.append(harness(model, *rows))
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
    place = {**_place(model, "fidelity", None, 4096, item), "document": f"document {item}"}
    tokens, nats, agree = (sum(bucket[column] for bucket in buckets) for column in (2, 3, 4))
    return {**place, "tokens": tokens, "kl": nats, "agree": agree, "buckets": buckets}


def _summary(model, item, length, worse, noise):
    place = {**_place(model, "summary", None, length, item), "document": f"report {item}"}
    scores = {name: top - worse / 4 + noise for name, top in (("rouge1", 0.4), ("rouge2", 0.2), ("rougeL", 0.3))}
    lead = {"rouge1": 0.25, "rouge2": 0.1, "rougeL": 0.2}
    text = f"A summary by {model}."
    return {**place, **scores, "lead": lead, "prompt_tokens": length, "cut": item > 2, "text": text}


def _recalls(model, worse, rng):
    records = []
    for task in ("passkey", "niah_multikey"):
        for length in LENGTHS:
            for item in range(10):
                depth = (0.1, 0.3, 0.5, 0.7, 0.9)[item % 5]
                right = float(rng.random() > 2 * worse * (length / 4096) * (1.2 - depth))
                records.append(recall(model, item, right, task, length, depth))
    return records


def plan_of(full):
    return ",".join("full" if layer in full else "window:252:sinks=4" for layer in range(LAYERS))


def choice(method, full, label=None):
    parsed = SpanPlan.parse(plan_of(full))
    return {
        "plan": str(parsed),
        "label": label or f"full {','.join(map(str, full))}",
        "full_layers": list(full),
        "recall": NATS[method],
        "documents": 3.0,
        "kl": 0.125,
        "nats": NATS[method] + 3.0,
        "by_probe": [NATS[method]] * 4,
        "cost": cost(GPT_NEO_1_3B, parsed, 1024).to_json(),
    }


def outcome(choices=CHOICES, *, seed=0, train_steps=0, scores=("recall", "mass"), words="2 full layers"):
    """What `masformer select` writes as selection.json."""
    plans = {method: choice(method, full) for method, full in choices.items()}
    values = [0.5 if layer in (7, 18) else -0.01 * layer for layer in range(LAYERS)]
    return {
        "format": 2,
        "facts": {
            "model": "models/parent",
            "identity": "x",
            "local": ["window:252:sinks=4"],
            "length": 1024,
            "probes": ["a", "b", "c", "d", "e"],
            "checks": ["f", "g", "h", "i", "j"],
            "seed": seed,
            "dtype": "float32",
            "device": "cpu",
        },
        "train_steps": train_steps,
        "budgets": [{"words": words, "chosen": min(plans, key=lambda name: plans[name]["nats"]), "plans": plans}],
        "scores": dict.fromkeys(scores, values),
        "parent": choice("parent", range(LAYERS), "parent"),
        "local": choice("all local", (), "all local"),
    }


def tried_on(label, nats, scores, more=10.0):
    documents = [loss(label, item, nats + more * item) for item in range(2)]
    return documents + [recall(label, item, score) for item, score in enumerate(scores)]


def write_selection(folder, *, trained=None, tried=MEASURED, settings=SETTINGS, **changes):
    """`trained`: what the plans measure after a training, as MEASURED."""
    folder.mkdir(parents=True)
    found = outcome(train_steps=20 if trained else 0, **changes)
    (folder / "selection.json").write_text(json.dumps(found), "utf-8")
    rows = [found["parent"], found["local"], *(row for each in found["budgets"] for row in each["plans"].values())]
    plans = {row["label"]: row["plan"] for row in rows}
    measured = {**tried, **{f"{label}, trained": values for label, values in (trained or {}).items()}}
    if measured:
        known = {label: plans[label.removesuffix(", trained")] for label in measured}
        lines = [record for label, values in measured.items() for record in tried_on(label, *values)]
        write_eval(folder / "held-out", lines, models=facts(known)["models"], settings=settings)
    for label in trained or ():
        recipe = {"model": "models/parent", "plan": plans[label]}
        write_train(folder / "training" / f"{label.replace(' ', '-').replace(',', '-')}-ab12cd", recipe=recipe)
    return folder
