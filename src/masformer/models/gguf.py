"""GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): their metadata, and the config made of it.

The config is made here, because the one that transformers makes leaves out what it does not know, as scaled positions;
the weights are read by transformers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import struct
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import CorruptError, InputError
from .families import class_of, family_of

_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
}
_ROTARY = {
    **_SIZES,
    "attention.head_count_kv": "num_key_value_heads",  # without it transformers leaves queries and keys permuted
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "feed_forward_length": "intermediate_size",
}
GGUF_KEYS = {
    "gpt2": {**_SIZES, "feed_forward_length": "n_inner", "attention.layer_norm_epsilon": "layer_norm_epsilon"},
    "llama": _ROTARY,
    "qwen2": _ROTARY,
    "qwen3": _ROTARY,
}
"""Architectures of the GGUF files that are read (model types of transformers too), and what they must state: keys after
the architecture's name, and what these are called in the config."""


def is_gguf(source: str) -> bool:
    """Whether a MODEL is the name of a GGUF file, and neither a folder nor a hub id."""
    return source.lower().endswith(".gguf") and not os.path.isdir(source)


@contextlib.contextmanager
def gguf_place(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Folder and keywords with which a `from_pretrained` of transformers reads this file and no other.

    transformers would take a tokenizer.json or an adapter beside the file, or a file of that name in the working
    directory, in its stead: so the folder is an empty one and the file has its whole path.
    """
    with tempfile.TemporaryDirectory() as empty:
        yield empty, {"gguf_file": os.path.abspath(source)}


def gguf_metadata(source: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Key-value pairs (arrays of texts as their lengths) and the names of the tensors of a GGUF file.

    Raises:
        InputError: no such file, or a package missing.
        CorruptError: not a GGUF file, or a truncated one.
    """
    try:
        with open(source, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise CorruptError(f"{source} is not a GGUF file: it begins with {magic!r}")
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise InputError(f"reading {source} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    from transformers.integrations.gguf import GgufHeader, read_gguf_metadata

    try:
        metadata, tensors = read_gguf_metadata(source)
    except (ValueError, struct.error, IndexError, OverflowError, MemoryError) as error:
        raise CorruptError(f"{source} is truncated or damaged ({one_line(error)}): copy it again") from error
    with contextlib.suppress(ValueError):  # a quantisation whose size this does not know: seen when it is loaded
        header = GgufHeader.from_file(source)
        end = max((header.data_start + tensor.offset + tensor.nbytes for tensor in header.tensors), default=0)
        if end > (size := os.path.getsize(source)):
            raise CorruptError(f"{source} is truncated: it has {size:,} of at least {end:,} bytes: copy it again")
    return metadata, tensors


def gguf_config(source: str) -> PreTrainedConfig:
    """The config of a GGUF file's model.

    Raises:
        InputError, CorruptError: as `gguf_metadata`; an architecture or a setting that is not supported.
    """
    metadata, tensors = gguf_metadata(source)
    kind = metadata["general.architecture"]
    if kind not in GGUF_KEYS:
        raise InputError(
            f"{source} is a GGUF file of architecture {kind!r}, which is not supported; "
            f"supported are: {', '.join(GGUF_KEYS)}"
        )
    if metadata.get("split.count", 1) > 1:
        raise InputError(f"{source} is one of {metadata['split.count']} parts: join them (llama-gguf-split --merge)")
    values = _values(source, kind, metadata)
    cls: Any = CONFIG_MAPPING[kind]
    try:
        config = cls(**values, tie_word_embeddings="output.weight" not in tensors, dtype="float32")
        unread = sorted(set(tensors) - _tensors(config))
    except Exception as error:  # every config class checks its fields in its own way
        raise CorruptError(f"what {source} states of its sizes makes no {kind}: {one_line(error)}") from error
    if unread:  # transformers would drop them and say nothing
        raise InputError(f"{source} holds {unread[0]}, which a {kind} of transformers has no place for")
    config.name_or_path = source
    family_of(config)
    return config


def _values(source: str, kind: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """The fields of the config. What is absent is llama.cpp's default; what has no field is refused."""
    stated = {key.removeprefix(f"{kind}."): value for key, value in metadata.items() if key.startswith(f"{kind}.")}
    if absent := [key for key in GGUF_KEYS[kind] if key not in stated]:
        raise CorruptError(f"{source} does not state {kind}.{absent[0]}")
    values = {name: stated.pop(key) for key, name in GGUF_KEYS[kind].items()}
    values["vocab_size"] = stated.pop("vocab_size", metadata.get("tokenizer.ggml.tokens"))
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
        values[f"{name}_token_id"] = metadata.get(f"tokenizer.ggml.{key}_token_id")
    heads = values["num_attention_heads"]
    dim = stated.pop("attention.key_length", stated.get("rope.dimension_count", values["hidden_size"] // heads))
    if GGUF_KEYS[kind] is _ROTARY:
        rope = {"rope_type": "default", "rope_theta": stated.pop("rope.freq_base", 10000.0)}
        values |= {"head_dim": dim, "rope_parameters": rope}
    same = {
        "attention.head_count_kv": heads,
        "attention.value_length": dim,
        "rope.dimension_count": dim,
        "rope.scaling.type": "none",
    }
    for key, value in stated.items():
        if key != "tensor_data_layout" and (key not in same or value != same[key]):
            raise InputError(f"{source} states {kind}.{key} = {value!r}, which is not supported in a GGUF file")
    return values


def _tensors(config: PreTrainedConfig) -> set[str]:
    """What the weights of a model are called in a GGUF file."""
    import gguf

    kinds = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[config.model_type], config.num_hidden_layers)
    with torch.device("meta"):
        model = class_of(config)(config)
    parts = (name.rpartition(".") for name in model.state_dict())
    return {f"{names.get_name(module)}.{parameter}" for module, _, parameter in parts}


def one_line(error: BaseException) -> str:
    """What an error says, as one line of at most some 300 characters."""
    text = " ".join(str(error).split())
    return text if len(text) < 300 else text[:300] + " ..."
