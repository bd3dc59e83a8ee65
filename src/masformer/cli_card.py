"""The README.md of an exported folder: what it is, what was proved of it, how to serve it, and what not to serve it
with. Its last table has the SHA-256 of every other file.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .data.documents import HUB_ID
from .files import sha256
from .report.picture import plan_text
from .spans import SpanPlan, Window

CHECKPOINT = re.compile(r"checkpoint-\d+")


def card(exported: Any, source: str, name: str, folder: Path) -> str:
    """Markdown for the files in `folder`, which will be called `name`; `exported` is what `export` returned."""
    recipe = _recipe(Path(source))
    parts = [
        _heading(name, str(recipe.get("model") or source)),
        _origin(exported, source, recipe),
        _spans(exported.plan),
        _proofs(exported),
        _serving(exported, name),
        _training(recipe),
        ["## Files", "", *_table(("file", "SHA-256"), checksums(folder).items()), ""],
    ]
    return "\n".join(line for part in parts for line in part)


def checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder and below, but for its README.md, by path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    named = ((path.relative_to(folder).as_posix(), path) for path in files)
    return {name: sha256(path) for name, path in named if name != "README.md"}


def _table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    heads = list(heads)
    yield from (f"| {' | '.join(map(str, row))} |" for row in (heads, ["---"] * len(heads), *rows))


def _recipe(source: Path) -> dict[str, Any]:
    """The recipe of the training that a checkpoint comes from: it lies in the folder, or in its run's."""
    beside = source.absolute().parent if CHECKPOINT.fullmatch(source.absolute().name) else source
    for file in (source / "recipe.json", beside / "recipe.json"):
        try:
            recipe = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(recipe, dict) and isinstance(recipe.get("data"), dict):
            return recipe
    return {}


def _place(words: object) -> str:
    """A path or hub id as people may see it: of an absolute path its last part."""
    return Path(str(words)).name if str(words).startswith(("/", "~")) else str(words)


def _heading(name: str, base: str) -> list[str]:
    hub = [f"base_model: {base}"] if HUB_ID.fullmatch(base) and not Path(base).exists() else []
    tags = "tags: [masformer, long-context, sliding-window]"
    return ["---", "library_name: transformers", *hub, tags, "---", "", f"# {name}", ""]


def _origin(exported: Any, source: str, recipe: dict[str, Any]) -> list[str]:
    base = f"Base model: `{_place(recipe['model'])}`. " if "model" in recipe else ""
    return [
        f"{base}Weights of `{_place(source)}`, a `{exported.source_type}` model whose attention has mixed spans, after",
        "[MASFormer](https://arxiv.org/abs/2310.12442): some layers see everything, the others a window.",
        f"Written for `{exported.architecture}`, model type `{exported.model_type}`.",
        "",
    ]


def _spans(plan: SpanPlan) -> list[str]:
    rows = []
    for span, group in itertools.groupby(range(len(plan)), key=lambda layer: plan[layer]):
        layers = list(group)
        words = (
            f"the last {span.size:,} tokens, itself included"
            if isinstance(span, Window)
            else "all before it, and itself"
        )
        rows.append((f"{layers[0]} to {layers[-1]}" if len(layers) > 1 else layers[0], f"`{span}`", words))
    heads = ("layers", "span", "a token sees")
    return ["## Spans", "", *_table(heads, rows), "", "```", plan_text(plan), "```", ""]


def _proofs(exported: Any) -> list[str]:
    lines = [proof.words() for proof in (exported.proof, exported.vllm) if proof is not None]
    if exported.vllm is None and exported.architecture == "LlamaForCausalLM":
        lines.append("vLLM: not run on this folder when it was written.")
    return ["## Proved when it was written", "", *(f"- {line}" for line in lines), ""]


def _serving(exported: Any, name: str) -> list[str]:
    return [
        "## Serve it",
        "",
        "transformers:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        "```",
        "",
        *_vllm(exported, name),
        "",
        *_warning(exported),
        "",
    ]


def _warning(exported: Any) -> list[str]:
    if exported.model_type == "gpt_neo":
        return [
            "> **Other software:** whatever does not read `attention_layers` and `window_size` would give every layer",
            "> full attention, or a window of 256, without a word.",
        ]
    return [
        "> **Do not serve it with SGLang or llama.cpp.** Their Llama, Mistral and Qwen ignore layer types and give all",
        "> layers full attention, without a word: other answers, and the memory of a full KV cache. The same holds for",
        "> whatever does not say that it reads `layer_types`.",
    ]


def _vllm(exported: Any, name: str) -> list[str]:
    if exported.architecture == "LlamaForCausalLM":
        return ["vLLM:", "", "```sh", f"vllm serve {name}", "```"]
    if exported.model_type == "ministral":
        return ["vLLM: export the model again with `--to vllm`, which names a class that vLLM has."]
    if exported.model_type == "gpt_neo":
        return ["vLLM: it has no class for this family."]
    return [
        "vLLM, through the classes of transformers; its own ones of this family would refuse the layer types or ignore",
        "them:",
        "",
        "```sh",
        f"vllm serve {name} --model-impl transformers",
        "```",
    ]


def _training(recipe: dict[str, Any]) -> list[str]:
    if not recipe:
        return []
    data, training = recipe["data"], recipe.get("training") or {}
    rows = [
        ("documents", _documents(data.get("documents"))),
        ("tokens a sequence", data.get("lengths")),
        ("steps", training.get("steps")),
        ("learning rate", training.get("learning_rate")),
        ("plan", _short(recipe.get("plan"))),
    ]
    known = ((name, f"`{value}`") for name, value in rows if value is not None)
    return ["## Training", "", *_table(("what", "value"), known), ""]


def _documents(found: Any) -> str | None:
    """Where the documents came from: a path or a hub id."""
    place = found.get("id") if isinstance(found, dict) else found
    return None if place is None else _place(place)


def _short(value: Any) -> str | None:
    return None if value is None else value if isinstance(value, str) else json.dumps(value)
