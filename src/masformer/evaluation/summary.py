"""Summaries of long documents: written by a model, or taken from the document's beginning, and scored by ROUGE.

    for pair in read_pairs("rfc-summaries.jsonl"):
        made = summarise(model, tokenizer, pair.text, length=8192)
        rouge(pair.summary, made.text)["rougeL"], rouge(pair.summary, lead(pair.text))["rougeL"]

A model that was never taught to summarise scores below `lead`, the usual baseline; both are given for that reason.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..data.documents import json_lines
from ..data.filler import beginning
from ..errors import InputError
from ..models.positions import check_positions
from ..models.selfcheck import evaluating
from .scoring import continued

INSTRUCTION = "\n\nSummary of the document above in a few sentences:\n"
"""What stands between the document and its summary."""
KINDS = ("rouge1", "rouge2", "rougeL")


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A document and what a person wrote as its summary."""

    id: str
    text: str
    summary: str


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """What a model wrote.

    prompt_tokens: of the document as far as it was read, and the instruction.
    cut: whether the document had more tokens than were read.
    """

    text: str
    prompt_tokens: int
    cut: bool


def summarise(
    model: PreTrainedModel, tokenizer: Any, text: str, *, length: int, new_tokens: int = 96, beams: int = 1
) -> Summary:
    """A summary of `text` in at most `new_tokens` tokens, up to the model's end token; greedy with one beam.

    The prompt is what the tokenizer puts before every text, the document and `INSTRUCTION`. Together with
    `new_tokens` it has at most `length` tokens: of a longer document the first tokens are read, and `cut` says so.

    Raises:
        InputError: an empty text, a length beyond the model's positions or without room for the document,
            no new tokens or beams.
    """
    if new_tokens < 1 or beams < 1:
        raise InputError(f"new tokens and beams must be at least 1, got {new_tokens} and {beams}")
    check_positions(model.config, length)
    ids, cut = _prompt(tokenizer, text, length - new_tokens)
    with evaluating(model):
        (made,) = continued(model, tokenizer, torch.tensor([ids]), new_tokens, beams)
    return Summary(made.strip(), len(ids), cut)


def check_room(tokenizer: Any, length: int, new_tokens: int) -> None:
    """Refuse what `summarise` could not do with any document: no room for one, or no package to score it with."""
    _prompt(tokenizer, "a", length - new_tokens)
    _scorer()


def _prompt(tokenizer: Any, text: str, most: int) -> tuple[list[int], bool]:
    """At most so many token ids, and whether the document was cut for that."""
    if not text.strip():
        raise InputError("the document is empty: there is nothing to summarise")
    document, instruction = tokenizer([text, INSTRUCTION], add_special_tokens=False, verbose=False)["input_ids"]
    start = beginning(tokenizer)
    room = most - len(start) - len(instruction)
    if room < 1:
        raise InputError(
            f"{most} tokens for a document and the instruction ({len(start) + len(instruction)} tokens) leave the "
            "document none: take a greater length or fewer new tokens"
        )
    return start + document[:room] + instruction, len(document) > room


def lead(text: str, words: int = 75) -> str:
    """The first words of a document, as a summary that takes no model."""
    return " ".join(text.split()[:words])


def rouge(reference: str, candidate: str) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of a candidate, 0 to 1: F1 of words, of pairs of words, and of the longest common
    subsequence over the whole text (Lin 2004; the package rouge-score, with Porter's stemmer). Case counts nothing,
    and every letter that is not a to z or a digit separates words: for English only.

    Raises:
        InputError: rouge-score is not installed.
    """
    scores = _scorer().score(reference, candidate)
    return {kind: float(scores[kind].fmeasure) for kind in KINDS}


@functools.cache
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise InputError("summaries need rouge-score: pip install 'masformer[eval]'") from error
    return RougeScorer(list(KINDS), use_stemmer=True)


def read_pairs(path: Path | str) -> list[Pair]:
    """The pairs of a `.jsonl` file, or of all in a folder by name: an object a line, with strings `text` and `summary`.

    The id is the field `id`, else `FILE:LINE`. Empty lines are passed over.

    Raises:
        InputError: nothing there, a file of another kind or without pairs, a line that is not UTF-8 or JSON, a field
            that is missing, empty or no string; file and line are named.
    """
    path = Path(path)
    try:
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files or any(file.suffix.lower() != ".jsonl" for file in files):
            raise InputError(f"{path} is no .jsonl file, nor a folder of these")
        pairs = {file: [_pair(*line) for line in json_lines(file)] for file in files}
    except OSError as error:
        raise InputError(f"cannot read {error.filename or path}: {error.strerror}") from error
    for file, found in pairs.items():
        if not found:
            raise InputError(f'{file} holds no pairs: give a line {{"text": ..., "summary": ...}} for each')
    return [pair for found in pairs.values() for pair in found]


def _pair(record: Any, where: str, default_id: str) -> Pair:
    values = record if isinstance(record, dict) else {}
    for name in ("text", "summary"):
        value = values.get(name)
        if not isinstance(value, str) or not value.strip():
            raise InputError(f'{where} has no "{name}", or one that is empty or no string')
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise InputError(f'{where} has half a surrogate pair in its "{name}", which no tokenizer takes')
    own_id = values.get("id")
    return Pair(default_id if own_id is None else str(own_id), values["text"], values["summary"])
