"""`masformer export`: a conversion as a checkpoint that transformers and vLLM load without this package."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_card import card
from .cli_model import Debug, Device, Json, Model, device_name
from .cli_output import UsageError, print_json, refuse_used, write_whole
from .files import seal

README = "README.md"
IGNORANT = ("sglang", "llama.cpp", "llamacpp", "gguf", "ollama")
"""Software whose Llama, Mistral and Qwen ignore layer types, and its file formats (SGLang 0.5.23, docs/export.md)."""


def export(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make; it must be new or empty.")],
    *,
    to: Annotated[str, typer.Option("--to", help="What shall load it: transformers, or vllm (right in both).")],
    verify_vllm: Annotated[
        str | None, typer.Option(metavar="PYTHON", help="Prove it in vLLM too, with the interpreter that has vLLM.")
    ] = None,
    device: Device = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a converted model as a checkpoint that stock software runs, and prove it in a fresh process.

    Example: masformer export MODEL OUT --to vllm
    """
    if to.lower() in IGNORANT:
        raise UsageError(
            f"--to {to}: it ignores layer types and would give all layers full attention without a word; transformers "
            "and vllm honour them"
        )
    if to not in ("transformers", "vllm"):
        raise UsageError(f"--to knows transformers and vllm, not {to!r}")
    if verify_vllm is not None and to != "vllm":
        raise UsageError("--verify-vllm needs --to vllm")
    from .models.export import export as write_and_prove
    from .models.tokenizer import quiet

    quiet()
    refuse_used(out)
    where, done = device_name(device), []

    def write(folder: Path) -> None:
        done.append(write_and_prove(model, folder, to, device=where, vllm=verify_vllm))
        seal(folder)
        (folder / README).write_text(card(done[0], model, out.absolute().name, folder), encoding="utf-8")

    write_whole(out, write)
    exported = done[0]
    if json:
        print_json(_facts(exported, model, out, to))
        return
    print(f"{out}: {exported.architecture}, model type {exported.model_type} ({exported.plan})")
    for proof in filter(None, (exported.proof, exported.vllm)):
        print(f"Proved: {proof.words()}")
    if not exported.tokenizer:
        print(f"Note: {model} holds no tokenizer, so none was written.")
    print(f"Note: not all software reads layer types: see {out / README} before serving with anything else.")


def _facts(exported: Any, model: str, out: Path, to: str) -> dict[str, Any]:
    facts = dataclasses.asdict(exported)
    return {"model": model, "out": str(out), "to": to, **facts, "plan": str(exported.plan)}
