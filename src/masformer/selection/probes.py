"""What plans are measured on while they are chosen: recall items and documents, as token ids and places to predict.

    items = recall_sequences(tokenizer, documents, folder, length=2048, seed=0)
    probes = [recall_probe(items, number) for number in range(8)]
    probes += document_probes(tokenizer, documents, length=2048, count=2)

The recall items are those of training (`data/recall.py`), in wording, keys and kinds of key unlike any task of the
evaluation (`data/generators.py`): what is chosen here can be tried on those without having been chosen by them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.corpus import Corpus
from ..data.documents import Document
from ..data.recall import RecallSequences
from ..data.sequences import IGNORED
from ..evaluation.texts import cut_documents

DOCUMENTS, RECALL = "documents", "recall"


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """One text that plans are measured on.

    kind: "documents" or "recall". ids: `[tokens]`. places: those of `ids` that are predicted, ascending, none is 0.
    """

    kind: str
    ids: Tensor
    places: Tensor

    @property
    def key(self) -> str:
        """The same for the same tokens and places."""
        parts = [self.kind.encode(), *(x.numpy().astype("<i8").tobytes() for x in (self.ids, self.places))]
        return hashlib.sha256(b"|".join(parts)).hexdigest()[:24]


def recall_sequences(
    tokenizer: Any, documents: Sequence[Document], folder: Path, *, length: int, seed: int
) -> RecallSequences:
    """Recall items without end, their facts hidden in these documents, whose tokens are kept in `folder`."""
    corpus = Corpus.build(documents, tokenizer, folder, eos=False)
    return RecallSequences(tokenizer, corpus, length, seed=seed, loss_on="answer")


def recall_probe(sequences: RecallSequences, number: int) -> Probe:
    """Item `number`, of which the tokens of the answers are predicted."""
    sequence = sequences.sequence(number)
    return Probe(
        RECALL, torch.from_numpy(sequence.input_ids), torch.from_numpy(np.flatnonzero(sequence.labels != IGNORED))
    )


def document_probes(tokenizer: Any, documents: Sequence[Document], *, length: int, count: int) -> list[Probe]:
    """The first tokens of the first documents that are long enough, of which the second half is predicted: before
    it, spans differ least.

    Raises:
        InputError: no document has so many tokens.
    """
    cut = cut_documents(tokenizer, documents, length=length, items=count)
    return [Probe(DOCUMENTS, ids, torch.arange(length // 2, length)) for ids in cut.ids]
