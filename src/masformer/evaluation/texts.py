"""Documents cut to exactly one length in tokens.

    tokenizer = load_tokenizer("HuggingFaceTB/SmolLM2-135M-Instruct")
    cut = cut_documents(tokenizer, read_documents("speeches.jsonl"), length=4096, items=10)

Nothing is padded or packed here, and a document that is too short is counted, never used in part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..data.documents import Document
from ..errors import InputError


@dataclasses.dataclass(frozen=True)
class Cut:
    """Documents of one length in tokens, or whole.

    sizes: UTF-8 bytes of the text behind each document's tokens but the first; None for a slow tokenizer.
    short: documents that were passed over for being shorter; `longest` is the longest of these, in tokens.
    """

    ids: list[Tensor]
    names: list[str]
    sizes: list[int] | None
    short: int
    longest: int


def cut_documents(tokenizer: Any, documents: Iterable[Document], *, length: int | None, items: int) -> Cut:
    """The first `length` tokens of the first `items` documents that have as many; None: the documents whole.

    Raises:
        InputError: no document is long enough.
    """
    fast = bool(tokenizer.is_fast)
    cut, least = Cut([], [], [] if fast else None, 0, 0), 2 if length is None else length
    short: list[int] = []
    for document in documents:
        if len(cut.ids) == items:
            break
        encoded = tokenizer(document.text, return_offsets_mapping=fast)
        ids = encoded["input_ids"]
        if len(ids) < least:
            short.append(len(ids))
            continue
        cut.ids.append(torch.tensor(ids[:length]))
        cut.names.append(document.id)
        if cut.sizes is not None:
            ends = [end for _, end in encoded["offset_mapping"][:length]]
            cut.sizes.append(len(document.text[ends[0] : max(ends)].encode()))
    longest = max(short, default=0)
    if not cut.ids:
        raise InputError(f"no document has {least:,} tokens; the longest of {len(short)} has {longest:,}")
    return dataclasses.replace(cut, short=len(short), longest=longest)
