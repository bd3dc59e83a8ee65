"""Writes docs/families.md from the families and their proofs: `make docs`; test_families.py holds the file to it."""

from __future__ import annotations

import inspect

from masformer.models.families import FAMILIES, native_plan
from masformer.models.positions import methods_for
from masformer.models.spanned import ATTENTION_FRONTS

from .helpers import config_of
from .test_families import PROOFS

HONOURED = {
    "cohere2": "full layers without RoPE",
    "exaone4": "full layers without RoPE",
    "gemma2": "soft-capping of scores",
    "gemma3_text": "RoPE by layer type",
    "gpt_neo": "unscaled scores, made in float32",
    "gpt_oss": "learned sink logits",
    "granite": "its own scale of scores",
    "granitemoe": "its own scale of scores",
    "olmo3": "RoPE by layer type",
    "smollm3": "layers without RoPE",
}
"""What a family does beside plain attention; the proof `mixed` compares with the parent, which does it."""
NATIVE = {
    "full": "full",
    "sliding_window": "one window (`sliding_window`)",
    "layer_types": "by layer (`layer_types`, `sliding_window`)",
    "attention_layers": "by layer (`attention_types`, `window_size`)",
}


def page() -> str:
    rows = []
    for name, family in sorted(FAMILIES.items()):
        config = config_of(name)
        assert len(native_plan(config)) == config.num_hidden_layers
        reached = "one method of its attention" if name in ATTENTION_FRONTS else "attention interface"
        positions = "learned" if family.table else "RoPE"
        methods = ", ".join(methods_for(config)) or "scaled already: none"
        rows.append(
            f"| {name} | {reached} | {NATIVE[family.native]} | {positions}: {methods} | {HONOURED.get(name, '')} |"
        )
    proofs = [f"- **{name}**: {inspect.cleandoc(proof.__doc__ or '')}." for name, proof in PROOFS.items()]
    return "\n".join(
        [
            "# Families",
            "",
            "This page is written by `make docs` from `tests/models/test_families.py`, and a test fails where it is "
            "not what that file proves. Names are transformers' `model_type`; SmolLM and SmolLM2 are `llama`, Pythia "
            "is `gpt_neox`, the paper's GPT-Neo is `gpt_neo`. Every other type is refused by name, with the reason.",
            "",
            f"Every one of the {len(FAMILIES)} families passes every proof below, on a tiny random model of its own "
            "config class with biases, norms and native spans:",
            "",
            *proofs,
            "",
            "Conversion changes spans and nothing else: a layer keeps the RoPE (or its absence) that the parent gives "
            "it, also where a plan makes a sliding layer full. Bit-equality holds with torch's kernels everywhere; "
            "families whose own attention is written out (gemma2, gpt_neo, gpt_oss) are bit-equal up to 512 tokens, "
            "and beyond that agree to rounding, since queries are then computed 512 at a time. Expert mixtures are "
            "traced by `torch.compile` with the `grouped_mm` experts; transformers' plain loop over experts cannot be, "
            "converted or not. With padding or packed documents `torch.compile` breaks the graph once, where documents "
            "are told apart, and the logits are the same.",
            "",
            "| model type | reached by | native spans | positions and how they can be extended | honoured beside |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    print(page(), end="")
