"""Items of long-range tasks scored by what the model thinks of the right answer, and by what it says itself.

    for result in score(model, tokenizer, items, batch=4): result.score, result.rank

Items of equal length run together, without padding: neither batches nor the order change a score beyond rounding.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..data.items import Item
from ..errors import InputError
from ..models.head import Head
from ..models.positions import check_positions
from ..models.selfcheck import evaluating


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """What one item gave. All but `score` of an item with several references, and `text`, are with the answers given
    (teacher forcing): every answer token is predicted after the right ones before it.

    task, depth: those of the item.
    score: 0 to 1. For an item with several references, the share of them that the generated text holds, upper and
        lower case alike (`string_match_all` of RULER, arXiv 2404.06654). For any other, the share of its parts of
        which every token was the most probable one; with a single part that is whether greedy generation gives the
        answer, token for token.
    log_probability: nats of the tokens of all parts together.
    rank: the mean over these tokens of the place of each in the order of the logits, 1 the best; tokens with the
        same logit share the middle of their places.
    right: for each part, whether every token was the most probable one.
    text: what was generated; None for an item without several references.
    """

    task: str
    depth: float | None
    score: float
    log_probability: float
    rank: float
    right: tuple[bool, ...]
    text: str | None = None


@torch.no_grad()
def score(
    model: PreTrainedModel,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    batch: int = 1,
    progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """The scores of `items`, in their order, in evaluation mode.

    Args:
        batch: how many items run at once at most, of those that are equally long.
        progress: called after every batch with its number of tokens; they add up to `work(items)`.

    Raises:
        InputError: an item that is beyond the model's positions, or would be with all its room; an empty part, a
            batch below 1, a head that is no plain linear layer, a log-probability that is not a number.
    """
    if batch < 1:
        raise InputError(f"a batch holds at least 1 item, got {batch}")
    for item in items:
        _check(model, item)
    head = Head.of(model)
    found: dict[int, Score] = {}
    texts: dict[int, str] = {}
    with evaluating(model):
        for numbers in _batches([len(item.ids) for item in items], batch):
            found |= zip(numbers, _forced(model, head, [items[number] for number in numbers]), strict=True)
            _tell(progress, sum(len(items[number].ids) for number in numbers))
        for numbers in _batches([(len(i.prompt), i.room) if _in_words(i) else None for i in items], batch):
            prompts = torch.tensor([items[number].prompt for number in numbers])
            texts |= zip(numbers, continued(model, tokenizer, prompts, items[numbers[0]].room), strict=True)
            _tell(progress, sum(items[number].length for number in numbers))
    return [_with_text(found[number], item, texts.get(number)) for number, item in enumerate(items)]


def work(items: Sequence[Item]) -> int:
    """How many tokens `score` runs the model on: answers given, and prompts and rooms where text is generated."""
    return sum(len(item.ids) + (item.length if _in_words(item) else 0) for item in items)


@torch.no_grad()
def continued(model: PreTrainedModel, tokenizer: Any, prompts: Tensor, new_tokens: int, beams: int = 1) -> list[str]:
    """What the model says after prompts `[batch, tokens]` without padding: at most `new_tokens` tokens, up to the
    model's end token, as text without special tokens. Greedy, or a beam search with more than one beam, without any of
    the penalties and bans that a model's own generation config may bring.
    """
    config: Any = model.generation_config
    end = config.eos_token_id if config is not None else None
    ends = [] if end is None else list(end) if isinstance(end, list | tuple) else [end]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    prompts = prompts.to(model.device)
    before = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=ends or None)  # else what is unset here is the model's own
    try:
        out: Any = model.generate(  # type: ignore[operator]
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens,
            num_beams=beams,
            do_sample=False,
            pad_token_id=pad,
            return_dict_in_generate=True,
        )
    finally:
        model.generation_config = before
    rows = out.sequences[:, prompts.shape[1] :].tolist()
    cut = [next((row[:at] for at, token in enumerate(row) if token in ends), row) for row in rows]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in cut]


def _in_words(item: Item) -> bool:
    """Whether several answers are asked for, which may come in any order: only generated text can be scored then."""
    return len(item.references) > 1


def _check(model: PreTrainedModel, item: Item) -> None:
    borders = [border for part in item.parts for border in part]
    if not borders or borders[0] < 1 or borders[-1] > len(item.ids) or any(low >= high for low, high in item.parts):
        raise InputError(
            f"an item of {item.task} has the parts {item.parts} in {len(item.ids)} tokens: nothing to score"
        )
    check_positions(model.config, max(len(item.ids), item.length))


def _batches(kinds: Sequence[Hashable], size: int) -> Iterator[list[int]]:
    """The numbers of the items of one kind, at most `size` at a time; those of kind None are in no batch."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number, kind in enumerate(kinds):
        if kind is not None:
            groups[kind].append(number)
    for numbers in groups.values():
        for at in range(0, len(numbers), size):
            yield numbers[at : at + size]


def _forced(model: PreTrainedModel, head: Head, items: Sequence[Item]) -> list[Score]:
    """Scores of items of one length by one forward with the answers given, as if none had references."""
    ids = torch.tensor([item.ids for item in items], device=model.device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return [_scored(head, *row) for row in zip(items, ids, hidden, strict=True)]


def _scored(head: Head, item: Item, ids: Tensor, hidden: Tensor) -> Score:
    """One item by ids `[tokens]` and hidden states `[tokens, hidden]`; the head runs on those before the answers."""
    places = torch.cat([torch.arange(low, high) for low, high in item.parts]).to(ids.device)
    logits, wanted = head(hidden[places - 1]).float(), ids[places, None]
    log_p = float(logits.log_softmax(-1).gather(1, wanted).double().sum())
    if not abs(log_p) < float("inf"):  # also catches NaN
        raise InputError(f"an answer of {item.task} has a log-probability of {log_p}: the model is not usable")
    logit = logits.gather(1, wanted)
    ranks = 1 + (logits > logit).sum(1) + ((logits == logit).sum(1) - 1) / 2
    greedy = (logits.argmax(1) == wanted[:, 0]).split([high - low for low, high in item.parts])
    right = tuple(bool(part.all()) for part in greedy)
    return Score(item.task, item.depth, sum(right) / len(right), log_p, float(ranks.double().mean()), right)


def _with_text(forced: Score, item: Item, text: str | None) -> Score:
    if text is None:
        return forced
    found = sum(reference.lower() in text.lower() for reference in item.references)
    return dataclasses.replace(forced, score=found / len(item.references), text=text)


def _tell(progress: Callable[[int], None] | None, tokens: int) -> None:
    if progress is not None:
        progress(tokens)
