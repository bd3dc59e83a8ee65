"""RoPE that vLLM computes as transformers does; read by exports and by the vLLM plugin, so it needs neither."""

from __future__ import annotations

from typing import Any

from ..errors import InputError

FIELDS = {
    "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
    "beta_fast", "beta_slow",
}  # fmt: skip
"""What vLLM's Llama reads of `rope_parameters` as transformers does, with the types default, linear, llama3, yarn."""


def refuse_for_vllm(rope: dict[str, Any], way_out: str) -> None:
    """Raise InputError for positions that vLLM would compute otherwise.

    Args:
        rope: `rope_parameters` of a config.
        way_out: what to do instead, for the message.
    """
    kind = rope.get("rope_type", "default")
    odd = sorted(name for name, value in rope.items() if name not in FIELDS and value is not None)
    if kind not in ("default", "linear", "llama3", "yarn") or odd:
        what = f"{odd[0]} in its RoPE" if odd else f"RoPE of type {kind!r}"
        raise InputError(f"a model with {what} cannot be served by vLLM, which computes it otherwise: {way_out}")
