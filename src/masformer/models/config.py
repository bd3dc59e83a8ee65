"""The config of a saved conversion: it can never be read as its parent's by accident.

config.json has model type `masformer`, the parent's whole config inside, and the plan as text. Software that
does not know this package refuses the model type. A parent class that is forced onto the folder would take a
nested config of its own model type (transformers/configuration_utils.py, from_pretrained), so the type stands
apart, and at the top it finds sizes that it refuses (`NO_PARENT`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import CorruptError
from ..spans import PlanError, SpanPlan
from .families import check_length

NO_PARENT = {"hidden_size": 1, "num_attention_heads": 2}
"""Written at the top of config.json: no parent class accepts heads that do not divide the width."""


class MasformerConfig(PreTrainedConfig):
    """Config of a converted model: the parent's config and the plan, in its text form."""

    model_type = "masformer"

    def __init__(
        self, parent_type: str = "", parent: dict[str, Any] | None = None, plan: str = "", **kwargs: Any
    ) -> None:
        self.parent_type = parent_type
        self.parent = parent or {}
        self.plan = plan
        super().__init__(**kwargs)

    @classmethod
    def of(cls, config: PreTrainedConfig, plan: SpanPlan) -> MasformerConfig:
        """The config to save for a model with `config` that was converted to `plan`."""
        parent = json.loads(config.to_json_string(use_diff=True))
        kind = parent.pop("model_type")
        return cls(
            kind, parent, str(plan), architectures=["MasformerForCausalLM"], dtype=parent.get("dtype"), **NO_PARENT
        )

    def parent_config(self) -> PreTrainedConfig:
        """The config of the unconverted model.

        Raises:
            CorruptError: a config without a parent, or with one that transformers does not know.
        """
        if self.parent_type not in CONFIG_MAPPING:
            raise CorruptError(
                f"config.json of a converted model names the parent type {self.parent_type!r}, which is not known"
            )
        try:
            return CONFIG_MAPPING[self.parent_type].from_dict(dict(self.parent))
        except Exception as error:  # every config class checks its fields in its own way
            raise CorruptError(
                f"config.json of a converted model has a bad parent config: {' '.join(str(error).split())}"
            ) from error

    def span_plan(self) -> SpanPlan:
        """The plan, checked against the parent.

        Raises:
            CorruptError: a plan that cannot be read or does not fit.
        """
        if not isinstance(self.plan, str):
            raise CorruptError(f"config.json of a converted model has a bad plan: {self.plan!r} is not text")
        try:
            plan = SpanPlan.parse(self.plan)
            check_length(plan, self.parent_config())
        except PlanError as error:
            raise CorruptError(f"config.json of a converted model has a bad plan: {error}") from error
        return plan


@contextlib.contextmanager
def saved_as_converted(config: PreTrainedConfig, plan: SpanPlan) -> Iterator[None]:
    """Inside, `config.save_pretrained` writes the config of the converted model.

    transformers saves the config before the weights, so no moment leaves weights beside the parent's config.
    """

    def save_pretrained(directory: Any, **kwargs: Any) -> None:
        del config.save_pretrained
        MasformerConfig.of(config, plan).save_pretrained(directory, **kwargs)

    config.save_pretrained = save_pretrained  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        config.__dict__.pop("save_pretrained", None)
