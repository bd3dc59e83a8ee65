"""The whole job on a small real model and real long documents: fetch, convert, check, measure, generate, train, show.

    masformer demo                      results under demo/: index.html, results.json, and what was fetched

Every measurement is kept in demo/measured/ under a name that holds what it was measured on, so a second run
measures nothing again, and a training that was cut off goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import demo_page
from .data.documents import Document, read_documents
from .data.fetch import smollm2, sotu
from .data.generators import DEPTHS, Filler, make_items
from .evaluation.generation import generate_text, prompt_ids
from .evaluation.loss import loss_by_position
from .evaluation.scoring import score
from .evaluation.texts import cut_documents
from .files import digest
from .models.checkpoint import load
from .models.convert import applied, is_converted, plan_of
from .models.families import shape_of
from .models.selfcheck import selfcheck
from .models.tokenizer import load_tokenizer
from .spans import SpanPlan, Window, cost, layout
from .training.recipe import Recipe
from .training.run import train
from .training.trainer import METRICS

LENGTH = 4096
"""Tokens of the documents whose loss is measured."""
DOCUMENTS = 3
NEEDLE_LENGTH = 2048
"""Tokens of the passkey items."""
FILLERS, PASSKEYS = 3, 15
"""Speeches, the newest, in which passkeys are hidden, and how many of these, at each depth in turn."""
FIRST_YEAR = 2001
"""Only speeches from here on, the longest and the newest."""
NEW_TOKENS = 64
STEPS, STEP_LENGTH = 16, 1024
"""Of the training, and tokens of each."""
HELD_OUT = 8
"""Sequences of held-out speeches whose loss is measured before the training and after it."""
LOCAL = Window(128, sinks=4)
CHOSEN = (0, 7, 8, 17, 18, 20, 21, 23)
"""The layers of SmolLM2-135M that a pilot measured to carry recall: each was made local alone, and these cost
the most log-probability of the answer on passkey items of 2,048 tokens."""
PARENT, ALL_LOCAL, RULE, MEASURED = "parent", "all local", "interleaved, 8 full", "chosen, 8 full"


def plans(layers: int) -> dict[str, SpanPlan]:
    """The layouts that the demo compares, by name."""
    return {
        PARENT: layout("full", layers),
        ALL_LOCAL: layout("local", layers, local=LOCAL),
        RULE: layout("masformer", layers, full=len(CHOSEN), placement="interleaved", local=LOCAL),
        MEASURED: layout("masformer", layers, full=list(CHOSEN), local=LOCAL),
    }


def run(folder: Path, *, device: str | None = None, say: Callable[[str], Any] = print) -> dict[str, Any]:
    """Run the demo, write `folder`/index.html and results.json, and return what the latter holds.

    Raises:
        ResourceError, InputError: the model or the speeches cannot be fetched.
    """
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    say("1/6 model and documents")
    model_folder = smollm2(folder / "smollm2-135m-instruct", progress=say)
    file = sotu(folder / "sotu", progress=say)
    speeches = [d for d in read_documents(file) if int(d.id[:4]) >= FIRST_YEAR]
    job = _Job(model_folder, folder / "measured", speeches, device, say)
    results = job.results()
    del job.model
    results["training"] = _trained(model_folder, file, folder, job.layouts[MEASURED], job.device, say)
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    page = demo_page.write(folder / "index.html", results, plans(len(job.layouts[PARENT])))
    say("\n" + "\n".join(demo_page.conclusions(results)))
    say(f"\n{page} shows it all ({time.perf_counter() - started:.0f} s).")
    return results


@dataclasses.dataclass
class _Job:
    model_folder: Path
    measured: Path
    speeches: list[Document]
    device: str | None
    say: Callable[[str], Any]

    def __post_init__(self) -> None:
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = load_tokenizer(str(self.model_folder))
        self.model: Any = load(str(self.model_folder), device=self.device)
        files = sorted(Path(__file__).parent.rglob("*.py"))
        self.code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
        self.layouts = plans(self.model.config.num_hidden_layers)

    def results(self) -> dict[str, Any]:
        self.say("2/6 conversion and self-check")
        check = self._once("check", self.layouts[MEASURED], self._check)
        self.say(f"  converted to {self.layouts[MEASURED]}, self-check passed in {check['seconds']:.1f} s")
        self.say(f"3/6 loss by position, {DOCUMENTS} speeches of {LENGTH:,} tokens")
        losses = self._each("loss", self._loss)
        self.say(demo_page.loss_lines(losses))
        self.say(f"4/6 a passkey hidden in a speech, {NEEDLE_LENGTH:,} tokens")
        needles = self._each("needle", self._needle)
        self.say("5/6 generation")
        texts = {name: self._once("text", plan, self._text) for name, plan in self.layouts.items() if name != RULE}
        for name, text in texts.items():
            self.say(
                f"  {name:20} {text['tokens_per_second']:6.1f} tokens/s, KV cache {text['kv_bytes'] / 1e6:6.1f} MB"
            )
        shape = shape_of(self.model.config, kv_dtype_bytes=self.model.dtype.itemsize)
        costs = {name: cost(shape, plan, LENGTH).to_json() for name, plan in self.layouts.items()}
        self.say(f"  cost of one document of {LENGTH:,} tokens\n{demo_page.cost_lines(costs)}")
        return {
            "model": self.model_folder.name,
            "device": self.device,
            "torch": torch.__version__,
            "length": LENGTH,
            "needle_length": NEEDLE_LENGTH,
            "plans": {name: str(plan) for name, plan in self.layouts.items()},
            "check": check,
            "loss": losses,
            "needle": needles,
            "text": texts,
            "cost": costs,
        }

    def _each(self, what: str, measure: Callable[[], dict[str, Any]]) -> dict[str, dict[str, Any]]:
        results = {}
        for name, plan in self.layouts.items():
            results[name] = self._once(what, plan, measure)
            self.say(f"  {name:20} {results[name]['words']}")
        return results

    def _once(self, what: str, plan: SpanPlan, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Measure under a plan, or take what an earlier run measured on the same things."""
        settings = (LENGTH, NEEDLE_LENGTH, DOCUMENTS, FILLERS, PASSKEYS, DEPTHS, FIRST_YEAR, NEW_TOKENS)
        basis = (what, str(plan), self.device, torch.__version__, settings, self.code)
        name = f"{what}-{hashlib.sha256(repr(basis).encode()).hexdigest()[:16]}.json"
        file = self.measured / name
        if file.is_file():
            return dict(json.loads(file.read_text(encoding="utf-8")))
        if plan == self.layouts[PARENT]:
            result = measure()  # the parent runs as it is, without any code of ours
        else:
            with applied(self.model, plan):
                result = measure()
        self.measured.mkdir(exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(result), encoding="utf-8")
        part.replace(file)
        return result

    def _check(self) -> dict[str, Any]:
        started = time.perf_counter()
        selfcheck(self.model)
        return {"seconds": time.perf_counter() - started, "converted": is_converted(self.model)}

    def _loss(self) -> dict[str, Any]:
        cut = cut_documents(self.tokenizer, self.speeches, length=LENGTH, items=DOCUMENTS)
        started = time.perf_counter()
        loss = loss_by_position(self.model, cut.ids, sizes=cut.sizes)
        seconds = time.perf_counter() - started
        words = f"{loss.nats_per_token:.3f} nats/token, {LENGTH * len(cut.ids) / seconds:,.0f} tokens/s"
        return {**loss.to_json(), "documents": cut.names, "seconds": seconds, "words": words}

    def _needle(self) -> dict[str, Any]:
        filler = Filler.of(self.tokenizer, [speech.text for speech in self.speeches[-FILLERS:]])
        items = make_items("passkey", self.tokenizer, length=NEEDLE_LENGTH, count=PASSKEYS, filler=filler)
        scores = score(self.model, self.tokenizer, items)
        found = sum(each.score == 1 for each in scores)
        mean = sum(each.log_probability for each in scores) / len(scores)
        words = f"found {found} of {len(scores)}, log-probability of the key {mean:.1f}"
        return {
            "found": found,
            "items": len(scores),
            "log_probability": mean,
            "words": words,
            "scores": [{"depth": each.depth, "found": each.score == 1} for each in scores],
        }

    def _text(self) -> dict[str, Any]:
        start = self.tokenizer.decode(self.tokenizer(self.speeches[-1].text)["input_ids"][: LENGTH - 256])
        question = f"{start}\n\nSum up this speech in a few sentences."
        ids = prompt_ids(self.tokenizer, question, chat=True)
        generated = generate_text(self.model, self.tokenizer, ids, new_tokens=NEW_TOKENS)
        return {**generated.to_json(), "plan": str(plan_of(self.model))}


def _trained(
    model: Path, speeches: Path, folder: Path, plan: SpanPlan, device: str | None, say: Callable[[str], Any]
) -> dict[str, Any]:
    """A short continual training of the conversion: the loss of held-out speeches by step."""
    say(f"6/6 training, {STEPS} steps of {STEP_LENGTH:,} tokens")
    recipe = Recipe.model_validate(
        {
            "model": str(model),
            "output": str(folder / f"training-{digest([str(plan), STEPS, STEP_LENGTH])[:8]}"),
            "plan": str(plan),
            "data": {"documents": str(speeches), "lengths": STEP_LENGTH, "cache": str(folder / "corpora")},
            "training": {"steps": STEPS, "learning_rate": 1e-4, "warmup_steps": 2},
            "evaluation": {"every": STEPS, "sequences": HELD_OUT},
            "saving": {"every": STEPS, "keep": 1},
        }
    )

    def show(line: dict[str, Any]) -> None:
        if "nats" in line:
            say(f"  step {line['step']:2}  {line['nats']:.3f} nats/token, {line['tokens_per_second']:,.0f} tokens/s")

    result = train(recipe, cpu=device == "cpu", say=say, progress=show)
    lines = [json.loads(line) for line in Path(recipe.output, METRICS).read_text(encoding="utf-8").splitlines()]
    losses = [[line["step"], line["eval_documents_loss"]] for line in lines if "eval_documents_loss" in line]
    say(f"  held-out speeches: {losses[0][1]:.3f} nats/token before, {losses[-1][1]:.3f} after")
    return {"checkpoint": result["checkpoint"], "steps": STEPS, "tokens": STEPS * STEP_LENGTH, "held_out": losses}
