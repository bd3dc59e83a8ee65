"""Proof that an exported folder says what its source says: other software loads it, in a process of its own.

asked = questions(config, window, tokenizer)
expected = answers(source, asked["prompts"])
prove(folder, asked, expected)                     stock transformers, without this package
prove_in_vllm(folder, asked, expected, python)     vLLM, in the environment of another interpreter
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from ..errors import InputError
from . import stock
from .positions import max_positions

TOLERANCE = 1e-4
"""Of stock transformers: the largest difference of two float32 logits, over the largest logit. Measured: up to 2e-6."""
VLLM_TOLERANCE = 2e-3
"""Of vLLM: the largest difference of two log-probabilities, in nats. Measured: 6e-5."""

VLLM = "vLLM"
TEXTS = [
    "The quick brown fox jumps over 13 lazy dogs.\n\n\tIt's 1,234.5 — émigré, naïve; 中文, 🙂",
    "  def f(x):\n    return x",
]
VLLM_SETTINGS = {
    "PYTHONSAFEPATH": "1",  # what lies in the working directory is none of its packages
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
VLLM_SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

folder, questions, written = sys.argv[1:]
asked = json.load(open(questions, encoding="utf-8"))
room = max(map(len, asked["prompts"])) + asked["new"]
model = LLM(
    folder, dtype="float32", enforce_eager=True, max_model_len=room, enable_prefix_caching=False, seed=0,
    skip_tokenizer_init=not asked["texts"], model_impl=asked["classes"],
)
how = SamplingParams(
    temperature=0, max_tokens=asked["new"], ignore_eos=True, logprobs=0, prompt_logprobs=0, detokenize=False
)
prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
found = []
for prompt, got in zip(asked["prompts"], model.generate(prompts, how, use_tqdm=False)):
    reply = got.outputs[0]
    tokens = list(reply.token_ids)
    found.append({
        "prompt": [part[token].logprob for part, token in zip(got.prompt_logprobs[1:], prompt[1:])],
        "tokens": tokens,
        "steps": [part[token].logprob for part, token in zip(reply.logprobs, tokens)],
    })
texts = [list(model.get_tokenizer().encode(text)) for text in asked["texts"]]
json.dump({"found": found, "texts": texts}, open(written, "w", encoding="utf-8"))
"""
"""Runs where vLLM is installed, which shares no environment with this package's transformers."""


@dataclasses.dataclass(frozen=True)
class Proof:
    """What was compared, and how far apart it was.

    software: what loaded the folder: the class of transformers, or vLLM.
    tokens: of the longest prompt.
    error: the largest difference: of logits over the largest logit, or of log-probabilities in nats.
    same: how many of the `generated` tokens are the source's; another one is a tie within the tolerance.
    """

    software: str
    tokens: int
    error: float
    tolerance: float
    same: int
    generated: int

    def words(self) -> str:
        """One line for people."""
        what = "log-probabilities" if self.software == VLLM else "logits, relative to the largest one,"
        return (
            f"{self.software}, fresh process: {what} at most {self.error:.1e} apart over {self.tokens:,} tokens "
            f"({self.tolerance:g} is allowed), {self.same} of {self.generated} greedy tokens the same"
        )


def questions(config: PreTrainedConfig, window: int, tokenizer: Any = None) -> dict[str, Any]:
    """Prompts of random tokens: one that ends just before the window begins to cut, so that generation crosses its
    border, and one of three windows and five tokens, or as many as the model has positions for.
    """
    most = max_positions(config)
    room = (3 * window + 5) if most is None else min(3 * window + 5, most - stock.NEW)
    if room < 2:
        raise InputError(f"the model has {most} positions: too few for a proof of its export")
    source = torch.Generator().manual_seed(0)
    lengths = [min(max(window - stock.NEW // 2, 2), room), room]
    prompts = [torch.randint(config.vocab_size, (length,), generator=source).tolist() for length in lengths]
    texts = [] if tokenizer is None else TEXTS
    return {"prompts": prompts, "texts": texts, "new": stock.NEW}


def prove(
    folder: Path, asked: dict[str, Any], expected: dict[str, Tensor], tokenizer: Any = None, device: str = "cpu"
) -> Proof:
    """Compare logits, greedy tokens and the tokenizer of a folder with its source's, in a fresh process.

    Raises:
        InputError: the folder does not load, or differs.
    """
    with tempfile.TemporaryDirectory() as scratch:
        answered = Path(scratch, "answers.safetensors")
        command = [sys.executable, "-P", stock.__file__, str(folder)]
        _ask(command, asked, answered, "transformers", {"HF_HUB_OFFLINE": "1"}, device)
        with safe_open(answered, "pt") as file:
            about = file.metadata()
            got = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    _same_texts(json.loads(about.get("texts", "[]")), asked, tokenizer, about["class"])
    errors, same = [], 0
    for number in range(len(asked["prompts"])):
        logits, steps = expected[f"logits.{number}"], expected[f"steps.{number}"]
        agree = _agreeing(got[f"tokens.{number}"].tolist(), expected[f"tokens.{number}"].tolist())
        same += agree
        errors += [_error(got[f"logits.{number}"], logits), _error(got[f"steps.{number}"][: agree + 1], steps)]
    return _judged(about["class"], asked, errors, TOLERANCE, same)


def _error(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest logit, of as many rows as there are of `got`; NaN stays NaN."""
    expected = expected[: len(got)]
    return float((got - expected).abs().max() / expected.abs().max())


def prove_in_vllm(
    folder: Path,
    asked: dict[str, Any],
    expected: dict[str, Tensor],
    python: str,
    tokenizer: Any = None,
    classes: str = "auto",
) -> Proof:
    """Compare the log-probabilities of the prompts' tokens and of the greedy ones after them, as vLLM gives them.

    Args:
        python: an interpreter that has vLLM.
        classes: vLLM's `model_impl`: "auto" for its own classes, "transformers" for those of transformers.

    Raises:
        InputError: an interpreter that cannot be run or has no vLLM, a folder that does not load, or one that differs.
    """
    with tempfile.TemporaryDirectory() as scratch:
        answered = Path(scratch, "answers.json")
        _ask([python, "-c", VLLM_SCRIPT, str(folder)], asked | {"classes": classes}, answered, VLLM, VLLM_SETTINGS)
        got = json.loads(answered.read_text(encoding="utf-8"))
    _same_texts(got["texts"], asked, tokenizer, VLLM)
    errors, same = [], 0
    for number, (prompt, found) in enumerate(zip(asked["prompts"], got["found"], strict=True)):
        rows, steps = (expected[f"{kind}.{number}"].log_softmax(-1) for kind in ("logits", "steps"))
        at = stock.positions(len(prompt))[:-1]  # what follows the last token, no prompt says
        ours = rows[torch.arange(len(at)), torch.tensor(prompt)[at + 1]]
        errors.append(_apart(torch.tensor(found["prompt"])[at], ours))
        agree = _agreeing(found["tokens"], expected[f"tokens.{number}"].tolist())
        same += agree
        until = min(agree + 1, stock.NEW)  # where tokens part, it must be a tie
        ours = steps[torch.arange(until), torch.tensor(found["tokens"][:until])]
        best = steps[:until].amax(-1)
        errors += [_apart(torch.tensor(found["steps"][:until]), ours), _apart(best, ours)]
    return _judged(VLLM, asked, errors, VLLM_TOLERANCE, same)


def check_vllm(python: str) -> None:
    """Refuse an interpreter that has no vLLM, before any work is done.

    Raises:
        InputError: it cannot be run, or vLLM is not installed there.
    """
    look = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"
    try:
        found = not subprocess.run([python, "-c", look], capture_output=True, env=os.environ | VLLM_SETTINGS).returncode
    except OSError as error:
        raise InputError(
            f"{python} cannot be run: {error.strerror}: name the interpreter of vLLM's environment"
        ) from error
    if not found:
        raise InputError(f"{python} has no vLLM: make an environment that has (make vllm-env: .venv-vllm/bin/python)")


def _ask(
    command: list[str], asked: dict[str, Any], answered: Path, software: str, settings: dict[str, str], *more: str
) -> None:
    """Run a script that reads the questions and writes the answers."""
    file = answered.with_name("questions.json")
    file.write_text(json.dumps(asked), encoding="utf-8")
    ran = subprocess.run(
        [*command, str(file), str(answered), *more], capture_output=True, text=True, env=os.environ | settings
    )
    if ran.returncode or not answered.is_file():
        reason = _reason(ran.stdout + ran.stderr) or f"exit code {ran.returncode}"
        raise InputError(f"{software} cannot load the export: {reason}")


def _reason(said: str) -> str:
    """What a process says it died of: its last error, but vLLM's last one only says that another came before."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [found[0] for line in lines if (found := re.search(r"\b\w+Error: .+", line))]
    causes = [error for error in errors if "Engine core initialization failed" not in error]
    return (causes or errors or lines or [""])[-1][:300]


def _same_texts(got: list[list[int]], asked: dict[str, Any], tokenizer: Any, software: str) -> None:
    if asked["texts"] and got != stock.encoded(tokenizer, asked["texts"]):
        raise InputError(f"the export differs: its tokenizer gives other tokens in {software} than the source's")


def _agreeing(got: list[int], expected: list[int]) -> int:
    """How many tokens are the same before the first that is not."""
    return next((n for n, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1]), len(expected))


def _apart(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).abs().max())


def _judged(software: str, asked: dict[str, Any], errors: list[float], tolerance: float, same: int) -> Proof:
    worst = max(errors, key=lambda error: error if error == error else float("inf"))
    if not worst <= tolerance:  # also refuses NaN
        kind = "log-probabilities" if software == VLLM else "logits"
        raise InputError(
            f"the export differs from its source in {software}, so it is refused: {kind} are up to {worst:.2g} apart, "
            f"{tolerance:g} is allowed"
        )
    longest = max(map(len, asked["prompts"]))
    return Proof(software, longest, worst, tolerance, same, stock.NEW * len(asked["prompts"]))
