"""The tokenizer of a model: from its folder, hub id or GGUF file, never with code of its own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from ..errors import InputError
from ..files import check_files
from .checkpoint import refuse_own_code
from .gguf import gguf_metadata, gguf_place, is_gguf

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "spiece*", "sentencepiece*", "special_tokens_map.json")
"""What the files of a tokenizer are called in a model folder."""


def quiet() -> None:
    """Turn off transformers' own progress bars and warnings, and the hub's lines on retries, in this process."""
    transformers_logging.set_verbosity(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    transformers_logging.disable_progress_bar()


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model folder, hub id or GGUF file.

    Raises:
        InputError: there is none, it cannot be read, or it needs its own code.
        CorruptError: a GGUF file that is damaged, or files that are not those that a conversion was saved with.
    """
    if is_gguf(source):
        return _gguf_tokenizer(source)
    if Path(source).is_dir():
        files = _tokenizer_files(source)
        if not files:
            raise InputError(f"{source} holds no tokenizer: copy the tokenizer files of its parent there")
        check_files(Path(source), *files)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception for a file that it cannot read
        refuse_own_code(source, error)
        raise InputError(f"cannot load a tokenizer from {source}: {' '.join(str(error).split())[:300]}") from error


def has_tokenizer(source: str) -> bool:
    """Whether a folder holds any file of a tokenizer, or a GGUF file a tokenizer."""
    if is_gguf(source):
        return gguf_metadata(source)[0].get("tokenizer.ggml.model", "none") not in ("none", "no_vocab")
    return bool(_tokenizer_files(source))


def _tokenizer_files(folder: str) -> list[str]:
    return [file.name for pattern in TOKENIZER_FILES for file in Path(folder).glob(pattern)]


def _gguf_tokenizer(source: str) -> Any:
    """The tokenizer in a GGUF file, which names the rule that splits texts before merging but does not spell it out.

    transformers takes GPT-2's rule for every name that it does not know, which gives other tokens.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if not has_tokenizer(source):
        raise InputError(f"{source} holds no tokenizer: give the folder or hub id of its parent")
    metadata, _ = gguf_metadata(source)
    rule, known = metadata.get("tokenizer.ggml.pre"), {"gpt-2", "smollm", *GGUF_PRE_TOKENIZER_SPLITS}
    if metadata["tokenizer.ggml.model"] == "gpt2" and rule not in known:
        raise InputError(
            f"the tokenizer of {source} splits texts by the rule {rule!r}, which is not known: "
            "give the folder or hub id of its parent"
        )
    try:
        with gguf_place(source) as (folder, keywords):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **keywords)
    except Exception as error:  # as above
        raise InputError(f"cannot load a tokenizer from {source}: {' '.join(str(error).split())[:300]}") from error
    if rule == "smollm":
        digits, rest = pre_tokenizers.Digits(individual_digits=True), tokenizer.backend_tokenizer.pre_tokenizer
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    tokenizer.name_or_path = source
    return tokenizer
