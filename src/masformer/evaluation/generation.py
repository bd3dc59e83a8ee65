"""Generate text and measure it: tokens, speed, and the bytes of the KV cache at the end.

    result = generate_text(model, tokenizer, prompt_ids(tokenizer, "Once"), new_tokens=50, show=print_piece)

The model is called as a user would call it, through `generate()` with its default cache.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TextStreamer

from ..errors import InputError
from ..models.positions import check_positions


@dataclasses.dataclass(frozen=True, slots=True)
class Generated:
    """One generation.

    prefill_seconds: until the first new token. decode_seconds: from the first to the last one.
    kv_bytes: storage behind the keys and values of the cache at the end.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    kv_bytes: int

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding alone; None where there was but one token."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "tokens_per_second": self.tokens_per_second}


def prompt_ids(tokenizer: Any, prompt: str, *, chat: bool = False) -> Tensor:
    """The prompt as token ids `[1, tokens]`; with `chat` inside the tokenizer's chat template, as the user's turn.

    Raises:
        InputError: an empty prompt, or a tokenizer without a chat template.
    """
    if not prompt.strip():
        raise InputError("the prompt is empty: give some text")
    if chat and not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template: leave the chat option out")
    if chat:
        turn = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise InputError("the prompt has no tokens: give some text")
    return torch.tensor([ids])


def generate_text(
    model: PreTrainedModel,
    tokenizer: Any,
    ids: Tensor,
    *,
    new_tokens: int,
    temperature: float = 0.0,
    show: Callable[[str], None] | None = None,
) -> Generated:
    """Continue ids `[1, tokens]` by at most `new_tokens`; greedily at temperature 0.

    Args:
        show: called with each piece of text as soon as it is whole.

    Raises:
        InputError: more tokens than the model has positions.
    """
    prompt = ids.shape[1]
    check_positions(model.config, prompt + new_tokens)
    streamer = _Timed(tokenizer, show)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    ids = ids.to(model.device)
    out: Any = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        num_beams=1,
        streamer=streamer,
        return_dict_in_generate=True,
        **sampling,
    )
    new = out.sequences[0, prompt:]
    return Generated(
        text=tokenizer.decode(new, skip_special_tokens=True),
        prompt_tokens=prompt,
        new_tokens=len(new),
        prefill_seconds=streamer.times[1] - streamer.times[0],
        decode_seconds=streamer.times[-1] - streamer.times[1],
        kv_bytes=_kv_bytes(out.past_key_values),
    )


class _Timed(TextStreamer):
    """Notes when the prompt and each token came, and hands the text on in whole pieces."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        if self.show is not None:
            super().put(value)

    def end(self) -> None:
        if self.show is not None:
            super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.show is not None:
            self.show(text)


def _kv_bytes(cache: Any) -> int:
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values) if x is not None]
    return sum(storage.nbytes() for storage in {x.untyped_storage() for x in tensors})
