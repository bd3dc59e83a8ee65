"""From texts to token ids: a model's tokenizer, and documents cut to exactly one length.

    tokenizer = load_tokenizer("HuggingFaceTB/SmolLM2-135M-Instruct")
    cut = cut_documents(tokenizer, read_documents("speeches.jsonl"), length=4096, items=10)

Nothing is padded or packed here, and a document that is too short is counted, never used in part.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..data.documents import Document
from ..errors import InputError

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "spiece*", "sentencepiece*", "special_tokens_map.json")
"""What the files of a tokenizer are called in a model folder."""


def quiet() -> None:
    """Turn off transformers' own progress bars and warnings, and the hub's lines on retries, in this process."""
    transformers_logging.set_verbosity(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    transformers_logging.disable_progress_bar()


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model folder or hub id.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    if Path(source).is_dir() and not has_tokenizer(source):
        raise InputError(f"{source} holds no tokenizer: copy the tokenizer files of its parent there")
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # the tokenizers library raises plain Exception for a file that it cannot read
        raise InputError(f"cannot load a tokenizer from {source}: {' '.join(str(error).split())[:300]}") from error


def has_tokenizer(folder: str) -> bool:
    """Whether a folder holds any file of a tokenizer."""
    return any(any(Path(folder).glob(pattern)) for pattern in TOKENIZER_FILES)


@dataclasses.dataclass(frozen=True)
class Cut:
    """Documents of exactly `length` tokens.

    sizes: UTF-8 bytes of the text behind each document's tokens but the first; None for a slow tokenizer.
    short: documents that were passed over for being shorter; `longest` is the longest of these, in tokens.
    """

    length: int
    ids: list[Tensor]
    names: list[str]
    sizes: list[int] | None
    short: int
    longest: int


def cut_documents(tokenizer: Any, documents: Iterable[Document], *, length: int, items: int) -> Cut:
    """The first `length` tokens of the first `items` documents that have as many.

    Raises:
        InputError: no document is long enough.
    """
    fast = bool(tokenizer.is_fast)
    cut = Cut(length, [], [], [] if fast else None, 0, 0)
    short: list[int] = []
    for document in documents:
        if len(cut.ids) == items:
            break
        encoded = tokenizer(document.text, return_offsets_mapping=fast)
        ids = encoded["input_ids"]
        if len(ids) < length:
            short.append(len(ids))
            continue
        cut.ids.append(torch.tensor(ids[:length]))
        cut.names.append(document.id)
        if cut.sizes is not None:
            ends = [end for _, end in encoded["offset_mapping"][:length]]
            cut.sizes.append(len(document.text[ends[0] : max(ends)].encode()))
    longest = max(short, default=0)
    if not cut.ids:
        raise InputError(f"no document has {length:,} tokens; the longest of {len(short)} has {longest:,}")
    return dataclasses.replace(cut, short=len(short), longest=longest)
