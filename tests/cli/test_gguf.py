"""GGUF files on the command line, and the tokenizers in them."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from masformer.cli import run
from masformer.errors import InputError
from masformer.models.checkpoint import load
from masformer.models.tokenizer import has_tokenizer, load_tokenizer
from tests.models.test_loading import logits, write_gguf

from .conftest import LAYERS, LOCAL, PLAN, TEXT, answer, refusal, small_tokenizer


@pytest.fixture(scope="module")
def model(parent):
    return AutoModelForCausalLM.from_pretrained(parent)


@pytest.fixture(scope="module")
def file(model, parent):
    return write_gguf(parent.parent / "parent.gguf", model, small_tokenizer())


def test_plan_reads_no_weights(file, capsys, monkeypatch):
    monkeypatch.setattr("masformer.models.checkpoint._load_gguf", None)
    facts = answer(capsys, "plan", file, *LOCAL, "--length", 100)
    assert facts["plan"] == PLAN
    # Two KV heads of dimension 8, K and V, float32.
    assert facts["parent"]["kv_bytes_held"] == LAYERS * 100 * 2 * 2 * 8 * 4


def test_a_converted_gguf_file_is_a_folder_like_any_other(file, model, speeches, tmp_path, capsys):
    out = tmp_path / "out"
    assert answer(capsys, "convert", file, out, "--plan", f"full*{LAYERS}")["tokenizer"] is True
    assert (out / "model.safetensors").is_file()
    assert torch.equal(logits(load(str(out))), logits(model))
    assert load_tokenizer(str(out))(TEXT).input_ids == small_tokenizer()(TEXT).input_ids
    assert not [made for made in out.iterdir() if str(file.parent).encode() in made.read_bytes()]
    where = ["--data", speeches, "--suite", "loss", "--lengths", 64]
    first, second = answer(capsys, "eval", f"file={file}", f"folder={out}", *where)["loss"]
    assert (first["nats"], second["difference"]["value"]) == (second["nats"], 0)


def test_generate_from_a_gguf_file(file, parent, capsys):
    flags = ["--prompt", "the fox", "--max-new-tokens", 5, *LOCAL]
    got, expected = answer(capsys, "generate", file, *flags), answer(capsys, "generate", parent, *flags)
    assert got["text"] == expected["text"]
    assert got["plan"] == PLAN


def test_a_damaged_gguf_file_is_one_line(file, tmp_path, capsys):
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:-500])
    assert "cut.gguf is truncated" in refusal(capsys, 4, "convert", tmp_path / "cut.gguf", tmp_path / "out", *LOCAL)
    (tmp_path / "zip.gguf").write_bytes(b"PK")
    assert "zip.gguf is not a GGUF file" in refusal(capsys, 4, "plan", tmp_path / "zip.gguf")
    assert "none.gguf cannot be read" in refusal(capsys, 3, "plan", tmp_path / "none.gguf")


def test_the_tokenizer_in_a_gguf_file(file):
    loaded, tokenizer, text = load_tokenizer(str(file)), small_tokenizer(), f"{TEXT}<user>émigré — 1862<bot>"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert (loaded.eos_token_id, loaded.chat_template) == (0, tokenizer.chat_template)
    assert has_tokenizer(str(file))


def test_digits_of_smollm(model, tmp_path):
    """Its rule splits digits one by one, which transformers does not read from the rule's name."""
    loaded = load_tokenizer(str(write_gguf(tmp_path / "s.gguf", model, small_tokenizer(), rule="smollm")))
    pieces = loaded.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 1862")
    assert [piece for piece, _ in pieces] == ["in", "Ġ", "1", "8", "6", "2"]


def test_a_tokenizer_whose_rule_is_not_known(model, tmp_path):
    path = write_gguf(tmp_path / "t.gguf", model, small_tokenizer(), rule="from-nowhere")
    with pytest.raises(InputError, match="splits texts by the rule 'from-nowhere', which is not known"):
        load_tokenizer(str(path))


def test_no_tokenizer_in_a_gguf_file(model, tmp_path, capsys):
    path = write_gguf(tmp_path / "bare.gguf", model)
    assert not has_tokenizer(str(path))
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(str(path))
    assert run(["convert", str(path), str(tmp_path / "out"), *LOCAL]) == 0
    assert "holds no tokenizer, so none was saved" in capsys.readouterr().out
