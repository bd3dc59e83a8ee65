"""What test_processes.py lets each of two processes do: `python -m torch.distributed.run ... FOLDER`."""

import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import masformer
from masformer.data.sequences import Sequence, Sequences
from masformer.models.convert import convert
from masformer.models.families import decoder_of
from masformer.models.tokenizer import quiet
from masformer.training import trainer
from masformer.training.prepare import prepare
from masformer.training.run import train
from masformer.training.trainer import collate, objective_of

from .made import recipe

UNEQUAL: dict[str, Any] = {"data": {"mode": "single"}, "training": {"steps": 6}, "evaluation": {"sequences": 3}}
"""Ends of documents are padded, so the sequences of a step hold unequal numbers of tokens."""


def trained(folder: Path, name: str, stop_rank_one_at: int | None = None) -> dict[str, Any]:
    """A run of UNEQUAL; the second rank alone may get a SIGTERM, after its second sequence of some step."""
    if stop_rank_one_at is not None and dist.get_rank() == 1:
        reads = 0
        sequence = trainer.Numbered.__getitem__

        def counted(self: Any, index: int) -> Any:
            nonlocal reads
            reads += 1
            if reads == 2 * stop_rank_one_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return sequence(self, index)

        trainer.Numbered.__getitem__ = counted  # type: ignore[method-assign]
        try:
            return train(recipe(folder, folder / name, **UNEQUAL), say=lambda words: None)
        finally:
            trainer.Numbered.__getitem__ = sequence  # type: ignore[method-assign]
    return train(recipe(folder, folder / name, **UNEQUAL), say=lambda words: None)


def own_mean(hidden: Any, labels: Any, head: Any, *, total: Any, **kwargs: Any) -> Any:
    """The known bug: every rank divides by its own tokens."""
    own = (labels[:, 1:] >= 0).sum() * dist.get_world_size() * 2
    return chunked(hidden, labels, head, total=own, **kwargs)


chunked = trainer.chunked_loss


def predicted(sequence: Sequence) -> int:
    return int((sequence.labels[1:] >= 0).sum())


def unequal(sequences: Sequences) -> list[Sequence]:
    """The first two neighbours that hold unequal numbers of tokens."""
    pairs = itertools.pairwise(map(sequences.sequence, range(100)))
    return list(next(pair for pair in pairs if predicted(pair[0]) != predicted(pair[1])))


def sharded(folder: Path) -> dict[str, Any]:
    """One step by FSDP2: the loss of both ranks together and all gradients."""
    prepared = prepare(recipe(folder, folder / "fsdp", **UNEQUAL))
    model: Any = convert(masformer.load(str(folder / "model")), prepared.plan).train()
    rank, world = dist.get_rank(), dist.get_world_size()
    with objective_of(model):
        for layer in decoder_of(model).layers:
            fully_shard(layer)
        fully_shard(model)
        pair = unequal(prepared.train)
        losses = model(**collate([pair[rank]]), total=torch.tensor(sum(map(predicted, pair))))
        (losses.loss * world).backward()
        loss = losses.loss.detach().clone()
        dist.all_reduce(loss)
        gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return {"loss": float(loss), "gradients": gradients}


def main(folder: Path) -> None:
    quiet()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"ddp": trained(folder, "ddp")}
    results["stopped"] = trained(folder, "stopped", stop_rank_one_at=3)
    trainer.chunked_loss = own_mean
    results["wrong"] = trained(folder, "wrong")
    trainer.chunked_loss = chunked
    fsdp = sharded(folder)
    if dist.get_rank() == 0:
        torch.save(fsdp, folder / "fsdp.pt")
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
