"""A tiny model with a tokenizer, as parent and converted, and what its commands answer."""

import json

import pytest
import torch
from transformers.utils import logging as transformers_logging

from masformer.cli import run
from tests.small import TEXT, small_llama, small_tokenizer

LAYERS, POSITIONS = 4, 4096
LOCAL = ["--layout", "masformer", "--full", "0,2", "--window", "8", "--sinks", "2"]
PLAN = "full,window:8:sinks=2,full,window:8:sinks=2"


@pytest.fixture(autouse=True)
def _loud_again():
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "parent"
    tokenizer = small_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = small_llama(
        tokenizer, **sizes, num_hidden_layers=LAYERS, max_position_embeddings=POSITIONS, initializer_range=0.3
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(parent):
    out = parent.parent / "converted"
    assert run(["convert", str(parent), str(out), *LOCAL]) == 0
    return out


@pytest.fixture
def speeches(tmp_path):
    file = tmp_path / "speeches.jsonl"
    texts = [TEXT * 20, TEXT, "émigré — " * 60, TEXT * 30]
    file.write_text("".join(json.dumps({"id": f"s{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    return file


def answer(capsys, *arguments):
    """The JSON of a command that must succeed and say nothing else on stdout."""
    code = run([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


def refusal(capsys, code, *arguments):
    """The one line on stderr of a command that must be refused with `code` and print nothing else."""
    got = run(list(map(str, arguments)))
    out, err = capsys.readouterr()
    assert got == code, err
    assert out == ""
    assert err.startswith("masformer: error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def sealed_copy(converted, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in converted.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def copy(sealed_copy):
    """One that nothing is held against: what is damaged there has to be seen in other ways."""
    (sealed_copy / "manifest.json").unlink()
    return sealed_copy
