"""What the demo says in the end: its page, and in plain words what was gained and lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report.page import Figure, Section, Table, write_page
from .report.picture import plan_svg
from .report.plots import bars, loss_by_position
from .spans import SpanPlan

MB = 1e6


def write(path: Path, results: dict[str, Any], plans: dict[str, SpanPlan]) -> Path:
    """Write the page for `results` (what `demo.run` returns)."""
    sections = [
        Section("What was gained and lost", conclusions(results)),
        _plans(results, plans),
        _loss(results),
        _needle(results),
        _cost(results),
        _text(results),
        _training(results),
        Section(
            "How this was made",
            [
                "Command: masformer demo",
                f"Model: {results['model']}, {results['device']}, torch {results['torch']}. But for the "
                "training at the end, no weight was changed: the plans only say what each layer may see.",
            ],
        ),
    ]
    return write_page(path, title="SmolLM2-135M with mixed attention spans", sections=sections)


def conclusions(results: dict[str, Any]) -> list[str]:
    """What was gained and what was lost, with the numbers of this run."""
    parent, local, rule, chosen = results["plans"]
    loss, needle, cost = results["loss"], results["needle"], results["cost"]

    def more(name: str) -> float:
        return float(loss[name]["nats_per_token"] - loss[parent]["nats_per_token"])

    def found(name: str) -> str:
        return f"{needle[name]['found']} of {needle[name]['items']}"

    def share(name: str, *keys: str) -> float:
        before, after = cost[parent], cost[name]
        for key in keys:
            before, after = before[key], after[key]
        return 1 - float(after) / float(before)

    return [
        f"Gained ({chosen}): {share(chosen, 'attention_pairs'):.0%} of the attention pairs, "
        f"{share(chosen, 'training_flops', 'total'):.0%} of the model's training FLOPs and "
        f"{share(chosen, 'kv_bytes_held'):.0%} of the KV cache are saved at {results['length']:,} tokens.",
        f"Lost ({chosen}): {more(chosen):+.3f} nats per token against the parent, without any training. "
        f"All local loses {more(local):+.3f}, as many full layers placed by the rule {more(rule):+.3f}.",
        f"Passkeys found: parent {found(parent)}; chosen {found(chosen)}; interleaved {found(rule)}; all local "
        f"{found(local)}.",
        f"At the same cost, choosing the layers by measurement instead of by the rule changes the loss by "
        f"{more(chosen) - more(rule):+.3f} nats and the passkeys found from {needle[rule]['found']} to "
        f"{needle[chosen]['found']}. The layers were measured for this model: another one needs its own measurement, "
        "and continual training to win back the rest.",
    ]


def _plans(results: dict[str, Any], plans: dict[str, SpanPlan]) -> Section:
    length = results["length"]
    figures = [
        Figure(f"Plan {name}: {plan}", svg=plan_svg(plan, title=name, length=length), caption=str(plan))
        for name, plan in plans.items()
        if plan.full_layers != tuple(range(len(plan)))
    ]
    words = [
        f"Each row is a layer; a bar covers what the last of {length:,} tokens sees. The parent is full everywhere."
    ]
    return Section("The plans", words, figures=figures)


def _loss(results: dict[str, Any]) -> Section:
    losses = results["loss"]
    series = {
        name: [((b["low"] * b["high"]) ** 0.5, b["nats_per_token"]) for b in loss["buckets"] if b["low"] >= 16]
        for name, loss in losses.items()
    }
    rows = [[name, f"{x['nats_per_token']:.3f}", f"{x['perplexity']:.2f}"] for name, x in losses.items()]
    documents = ", ".join(next(iter(losses.values()))["documents"])
    return Section(
        "Loss by position",
        [f"Mean loss of the tokens by how many stand before them; {results['length']:,} tokens of {documents}."],
        tables=[Table(["plan", "nats/token", "perplexity"], rows, "Loss over all positions")],
        figures=[Figure("Loss by position for every plan; the table holds the means", svg=loss_by_position(series))],
    )


def _needle(results: dict[str, Any]) -> Section:
    needle = results["needle"]
    depths = sorted({score["depth"] for score in next(iter(needle.values()))["scores"]})
    rows = []
    for name, result in needle.items():
        at = [[s["found"] for s in result["scores"] if s["depth"] == depth] for depth in depths]
        cells = [f"{sum(found)}/{len(found)}" for found in at]
        rows.append([name, *cells, f"{result['found']}/{result['items']}", f"{result['log_probability']:.1f}"])
    return Section(
        "A passkey hidden in a speech",
        [
            f"A five-digit key stands once in {results['needle_length']:,} tokens of a speech, at the depth given "
            "(0 is the start), and is asked for at the end. Found means that greedy decoding gives every digit."
        ],
        tables=[
            Table(
                ["plan", *(f"{depth}" for depth in depths), "all", "log p"],
                rows,
                "Passkeys found by depth, and log p, the mean log-probability of the key in nats",
            )
        ],
    )


COSTS = ["M pairs", "training TFLOP", "prefill TFLOP", "KV held, MB", "KV peak, MB"]


def _cost_row(cost: dict[str, Any]) -> list[str]:
    """The numbers under `COSTS` of one plan."""
    return [
        f"{cost['attention_pairs'] / 1e6:,.0f}",
        f"{cost['training_flops']['total'] / 1e12:.2f}",
        f"{cost['prefill_flops']['total'] / 1e12:.2f}",
        f"{cost['kv_bytes_held'] / MB:.1f}",
        f"{cost['prefill_kv_peak'] / MB:.1f}",
    ]


def cost_lines(costs: dict[str, Any]) -> str:
    """The cost table for the terminal."""
    return _lines([["", *COSTS], *([name, *_cost_row(cost)] for name, cost in costs.items())])


def loss_lines(losses: dict[str, Any]) -> str:
    """Loss by position for the terminal, from position 16 on: before, no plan differs from the parent."""
    buckets = zip(*(loss["buckets"] for loss in losses.values()), strict=True)
    rows = [
        [f"{row[0]['low']:,} to {row[0]['high'] - 1:,}", *(f"{b['nats_per_token']:.3f}" for b in row)]
        for row in buckets
        if row[0]["low"] >= 16
    ]
    return _lines([["position", *losses], *rows])


def _lines(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  " + "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def _cost(results: dict[str, Any]) -> Section:
    cost = results["cost"]
    held = {"KV held": [c["kv_bytes_held"] / MB for c in cost.values()]}
    return Section(
        "Cost",
        [
            f"Counted for one document of {results['length']:,} tokens; attention is only a part of the FLOPs. KV held "
            "is what the cache keeps afterwards, KV peak the most that is alive during a prefill in one go."
        ],
        tables=[Table(["plan", *COSTS], [[name, *_cost_row(c)] for name, c in cost.items()], "What each plan costs")],
        figures=[Figure("KV cache held by each plan, as in the table", svg=bars(list(cost), held, "MB"))],
    )


def _training(results: dict[str, Any]) -> Section:
    training = results["training"]
    rows = [[f"{step:,}", f"{loss:.3f}"] for step, loss in training["held_out"]]
    return Section(
        "A short training",
        [
            f"The conversion with measured layers, all weights, {training['tokens']:,} tokens of other speeches. This "
            "shows that a conversion trains as its parent does; to win back what it lost takes more, and the parent "
            "would gain from the same tokens too (see recipes/)."
        ],
        tables=[Table(["step", "nats/token"], rows, "Loss of held-out speeches")],
    )


def _text(results: dict[str, Any]) -> Section:
    texts = results["text"]
    rows = [
        [
            name,
            f"{t['prompt_tokens']:,}",
            f"{t['prefill_seconds']:.1f}",
            f"{t['tokens_per_second']:.1f}",
            f"{t['kv_bytes'] / MB:.1f}",
        ]
        for name, t in texts.items()
    ]
    headers = ["plan", "prompt tokens", "prefill (s)", "tokens/s", "KV cache (MB)"]
    return Section(
        "Generation",
        [
            "The same prompt, greedy: sum up the newest speech. Speed is of this machine and this run; KV bytes are "
            "those of the storage that generate() really held at its end."
        ],
        tables=[Table(headers, rows, "Speed and memory of generation")],
        verbatim=[f"{name}: {t['text'].strip()}" for name, t in texts.items()],
    )
