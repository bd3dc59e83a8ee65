"""Every command on a tiny model: what it prints and what it writes; and Ctrl-C, which leaves nothing behind."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from masformer.cli import run
from masformer.evaluation.texts import cut_documents
from masformer.models.checkpoint import load_config
from masformer.spans import Full, Window, layout

from .conftest import LOCAL, PLAN, POSITIONS, TEXT, answer, refusal, small_tokenizer

# plan


def test_plan_draws_and_counts_from_a_config_alone(parent, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((parent / "config.json").read_bytes())
    svg = tmp_path / "plan.svg"
    assert run(["plan", str(bare), *LOCAL, "--length", "1024", "--svg", str(svg)]) == 0
    out, err = capsys.readouterr()
    assert PLAN in out
    assert "window 8, 2 sinks" in out
    assert "KV peak during prefill" in out
    assert "Against the parent at 1,024 tokens" in out
    assert err == ""
    assert svg.read_text().startswith("<svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "plan.svg"]


def test_plan_json_is_the_arithmetic_of_the_spans(parent, capsys):
    facts = answer(capsys, "plan", parent, *LOCAL, "--length", "1000")
    full, local = Full().visible_pairs(1000), Window(8, 2).visible_pairs(1000)
    assert facts["plan"] == PLAN
    assert facts["full_layers"] == [0, 2]
    assert facts["parent"]["attention_pairs"] == 4 * full
    assert facts["planned"]["attention_pairs"] == 2 * full + 2 * local
    assert facts["saved"]["attention_pairs"] == pytest.approx((2 * full - 2 * local) / (4 * full))
    # Two KV heads of dimension 8, K and V, float32.
    assert facts["parent"]["kv_bytes_held"] == 4 * 1000 * 2 * 2 * 8 * 4


def test_plan_of_a_converted_model_is_its_own(converted, capsys):
    facts = answer(capsys, "plan", converted)
    assert facts["plan"] == PLAN
    assert facts["parent_plan"] == "full*4"
    assert facts["length"] == POSITIONS


def test_plan_without_a_model_counts_pairs(capsys):
    facts = answer(
        capsys, "plan", "--layers", 24, "--layout", "masformer", "--full", 4, "--block", 1024, "--length", 8192
    )
    assert facts["plan"] == "full*4,block:1024*20"
    assert facts["saved"] == pytest.approx(0.729, abs=5e-4)  # the paper's setting


@pytest.mark.parametrize(
    ("flags", "plan"),
    [
        (["--plan", "full*2,block:4:lookback=1*2"], "full*2,block:4:lookback=1*2"),
        (["--layout", "masformer", "--full", "1", "--placement", "top", "--block", "4"], "block:4*3,full"),
        (["--layout", "masformer", "--full", "3,", "--block", "4", "--lookback", "2"], "block:4:lookback=2*3,full"),
        (["--layout", "local", "--window", "5"], "window:5*4"),
        (["--layout", "gpt-neo"], str(layout("gpt-neo", 4))),
    ],
)
def test_flags_make_the_plan_that_they_say(flags, plan, capsys):
    assert answer(capsys, "plan", "--layers", 4, *flags)["plan"] == plan


# convert


def test_convert_writes_a_model_that_loads_with_the_same_logits(parent, converted, capsys):
    ids = torch.arange(40)[None]
    config, plan = load_config(str(converted))
    assert str(plan) == PLAN
    assert config.model_type == "llama"
    model = AutoModelForCausalLM.from_pretrained(converted)
    plain = AutoModelForCausalLM.from_pretrained(parent)
    assert not torch.equal(model(ids).logits, plain(ids).logits)
    assert torch.equal(model(ids[:, :8]).logits, plain(ids[:, :8]).logits)  # within the window nothing is hidden
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer(TEXT)["input_ids"] == small_tokenizer()(TEXT)["input_ids"]
    assert tokenizer.chat_template
    assert (converted / "generation_config.json").is_file()
    assert not list(converted.parent.glob(".*"))


def test_convert_fills_an_empty_folder_and_says_what_it_did(parent, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    facts = answer(capsys, "convert", parent, out, "--layout", "local", "--block", 16)
    assert facts == {
        "model": str(parent),
        "out": str(out),
        "plan": "block:16*4",
        "layers": 4,
        "checked": True,
        "full_layers": [],
        "tokenizer": True,
    }
    assert (out / "model.safetensors").is_file()


def test_convert_of_a_model_without_a_tokenizer_says_so(parent, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((parent / name).read_bytes())
    assert run(["convert", str(bare), str(tmp_path / "out"), *LOCAL]) == 0
    assert "holds no tokenizer" in capsys.readouterr().out


def test_convert_refuses_a_folder_in_use(parent, tmp_path, capsys):
    (tmp_path / "keep.txt").write_text("mine")
    assert "is not empty" in refusal(capsys, 3, "convert", parent, tmp_path, *LOCAL)
    assert "is a file" in refusal(capsys, 3, "convert", parent, tmp_path / "keep.txt", *LOCAL)
    assert "does not exist" in refusal(capsys, 3, "convert", parent, tmp_path / "a" / "b", *LOCAL)
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


def test_a_full_disk_leaves_nothing_behind(parent, tmp_path, monkeypatch, capsys):
    def full_disk(self, folder, **kwargs):
        Path(folder).mkdir()
        (Path(folder) / "tokenizer.json").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full_disk)
    assert "No space left" in refusal(capsys, 5, "convert", parent, tmp_path / "out", *LOCAL)
    assert list(tmp_path.iterdir()) == []


def test_bytes_are_those_of_the_predicted_text():
    from masformer.data.documents import Document

    tokenizer, text = small_tokenizer(), "ab — éé the quick brown fox"
    ids = tokenizer(text)["input_ids"]
    cut = cut_documents(tokenizer, [Document("d", text)], length=len(ids), items=1)
    first = len(tokenizer.decode(ids[:1]).encode())
    assert cut.sizes == [len(text.encode()) - first]
    assert cut.ids[0].tolist() == ids


# generate


def test_generate_continues_and_counts_bounded_keys(parent, converted, capsys):
    arguments = ["--prompt", TEXT, "--max-new-tokens", 40]
    full = answer(capsys, "generate", parent, *arguments)
    local = answer(capsys, "generate", converted, *arguments)
    prompt = len(small_tokenizer()(TEXT)["input_ids"])
    assert (full["prompt_tokens"], full["new_tokens"]) == (prompt, 40)
    per_key = 2 * 2 * 8 * 4
    seen = prompt + 39  # the last token is not run through the model
    assert full["kv_bytes"] == 4 * seen * per_key
    assert local["kv_bytes"] == (2 * seen + 2 * Window(8, 2).cache_length(seen)) * per_key
    assert full["tokens_per_second"] > 0


def test_generate_streams_what_json_returns(parent, tmp_path, capsys):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(TEXT)
    arguments = ["--prompt-file", prompt, "--max-new-tokens", 12, "--temperature", 1.5, "--seed", 3]
    text = answer(capsys, "generate", parent, *arguments)["text"]
    assert run(["generate", str(parent), *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert out == text + "\n"
    assert "12 new tokens" in err
    assert "KV cache" in err
    arguments[-1] = 4
    assert answer(capsys, "generate", parent, *arguments)["text"] != text


def test_generate_puts_the_prompt_into_the_chat_template(parent, capsys):
    plain = answer(capsys, "generate", parent, "--prompt", "the fox", "--max-new-tokens", 1)
    chat = answer(capsys, "generate", parent, "--prompt", "the fox", "--max-new-tokens", 1, "--chat")
    assert chat["prompt_tokens"] == plain["prompt_tokens"] + 2
    assert chat["tokens_per_second"] is None


@pytest.mark.parametrize("flags", [["--prompt", ""], ["--prompt", " \n"]])
def test_generate_refuses_an_empty_prompt(parent, flags, capsys):
    assert "the prompt is empty" in refusal(capsys, 3, "generate", parent, *flags)


def test_generate_refuses_more_tokens_than_positions(parent, capsys):
    line = refusal(capsys, 3, "generate", parent, "--prompt", "the", "--max-new-tokens", POSITIONS)
    assert f"{POSITIONS + 1:,} tokens are more than the model's {POSITIONS:,} positions: extend it with convert" in line


def test_convert_extends_positions(parent, tmp_path, capsys):
    out, longer = tmp_path / "out", 2 * POSITIONS
    assert run(["convert", str(parent), str(out), "--max-length", str(longer), "--positions", "yarn"]) == 0
    config, plan = load_config(str(out))
    assert config.max_position_embeddings == longer
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.extended_positions == {"method": "yarn", "from": POSITIONS, "to": longer}
    assert not any(span.is_local for span in plan)
    capsys.readouterr()
    assert run(["generate", str(out), "--prompt", "the", "--max-new-tokens", "3"]) == 0


def test_convert_says_which_way_to_extend(parent, tmp_path, capsys):
    out = tmp_path / "out"
    line = refusal(capsys, 3, "convert", parent, out, "--max-length", 2 * POSITIONS)
    assert f"--max-length {2 * POSITIONS} --positions theta, linear, dynamic or yarn" in line
    assert "cannot extend this llama" in refusal(
        capsys, 3, "convert", parent, out, "--max-length", 2 * POSITIONS, "--positions", "tile"
    )
    assert "--positions needs --max-length" in refusal(capsys, 2, "convert", parent, out, "--positions", "yarn")
    assert "--positions knows theta" in refusal(
        capsys, 2, "convert", parent, out, "--max-length", 9, "--positions", "alibi"
    )
    assert "leave it out" in refusal(capsys, 2, "convert", parent, out, "--max-length", 9)
    assert not out.exists()


def test_generate_refuses_prompts_it_cannot_read(parent, tmp_path, capsys):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"abc\xff")
    assert "not UTF-8: byte 3 is 0xff" in refusal(capsys, 3, "generate", parent, "--prompt-file", bad)
    assert "missing.txt" in refusal(capsys, 3, "generate", parent, "--prompt-file", tmp_path / "missing.txt")


# the program


def test_a_traceback_is_shown_only_with_debug(tmp_path, capsys):
    assert run(["plan", str(tmp_path), "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_help_and_version(capsys):
    assert run([]) == 0
    assert "convert" in capsys.readouterr().out
    for command in ("plan", "convert", "eval", "generate", "demo"):
        assert run([command, "--help"]) == 0
        assert f"Example: masformer {command}" in capsys.readouterr().out
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("masformer 0.")


def interrupted(code, wait_for):
    """Run `code` in a new interpreter, press Ctrl-C once it printed `wait_for`, and return (exit code, stderr)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    try:
        while wait_for not in (read := process.stdout.read1()):
            assert read, process.stderr.read().decode()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, err.decode()


def test_ctrl_c_while_converting_leaves_nothing_behind(parent, tmp_path):
    arguments = ["masformer", "convert", str(parent), str(tmp_path / "out"), *LOCAL]
    # The tokenizer is saved last: by then weights and config stand in the temporary folder.
    code = f"""
import sys, time, transformers
def slow(self, folder, **kwargs):
    import os
    assert "model.safetensors" in os.listdir(folder)
    print("READY", flush=True)
    time.sleep(60)
transformers.PreTrainedTokenizerBase.save_pretrained = slow
from masformer.cli import main
sys.argv = {arguments!r}
main()
"""
    assert hasattr(PreTrainedTokenizerBase, "save_pretrained")
    assert interrupted(code, b"READY") == (130, "masformer: interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ctrl_c_while_generating_ends_at_once(parent):
    arguments = ["generate", str(parent), "--prompt", TEXT, "--max-new-tokens", "4000", "--temperature", "1"]
    code = f"import sys; from masformer.cli import main; sys.argv = {['masformer', *arguments]!r}; main()"
    assert interrupted(code, b" ") == (130, "masformer: interrupted\n")
