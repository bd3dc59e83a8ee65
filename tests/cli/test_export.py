"""`masformer export`: a folder that stock software runs, with a card, or nothing at all."""

import hashlib
import json
import re

import pytest
import torch

import masformer
from masformer.cli import run
from masformer.errors import CorruptError, InputError
from masformer.models import export as exporting
from masformer.models.proof import Proof

from .conftest import answer, refusal

WINDOWS = ["--layout", "masformer", "--full", "0,2", "--window", "24"]
PLAN = "full,window:24,full,window:24"
PROVED = Proof("MinistralForCausalLM", 77, 1e-6, 1e-4, 32, 32)


@pytest.fixture(scope="module")
def windows(parent):
    out = parent.parent / "windows"
    assert run(["convert", str(parent), str(out), *WINDOWS]) == 0
    return out


@pytest.fixture
def unproved(monkeypatch):
    """Exports are written and not proved."""
    monkeypatch.setattr(exporting, "prove", lambda *_: PROVED)


def in_card(folder):
    """The checksums that a card names."""
    return dict(re.findall(r"^\| (\S+) \| ([0-9a-f]{64}) \|$", (folder / "README.md").read_text(), re.MULTILINE))


def damaged(folder):
    """Files that are not what the card says, are missing from it, or are named there and gone."""
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    del found["README.md"]
    named = in_card(folder)
    return sorted(name for name in found.keys() | named.keys() if found.get(name) != named.get(name))


def test_an_export_is_proved_and_says_what_it_is(windows, tmp_path, capsys):
    out = tmp_path / "out"
    facts = answer(capsys, "export", windows, out, "--to", "vllm", "--device", "cpu")
    assert facts["plan"] == PLAN
    assert (facts["model_type"], facts["architecture"], facts["tokenizer"]) == ("ministral", "LlamaForCausalLM", True)
    assert facts["proof"]["error"] < 1e-5
    assert facts["vllm"] is None
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_card_says_what_was_changed_how_to_serve_it_and_with_what_not(windows, tmp_path, unproved):
    out = tmp_path / "out"
    assert run(["export", str(windows), str(out), "--to", "vllm"]) == 0
    card = (out / "README.md").read_text()
    assert "# out\n" in card
    assert (
        "| 0 | `full` | all before it, and itself |\n| 1 | `window:24` | the last 24 tokens, itself included |" in card
    )
    assert "4 layers" in card
    assert "█" in card
    assert 'from_pretrained("out")' in card
    assert "vllm serve out" in card
    assert "**Do not serve it with SGLang or llama.cpp.**" in card
    assert "MinistralForCausalLM, fresh process: logits" in card
    assert "vLLM: not run on this folder" in card
    assert str(tmp_path) not in card
    assert "## Training" not in card


def flipped(file):
    """One bit of the file is another."""
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def without_layer_types(file):
    config = json.loads(file.read_text())
    del config["layer_types"]
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "change"),
    [("model.safetensors", flipped), ("config.json", without_layer_types), ("tokenizer.json", flipped)],
)
def test_an_export_that_was_changed_is_not_what_the_card_says_and_is_refused(
    name, change, windows, tmp_path, unproved, capsys
):
    out = tmp_path / "out"
    assert run(["export", str(windows), str(out), "--to", "transformers"]) == 0
    assert damaged(out) == []
    assert masformer.load(str(out)).config.layer_types
    change(out / name)
    assert damaged(out) == [name]
    with pytest.raises(CorruptError, match=re.escape(f"{out / name} is not what was written")):
        masformer.load(str(out))
    capsys.readouterr()
    if name == "config.json":
        assert "manifest.json has another SHA-256" in refusal(capsys, 4, "plan", out)
    (out / "manifest.json").unlink()
    if name != "tokenizer.json":  # which a flipped bit may make unreadable
        masformer.load(str(out))  # as its owner wants it


def test_the_card_of_a_trained_checkpoint_names_its_data(windows, tmp_path, unproved):
    checkpoint = tmp_path / "run" / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    for file in windows.iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    data = {"documents": {"id": "someone/speeches", "split": "train"}, "lengths": 2048}
    recipe = {"model": "HuggingFaceTB/SmolLM2-135M", "data": data, "plan": PLAN, "training": {"steps": 40}}
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(recipe))
    assert run(["export", str(checkpoint), str(tmp_path / "out"), "--to", "transformers"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: HuggingFaceTB/SmolLM2-135M\n" in card
    assert "| documents | `someone/speeches` |" in card
    assert "| steps | `40` |" in card
    assert f"| plan | `{PLAN}` |" in card
    assert "export the model again with `--to vllm`" in card


def test_a_folder_that_differs_from_its_source_is_not_left_behind(windows, tmp_path, capsys, monkeypatch):
    write = exporting._write

    def with_other_weights(model, native, folder):
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[0] += 0.01
        write(model, native, folder)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[0] -= 0.01

    monkeypatch.setattr(exporting, "_write", with_other_weights)
    line = refusal(capsys, 3, "export", windows, tmp_path / "out", "--to", "vllm")
    assert "the export differs from its source in MinistralForCausalLM, so it is refused" in line
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_an_export_that_vllm_refutes(windows, tmp_path, capsys, monkeypatch, unproved):
    def refute(*_):
        raise InputError("the export differs from its source in vLLM")

    monkeypatch.setattr(exporting, "check_vllm", lambda _: None)
    monkeypatch.setattr(exporting, "prove_in_vllm", refute)
    arguments = ["export", windows, tmp_path / "out", "--to", "vllm", "--verify-vllm", "python"]
    assert "differs from its source in vLLM" in refusal(capsys, 3, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--to", "onnx"], "--to knows transformers and vllm, not 'onnx'"),
        (["--to", "sglang"], "--to sglang: it ignores layer types and would give all layers full attention"),
        (["--to", "gguf"], "--to gguf: it ignores layer types"),
        (["--to", "transformers", "--verify-vllm", "python"], "--verify-vllm needs --to vllm"),
        ([], "--to"),
    ],
)
def test_mistaken_flags_are_usage_errors(flags, words, windows, tmp_path, capsys):
    assert words in refusal(capsys, 2, "export", windows, tmp_path / "out", *flags)
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_native_form_is_bad_input(parent, converted, tmp_path, capsys):
    out = tmp_path / "out"
    assert "convert it first" in refusal(capsys, 3, "export", parent, out, "--to", "vllm")
    line = refusal(capsys, 3, "export", converted, out, "--to", "vllm")
    assert "window:8:sinks=2 cannot be exported, native layers have no sinks: train the last phase" in line
    assert "recipes/smollm2-windows.yaml" in line
    assert not out.exists()


def test_an_interpreter_without_vllm_is_bad_input(windows, tmp_path, capsys):
    arguments = ["export", windows, tmp_path / "out", "--to", "vllm", "--verify-vllm", tmp_path / "python"]
    assert "cannot be run" in refusal(capsys, 3, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_used_is_left_alone(windows, tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    assert "is not empty" in refusal(capsys, 3, "export", windows, tmp_path, "--to", "vllm")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
