"""Time of local attention against what a user would take instead, forward alone and with the backward pass.

    python -m benchmarks.op [--lengths 2048,16384] [--dtypes float32,bfloat16] [--out benchmarks/results/op.json]

All of one length and dtype get the same tensors, 8 heads of 64, and take turns; medians. Useful GFLOP/s count the pairs
of query and key that are seen, whatever else was multiplied. Beside full causal attention by torch's own kernel:
torch's kernel under the mask of a window (its whole square is computed), compiled flex_attention (forward only: it has
no backward pass on the CPU) and the package local-attention 1.11.2. Before anything is timed, each is held against the
reference, with gradients.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from local_attention import LocalAttention
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from masformer.attention import attend
from masformer.attention.reference import reference, visible
from masformer.spans import Full, Span, Window, parse_span
from masformer.training.meter import interleaved, matmul_peak

from .measure import machine

HEADS, DIM, SIZE = 8, 64, 512
OURS = ("block:512", "block:256:lookback=1", "window:512", "block:512:sinks=4", "window:512:sinks=4")
CAUSAL, MASKED, FLEX = "SDPA, causal", "SDPA, mask of window:512", "flex_attention, window:512"
WINDOWS, BLOCKS = "local-attention, window:513", "local-attention, block:512"
MOST = {CAUSAL: 32_768, MASKED: 16_384, FLEX: 16_384}
"""Longest inputs of what is quadratic in time or memory."""

Op = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_ops() -> dict[str, tuple[Op, Span]]:
    """What needs nothing but its inputs, by name, and the span that it computes."""
    found: dict[str, tuple[Op, Span]] = {
        CAUSAL: (functools.partial(F.scaled_dot_product_attention, is_causal=True), Full())
    }
    for text in OURS:
        found[text] = functools.partial(attend, span=parse_span(text)), parse_span(text)
    # Its exact windows count one token more than ours.
    exact = {"causal": True, "use_rotary_pos_emb": False, "autopad": True, "window_size": SIZE}
    found[WINDOWS] = LocalAttention(look_backward=1, exact_windowsize=True, **exact), Window(SIZE + 1)
    found[BLOCKS] = LocalAttention(look_backward=0, **exact), parse_span("block:512")
    return found


def ops(length: int) -> dict[str, tuple[Op, Span]]:
    """What is timed."""
    found, window = plain_ops(), Window(SIZE)
    if length <= MOST[MASKED]:
        positions = torch.arange(length)
        mask = visible(window, positions, positions)
        found[MASKED] = functools.partial(F.scaled_dot_product_attention, attn_mask=mask), window
    if length <= MOST[FLEX]:
        found[FLEX] = flexible(length), window
    return {name: op for name, op in found.items() if length <= MOST.get(name, length)}


def flexible(length: int) -> Op:
    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < SIZE)

    blocks = torch.compile(create_block_mask)(seen, None, None, length, length, device="cpu")
    return functools.partial(torch.compile(flex_attention), block_mask=blocks)


def made(length: int, dtype: torch.dtype, heads: int = HEADS) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, length, DIM, dtype=dtype, requires_grad=True) for _ in range(3)], torch.randn(
        1, heads, length, DIM, dtype=dtype
    )


def check() -> None:
    """Refuse to time what is wrong."""
    length = 1536
    given, up = made(length, torch.float32, heads=2)
    for name, (op, span) in ops(length).items():
        expected = reference(*given, span)
        got = run(op, given, None) if name == FLEX else op(*given)
        pairs = [(got, expected)]
        if name != FLEX:
            both = (torch.autograd.grad(out, given, up) for out in (got, expected))
            pairs += zip(*both, strict=True)
        error = max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs)
        if not error < 1e-4:
            sys.exit(f"{name} is wrong by {error}: nothing was timed")


def run(op: Op, given: list[Tensor], up: Tensor | None) -> Any:
    if up is None:
        with torch.no_grad():
            return op(*(x.detach() for x in given))
    return torch.autograd.grad(op(*given), given, up)


def measure(length: int, dtype: torch.dtype, repetitions: int) -> list[dict[str, Any]]:
    given, up = made(length, dtype)
    peak, rows = matmul_peak(torch.device("cpu"), dtype) / 1e9, []
    chosen = ops(length)
    for what, grad in (("forward", None), ("forward and backward", up)):
        timed = {
            name: functools.partial(run, op, given, grad)
            for name, (op, _) in chosen.items()
            if not (grad is not None and name == FLEX)
        }
        found = interleaved(timed, repetitions)
        speeds = {
            name: (1 if grad is None else 3)
            * 4
            * DIM
            * HEADS
            * chosen[name][1].visible_pairs(length)
            / times["median"]
            / 1e9
            for name, times in found.items()
        }
        for name, times in found.items():
            row = {"length": length, "dtype": str(dtype).removeprefix("torch."), "what": what, "op": name}
            row |= {"seconds": times, "useful_gflops": speeds[name], "peak_gflops": peak}
            row["of_causal"] = speeds[name] / speeds[CAUSAL] if CAUSAL in speeds else None
            rows.append(row)
            share = f"{row['of_causal']:6.2f}" if CAUSAL in speeds else "     -"
            print(
                f"{length:7,} {row['dtype']:9} {what:21} {name:28} {times['median'] * 1e3:9.1f} ms "
                f"{speeds[name]:7.1f} GFLOP/s {share}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="2048,4096,8192,16384,32768,65536")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/op.json"))
    arguments = parser.parse_args()
    check()
    results = [
        row
        for dtype in arguments.dtypes.split(",")
        for length in map(int, arguments.lengths.split(","))
        for row in measure(length, getattr(torch, dtype), arguments.repetitions)
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
