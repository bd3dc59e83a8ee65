"""A training run from its recipe: begins, or goes on from the newest good checkpoint.

result = train(read_recipe(Path("recipes/smollm2-sotu.yaml")))
model = masformer.load(result["checkpoint"])
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from ..errors import InputError
from ..models.checkpoint import load
from ..models.convert import convert
from ..models.families import native_plan
from ..models.positions import extend
from .checkpoints import Checkpoint, Checkpoints
from .meter import Meter, matmul_peak
from .prepare import Prepared, prepare
from .recipe import Lora, Recipe
from .trainer import METRICS, Numbered, SpanTrainer, objective_of


def train(
    recipe: Recipe,
    *,
    prepared: Prepared | None = None,
    cpu: bool = False,
    say: Callable[[str], None] = print,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train as the recipe says; a run that was cut off goes on where its newest good checkpoint was taken.

    On several processes (torchrun, accelerate launch) call it on each. SIGTERM and a first Ctrl-C end the run after
    the step that is going on, with a checkpoint.

    Args:
        prepared: what `prepare` made of the recipe, if that was done already.
        cpu: train on the CPU, though there may be a GPU.
        say: gets lines of text: what is resumed, which checkpoints were passed over.
        progress: gets every line of metrics.jsonl.

    Returns:
        `step` (how many were done in all), `checkpoint` (a model folder; of a LoRA run an adapter), `signal` (the name
        of the one that ended the run, or None) and `metrics` (the last evaluation).

    Raises:
        InputError, CorruptError, ResourceError: what the recipe asks for cannot be done.
        DivergedError: a gradient that is not finite or too large; the last checkpoint is good.
    """
    prepared = prepare(recipe) if prepared is None else prepared
    output = Path(recipe.output)
    if not any(output.glob("checkpoint-*")):
        prepared.refuse_too_large()  # before anything is written
    output.mkdir(parents=True, exist_ok=True)
    args = _arguments(recipe, cpu)
    with contextlib.ExitStack() as stack:
        checkpoints = found = None
        if args.process_index == 0:
            checkpoints = stack.enter_context(Checkpoints(output, prepared.identity, recipe.saving.keep))
            found = checkpoints.newest(say)
            _keep_metrics(output / METRICS, found.step if found else 0)
            (output / "recipe.json").write_text(recipe.model_dump_json(indent=1), encoding="utf-8")
        [found] = broadcast_object_list([found])
        if found is not None and found.step >= recipe.training.steps:
            return {"step": found.step, "checkpoint": str(found.folder), "signal": None, "metrics": {}}
        if found is not None:
            prepared.refuse_too_large()
            if args.process_index == 0:
                say(f"going on from {found.folder}")
        return _run(recipe, prepared, args, checkpoints, found, progress)


def _run(
    recipe: Recipe,
    prepared: Prepared,
    args: TrainingArguments,
    checkpoints: Checkpoints | None,
    found: Checkpoint | None,
    progress: Callable[[dict[str, Any]], None] | None,
) -> dict[str, Any]:
    """Train to the end, from the beginning or from the checkpoint that was found."""
    set_seed(recipe.training.seed)
    model = _model(recipe, prepared)
    kinds = {name: Numbered(kind, recipe.evaluation.sequences) for name, kind in prepared.held_out.items()}
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    meter = Meter(prepared.flops, matmul_peak(args.device, dtype), args.device)
    args.eval_on_start, args.use_cache = found is None, bool(model.config.use_cache)
    ending = Ending(recipe.training.steps)
    with objective_of(model), ending.listening():
        trainer = SpanTrainer(
            _with_lora(model, recipe.training.lora),
            args,
            train=Numbered(prepared.train, recipe.training.steps * recipe.training.batch),
            held_out=kinds,
            tokenizer=prepared.tokenizer,
            checkpoints=checkpoints,
            meter=meter,
            gradient_limit=recipe.training.gradient_limit,
            teacher=_teacher(recipe, args) if recipe.training.distill else None,
            distill=recipe.training.distill,
            adapts=_stands_upon(recipe, prepared),
            say=progress,
            callbacks=[ending],
        )
        ending.trainer = trainer
        _refuse_shards(trainer)
        if found is not None:
            trainer.data_after(0).load_state(found.facts["data"])  # refuses another place than that of the step
        meter.start(found.step if found else 0)
        trainer.train(resume_from_checkpoint=str(found.folder) if found else None)
    step = trainer.state.global_step
    return {
        "step": step,
        "checkpoint": str(Path(recipe.output, f"checkpoint-{step}")),
        "signal": signal.Signals(ending.signal).name if ending.signal else None,
        "metrics": trainer.evaluated,
    }


def _arguments(recipe: Recipe, cpu: bool) -> TrainingArguments:
    """transformers' words for the recipe's."""
    training, gpu = recipe.training, torch.cuda.is_available() and not cpu
    args = TrainingArguments(
        output_dir=recipe.output,
        max_steps=training.steps,
        per_device_train_batch_size=training.micro_batch,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule if training.schedule != "constant" else "constant_with_warmup",
        warmup_steps=training.warmup_steps,
        optim="adamw_torch",
        weight_decay=training.weight_decay,
        adam_beta1=training.betas[0],
        adam_beta2=training.betas[1],
        max_grad_norm=training.max_gradient_norm,
        bf16=training.precision == "bf16",
        activation_checkpointing=training.recompute,
        seed=training.seed,
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        logging_steps=recipe.logging.every,
        logging_nan_inf_filter=False,
        report_to=list(recipe.logging.to) or "none",
        eval_strategy="steps",
        eval_steps=recipe.evaluation.every,
        save_strategy="steps",
        save_steps=recipe.saving.every,
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )
    args._n_gpu = min(1, args.n_gpu)  # of several the first: transformers would split batches by DataParallel
    args.mixed_precision = "bf16" if args.bf16 else "no"  # what a launcher says would go before the recipe
    if args.parallelism_config is not None:
        raise InputError("tensor, context and sequence parallelism are not supported: use DDP, FSDP or DeepSpeed")
    together = training.micro_batch * args.world_size
    if training.batch % together:
        raise InputError(
            f"training.batch {training.batch} is no multiple of {training.micro_batch} (micro_batch) times "
            f"{args.world_size} processes"
        )
    args.gradient_accumulation_steps = training.batch // together
    return args


def _model(recipe: Recipe, prepared: Prepared) -> PreTrainedModel:
    """The model with its positions and spans, its weights in float32."""
    model = load(recipe.model, dtype=torch.float32)
    if recipe.positions is not None:
        extend(model, recipe.positions.length, recipe.positions.method)
    return convert(model, prepared.plan)


def _teacher(recipe: Recipe, args: TrainingArguments) -> PreTrainedModel:
    """The parent, with spans like its own so that packed documents are kept apart."""
    parent = load(recipe.model, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    parent.requires_grad_(False).to(args.device)  # type: ignore[arg-type]
    return convert(parent, native_plan(parent.config), check=False)


def _with_lora(model: PreTrainedModel, lora: Lora | None) -> Any:
    """The model with adapters, or as it is."""
    if lora is None:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError("training.lora needs peft: pip install peft") from error
    tables = {type(model.get_input_embeddings())}
    whole = [
        name.rpartition(".")[2]
        for name, module in model.base_model.named_modules()
        if (lora.embeddings and type(module) in tables) or (lora.norms and "Norm" in type(module).__name__)
    ]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        modules_to_save=sorted(set(whole)) or None,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # peft asks by the old name
        return get_peft_model(model, config)


def _stands_upon(recipe: Recipe, prepared: Prepared) -> dict[str, Any] | None:
    """What an adapter needs beside itself."""
    if recipe.training.lora is None:
        return None
    local = Path(recipe.model).exists()
    return {
        "model": str(Path(recipe.model).absolute()) if local else recipe.model,
        "plan": str(prepared.plan),
        "positions": recipe.positions and recipe.positions.model_dump(),
    }


def _refuse_shards(trainer: SpanTrainer) -> None:
    """FSDP's sharded checkpoints could be resumed, but are no model folders."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and "FULL" not in str(plugin.state_dict_type):
        raise InputError("checkpoints are model folders: set fsdp_state_dict_type to FULL_STATE_DICT")


def _keep_metrics(file: Path, step: int) -> None:
    """Drop the lines of steps that are done again, and one that was torn."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            if step and json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    rest = file.with_suffix(".new")
    rest.write_text("".join(kept), encoding="utf-8")
    rest.replace(file)  # at once: a process that is killed here has one or the other


class Ending(TrainerCallback):
    """Ends a run with an evaluation and a checkpoint: at the last step, or when a signal came."""

    trainer: SpanTrainer

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.signal = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Notes SIGTERM and the first SIGINT inside the block; a second SIGINT interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """transformers goes on with the checkpoint's own cadences of saving, evaluation and logging."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> Any:
        """All ranks stop after the same step, whichever of them got the signal."""
        if args.world_size > 1:
            flag = torch.tensor([self.signal], device=args.device)
            self.signal = int(self.trainer.accelerator.gather(flag).max())
        last = state.global_step >= self.steps
        if last or self.signal:
            control.should_save = control.should_training_stop = True
        if last:
            control.should_evaluate = True
        control.should_log |= control.should_save  # what was counted since the last line is not in a checkpoint
        return control
