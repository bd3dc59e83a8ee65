"""A training run as data: what a YAML file says, checked before anything is loaded.

    recipe = read_recipe(Path("recipes/smollm2-sotu.yaml"), ["training.steps=20", "output=runs/short"])

Every key is one of those below, or the recipe is refused. Paths are relative to the working directory.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..data.documents import Source
from ..data.sequences import checked_lengths
from ..errors import InputError
from ..spans import PlanError, SpanPlan, layout, parse_span

Whole = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Place = Annotated[Text, AfterValidator(os.path.expanduser)]


class Part(BaseModel):
    """A frozen part of a recipe that knows its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Layout(Part):
    """A plan by a rule; see `masformer.spans.layout`. `local` is the text form of a span: `window:128:sinks=4`."""

    layout: str
    full: int | list[int] | None = None
    placement: str | None = None
    local: str | None = None

    def plan_for(self, layers: int) -> SpanPlan:
        local = None if self.local is None else parse_span(self.local)
        return layout(self.layout, layers, full=self.full, placement=self.placement, local=local)


class Positions(Part):
    """More positions than the model has; see `masformer.models.positions`."""

    length: Count
    method: str


class Hub(Part):
    """Documents of a hub id; see `masformer.data.documents.Source`."""

    id: Text
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = True
    limit: Count | None = None

    def source(self) -> Source:
        return Source(self.id, self.limit, self.config, self.split, self.revision, self.streaming)


class RecallShare(Part):
    """Which share of the sequences are recall items instead of documents; see `masformer.data.recall`."""

    share: Annotated[float, Field(gt=0, lt=1)]
    loss_on: Literal["answer", "all"] = "all"


class Data(Part):
    """Documents and how they become sequences; see `masformer.data`.

    held_out: documents for evaluation: other ones (a path), or how many of `documents`, or which part of them.
    lengths: tokens of every sequence, or a curriculum of [first step, tokens].
    cache: folder of the tokenised documents.
    """

    documents: Place | Hub
    held_out: Place | Hub | int | float = 0.05
    mode: Literal["packed", "single"] = "packed"
    lengths: Count | list[list[int]] = 2048
    end_token: bool = True
    recall: RecallShare | None = None
    cache: Place = "corpora"

    @field_validator("held_out")
    @classmethod
    def _held_out(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not (value >= 1 if isinstance(value, int) else 0 < value < 1):
            raise ValueError("write a number of documents (1 or more), or which part of them (between 0 and 1)")
        return value

    @field_validator("lengths")
    @classmethod
    def _lengths(cls, value: Any) -> Any:
        if not isinstance(value, int) and any(len(stage) != 2 for stage in value):
            raise ValueError("a stage of a curriculum is [first step, tokens]")
        checked_lengths(value)
        return value


class Lora(Part):
    """Low-rank adapters at every linear layer of the decoder, in place of training all weights.

    embeddings, norms: whether these are trained in full beside them (LongLoRA, arXiv 2309.12307).
    """

    rank: Count = 16
    alpha: Count = 32
    dropout: Share = 0.0
    embeddings: bool = False
    norms: bool = False


class Training(Part):
    """Optimisation: AdamW with warm-up.

    batch: sequences of one step, over accumulation and all processes. micro_batch: sequences of one forward.
    precision: bf16 is autocast with float32 weights. distill: weight of KL(parent || model); 1 - distill is the loss's.
    gradient_limit: a gradient norm beyond it, before clipping, stops the run.
    """

    steps: Count
    batch: Count = 1
    micro_batch: Count = 1
    learning_rate: Positive = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Whole = 0
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = (0.9, 0.95)
    max_gradient_norm: Positive = 1.0
    gradient_limit: Positive = 1000.0
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: bool = False
    lora: Lora | None = None
    distill: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Whole = 0


class Evaluation(Part):
    """On held-out documents, and recall items if they are trained on: at the start, every so many steps, at the end."""

    every: Count = 100
    sequences: Count = 8


class Saving(Part):
    """Checkpoints every so many steps, at the end and at SIGTERM; the newest `keep` stay."""

    every: Count = 50
    keep: Count = 2


class Logging(Part):
    """A line of metrics.jsonl every so many steps, and the same numbers to these services."""

    every: Count = 1
    to: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = []


class Recipe(Part):
    """A whole run. `plan` is the text of a plan or a layout; None keeps the model's own spans."""

    model: Place
    output: Place
    plan: str | Layout | None = None
    positions: Positions | None = None
    data: Data
    training: Training
    evaluation: Evaluation = Evaluation()
    saving: Saving = Saving()
    logging: Logging = Logging()

    @field_validator("plan")
    @classmethod
    def _plan(cls, value: Any) -> Any:
        if isinstance(value, str):
            SpanPlan.parse(value)
        elif isinstance(value, Layout) and value.local is not None:
            parse_span(value.local)
        return value

    @model_validator(mode="after")
    def _batches(self) -> Recipe:
        if self.training.batch % self.training.micro_batch:
            raise ValueError(
                f"training.batch {self.training.batch} is no multiple of training.micro_batch "
                f"{self.training.micro_batch}"
            )
        return self

    def plan_for(self, layers: int, own: SpanPlan) -> SpanPlan:
        """The plan for a model of so many layers; `own` where the recipe has none."""
        if self.plan is None:
            return own
        return SpanPlan.parse(self.plan) if isinstance(self.plan, str) else self.plan.plan_for(layers)

    def decisive(self) -> dict[str, Any]:
        """JSON of what decides the weights that come out, beside the plan: not where things lie, nor what is kept."""
        settings = self.model_dump(mode="json", include={"positions", "data", "training"})
        for name in ("documents", "held_out", "cache"):
            del settings["data"][name]  # the sequences' own identity stands for them
        for name in ("micro_batch", "recompute", "gradient_limit"):
            del settings["training"][name]
        return settings


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are those of YAML 1.2, and in which no key stands twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"the key {name} stands twice in one place")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(  # PyYAML takes 1e-4 for a text and 1.0e-4 for a number
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def read_recipe(file: Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with changes like `training.steps=20`, whose values are YAML too.

    Raises:
        InputError: no such file, no YAML, a key that is unknown or missing, a value that cannot be.
    """
    try:
        settings = _read_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"cannot read {file} as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{file} holds no recipe: write keys and values")
    for change in changes:
        _change(settings, change)
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise InputError(f"{file}: {_first(error)}") from error
    except (InputError, PlanError) as error:
        raise InputError(f"{file}: {error}") from error


def _read_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def _change(settings: dict[str, Any], change: str) -> None:
    key, given, text = change.partition("=")
    *parents, last = key.split(".")
    if not given or not all([*parents, last]):
        raise InputError(f"cannot read the change {change!r}: write for example training.steps=20")
    try:
        value = _read_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"cannot read the value of the change {change!r} as YAML") from error
    place = settings
    for name in parents:
        if place.get(name) is None:
            place[name] = {}
        place = place[name]
        if not isinstance(place, dict):
            raise InputError(f"the change {change!r} goes into {name}, which has no keys")
    place[last] = value


def keys(part: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every key of a recipe with those before it: `model`, `data.documents`, `data.documents.id` ..."""
    for name, field in part.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Part):
                yield from keys(kind, f"{prefix}{name}.")


WORDS = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "model_type": "keys and values",
}
"""What a value should have been, by pydantic's names of faults."""
UNKNOWN = ("extra_forbidden", "invalid_key")


def _first(error: ValidationError) -> str:
    """One fault in words: of a value that fits none of several types, that of the type it comes nearest to."""
    known = set(keys())
    faults = [(_where(fault, known), fault) for fault in error.errors()]

    def weight(found: tuple[str, Any]) -> tuple[bool, int, bool]:
        where, fault = found
        return fault["type"] in UNKNOWN, where.count("."), fault["type"] not in WORDS

    where, fault = max(faults, key=weight)
    said, value = fault["msg"], f" (got {fault['input']!r})"
    if fault["type"] in UNKNOWN:
        near = difflib.get_close_matches(where, known, 1)
        return f"unknown key {where}" + (f": did you mean {near[0]}?" if near else "")
    if fault["type"] == "missing":
        return f"the {'key' if where in known else 'number'} {where} is missing"
    if fault["type"] == "value_error":
        return f"{where}: {said.removeprefix('Value error, ')}{value}" if where else said.removeprefix("Value error, ")
    if fault["type"] in WORDS:
        types = dict.fromkeys(WORDS[other["type"]] for at, other in faults if at == where and other["type"] in WORDS)
        return f"{where} should be {' or '.join(types)}{value}"
    return f"{where} {said.partition(' ')[2]}{value}"  # "Input should be less than 1"


def _where(fault: Any, known: set[str]) -> str:
    """The key of a fault, without the names of types that pydantic puts in where a key has one of several."""
    where = ""
    for name in fault["loc"]:
        longer = f"{where}.{name}".lstrip(".")
        if isinstance(name, int) or longer in known or (fault["type"] in UNKNOWN and name == fault["loc"][-1]):
            where = longer
    return where
