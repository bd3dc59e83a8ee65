"""Training steps on transformers' Trainer: what it lacks for long documents, and nothing that it has.

The loss is made by chunks inside the model's forward, so that DDP and FSDP see one call and one scalar; it is the mean
over the tokens of the whole step, whatever the lengths of documents, micro-batches and ranks. Checkpoints are
`checkpoints.py`'s. A step whose gradients are not finite is not taken.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments

from ..data.sequences import Sequence, Sequences, Stream
from ..errors import MasformerError
from ..models.checkpoint import save_adapter
from ..models.fronts import Front, enter, leave
from ..models.head import Head
from .checkpoints import Checkpoints
from .loss import Losses, chunked_loss
from .meter import Meter

METRICS = "metrics.jsonl"
Batch = dict[str, Tensor]


class DivergedError(MasformerError):
    """A loss or gradients that are not finite, or too large: nothing was changed by that step."""


class Objective(Front):
    """In front of a converted causal language model while it is trained: with labels, forward gives its `Losses`."""

    def forward(
        self: Any,
        *args: Any,
        labels: Tensor | None = None,
        total: Tensor | None = None,
        teacher: tuple[Head, Tensor] | None = None,
        distill: float = 0.0,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        hidden = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state
        total = (labels[:, 1:] >= 0).sum() if total is None else total
        return chunked_loss(hidden, labels, Head.of(self), total=total.clamp(min=1), teacher=teacher, weight=distill)


@contextlib.contextmanager
def objective_of(model: PreTrainedModel) -> Any:
    """`model` with `Objective` in front inside the block."""
    enter(model, Objective)
    try:
        yield model
    finally:
        leave(model)


class Numbered(Dataset[Sequence]):
    """The first `count` of endless sequences, for transformers' Trainer."""

    def __init__(self, sequences: Sequences, count: int) -> None:
        self.sequences, self.count = sequences, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sequence:
        return self.sequences.sequence(index)


def collate(batch: list[Sequence]) -> Batch:
    """Tensors `[batch, tokens]`; an attention mask only where one of them has padding."""
    names = ("input_ids", "position_ids", "labels")
    tensors = {name: torch.stack([torch.from_numpy(getattr(one, name)) for one in batch]) for name in names}
    if any(one.attention_mask is not None for one in batch):
        masks = [one.attention_mask for one in batch]
        shape = tensors["labels"][0]
        tensors["attention_mask"] = torch.stack(
            [torch.ones_like(shape) if mask is None else torch.from_numpy(mask) for mask in masks]
        )
    return tensors


class SpanTrainer(transformers.Trainer):
    """Trains a converted model that has `Objective` in front.

    Args:
        train, held_out: sequences by number; of held-out ones the first `evaluation` of each kind, by name.
        teacher: the parent, on the same device, whose KL divergence has the weight `distill`.
        checkpoints: where they go; on the first rank alone.
        adapts: of a model with adapters, what these stand upon.
        meter: counts tokens, time and memory.
        gradient_limit: the largest gradient norm, before clipping, with which a step is taken.
        say: gets every line of metrics.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train: Numbered,
        held_out: Mapping[str, Numbered],
        tokenizer: Any,
        checkpoints: Checkpoints | None,
        meter: Meter,
        gradient_limit: float,
        teacher: PreTrainedModel | None = None,
        distill: float = 0.0,
        adapts: dict[str, Any] | None = None,
        say: Callable[[dict[str, Any]], None] | None = None,
        callbacks: list[transformers.TrainerCallback] | None = None,
    ) -> None:
        super().__init__(
            model,
            args,
            data_collator=collate,
            train_dataset=train,
            eval_dataset=train,  # not read: `evaluate` below goes through `held_out`
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # so that the tokens of the whole step are counted
        self.train_sequences, self.held_out, self.checkpoints, self.meter = train, held_out, checkpoints, meter
        self.tokenizer, self.teacher, self.distill, self.adapts = tokenizer, teacher, distill, adapts
        self.gradient_limit, self.say = gradient_limit, say or (lambda line: None)
        self.evaluated: dict[str, float] = {}
        """What the last evaluation gave."""
        self._scratch: str | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_sequences)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The share of this micro-batch in the mean over the tokens of the step, times the ranks, whose gradients
        are averaged.
        """
        losses = self._losses(model, inputs, num_items_in_batch)
        self.meter.add(inputs["input_ids"], losses)
        return losses.loss * self.accelerator.num_processes

    def _losses(self, model: nn.Module, inputs: Batch, total: Tensor | int | None = None) -> Losses:
        asked: dict[str, Any] = {} if total is None else {"total": torch.as_tensor(total).round().long()}
        if self.teacher is not None and self.distill:
            with torch.no_grad():
                states = {name: value for name, value in inputs.items() if name != "labels"}
                hidden = self.teacher.base_model(**states, use_cache=False).last_hidden_state
            asked |= {"teacher": (Head.of(self.teacher), hidden), "distill": self.distill}
        losses: Losses = model(**inputs, **asked)
        return losses

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient norm before clipping, on every rank the same; this is asked for before every step.

        Raises:
            DivergedError: it is not finite, or beyond the limit.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        value = float(norm)
        if not value <= self.gradient_limit:
            raise DivergedError(
                f"step {self.state.global_step + 1}: the gradient norm is {value:g} (limit {self.gradient_limit:g}) at "
                f"a loss of {self.meter.loss:g}: this step was not taken, and the last checkpoint is good; "
                "lower training.learning_rate, or raise training.gradient_limit if that is normal here"
            )
        return norm

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Nats per predicted token of every kind of held-out sequences, over all ranks."""
        model: nn.Module = self.model_wrapped
        metrics: dict[str, float] = {}
        was, self.teacher = self.teacher, None
        model.eval()
        with self.meter.paused(), torch.no_grad():
            for name, kind in self.held_out.items():
                sums = torch.zeros(2, dtype=torch.float64)
                for first in range(0, len(kind), self.args.world_size):
                    index = first + self.args.process_index
                    one = kind[min(index, len(kind) - 1)]  # all ranks run as often: those of FSDP wait for each other
                    losses = self._losses(model, self._prepare_inputs(collate([one])))
                    if index < len(kind):
                        sums += torch.tensor([float(losses.nats), losses.tokens], dtype=torch.float64)
                nats, tokens = self.accelerator.reduce(sums.to(self.args.device)).tolist()
                metrics[f"eval_{name}_loss"] = nats / max(1.0, tokens)
        self.teacher = was
        model.train()
        self.evaluated = metrics
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds speed, memory and time left, and writes the line to metrics.jsonl too."""
        if "train_runtime" in logs:
            return  # transformers' own summary, which counts from the last resumption on
        if "loss" in logs:
            logs |= self.meter.since_last(self.state.global_step, self.state.max_steps, self.accelerator)
        super().log(logs, start_time)
        if self.is_world_process_zero():
            line = {"step": self.state.global_step, **{name: logs[name] for name in logs if name != "epoch"}}
            with Path(str(self.args.output_dir), METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.say(line)

    def data_after(self, step: int) -> Stream:
        """Where the training sequences stand after so many steps."""
        stream = Stream(self.train_sequences.sequences)
        stream.seek(step * self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size)
        return stream

    def _get_output_dir(self, trial: Any = None) -> str:
        return self._scratch or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Everything into a scratch folder, by all ranks; the first one then gives it its name."""
        with self.meter.paused(), contextlib.ExitStack() as stack:
            folder = None
            if self.checkpoints is not None:
                step = self.state.global_step
                facts = {"data": self.data_after(step).state()}
                folder = stack.enter_context(self.checkpoints.writing(step, facts))
            [self._scratch] = broadcast_object_list([folder and str(folder.parent)])
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._scratch = None
            self.accelerator.wait_for_everyone()
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As transformers does, with the tokenizer, and without a pickle of its arguments.

        A tokenizer that transformers knew of would change the model's config to fit it. An adapter is saved with what
        it was trained upon (`save_adapter`).
        """
        folder = Path(output_dir or str(self.args.output_dir))
        if self.adapts is None:
            super()._save(output_dir, state_dict)
        elif self.is_world_process_zero():
            save_adapter(self.accelerator.unwrap_model(self.model), folder, self.adapts, state_dict)
        if self.is_world_process_zero():
            (folder / "training_args.bin").unlink(missing_ok=True)
            self.tokenizer.save_pretrained(folder)
