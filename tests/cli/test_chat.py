"""`chat` driven by lines on its input, and `--dtype` of both commands that let a model write."""

import io
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from masformer.cli import run
from masformer.evaluation import generation
from masformer.models import checkpoint

from .conftest import LOCAL, POSITIONS, TEXT, answer, refusal, small_tokenizer

NUMBERS = re.compile(
    r"([\d,]+) prompt tokens, ([\d,]+) of them newly computed, in [\d.]+ s, ([\d,]+) new tokens, "
    r"[\d.-]+ tokens/s, KV cache [\d.]+ [KM]?i?B"
)


@pytest.fixture
def talk(monkeypatch, capsys):
    """Run `chat` with lines as its input; its exit code, stdout and the lines of stderr."""

    def start(text, *arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text) if isinstance(text, str) else text)
        code = run(["chat", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return start


@pytest.fixture
def unread(monkeypatch):
    """Fails where weights would be read."""
    monkeypatch.setattr(checkpoint, "load", None)


def spoken(monkeypatch):
    """The prompts that a conversation makes."""
    prompts, make = [], generation.chat_ids

    def chat_ids(tokenizer, turns):
        prompts.append([(turn["role"], turn["content"]) for turn in turns])
        return make(tokenizer, turns)

    monkeypatch.setattr(generation, "chat_ids", chat_ids)
    return prompts


def test_chat_answers_each_line_with_all_turns_before_it(parent, talk, monkeypatch):
    prompts = spoken(monkeypatch)
    code, out, err = talk("the fox\n\n  \nthe dog \n", parent, *LOCAL, "--max-new-tokens", 6, "--system", "be quick")
    assert code == 0
    _, first, second = prompts  # before them, the shortest one, which must fit
    assert first == [("system", "be quick"), ("user", "the fox")]
    assert [role for role, _ in second] == ["system", "user", "assistant", "user"]
    assert second[-1] == ("user", "the dog")
    assert out.startswith(second[2][1] + "\n")
    assert len(err) == 2
    for line, prompt in zip(err, prompts[1:], strict=True):
        whole, computed, new = NUMBERS.fullmatch(line).groups()
        turns = [{"role": role, "content": content} for role, content in prompt]
        tokens = generation.chat_ids(small_tokenizer(), turns).shape[1]
        assert (int(whole), int(computed), int(new)) == (tokens, tokens, 6)


def test_chat_says_what_generate_says(parent, talk, capsys):
    arguments = [parent, *LOCAL, "--max-new-tokens", 12, "--temperature", 1.5, "--seed", 3]
    _, out, _ = talk("the fox\n", *arguments)
    assert out == answer(capsys, "generate", *arguments, "--chat", "--prompt", "the fox")["text"] + "\n"


def test_chat_leaves_the_system_prompt_to_the_template(parent, talk, monkeypatch):
    prompts = spoken(monkeypatch)
    talk("the fox", parent, "--max-new-tokens", 1)  # the last line may have no end
    assert prompts[-1] == [("user", "the fox")]


def test_chat_knows_two_commands(parent, talk, monkeypatch):
    prompts = spoken(monkeypatch)
    lines = "the fox\n/reset\nthe dog\n/help me\n/exit\nthe end\n"
    code, _, err = talk(lines, parent, "--max-new-tokens", 2)
    assert code == 0
    assert prompts[-1] == [("user", "the dog")]
    assert err[1] == "a new conversation"
    assert err[3] == "no command /help: /reset begins a new conversation, /exit ends"
    assert len(err) == 4


def test_chat_goes_on_without_a_turn_that_is_too_long(parent, talk, monkeypatch):
    prompts = spoken(monkeypatch)
    code, _, err = talk(f"{TEXT * 500}\nthe fox\n", parent, "--max-new-tokens", 2)
    assert code == 0
    assert f"more than the model's {POSITIONS:,} positions" in err[0]
    assert "/reset" in err[0]
    assert NUMBERS.fullmatch(err[1])
    assert prompts[-1] == [("user", "the fox")]


def test_ctrl_c_stops_an_answer_and_keeps_what_it_said(parent, talk, monkeypatch):
    prompts, heard = spoken(monkeypatch), []

    def stop(piece):
        print(piece, end="")
        heard.append(piece)
        if piece and len(prompts) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("masformer.cli_generate._show", stop)
    code, out, err = talk("the fox\nthe dog\n", parent, "--max-new-tokens", 200)
    assert code == 0
    said = prompts[-1][1][1]
    assert said
    assert out.startswith(said + "\n")
    assert err[0] == "stopped"
    assert NUMBERS.fullmatch(err[1])
    assert prompts[-1] == [("user", "the fox"), ("assistant", said), ("user", "the dog")]


def test_ctrl_c_at_the_prompt_ends(parent, talk):
    class Pressed(io.StringIO):
        def readline(self, *args):
            raise KeyboardInterrupt

    assert talk(Pressed(), parent) == (130, "", ["masformer: interrupted"])


@pytest.mark.parametrize("line", [b"\xff\n", b"caf\xe9\n"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_chat_refuses_an_input_that_is_not_utf8(parent, line, errors, talk):
    code, _, err = talk(io.TextIOWrapper(io.BytesIO(line), encoding="utf-8", errors=errors), parent)
    assert (code, err) == (3, ["masformer: error: the input is not UTF-8"])


@pytest.mark.usefixtures("unread")
def test_chat_refuses_before_it_reads_weights(parent, copy, capsys):
    assert "unknown --dtype 'int8': choose of float32" in refusal(capsys, 2, "chat", parent, "--dtype", "int8")
    assert "positions" in refusal(capsys, 3, "chat", parent, "--max-new-tokens", POSITIONS)
    assert "the model has 4" in refusal(capsys, 3, "chat", parent, "--plan", "full*3")
    (copy / "chat_template.jinja").unlink()
    assert "no chat template: use masformer generate" in refusal(capsys, 3, "chat", copy)
    (copy / "chat_template.jinja").write_text("{{ raise_exception('system role not supported') }}")
    assert "system role not supported" in refusal(capsys, 3, "chat", copy, "--system", "x")


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_dtype(command, dtype, parent, talk, monkeypatch):
    loaded, load = [], checkpoint.load

    def spied(*args, **kwargs):
        loaded.append(load(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(checkpoint, "load", spied)
    flags = [parent, *LOCAL, "--max-new-tokens", 3, *(["--dtype", dtype] if dtype else [])]
    if command == "chat":
        assert talk("the fox\n", *flags)[0] == 0
    else:
        assert run([*map(str, ["generate", *flags]), "--prompt", "the fox"]) == 0
    [model] = loaded
    assert model.dtype == getattr(torch, dtype or "float32")
    assert all(buffer.dtype == torch.float32 for name, buffer in model.named_buffers() if "inv_freq" in name)


def test_generate_refuses_an_unknown_dtype(parent, unread, capsys):
    assert "unknown --dtype" in refusal(capsys, 2, "generate", parent, "--prompt", "x", "--dtype", "half")


def test_help(capsys):
    assert run(["chat", "--help"]) == 0
    assert "Example: masformer chat" in capsys.readouterr().out


def program(*arguments, **streams):
    arguments = ["masformer", "chat", *map(str, arguments)]
    code = f"import sys; from masformer.cli import main; sys.argv = {arguments!r}; main()"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **streams)


@pytest.mark.slow
def test_a_real_ctrl_c_stops_an_answer_and_the_next_line_is_answered(parent):
    pipe = subprocess.PIPE
    process = program(parent, "--max-new-tokens", 4000, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        for _ in range(2):
            process.stdin.write(b"the fox\n")
            process.stdin.flush()
            while b" " not in (read := process.stdout.read1()):
                assert read, process.stderr.read().decode()
            process.send_signal(signal.SIGINT)
            assert process.stderr.readline() == b"stopped\n"
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, err) == (0, b"")


@pytest.mark.slow
@pytest.mark.parametrize("piped", [False, True])
@pytest.mark.parametrize(("key", "code"), [(b"\x03", 130), (b"\x04", 0)])
def test_a_terminal_is_asked_for_lines(key, code, piped, parent):
    """Ctrl-C and Ctrl-D at the prompt of a terminal; where the answers go to a pipe, it does not stand among them."""
    ours, theirs = pty.openpty()
    stdout = subprocess.PIPE if piped else theirs
    process = program(parent, "--max-new-tokens", 2, stdin=theirs, stdout=stdout, stderr=theirs, start_new_session=True)
    try:
        shown = b""
        while b"> " not in shown:
            shown += os.read(ours, 1000)
        os.write(ours, b"the fox\n")
        while b"KV cache" not in shown or not shown.endswith(b"> "):
            shown += os.read(ours, 1000)
        if key == b"\x03":  # no terminal of its own session: what its driver would send
            time.sleep(1)  # until it waits: a signal between the prompt and the system call would be seen after a line
            process.send_signal(signal.SIGINT)
        else:
            os.write(ours, key)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
        os.close(theirs)
        os.close(ours)
    assert process.returncode == code
    assert shown.count(b"> ") == 2
    assert not piped or b"> " not in out
