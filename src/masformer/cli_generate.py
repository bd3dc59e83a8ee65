"""The commands that let a model write: `generate` and `chat`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_model import Debug, Device, Dtype, Json, Model, check_dtype, load_with_plan
from .cli_output import UsageError, at_least, print_json, say
from .cli_plan import PlanFlags, in_words
from .errors import InputError

if TYPE_CHECKING:
    from .evaluation.generation import Conversation, Generated

NewTokens = Annotated[int, typer.Option(callback=at_least(1), help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(callback=at_least(0), help="0 takes the likeliest token.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of sampling at a temperature above 0.")]


def generate(
    model: Model,
    *,
    flags: PlanFlags,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A UTF-8 file with it.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_new_tokens: NewTokens = 100,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt, token by token, and report speed and the bytes of the KV cache.

    Example: masformer generate MODEL --chat --prompt "What is a long document?" --max-new-tokens 50
    """
    text = _prompt(prompt, prompt_file)
    check_dtype(dtype)
    from .evaluation.generation import generate_text, prompt_ids
    from .models.checkpoint import load_config
    from .models.positions import check_positions
    from .models.tokenizer import load_tokenizer, quiet

    quiet()
    config, own = load_config(model)
    flags.plan_for(len(own), own)
    tokenizer = load_tokenizer(model)
    ids = prompt_ids(tokenizer, text, chat=chat)
    check_positions(config, ids.shape[1] + max_new_tokens)
    loaded, chosen = load_with_plan(model, flags, device, dtype=dtype)
    _seed(seed)
    show = None if json else _show
    result = generate_text(loaded, tokenizer, ids, new_tokens=max_new_tokens, temperature=temperature, show=show)
    if json:
        print_json({"model": model, "plan": str(chosen), "seed": seed, **result.to_json()})
        return
    print(flush=True)
    say(_measured(result, f"{result.prompt_tokens:,} prompt tokens"))


def chat(
    model: Model,
    *,
    flags: PlanFlags,
    system: Annotated[str | None, typer.Option(help="The system prompt; the chat template's own.")] = None,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Talk with a model: each line of the input is a turn. Ctrl-C stops an answer, Ctrl-D ends.

    Example: masformer chat MODEL --system "Answer in one sentence."
    """
    check_dtype(dtype)
    from .evaluation.generation import Conversation, chat_ids
    from .models.checkpoint import load_config
    from .models.positions import check_positions
    from .models.tokenizer import load_tokenizer, quiet

    quiet()
    config, own = load_config(model)
    flags.plan_for(len(own), own)
    tokenizer = load_tokenizer(model)
    shortest = [{"role": "user", "content": "?"}]
    if system is not None:
        shortest.insert(0, {"role": "system", "content": system})
    check_positions(config, chat_ids(tokenizer, shortest).shape[1] + max_new_tokens)
    loaded, _ = load_with_plan(model, flags, device, dtype=dtype)
    _seed(seed)
    conversation = Conversation(loaded, tokenizer, new_tokens=max_new_tokens, temperature=temperature, system=system)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # lets `input` edit a line and recall earlier ones
    while (line := _line()) is not None and line != "/exit":
        if line == "/reset":
            conversation.reset()
            say("a new conversation")
        elif line.startswith("/"):
            say(f"no command {line.split()[0]}: /reset begins a new conversation, /exit ends")
        elif line:
            _answer(conversation, line)


def _line() -> str | None:
    """The next line of the input without the blanks around it; None at the end."""
    asked = sys.stdin.isatty()
    try:
        if asked and sys.stdout.isatty():
            line = input("> ")  # readline has to know of the prompt, or draws over it
        else:
            if asked:
                print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:
                raise EOFError
        line.encode()  # where the locale is not UTF-8, what cannot be read comes as surrogates
    except (EOFError, KeyboardInterrupt) as error:
        if asked:
            say("")  # what comes next gets a line of its own
        if isinstance(error, KeyboardInterrupt):
            raise
        return None
    except UnicodeError as error:
        raise InputError("the input is not UTF-8") from error
    return line.strip()


def _answer(conversation: Conversation, text: str) -> None:
    """Show one answer as it comes; Ctrl-C stops it."""
    try:
        result = conversation.answer(text, show=_show)
    except InputError as error:
        say(f"{error}; this turn is left out, /reset begins a new conversation")
    except KeyboardInterrupt:
        print(flush=True)
        say("stopped")
    else:
        print(flush=True)
        prompt = f"{result.prompt_tokens:,} prompt tokens, {result.computed_tokens:,} of them newly computed,"
        say(_measured(result, prompt))


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _measured(result: Generated, prompt: str) -> str:
    speed = f"{result.tokens_per_second:.1f}" if result.tokens_per_second else "-"
    return (
        f"{prompt} in {result.prefill_seconds:.2f} s, {result.new_tokens:,} new tokens, "
        f"{speed} tokens/s, KV cache {in_words(result.kv_bytes, 'B')}"
    )


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise UsageError("give either --prompt or --prompt-file")
    try:
        text = prompt if file is None else file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}") from error
    if text and any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):  # what a shell gave and could not be read
        raise InputError("the prompt is not UTF-8")
    if not text or not text.strip():
        raise InputError(f"the prompt{f' in {file}' if file else ''} is empty: give some text")
    return text


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)
