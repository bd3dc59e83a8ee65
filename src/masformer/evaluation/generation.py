"""Generate text, or answers in a conversation, and measure it: tokens, speed, bytes of the KV cache at the end.

    result = generate_text(model, tokenizer, prompt_ids(tokenizer, "Once"), new_tokens=50, show=print_piece)

    conversation = Conversation(model, tokenizer, new_tokens=50)
    result = conversation.answer("What is the capital of France?", show=print_piece)

The model is called as a user would call it, through `generate()` with its default cache.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, TextStreamer

from ..errors import InputError
from ..models.positions import check_positions


@dataclasses.dataclass(frozen=True, slots=True)
class Generated:
    """One generation.

    computed_tokens: those of the prompt that no kept cache held.
    prefill_seconds: until the first new token. decode_seconds: from the first to the last one.
    kv_bytes: storage behind the keys and values of the cache at the end.
    """

    text: str
    prompt_tokens: int
    computed_tokens: int
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
    if chat:
        return chat_ids(tokenizer, [{"role": "user", "content": prompt}])
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise InputError("the prompt has no tokens: give some text")
    return torch.tensor([ids])


def chat_ids(tokenizer: Any, turns: list[dict[str, str]]) -> Tensor:
    """Turns (`role` and `content`) in the tokenizer's chat template, up to the model's answer, as ids `[1, tokens]`.

    Raises:
        InputError: a tokenizer without a chat template, or turns that its template refuses.
    """
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template: use masformer generate, without --chat")
    try:
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    except TemplateError as error:
        raise InputError(f"the tokenizer's chat template refuses this conversation: {error}") from error
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
    check_positions(model.config, ids.shape[1] + new_tokens)
    result, _ = _generate(model, tokenizer, ids, None, new_tokens=new_tokens, temperature=temperature, show=show)
    return result


@dataclasses.dataclass
class Conversation:
    """Turns of a user and a model, the system prompt before them, and the KV cache of what the model has read of them.

    The cache is kept as long as each prompt goes on from exactly the token ids in it. It is never cut back, which a
    cache that is bounded by spans does not allow; where ids differ, all of the prompt is computed anew.

    Args:
        new_tokens: of an answer at most.
        temperature: 0 takes the likeliest token.
        system: what stands before the turns; None leaves that to the chat template.
    """

    model: PreTrainedModel
    tokenizer: Any
    new_tokens: int
    temperature: float = 0.0
    system: str | None = None

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew with no turn but the system prompt."""
        self.turns = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.cache: Any = None
        self.seen: list[int] = []
        """Ids of the tokens in the cache."""

    def answer(self, text: str, show: Callable[[str], None] | None = None) -> Generated:
        """Answer the user's `text`; both become turns. What is interrupted becomes a turn as far as it was said.

        Args:
            show: called with each piece of text as soon as it is whole.

        Raises:
            InputError: more tokens than the model has positions, or turns that the chat template refuses; the
                conversation stays as it was.
        """
        turns, said = [*self.turns, {"role": "user", "content": text}], []
        ids = chat_ids(self.tokenizer, turns)
        check_positions(self.model.config, ids.shape[1] + self.new_tokens)
        goes_on = len(self.seen) < ids.shape[1] and ids[0, : len(self.seen)].tolist() == self.seen
        cache, self.cache, self.seen = self.cache if goes_on else None, None, []  # interrupted, it is out of step

        def hear(piece: str) -> None:
            said.append(piece)
            if show is not None:
                show(piece)

        how: dict[str, Any] = {"new_tokens": self.new_tokens, "temperature": self.temperature, "show": hear}
        try:
            result, out = _generate(self.model, self.tokenizer, ids, cache, **how)
        except KeyboardInterrupt:
            if any(said):
                self.turns = [*turns, {"role": "assistant", "content": "".join(said)}]
            raise
        self.turns = [*turns, {"role": "assistant", "content": result.text}]
        self.cache = out.past_key_values
        self.seen = out.sequences[0, : self.cache.get_seq_length()].tolist()  # the last token was not run
        return result


def _generate(
    model: PreTrainedModel,
    tokenizer: Any,
    ids: Tensor,
    cache: Any,
    *,
    new_tokens: int,
    temperature: float,
    show: Callable[[str], None] | None,
) -> tuple[Generated, Any]:
    """Continue ids, the first of which `cache` may hold; beside the result what transformers returns."""
    prompt, held = ids.shape[1], 0 if cache is None else cache.get_seq_length()
    streamer = _Timed(tokenizer, show)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    ids = ids.to(model.device)
    out: Any = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        num_beams=1,
        num_return_sequences=1,
        use_cache=True,
        streamer=streamer,
        return_dict_in_generate=True,
        **sampling,
    )
    new = out.sequences[0, prompt:]
    result = Generated(
        text=tokenizer.decode(new, skip_special_tokens=True),
        prompt_tokens=prompt,
        computed_tokens=prompt - held,
        new_tokens=len(new),
        prefill_seconds=streamer.times[1] - streamer.times[0],
        decode_seconds=streamer.times[-1] - streamer.times[1],
        kv_bytes=_kv_bytes(out.past_key_values),
    )
    return result, out


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
