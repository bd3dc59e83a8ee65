"""What an evaluation writes beside its numbers: the models, data and versions that they depend on."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..files import digest, sha256
from ..models.checkpoint import weights_digest
from ..models.families import shape_of
from ..spans import cost
from .suites import Data, Settings, Subject


def facts_of(
    subjects: Sequence[Subject], settings: Settings, data: str | None, read: Data, device: str
) -> dict[str, Any]:
    """What run.json holds: everything that the numbers depend on, and the command.

    Args:
        data: where the documents came from.
    """
    texts = [[document.id, document.text] for document in read.documents]
    extras = {"summary": "rouge-score", "lm-eval": "lm-eval"}
    used = ["masformer", "torch", "transformers", *(extras[suite] for suite in settings.suites if suite in extras)]
    versions = {name: metadata.version(name) for name in used}
    own = settings.of_items()
    if texts:
        own["data"] = digest(texts)
    if read.pairs:
        own["summaries"] = digest([[pair.id, pair.text, pair.summary] for pair in read.pairs])
    if settings.include is not None:
        own["include"] = digest(
            [[file.name, sha256(file)] for file in sorted(settings.include.iterdir()) if file.is_file()]
        )
    return {
        "versions": {**versions, "python": platform.python_version()},
        "device": device,
        "data": data,
        "settings": own,
        "models": {subject.label: _about(subject, settings) for subject in subjects},
        "commands": [shlex.join(["masformer", *sys.argv[1:]])],
    }


def _about(subject: Subject, settings: Settings) -> dict[str, Any]:
    dtype = subject.config.dtype
    shape = shape_of(subject.config, kv_dtype_bytes=getattr(dtype, "itemsize", 2))
    config = {name: value for name, value in subject.config.to_dict().items() if not name.startswith("_")}
    generation = Path(subject.source, "generation_config.json")
    parts = [
        weights_digest(subject.source, subject.config),
        digest(str(sorted(config.items()))),
        subject.mark,
    ]
    parts += [sha256(generation)] if generation.is_file() else []
    return {
        "model": subject.source,
        "plan": str(subject.plan),
        "layers": len(subject.plan),
        "dtype": str(dtype).removeprefix("torch."),
        "identity": digest(parts),
        "cost": {str(length): cost(shape, subject.plan, length).to_json() for length in settings.lengths},
    }
