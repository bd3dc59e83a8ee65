"""What spans save on one GPU: attention alone, and a training step of whole models, after a check against the truth.

    python -m benchmarks.gpu [--out benchmarks/results/gpu.json] [--deadline 540] [--dry-run]

1. `attend` is held against the float64 reference, with gradients: no worse than twice torch's masked attention in the
   same dtype. If anything is wrong, nothing is timed.
2. Attention alone in bfloat16, forward and with the backward pass, beside torch's causal flash kernel. Useful GFLOP/s
   count the pairs of query and key that are seen. "without varlen" is what attention was before it used that kernel.
3. A training step, batch 1, random tokens and weights: forward, backward with gradient checkpointing, AdamW, as
   `masformer train` does it: bfloat16 autocast, float32 weights, the loss by chunks. The parent of GPT-Neo is all its
   layers full on torch's kernels, since transformers computes GPT-Neo's attention eagerly alone, which is measured
   beside it as far as it goes. Beside each speed-up stands the one that `spans.cost` counts from FLOPs.

Times are medians between CUDA events. What does not fit into memory, or into the time that is left, is recorded as
such. The file is written after every row. --dry-run runs the same on the CPU, tiny, by the wall clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from masformer.attention import Segments, attend, varlen
from masformer.attention.reference import reference, visible
from masformer.models.convert import convert, is_converted, restore
from masformer.models.families import shape_of
from masformer.models.head import Head
from masformer.spans import Block, Full, Span, SpanPlan, cost, layout, parse_span, savings
from masformer.training.loss import chunked_loss
from masformer.training.meter import matmul_peak, peak_memory

from .measure import machine
from .record import Measured, Record, free, say, seconds, summary, timed

KINDS = ("block:{}", "block:{}:lookback=1", "block:{}:sinks=4", "window:{}", "window:{}:sinks=4", "full")
CAUSAL, WITHOUT = "SDPA, causal, flash", "{}, without varlen"
OWN, PARENT = "transformers' own", "parent"
MOST_OWN = 8192
"""Longest input of GPT-Neo as transformers computes it: every layer holds its scores."""
FLOORS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}
"""Root mean square error that is no sign of anything."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured. op: name, heads, key heads, dim. models: name and how to make one for so many positions."""

    op: tuple[tuple[str, int, int, int], ...]
    models: tuple[tuple[str, Callable[[], PreTrainedModel], tuple[int, ...]], ...]
    lengths: tuple[int, ...]
    size: int
    checked: int
    rounds: int


def gpt_neo(layers: int, hidden: int, heads: int, vocabulary: int) -> PreTrainedModel:
    """With few positions, since every layer makes a square of them; `stretch` gives it more."""
    kinds: Any = [[["global", "local"], layers // 2]]
    config = GPTNeoConfig(
        vocab_size=vocabulary,
        max_position_embeddings=64,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        attention_types=kinds,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoForCausalLM(config)


def llama(layers: int, hidden: int, heads: int, kv_heads: int, inner: int, vocabulary: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


REAL = Sizes(
    op=(("16 heads of 128", 16, 16, 128), ("9 heads of 64, 3 key heads", 9, 3, 64)),
    models=(
        ("GPT-Neo 1.3B", functools.partial(gpt_neo, 24, 2048, 16, 50257), (24, 8, 4, 0)),
        ("SmolLM2-135M", functools.partial(llama, 30, 576, 9, 3, 1536, 49152), (30, 8, 4, 0)),
    ),
    lengths=(2048, 4096, 8192, 16384, 32768, 65536),
    size=1024,
    checked=1500,
    rounds=10,
)
DRY = Sizes(
    op=(("2 heads of 16", 2, 2, 16), ("4 heads of 8, 2 key heads", 4, 2, 8)),
    models=(
        ("GPT-Neo 1.3B", functools.partial(gpt_neo, 2, 32, 2, 64), (2, 1, 0)),
        ("SmolLM2-135M", functools.partial(llama, 2, 32, 4, 2, 64, 64), (2, 1, 0)),
    ),
    lengths=(64, 128),
    size=32,
    checked=100,
    rounds=1,
)


# The check


def dense(q: Tensor, k: Tensor, v: Tensor, span: Span, documents: Tensor, positions: Tensor) -> Tensor:
    """torch's attention under a mask over all pairs."""
    mask = visible(span, positions, positions) & (documents[:, :, None] == documents[:, None, :])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])


def check(record: Record, sizes: Sizes, device: torch.device) -> None:
    """Refuse to time what is wrong."""
    length = sizes.checked
    lengths = {"one document": [[length]] * 2, "packed": [[length // 3, 1, length - length // 3 - 1], [length]]}
    for dtype, floor in FLOORS.items():
        for text in KINDS:
            span = parse_span(text.format(length // 5))
            for batch, rows in lengths.items():
                ratio = worst(span, rows, dtype, floor, device)
                row = {
                    "span": str(span),
                    "dtype": str(dtype).removeprefix("torch."),
                    "batch": batch,
                    "of_allowed": ratio,
                }
                record.results["check"].append(row)
                print(f"check: {row['span']:24} {row['dtype']:9} {batch:13} error {ratio:5.2f} of what is allowed")
                if not ratio <= 1:
                    record.write()
                    sys.exit(f"{span} in {row['dtype']}, {batch}, is wrong: nothing was timed")
    record.write()


def worst(span: Span, rows: list[list[int]], dtype: torch.dtype, floor: float, device: torch.device) -> float:
    """The largest error of output and gradients, as a part of what is allowed."""
    documents = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in rows], device=device)
    positions = torch.tensor([[p for n in row for p in range(n)] for row in rows], device=device)
    segments = Segments.of(*positions.shape, position_ids=positions)
    q, k, v, up = made(4, 2, 64, positions.shape[1], dtype, device, batch=len(rows))

    def gradients(compute: Callable[..., Tensor], exact: bool = False) -> list[Tensor]:
        leaves = [x.detach().to(torch.float64 if exact else dtype).requires_grad_() for x in (q, k, v)]
        out = compute(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, up.to(out.dtype))]

    truth = gradients(functools.partial(reference, span=span, documents=documents, positions=positions), exact=True)
    ours = gradients(functools.partial(attend, span=span, segments=segments))
    plain = gradients(functools.partial(dense, span=span, documents=documents, positions=positions))
    errors = [
        [float((x.double() - y).square().mean().sqrt()) for x, y in zip(got, truth, strict=True)]
        for got in (ours, plain)
    ]
    return max(error / (2 * allowed + floor) for error, allowed in zip(*errors, strict=True))


# Attention alone


def made(
    heads: int, kv_heads: int, dim: int, length: int, dtype: torch.dtype, device: torch.device, batch: int = 1
) -> list[Tensor]:
    """q, k and v as a layer hands them on, and the gradient of the output."""
    torch.manual_seed(0)
    sizes = (heads, kv_heads, kv_heads, heads)
    return [torch.randn(batch, length, n, dim, dtype=dtype, device=device).transpose(1, 2) for n in sizes]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def without_varlen(q: Tensor, k: Tensor, v: Tensor, span: Span) -> Tensor:
    with mock.patch.object(varlen, "takes", return_value=False):
        return attend(q, k, v, span)


def ops(size: int) -> Iterator[tuple[str, Callable[..., Tensor], Span]]:
    yield CAUSAL, causal, Full()
    for text in KINDS:
        span = parse_span(text.format(size))
        yield str(span), functools.partial(attend, span=span), span
        if text in ("block:{}", "window:{}"):
            yield WITHOUT.format(span), functools.partial(without_varlen, span=span), span


def measure_ops(record: Record, sizes: Sizes, device: torch.device) -> None:
    for length, (shape, heads, kv_heads, dim) in itertools.product(sizes.lengths, sizes.op):
        *given, up = made(heads, kv_heads, dim, length, torch.bfloat16, device)
        for what, passes, grad in (("forward", 1, None), ("forward and backward", 3, up)):
            rate: float | None = None
            for name, op, span in ops(sizes.size):
                row = {"shape": shape, "length": length, "what": what, "op": name}
                call = functools.partial(run, op, given, grad)
                found = record.row(
                    "op", ("op", shape, what, name), row, functools.partial(timed, call, device, sizes.rounds)
                )
                if "seconds" in found:
                    work = passes * 4 * dim * heads * span.visible_pairs(length)
                    found["useful_gflops"] = work / found["seconds"]["median"] / 1e9
                    rate = found["useful_gflops"] if name == CAUSAL else rate
                    found["of_causal"] = None if rate is None else found["useful_gflops"] / rate
                    record.results["op"][-1] |= found
                say(f"{shape:26} {length:7,} {what:20} {name:28}", found, "useful_gflops", "of_causal")
        del given, up, call
        free()
    record.write()


def run(op: Callable[..., Tensor], given: list[Tensor], up: Tensor | None) -> None:
    if up is None:
        with torch.no_grad():
            op(*given)
    else:
        leaves = [x.detach().requires_grad_() for x in given]
        torch.autograd.grad(op(*leaves), leaves, up)


# A training step


def stretch(model: PreTrainedModel, length: int, device: torch.device) -> None:
    """Give a converted model so many positions."""
    model.config.max_position_embeddings = length
    if isinstance(model, GPTNeoForCausalLM):
        table = nn.Embedding(length, model.config.hidden_size, device=device)
        nn.init.normal_(table.weight, std=model.config.initializer_range)
        model.transformer.wpe = table


def plans(
    name: str, layers: int, counts: tuple[int, ...], size: int, length: int
) -> Iterator[tuple[str, SpanPlan | None]]:
    """What is measured at a length, the parent first; None is the model as transformers has it."""
    neo = name.startswith("GPT-Neo")
    if not neo:
        yield PARENT, None
    for count in counts:
        label = f"{count} full"
        yield label, layout("masformer", layers, full=count, local=Block(size))
    if neo and length <= MOST_OWN:
        yield OWN, None


def measure_training(record: Record, sizes: Sizes, device: torch.device) -> None:
    for name, make, counts in sizes.models:
        with device:
            model = make()
        model.train()
        # Older versions of transformers have the other name alone.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        layers = model.config.num_hidden_layers
        whole = layout("full", layers)
        for length in sizes.lengths:
            convert(model, whole, check=False)
            stretch(model, length, device)
            parent: float | None = None
            shape = shape_of(model.config)
            for label, plan in plans(name, layers, counts, sizes.size, length):
                row = {"model": name, "length": length, "plan": label}
                measure = functools.partial(training, model, plan, length, device, min(3, sizes.rounds))
                found = record.row("training", ("training", name, label), row, measure)
                free()
                if "seconds" in found:
                    took = found["seconds"]["median"]
                    counted, full = (cost(shape, p, length) for p in (plan or whole, whole))
                    parent = took if label in (PARENT, f"{layers} full") and parent is None else parent
                    found |= {
                        "tokens_per_second": length / took,
                        "mfu": counted.training_flops.total / took / record.results["peak_flops"],
                        "speedup": None if parent is None else parent / took,
                        "speedup_by_flops": full.training_flops.total / counted.training_flops.total,
                        "pairs_saved": savings(full, counted).attention_pairs,
                    }
                    record.results["training"][-1] |= found
                say(
                    f"{name:13} {length:7,} {label:18}",
                    found,
                    *("tokens_per_second", "peak_gib", "mfu", "speedup", "speedup_by_flops", "pairs_saved"),
                )
            model.zero_grad()
            free()
        del model, measure
        free()
    record.write()


def training(model: PreTrainedModel, plan: SpanPlan | None, length: int, device: torch.device, rounds: int) -> Measured:
    """Seconds of a step, the memory at its peak, and the loss of the last one."""
    if plan is not None:
        convert(model, plan, check=False)
    elif is_converted(model):
        restore(model)
    model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    torch.manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=device)
    losses: list[Tensor] = []

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            loss = chunked_loss(hidden, ids, Head.of(model), total=length - 1).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [seconds(step, device) for _ in range(rounds)]
    return {"seconds": summary(times), "peak_gib": peak_memory(device) / 2**30, "loss": float(losses[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--deadline", type=float, default=540.0, help="seconds after which no row is begun")
    parser.add_argument("--dry-run", action="store_true", help="the same on the CPU, tiny: shows that it runs")
    arguments = parser.parse_args()
    if not (arguments.dry_run or torch.cuda.is_available()):
        sys.exit("no CUDA device is here: --dry-run shows on the CPU that the benchmark runs")
    device = torch.device("cpu" if arguments.dry_run else "cuda:0")
    sizes = DRY if arguments.dry_run else REAL
    record = Record(
        arguments.out,
        arguments.deadline,
        **machine(),
        device="CPU" if arguments.dry_run else torch.cuda.get_device_name(device),
        cuda=torch.version.cuda,
        transformers=transformers.__version__,
        dry_run=arguments.dry_run,
        varlen=varlen._has_kernel(device),
    )
    print(
        f"{record.results['device']}, torch {torch.__version__}, varlen kernel: {record.results['varlen']}", flush=True
    )
    check(record, sizes, device)
    record.results["peak_flops"] = matmul_peak(device, torch.bfloat16)
    measure_ops(record, sizes, device)
    measure_training(record, sizes, device)
    record.results["complete"] = True
    record.write()
    for row in record.results["skipped"]:
        print("skipped for lack of time:", ", ".join(str(value) for value in row.values()))
    wrong = [
        row
        for name in ("op", "training")
        for row in record.results[name]
        if row.get("failed", "out of memory") != "out of memory"
    ]
    if wrong:
        sys.exit(f"{len(wrong)} rows failed: see {arguments.out}")


if __name__ == "__main__":
    main()
