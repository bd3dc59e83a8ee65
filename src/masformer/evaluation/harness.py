"""Run tasks of lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness) on a model, converted or not.

    check_tasks(["hellaswag", "mine"], include=Path("tasks"))      needs no model
    longest = longest_request(config, tokenizer, ["mine"], include=Path("tasks"))
    longest.check(config)                                          nor does this; it refuses what would not fit
    rows = run_tasks(model, tokenizer, ["hellaswag", "mine"], include=Path("tasks"), batch=8)

lm-eval cuts prompts that are too long for the model and scores what is left; here they are refused. Only rolling
log-likelihoods (perplexity of whole texts) are still split into windows of all the model's positions, which is how
lm-eval defines them: every token is scored, and once. Log-probabilities are made in float32 for every model.

A task may bring functions of its own: those of lm-eval's tasks and of the folder `include` run. Nothing that the Hub
holds does, nor does code that a model writes. All this needs the extra `harness`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import logging
import numbers
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import InputError
from ..models.positions import max_positions
from ..models.selfcheck import evaluating

UNLIMITED = 2**31
"""Stands for the positions of a model that has no limit; lm-eval would take 2048."""
RESAMPLES = 1000
"""Of the documents, for the standard error of what is no mean, as a perplexity. lm-eval takes 100,000."""


def check_tasks(tasks: Sequence[str], include: Path | None = None) -> None:
    """Refuse what is not the name of a task, group or tag, of lm-eval's own or of a YAML file in `include`.

    Whether the data of a task can be had shows only when it is loaded. Takes about 5 s once in a process.

    Raises:
        InputError: no name, an unknown one, an `include` that is not a folder, or lm-eval not installed.
    """
    if not tasks:
        raise InputError("no task is named: give at least one")
    known = _manager(include).task_index
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, 3, 0.75)
            hint = f"is {' or '.join(near)} meant?" if near else "'lm-eval ls tasks' lists lm-eval's own"
            where = f" and {include}" if include else ""
            raise InputError(f"unknown task {task!r} among the {len(known):,} of lm-eval{where}: {hint}")


@dataclasses.dataclass(frozen=True)
class Size:
    """What a request of a task takes: the tokens of its prompt and of its answer, which is given or `generated`."""

    task: str
    document: int
    prompt: int
    answer: int
    generated: bool

    @property
    def positions(self) -> int:
        return self.prompt + self.answer - (not self.generated)  # the last given token is only predicted

    def check(self, config: PreTrainedConfig) -> None:
        """Refuse a request that does not fit into the positions of a model.

        Raises:
            InputError: it does not; nothing is ever cut.
        """
        most = max_positions(config)
        if most is None or self.positions <= most:
            return
        more = f"up to {self.answer:,} generated ones" if self.generated else f"an answer of {self.answer:,} tokens"
        raise InputError(
            f"task {self.task!r}: a prompt of {self.prompt:,} tokens and {more} do not fit into the model's "
            f"{most:,} positions (document {self.document}), and nothing is cut"
        )


def longest_request(
    config: PreTrainedConfig,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include: Path | None = None,
    seed: int = 0,
) -> Size | None:
    """Of what `run_tasks` would ask with the same arguments, that which takes most positions, counted as there.

    Needs no weights, but the data of the tasks. It is the same for all models whose tokenizers encode alike and have
    the same special tokens. None: all texts are split into windows, which always fit.

    Nothing is printed, and the tokenizer and the random states are left as they were.

    Raises:
        InputError: what `run_tasks` refuses, but for the length; or a task whose prompts cannot be made.
    """
    _refuse_arguments(tokenizer, tasks, limit, include)
    from lm_eval.evaluator_utils import get_sample_size

    with _quiet(), _no_code_of_the_hub(), _seeded(seed, torch.device("cpu")):
        loaded = _load(tasks, include, seed)
        lm = _wrappers()[1](SimpleNamespace(config=config, device=torch.device("cpu")), tokenizer, 1)
        for name, task in loaded["tasks"].items():
            try:  # what `lm_eval.evaluate` does
                task.build_all_requests(limit=get_sample_size(task, limit), rank=lm.rank, world_size=lm.world_size)
            except Exception as error:  # a task may run any code of its own
                raise InputError(f"cannot make the prompts of {name}: {_line(error)}") from error
            for kind in ("loglikelihood", "generate_until"):
                getattr(lm, kind)([request for request in task.instances if request.request_type == kind])
    return lm.longest


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch: int = 1,
    include: Path | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Results of `model`, one row for each metric of each task, in lm-eval's order; groups come after their tasks.

    A row has `task`; `metric`, with its filter behind a comma if it has one ("exact_match,strict-match"); `value`;
    `stderr`, None where lm-eval knows none; `items`, the number of documents; and `values`, those of the single
    documents in their order, to compare two models pairwise, None where they are no numbers or the row is a group's.

    Nothing is printed, and the model's mode, the tokenizer and the random states are left as they were.

    Args:
        limit: take only the first documents of each task.
        batch: how many requests run at once.
        include: a folder with tasks of one's own.
        seed: of the examples shown before a question, and of sampling.

    Raises:
        InputError: an unknown task, one whose data, metric or package cannot be had or that needs more than text, a
            prompt with its answer that is longer than the model has positions, or a tokenizer without end token.
    """
    if batch < 1:
        raise InputError(f"a batch of {batch} requests is impossible: give 1 or more")
    _refuse_arguments(tokenizer, tasks, limit, include)
    from lm_eval import evaluate

    with _quiet(), _no_code_of_the_hub(), _one_process(), _seeded(seed, model.device), evaluating(model):
        loaded = _load(tasks, include, seed)
        lm = _wrappers()[0](model, tokenizer, batch)
        results = evaluate(lm, loaded, limit=limit, bootstrap_iters=RESAMPLES, log_samples=True)
    return list(_rows(results))


def _refuse_arguments(tokenizer: Any, tasks: Sequence[str], limit: int | None, include: Path | None) -> None:
    if limit is not None and limit < 1:
        raise InputError(f"a limit of {limit} documents leaves nothing to do: give 1 or more")
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end token (eos_token), which lm-eval needs")
    check_tasks(tasks, include)


@functools.cache
def _wrappers() -> tuple[Any, Any]:
    """The classes below, which need lm-eval's."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs

    class Refusing(HFLM):
        """lm-eval's wrapper of a transformers model, which refuses what would not fit instead of cutting it."""

        def __init__(self, model: Any, tokenizer: Any, batch: int) -> None:
            tokenizer = copy.deepcopy(tokenizer)  # lm-eval gives it a pad token
            pad, rows = tokenizer.pad_token_id, model.config.vocab_size
            if pad is None or pad >= rows:  # lm-eval would invent one that the model has no embedding for
                tokenizer.pad_token = tokenizer.eos_token
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                max_length=max_positions(model.config) or UNLIMITED,
                batch_size=batch,
                softmax_dtype=torch.float32,
                trust_remote_code=False,
            )

        def see(self, size: Size) -> None:
            size.check(self.config)

        def see_answers(self, requests: Any) -> None:
            """`requests`: texts, tokens of the context, tokens of the continuation, for each that was asked."""
            for asked, (_, context, continuation) in zip(self.asked, requests, strict=True):
                if not continuation:
                    raise InputError(f"task {asked.task_name!r} has an answer of no tokens")
                self.see(Size(asked.task_name, asked.doc_id, len(context), len(continuation), generated=False))

        def see_prompts(self, requests: list[Any]) -> None:
            for request in requests:
                prompt, kwargs = request.args
                new = normalize_gen_kwargs(kwargs, self.max_gen_toks)["max_gen_toks"]
                tokens = self.tok_batch_encode([prompt])[0].shape[1]
                new = max(new, kwargs.get("max_length", 0) - tokens)
                self.see(Size(request.task_name, request.doc_id, tokens, new, generated=True))

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            self.asked = requests
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            self.asked = []
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
            if self.asked:  # windows of a long text come too and always fit
                self.see_answers(requests)
            splits = {((*context, *continuation[:-1]), len(continuation)) for _, context, continuation in requests}
            # lm-eval computes the same tokens once; where they are split differently it takes the wrong ones of them.
            self.logits_cache = len({tokens for tokens, _ in splits}) == len(splits)
            return super()._loglikelihood_tokens(requests, **kwargs)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            self.see_prompts(requests)
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

        def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Any:
            """`max_new_tokens` says the same as `max_length`, but overrules that of the model's generation config."""
            new = max_length - context.shape[1]
            return super()._model_generate(context, max_length, stop, **{**kwargs, "max_new_tokens": new})

    class Sizing(Refusing):
        """The same without weights: `model` is only a config and a device. It encodes all requests but answers none,
        and keeps what the longest takes."""

        longest: Size | None = None

        def see(self, size: Size) -> None:
            if self.longest is None or size.positions > self.longest.positions:
                self.longest = size

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
            self.see_answers(requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            self.see_prompts(requests)

    return Refusing, Sizing


@functools.lru_cache(maxsize=1)
def _manager(include: Path | None) -> Any:
    """The index of all tasks, read once for each `include` in turn."""
    try:
        from lm_eval.models import huggingface  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"the harness needs {error.name}: pip install 'masformer[harness]'") from error
    if include is not None and not include.is_dir():
        raise InputError(f"{include} is not a folder of tasks")
    with _quiet():
        return TaskManager(include_path=include)


def _load(tasks: Sequence[str], include: Path | None, seed: int) -> Any:
    """The tasks with their data, as `lm_eval.simple_evaluate` prepares them."""
    names = ", ".join(tasks)
    try:
        loaded = _manager(include).load(list(dict.fromkeys(tasks)))
    except Exception as error:  # a task may run any code of its own while it loads
        raise InputError(f"cannot load {names}, or the data they need: {_line(error)}") from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(f"task {name!r} runs code that the model writes, which is not done here")
        if getattr(task, "MULTIMODAL", False):
            raise InputError(f"task {name!r} needs more than text, which is not supported")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return loaded


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _rows(results: Any) -> Iterator[dict[str, Any]]:
    for task, found in results["results"].items():
        samples = results["samples"].get(task)
        for key, value in found.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            yield {
                "task": task,
                "metric": metric if filtered == "none" else key,
                "value": _number(value),
                "stderr": _number(found.get(f"{metric}_stderr,{filtered}")),
                "items": found["sample_len"],
                "values": _values(samples, metric, filtered) if samples else None,
            }


def _number(value: Any) -> float | None:
    """None for lm-eval's "N/A"."""
    return float(value) if isinstance(value, numbers.Real | np.bool) else None


def _values(samples: list[dict[str, Any]], metric: str, filtered: str) -> list[float] | None:
    raw = [sample[metric] for sample in samples if sample["filter"] == filtered and metric in sample]
    values = [value for value in map(_number, raw) if value is not None]
    return values if len(values) == len(raw) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No log lines, prints or progress bars of lm-eval and what it calls."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _no_code_of_the_hub() -> Iterator[None]:
    """Refuse the metrics of the package `evaluate`: loading one downloads a script and runs it."""
    from evaluate import loading

    refused: list[str] = []

    def refuse(path: str, *_: Any, **__: Any) -> None:
        refused.append(path)
        raise InputError("refused")  # which lm-eval may swallow, and stumble over later

    before = loading.evaluation_module_factory
    loading.evaluation_module_factory = refuse
    try:
        yield
    except Exception as error:
        if refused:
            raise InputError(f"the metric {refused[0]!r} is a script of the Hub, which is not run here") from error
        raise
    finally:
        loading.evaluation_module_factory = before


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Where lm-eval resamples documents for a standard error, it would fork this process once for each core."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed Python, numpy and torch on the processor and on `device`, and give each its random state back."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every device there is
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
