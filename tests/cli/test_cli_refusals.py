"""What the commands refuse: one line, the documented exit code, nothing half-written."""

import errno
import json

import pytest
import torch
from transformers import (
    BloomConfig,
)

from masformer.attention import UnsupportedSpan
from masformer.cli_output import exit_code
from masformer.models.checkpoint import load
from masformer.spans import PlanError

from .conftest import LOCAL, POSITIONS, TEXT, refusal


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--layout", "nope"], "unknown layout 'nope': choose one of full"),
        (["--plan", "full*2,blok:4*2"], "unknown span 'blok:4'"),
        (["--plan", "full*2,block:0*2"], "block size must be a whole number of at least 1, got 0"),
        (["--layout", "local", "--window", "0"], "window size must be a whole number of at least 1, got 0"),
        (["--layout", "local", "--block", "-4"], "at least 1, got -4"),
        (["--layout", "local", "--block", "x"], "'--block': Input should be a valid integer"),
        (["--layout", "local", "--block", "4", "--window", "4"], "--block and --window cannot be given together"),
        (["--layout", "local", "--plan", "full*4"], "--plan and --layout cannot be given together"),
        (["--plan", "full*4", "--full", "2"], "--plan and --full cannot be given together"),
        (["--layout", "local", "--sinks", "4"], "--sinks needs --block or --window"),
        (["--layout", "local", "--window", "4", "--lookback", "4"], "--lookback needs --block"),
        (["--full", "4"], "--full needs --layout"),
        (["--layout", "masformer", "--full", "two"], "cannot read --full 'two'"),
        (["--layout", "masformer", "--full", "0,9"], "full layer 9 is out of range: the model has layers 0 to 3"),
        (["--layout", "masformer", "--placement", "left"], "unknown placement 'left'"),
        (["--layout", "gemma-3", "--full", "2"], "layout gemma-3 does not take full"),
        (["--no-such-flag"], "No such option: --no-such-flag"),
    ],
)
def test_mistaken_flags_are_usage_errors(parent, tmp_path, flags, words, capsys):
    assert words in refusal(capsys, 2, "convert", parent, tmp_path / "out", *flags)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan"], "either MODEL or --layers"),
        (["plan", "x", "--layers", "4"], "either MODEL or --layers"),
        (["plan", "--layers", "4"], "--layers needs --plan or --layout"),
        (["plan", "--layers", "0", "--layout", "local"], "--layers must be at least 1, got 0"),
        (["plan", "--layers", "4", "--layout", "local", "--length", "0"], "--length must be at least 1, got 0"),
        (["generate", "x"], "either --prompt or --prompt-file"),
        (["generate", "x", "--prompt", "a", "--prompt-file", "b"], "either --prompt or --prompt-file"),
        (["generate", "x", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["generate", "x", "--prompt", "a", "--temperature", "-1"], "--temperature must be at least 0, got -1"),
        (["convrt"], "No such command 'convrt'"),
    ],
)
def test_mistaken_commands_are_usage_errors(arguments, words, capsys):
    assert words in refusal(capsys, 2, *arguments)


@pytest.mark.parametrize("command", ["plan", "convert", "eval", "generate"])
def test_a_plan_for_another_number_of_layers_is_bad_input(command, parent, speeches, tmp_path, capsys):
    rest = {
        "plan": [],
        "convert": [tmp_path / "out"],
        "eval": ["--data", speeches, "--suite", "loss", "--lengths", 8],
        "generate": ["--prompt", "the"],
    }[command]
    line = refusal(capsys, 3, command, parent, *rest, "--plan", "full*2,block:4*3")
    assert "the plan has 5 layers, the model has 4" in line
    assert not (tmp_path / "out").exists()


def test_an_unsupported_family_is_bad_input(tmp_path, capsys):
    BloomConfig(n_layer=2, hidden_size=16, n_head=2).save_pretrained(tmp_path / "bloom")
    line = refusal(capsys, 3, "convert", tmp_path / "bloom", tmp_path / "out", *LOCAL)
    assert "'bloom' biases its scores by distance (ALiBi), which spans do not honour; supported are:" in line
    assert not (tmp_path / "out").exists()


def test_a_missing_model_is_bad_input(tmp_path, capsys):
    assert "nowhere" in refusal(capsys, 3, "plan", tmp_path / "nowhere")
    assert "holds no config.json" in refusal(capsys, 3, "plan", tmp_path)


def test_truncated_weights_are_corrupt(copy, tmp_path, capsys):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert str(copy) in refusal(capsys, 4, "convert", copy, tmp_path / "out", *LOCAL)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    "edit",
    [
        {"plan": "full*3"},
        {"plan": "fool*4"},
        {"parent_type": "no-such-model"},
        {"model_type": None},
    ],
)
def test_an_edited_config_is_corrupt(copy, edit, capsys):
    config = json.loads((copy / "config.json").read_text()) | edit
    config = {key: value for key, value in config.items() if value is not None}
    (copy / "config.json").write_text(json.dumps(config))
    refusal(capsys, 4, "generate", copy, "--prompt", "the")


def test_a_config_that_is_not_json_is_corrupt(copy, capsys):
    (copy / "config.json").write_text('{"model_type": "masf')
    assert "is not JSON" in refusal(capsys, 4, "plan", copy)


def test_weights_of_another_model_are_corrupt(copy, capsys):
    config = json.loads((copy / "config.json").read_text())
    config["parent"]["intermediate_size"] = 48
    (copy / "config.json").write_text(json.dumps(config))
    assert str(copy) in refusal(capsys, 4, "generate", copy, "--prompt", "the")


@pytest.mark.parametrize(
    ("content", "length", "words"),
    [
        ("", 8, "is empty"),
        ("t", 2, "no document has 2 tokens; the longest of 1 has 1"),
        (TEXT, 500, "no document has 500 tokens; the longest of 1 has"),
        (TEXT, POSITIONS + 1, f"more than the model's {POSITIONS:,} positions"),
        (None, 8, "No such file"),
    ],
)
def test_unusable_documents_are_bad_input(parent, tmp_path, content, length, words, capsys):
    data = tmp_path / "data.txt"
    if content is not None:
        data.write_text(content)
    assert words in refusal(capsys, 3, "eval", parent, "--data", data, "--suite", "loss", "--lengths", length)


def test_a_model_without_a_tokenizer_cannot_read_text(copy, speeches, capsys):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert "holds no tokenizer" in refusal(
        capsys, 3, "eval", copy, "--data", speeches, "--suite", "loss", "--lengths", 8
    )


def test_an_impossible_device_is_a_usage_error(parent, capsys):
    assert "--device 'abacus'" in refusal(capsys, 2, "generate", parent, "--prompt", "the", "--device", "abacus")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PlanError("x"), 3),
        (UnsupportedSpan("x"), 3),
        (PermissionError(errno.EACCES, "denied"), 3),
        (MemoryError(), 5),
        (torch.OutOfMemoryError("x"), 5),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 5),
        (OSError(errno.ENOSPC, "full"), 5),
        (KeyboardInterrupt(), 130),
        (RuntimeError("a defect"), 1),
    ],
)
def test_exit_codes_of_other_errors(error, code):
    assert exit_code(error) == code


def test_a_conversion_whose_plan_was_edited_is_refused(sealed_copy, capsys):
    file = sealed_copy / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"plan": "full*4"}))
    for command in (["plan"], ["generate", "--prompt", "x"], ["convert", "OUT"]):
        arguments = [sealed_copy.parent / "out" if part == "OUT" else part for part in command[1:]]
        line = refusal(capsys, 4, command[0], sealed_copy, *arguments)
        assert "config.json is not what was written, manifest.json has another SHA-256" in line


def test_a_model_that_is_saved_again_into_its_folder_is_a_new_one(sealed_copy):
    model = load(str(sealed_copy))
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(sealed_copy)
    assert torch.equal(next(load(str(sealed_copy)).parameters()), next(model.parameters()))


def test_a_tokenizer_that_was_cut_off_is_not_what_was_written(sealed_copy, capsys):
    file = sealed_copy / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-9])
    assert "tokenizer.json is not what was written" in refusal(capsys, 4, "generate", sealed_copy, "--prompt", "x")


def test_a_prompt_that_no_text_can_be_is_bad_input(converted, capsys):
    assert "the prompt is not UTF-8" in refusal(capsys, 3, "generate", converted, "--prompt", "caf\udce9")
