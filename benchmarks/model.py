"""A whole model beside what a user would pick instead: a training step, a prefill, and decoding after long context.

    python -m benchmarks.model [--what training,prefill,decode] [--lengths 8192,16384,32768] [--dtype bfloat16]

SmolLM2-135M's shape with random weights. The parent is on transformers' SDPA; native is transformers' Ministral with
the same windows; both take the same loss, by chunks, as the conversions do. Every program lives in a process of its
own, so that the peak of memory is its own, and takes its turn while the others wait. Before anything is timed, the
programs answer the same short input: all full as the parent, windows as Ministral.

Beside each time stands what `masformer plan --calibrate` predicts, from rates measured in the same run, and the
speed-up that FLOPs (decoding: bytes of weights and cache) alone would give. The file is written after every group,
whose rows take the place of those that are there; of another machine, of all.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, MinistralConfig, PreTrainedConfig

from masformer.attention.tiled import has_bf16
from masformer.models.cache import SpanCache
from masformer.models.convert import convert, is_converted, plan_of
from masformer.models.families import class_of, shape_of
from masformer.models.head import Head
from masformer.spans import Block, Full, SpanPlan, Window, cost, layout
from masformer.spans.hardware import predict
from masformer.training.calibrate import calibrate, fill
from masformer.training.loss import chunked_loss
from masformer.training.meter import spread

from .measure import machine
from .memory import resident

LAYERS, FULL, SIZE, LONGEST, NEW = 30, 4, 512, 65536, 8
PLANS = {
    "blocks": layout("masformer", LAYERS, full=FULL, local=Block(SIZE)),
    "windows": layout("masformer", LAYERS, full=FULL, local=Window(SIZE)),
}
PARENT, NATIVE = "parent", "native"
PROGRAMS = (PARENT, NATIVE, *PLANS)
SIZES: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": LONGEST,
    "tie_word_embeddings": True,
}
MOST = {(NATIVE, "training"): 8192, (NATIVE, "prefill"): 8192, (NATIVE, "decode"): 32768}
"""Longest input of a program: masks over all pairs take minutes."""
CHECKED = 1536
ENOUGH = 420
"""Seconds of a group: there are fewer turns where they take longer."""


def config_of(program: str, dtype: torch.dtype) -> PreTrainedConfig:
    config: PreTrainedConfig = LlamaConfig(**SIZES)
    if program == NATIVE:
        types = ["sliding_attention" if span.is_local else "full_attention" for span in PLANS["windows"]]
        config = MinistralConfig(**SIZES, sliding_window=SIZE, layer_types=types)
    config.dtype = dtype
    return config


def made(program: str, dtype: torch.dtype) -> Any:
    """The same weights for all programs."""
    torch.manual_seed(0)
    model = class_of(config_of(program, dtype))._from_config(config_of(program, dtype), attn_implementation="sdpa")
    model = model.to(dtype)
    return convert(model, PLANS[program], check=False) if program in PLANS else model


def ids_of(length: int) -> torch.Tensor:
    return torch.randint(0, 49152, (1, length), generator=torch.Generator().manual_seed(length))


def training(model: Any, length: int) -> Callable[[], dict[str, Any]]:
    """A step of AdamW with gradient checkpointing."""
    model.train().activation_checkpointing_enable({"use_reentrant": False})
    optimizer, ids, head = torch.optim.AdamW(model.parameters()), ids_of(length), Head.of(model)

    def step() -> dict[str, Any]:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        chunked_loss(hidden, ids, head, total=length - 1).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"tokens": length}

    return step


def prefill(model: Any, length: int) -> Callable[[], dict[str, Any]]:
    model.eval()
    ids = ids_of(length)

    @torch.no_grad()
    def run() -> dict[str, Any]:
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return {"tokens": length, "kv_bytes": held(out.past_key_values)}

    return run


def decode(model: Any, length: int) -> Callable[[], dict[str, Any]]:
    """New tokens after `length` others, whose keys and values are random: nothing is faster or slower by them."""
    model.eval()
    cache = SpanCache(plan_of(model)) if is_converted(model) else DynamicCache(config=model.config)
    fill(cache, shape_of(config_of(PARENT, model.dtype)), length, dtype=model.dtype)
    ids = ids_of(NEW)

    @torch.no_grad()
    def run() -> dict[str, Any]:
        for token in range(NEW):
            model(input_ids=ids[:, token : token + 1], past_key_values=cache)
        return {"tokens": NEW, "kv_bytes": held(cache)}

    return run


def held(cache: Any) -> int:
    """Bytes of the storage behind all keys and values."""
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    return sum(storage.nbytes() for storage in {x.untyped_storage() for x in tensors})


WHAT = {"training": training, "prefill": prefill, "decode": decode}


def serve(pipe: Any, program: str, what: str, length: int, dtype: torch.dtype) -> None:
    """In a process of its own: takes a step whenever it is told to, and tells how long it took and its peak."""
    model = made(program, dtype)
    WHAT[what](model, min(length, 256))()  # loads what a first step loads
    step = WHAT[what](model, length)
    pipe.send("ready")
    while pipe.recv() == "step":
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
        started = time.perf_counter()
        facts = step()
        seconds = time.perf_counter() - started
        pipe.send({**facts, "seconds": seconds, "peak_bytes": resident("VmHWM")})


def group(programs: list[str], what: str, length: int, dtype: torch.dtype, repetitions: int) -> list[dict[str, Any]]:
    """All programs, turn by turn."""
    context = multiprocessing.get_context("spawn")
    names = [name for name in programs if length <= MOST.get((name, what), length)]
    pipes, processes = {}, []
    for name in names:
        pipes[name], far = context.Pipe()
        processes.append(context.Process(target=serve, args=(far, name, what, length, dtype), daemon=True))
        processes[-1].start()
        far.close()  # so that a program that dies is noticed
        pipes[name].recv()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    started = time.perf_counter()
    for turn in range(repetitions):
        if turn and time.perf_counter() - started > ENOUGH * turn / (turn + 1):
            break  # another turn would not fit
        for name in names:
            pipes[name].send("step")
            found[name].append(pipes[name].recv())
            print(f"  {what} {length:,} {name}: {found[name][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    for name, process in zip(names, processes, strict=True):
        pipes[name].send("stop")
        process.join()
    return [row(what, length, name, turns) for name, turns in found.items()]


def row(what: str, length: int, program: str, turns: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [turn["seconds"] for turn in turns]
    times = {**spread(seconds), "turns": len(seconds)}
    facts = {"what": what, "length": length, "program": program, "seconds": times}
    facts["tokens_per_second"] = turns[0]["tokens"] / times["median"]
    facts["peak_bytes"] = statistics.median(turn["peak_bytes"] for turn in turns)
    return facts | ({"kv_bytes": turns[0]["kv_bytes"]} if "kv_bytes" in turns[0] else {})


def predicted(rows: list[dict[str, Any]], rates: Any, dtype: torch.dtype) -> None:
    """Put beside each row of a group what the cost model says: its time, its speed-up over the parent, its cache."""
    shape = shape_of(config_of(PARENT, dtype), kv_dtype_bytes=dtype.itemsize)
    full = SpanPlan((Full(),) * LAYERS)
    parent = next(row["seconds"]["median"] for row in rows if row["program"] == PARENT)
    for each in rows:
        what, length = each["what"], each["length"]
        each["speedup"] = parent / each["seconds"]["median"]
        plan = full if each["program"] == PARENT else PLANS.get(each["program"], PLANS["windows"])
        ours, theirs = cost(shape, plan, length), cost(shape, full, length)
        if each["program"] != NATIVE:
            seconds = predict(shape, plan, length, rates)
            one = {"training": seconds.recomputed, "prefill": seconds.prefill, "decode": NEW * seconds.decode}[what]
            each["predicted_seconds"] = one
            each["off"] = one / each["seconds"]["median"] - 1
        each["counted_speedup"] = {
            "training": theirs.training_flops.total / ours.training_flops.total,
            "prefill": theirs.prefill_flops.total / ours.prefill_flops.total,
            "decode": (shape.kv_dtype_bytes * shape.parameters + theirs.kv_bytes_read)
            / (shape.kv_dtype_bytes * shape.parameters + ours.kv_bytes_read),
        }[what]
        if "kv_bytes" in each:
            each["counted_kv_bytes"] = cost(shape, plan, length + (NEW if what == "decode" else 0)).kv_bytes_held


@torch.no_grad()
def check() -> None:
    """Refuse to time what is wrong."""
    ids = ids_of(CHECKED)
    outs = {name: made(name, torch.float32)(input_ids=ids, logits_to_keep=64).logits for name in PROGRAMS}
    full = convert(made(PARENT, torch.float32), SpanPlan((Full(),) * LAYERS), check=False)
    pairs = {
        "all full": (full(input_ids=ids, logits_to_keep=64).logits, outs[PARENT]),
        "windows": (outs["windows"], outs[NATIVE]),
    }
    for name, (ours, theirs) in pairs.items():
        if not float((ours - theirs).abs().max()) < 1e-4 * float(theirs.abs().max()):
            sys.exit(f"{name} answers something else: nothing was timed")
    if float((outs["blocks"] - outs[PARENT]).abs().max()) < 1e-2:
        sys.exit("blocks change nothing: nothing was timed")


def show(rows: list[dict[str, Any]]) -> None:
    for each in rows:
        off = f"{100 * each['off']:+5.0f} %" if "off" in each else "      -"
        print(
            f"{each['what']:9} {each['length']:7,} {each['program']:8} {each['seconds']['median']:9.2f} s "
            f"{each['tokens_per_second']:9.1f} tokens/s {each['speedup']:6.2f} times the parent's speed "
            f"(counted {each['counted_speedup']:5.2f}), predicted {off}, {each['peak_bytes'] / 2**30:6.2f} GiB"
            + (f", KV {each['kv_bytes'] / 2**20:7.1f} MiB" if "kv_bytes" in each else ""),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default=",".join(WHAT))
    parser.add_argument("--lengths", default="8192,16384,32768")
    parser.add_argument("--programs", default=",".join(PROGRAMS))
    parser.add_argument("--dtype", default="bfloat16" if has_bf16() else "float32", help="as the processor has it")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/model.json"))
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    programs = [name for name in PROGRAMS if name in given.programs.split(",")]
    if PARENT not in programs:
        parser.error(f"--programs needs {PARENT}, which the others are compared with")
    check()
    about = machine()
    commit, about["dtype"] = about.pop("commit"), given.dtype
    results: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    if {**results, **about} != results:  # of another machine
        results = {**about, "rates": {}, "results": []}
    for length in map(int, given.lengths.split(",")):
        both = SpanPlan(tuple({*PLANS["blocks"], *PLANS["windows"]}))
        rates = calibrate(config_of(PARENT, dtype), both, context=length)
        for what in given.what.split(","):
            results["rates"][f"{what}, {length}"] = rates.to_json()
            rows = [{**row, "commit": commit} for row in group(programs, what, length, dtype, given.repetitions)]
            predicted(rows, rates, dtype)
            show(rows)
            others = [row for row in results["results"] if (row["what"], row["length"]) != (what, length)]
            results["results"] = others + rows
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
