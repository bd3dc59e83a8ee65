"""Models built by hand of which one knows the layers that carry recall: a GPT-2 without positions, of one head.

Its tokens are facts "x goes with y" of two tables, a question about an x, answers, filler, and a first token. Every
kind of information has dimensions of its own (`PARTS`): a layer of S compares what is asked with the facts' x, and
copies the y that goes with it to where the next layer of S, or the head, reads it. Where nothing matches, it looks at
the first token, which says nothing.

The facts lie further back than the local span, so recall needs all of S full. The other layers attend as well:
`BAITS` look at the facts wherever they are and tell, ever so slightly, which answers occur at all; the rest attend at
random and write what nobody reads. So attention that reaches far is no sign of S, and with two hops neither is
what a layer does for the answer alone: one layer of S without the other does nothing.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from masformer.data.sequences import IGNORED
from masformer.selection.probes import DOCUMENTS, Probe, recall_probe
from masformer.spans import Full, SpanPlan, Window

NAMES, LAYERS, TOKENS, QUESTIONS = 8, 7, 64, 4
S = {1: (4,), 2: (1, 4)}
"""The layers that carry recall, by the number of hops."""
BAITS = (0, 2, 5)
LOCAL = Window(8, sinks=1)

PARTS = ("asked", "x1", "y1", "found", "x2", "y2", "answer")
FLAGS = ("first", "question", "fact", "plus", "minus")
JUNK = 19
WIDTH = len(PARTS) * NAMES + len(FLAGS) + JUNK
HEIGHT = 10.0
"""Of a pair of dimensions, one up and one down, that all tokens have: the norm hardly changes whatever is written."""
MATCH, REST, SHARP, BAIT = 8.0, 5.0, 8.0, 0.25
"""Score of a fact that matches and of the first token; logit of an answer; how much of the facts' ys a bait writes."""

FIRST, FILLER = 0, range(1, 9)
QUESTION = range(9, 9 + NAMES)
ANSWER = range(QUESTION.stop, QUESTION.stop + NAMES)
TABLES = [range(ANSWER.stop + table * NAMES**2, ANSWER.stop + (table + 1) * NAMES**2) for table in range(2)]
VOCABULARY = TABLES[1].stop


def part(name: str) -> slice:
    at = PARTS.index(name) * NAMES
    return slice(at, at + NAMES)


def flag(name: str) -> int:
    return len(PARTS) * NAMES + FLAGS.index(name)


def planted(hops: int) -> GPT2LMHeadModel:
    """With two hops the answer is what the second table has for what the first one has for what is asked."""
    torch.manual_seed(0)
    sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 1, "n_positions": TOKENS}
    no_dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": FIRST, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, **tokens, tie_word_embeddings=False)).eval()
    unit = math.sqrt(WIDTH / 2) / HEIGHT  # what the norm makes of 1
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        model.transformer.wte.weight.copy_(_embedding())
        model.lm_head.weight.zero_()
        for name, token in enumerate(ANSWER):
            model.lm_head.weight[token, part("answer").start + name] = SHARP / unit
            model.lm_head.weight[token, flag("question")] = SHARP / unit
        for layer, block in enumerate(model.transformer.h):
            block.mlp.c_proj.weight.mul_(0.05)
            query, key, value = _attention(hops, layer, torch.Generator().manual_seed(layer))
            scale = math.sqrt(WIDTH) / unit**2
            block.attn.c_attn.weight.copy_(torch.cat([query * scale, key, value / unit], dim=1))
            block.attn.c_proj.weight.copy_(torch.eye(WIDTH))
    return model


def _embedding() -> Tensor:
    table = torch.zeros(VOCABULARY, WIDTH)
    table[:, flag("plus")], table[:, flag("minus")] = HEIGHT, -HEIGHT
    table[FIRST, flag("first")] = 1
    for name, token in enumerate(QUESTION):
        table[token, part("asked")][name] = 1
        table[token, flag("question")] = 1
    for number, tokens in enumerate(TABLES, start=1):
        for pair, token in enumerate(tokens):
            x, y = divmod(pair, NAMES)
            table[token, part(f"x{number}")][x] = table[token, part(f"y{number}")][y] = 1
            table[token, flag("fact")] = 1
    return table


def _attention(hops: int, layer: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """What a layer makes of a token: its query, key and value, which is written as it is; `[width, width]` each."""
    query, key, value = torch.zeros(3, WIDTH, WIDTH)
    junk = slice(WIDTH - JUNK, WIDTH)
    name = torch.eye(NAMES)
    if layer in S[hops]:
        first, last = layer == S[hops][0], layer == S[hops][-1]
        table = 1 if first else 2
        query[part("asked" if first else "found"), :NAMES] = MATCH * name
        query[flag("plus"), NAMES] = REST / HEIGHT
        key[part(f"x{table}"), :NAMES] = name
        key[flag("first"), NAMES] = 1
        value[part(f"y{table}"), part("answer" if last else "found")] = name
    elif layer in BAITS:
        query[flag("plus"), 0] = MATCH / HEIGHT
        key[flag("fact"), 0] = 1
        value[part(f"y{hops}"), part("answer")] = BAIT * name
        value[:, junk] = torch.randn(WIDTH, JUNK, generator=random) / 20
    else:
        query[:-JUNK, :NAMES] = torch.randn(WIDTH - JUNK, NAMES, generator=random) / 3
        key[:-JUNK, :NAMES] = torch.randn(WIDTH - JUNK, NAMES, generator=random) / 3
        value[:, junk] = torch.randn(WIDTH, JUNK, generator=random) / 20
    return query, key, value


@dataclasses.dataclass(frozen=True)
class Sequence:
    input_ids: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Items:
    """Facts, filler, and questions with their answers: as `data.recall.RecallSequences`, without end."""

    hops: int

    def sequence(self, number: int) -> Sequence:
        drawn = np.random.default_rng([self.hops, number])
        ids = drawn.integers(FILLER.start, FILLER.stop, TOKENS)
        ids[0] = FIRST
        tables = [drawn.permutation(NAMES), drawn.permutation(NAMES)]
        few = tables[self.hops - 1] // 2 * 2  # half of the names are answers
        tables[self.hops - 1] = few
        facts = [token[x * NAMES + int(y)] for token, ys in zip(TABLES, tables, strict=True) for x, y in enumerate(ys)]
        ids[1 + drawn.permutation(24)[: len(facts)]] = facts
        labels = np.full(TOKENS, IGNORED)
        for at, asked in zip(range(TOKENS - 2 * QUESTIONS, TOKENS, 2), drawn.permutation(NAMES), strict=False):
            found = tables[0][asked] if self.hops == 1 else tables[1][tables[0][asked]]
            ids[at : at + 2] = QUESTION[asked], ANSWER[found]
            labels[at + 1] = ids[at + 1]
        return Sequence(ids, labels)


def probes(hops: int, count: int = 3) -> list[Probe]:
    """Recall items, and a document made like them, of which the second half is predicted."""
    items = Items(hops)
    ids = torch.from_numpy(items.sequence(10_000).input_ids)
    document = Probe(DOCUMENTS, ids, torch.arange(TOKENS // 2, TOKENS))
    return [*(recall_probe(items, number) for number in range(count)), document]


def parent() -> SpanPlan:
    return SpanPlan((Full(),) * LAYERS)
