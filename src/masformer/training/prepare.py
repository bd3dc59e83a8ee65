"""Everything about a run that can be known before its weights are loaded: data, plan, cost, and whether it fits.

prepared = prepare(recipe)
prepared.facts()            # what `masformer train --dry-run` prints
prepared.refuse_too_large()
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedConfig

from ..data.corpus import Corpus, Counts
from ..data.mixture import Mixture
from ..data.packing import CorpusSequences
from ..data.recall import RecallSequences
from ..data.sequences import Lengths, Sequences, length_at
from ..errors import InputError, ResourceError
from ..files import digest
from ..models.checkpoint import load_config, weights_digest
from ..models.families import check_length, native_plan, shape_of
from ..models.positions import check_positions, extended_config, methods_for
from ..models.tokenizer import load_tokenizer
from ..spans import ModelShape, SpanPlan, cost
from .loss import CHUNK_BYTES
from .recipe import Hub, Recipe

DOCUMENTS, RECALL = "documents", "recall"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A recipe with its data.

    config: of the model with the recipe's positions. parent, plan: the spans that the model has, and is to get.
    train: endless sequences. held_out: the same from documents that are not trained on, by kind.
    corpus, aside: the documents of either.
    """

    recipe: Recipe
    config: PreTrainedConfig
    parent: SpanPlan
    plan: SpanPlan
    tokenizer: Any
    corpus: Corpus
    aside: Corpus
    train: Sequences
    held_out: dict[str, Sequences]

    @functools.cached_property
    def shape(self) -> ModelShape:
        return shape_of(self.config, kv_dtype_bytes=4)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """JSON that two runs share if one can go on where the other stopped."""
        settings = json.loads(self.config.to_json_string())
        for name in ("_name_or_path", "transformers_version", "dtype"):
            settings.pop(name, None)
        return {
            "recipe": self.recipe.decisive(),
            "plan": str(self.plan),
            "model": digest(settings),
            "weights": weights_digest(self.recipe.model, self.config),
            "data": json.loads(json.dumps(self.train.identity)),
        }

    def flops(self, length: int) -> float:
        """Of training on one sequence of so many tokens, the parent's forward included where it teaches."""
        taught = cost(self.shape, self.parent, length).training_flops.total / 3 if self.recipe.training.distill else 0
        return cost(self.shape, self.plan, length).training_flops.total + taught

    def facts(self) -> dict[str, Any]:
        """What the run will read, compute and need; JSON."""
        training = self.recipe.training
        count = training.steps * training.batch
        firsts = range(0, count, training.batch)  # the first sequence of every step
        lengths = collections.Counter(length_at(self.train.lengths, first) for first in firsts)
        parent = {length: cost(self.shape, self.parent, length).training_flops.total for length in lengths}
        return {
            "model": self.recipe.model,
            "plan": str(self.plan),
            "full_layers": list(self.plan.full_layers),
            "steps": training.steps,
            "tokens": training.batch * sum(length * steps for length, steps in lengths.items()),
            "longest": max(lengths),
            "documents": _counted(self.corpus.counts),
            "held_out": _counted(self.aside.counts),
            "read": self._read(count),
            "flops": training.batch * sum(self.flops(length) * steps for length, steps in lengths.items()),
            "flops_of_the_parent": training.batch * sum(parent[length] * steps for length, steps in lengths.items()),
            **self.sizes(),
        }

    def _read(self, count: int) -> dict[str, Any]:
        """How much of each kind the first `count` sequences hold."""
        parts = self.train.parts if isinstance(self.train, Mixture) else {DOCUMENTS: self.train}
        counts = self.train.counts(count) if isinstance(self.train, Mixture) else {DOCUMENTS: count}
        read: dict[str, Any] = {f"{name}_sequences": number for name, number in counts.items()}
        documents = parts[DOCUMENTS]
        assert isinstance(documents, CorpusSequences)
        return {**read, **dataclasses.asdict(documents.totals(counts[DOCUMENTS]))}

    def sizes(self) -> dict[str, int]:
        """Bytes: estimated memory of one process at its peak, and the size of a checkpoint.

        Memory is that of weights, gradients and AdamW's two moments (float32, 16 bytes a weight that is trained), the
        parent where it teaches, what the layers keep for the backward pass, and the logits of a chunk.
        """
        training, shape = self.recipe.training, self.shape
        trained, beside = shape.parameters, 0
        if (lora := training.lora) is not None:
            trained = beside = self._lora_parameters(lora.rank) + shape.head_parameters * lora.embeddings
        weights = 4 * (shape.parameters * (2 if training.distill else 1) + beside) + 12 * trained
        tokens = training.micro_batch * max(length for _, length in self.train.lengths)
        number = 2 if training.precision == "bf16" else 4
        kept = KEPT_PER_WIDTH * number * tokens * shape.linear_parameters // (shape.layers * shape.hidden)
        layers = shape.layers
        activations = kept + 4 * layers * tokens * shape.hidden if training.recompute else kept * layers
        return {
            "memory": PROGRAM + weights + activations + LOGIT_COPIES * CHUNK_BYTES,
            "checkpoint": 12 * trained,
        }

    def _lora_parameters(self, rank: int) -> int:
        """About as many as two thin matrices for every square one of that layer's size."""
        shape = self.shape
        return 2 * rank * shape.linear_parameters // shape.hidden

    def refuse_too_large(self) -> None:
        """Raise a ResourceError if memory or disk do not hold the run.

        Raises:
            ResourceError: with what is needed and what there is.
        """
        sizes, gpu = self.sizes(), torch.cuda.is_available()
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine
        free = torch.cuda.mem_get_info()[0] if gpu else psutil.virtual_memory().available // beside
        if sizes["memory"] > free:
            raise ResourceError(
                f"training needs about {sizes['memory'] / 1e9:.1f} GB of {'GPU ' if gpu else ''}memory and "
                f"{free / 1e9:.1f} GB are free: set training.recompute=true, lower training.micro_batch or "
                "data.lengths, or train with training.lora={}"
            )
        folder = Path(self.recipe.output).absolute()
        while not folder.exists():
            folder = folder.parent
        there = len(list(Path(self.recipe.output).glob("checkpoint-*")))
        room = sizes["checkpoint"] * max(1, self.recipe.saving.keep + 1 - there)
        disk = shutil.disk_usage(folder).free
        if room > disk:
            raise ResourceError(
                f"checkpoints need {room / 1e9:.1f} GB of disk at {folder} and {disk / 1e9:.1f} GB are free: "
                "lower saving.keep, or name another output"
            )


KEPT_PER_WIDTH = 2
"""Numbers that a layer keeps for the backward pass, per token and per output of its linear maps (their own results,
norms, rotary and gated products); measured on SmolLM2 (docs/log.md)."""
LOGIT_COPIES = 4
PROGRAM = 600_000_000
"""Bytes of the program itself and its libraries."""


def prepare(recipe: Recipe, progress: Callable[[Counts], None] | None = None) -> Prepared:
    """Read config and tokenizer, tokenise the documents or find them again, lay out the sequences.

    Raises:
        InputError, CorruptError, ResourceError: anything that cannot be used as the recipe says.
    """
    config, own = load_config(recipe.model)
    plan = recipe.plan_for(config.num_hidden_layers, own)
    check_length(plan, config)
    _refuse(recipe, config, own)
    if recipe.positions is not None:
        config = extended_config(config, recipe.positions.length, recipe.positions.method)
    lengths = _lengths(recipe)
    longest = max(length for _, length in lengths)
    _check_positions(config, longest)
    tokenizer = load_tokenizer(recipe.model)
    corpus, aside = _corpora(recipe, tokenizer, progress)
    highest = max(corpus.counts.highest, aside.counts.highest)
    if highest >= config.vocab_size:
        raise InputError(f"the tokenizer gives token {highest}, the model has {config.vocab_size}: they do not fit")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    seed, mode = recipe.training.seed, recipe.data.mode
    train: Sequences = CorpusSequences(corpus, lengths, mode=mode, seed=seed, pad_id=pad)
    held_out: dict[str, Sequences] = {DOCUMENTS: CorpusSequences(aside, longest, mode=mode, seed=seed, pad_id=pad)}
    if (share := recipe.data.recall) is not None:
        items = RecallSequences(tokenizer, corpus, lengths, seed=seed, loss_on=share.loss_on)
        train = Mixture({DOCUMENTS: (train, 1 - share.share), RECALL: (items, share.share)}, seed=seed)
        held_out[RECALL] = RecallSequences(tokenizer, aside, longest, seed=seed + 1, loss_on="answer")
    return Prepared(recipe, config, native_plan(config), plan, tokenizer, corpus, aside, train, held_out)


def _refuse(recipe: Recipe, config: PreTrainedConfig, own: SpanPlan) -> None:
    """What training would leave out without a word."""
    if getattr(config, "output_router_logits", False):
        raise InputError(
            f"the config of {recipe.model} asks for the loss of its router (output_router_logits), which is not "
            "computed here: set it to false there"
        )
    if recipe.training.distill and own != native_plan(config):
        raise InputError(f"training.distill needs a parent, and {recipe.model} is converted: name its parent as model")
    if recipe.training.distill:
        check_positions(config, max(length for _, length in _lengths(recipe)))


def _check_positions(config: PreTrainedConfig, longest: int) -> None:
    """Refuse sequences that are longer than the model has positions, with the recipe's own remedy."""
    try:
        check_positions(config, longest)
    except InputError as error:
        if not methods_for(config):
            raise
        either = ", ".join(methods_for(config))
        raise InputError(
            f"{str(error).partition(':')[0]}: lower data.lengths, or set positions={{length: {longest}, method: ...}} "
            f"with a method of {either}"
        ) from error


def _lengths(recipe: Recipe) -> Lengths:
    """The curriculum, counted in sequences."""
    lengths = recipe.data.lengths
    stages = [(0, lengths)] if isinstance(lengths, int) else [(step, length) for step, length in lengths]
    return tuple((step * recipe.training.batch, length) for step, length in stages)


def _corpora(recipe: Recipe, tokenizer: Any, progress: Callable[[Counts], None] | None) -> tuple[Corpus, Corpus]:
    """The documents to train on, and those held out."""
    data = recipe.data

    def build(documents: str | Hub) -> Corpus:
        source = documents.source() if isinstance(documents, Hub) else Path(documents)
        return Corpus.build(source, tokenizer, Path(data.cache), eos=data.end_token, progress=progress)

    corpus = build(data.documents)
    if isinstance(data.held_out, str | Hub):
        return corpus, build(data.held_out)
    return corpus.split(data.held_out, seed=recipe.training.seed)


def _counted(counts: Counts) -> dict[str, int]:
    return {name: value for name, value in dataclasses.asdict(counts).items() if name != "highest"}
