"""The demo from end to end, on a tiny random model and made-up speeches in place of the fetched ones."""

import json

import pytest
import torch

from masformer import demo
from masformer.evaluation.scoring import Score
from masformer.models.convert import plan_of
from tests.small import TEXT, small_llama, small_tokenizer


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """A folder with a model of 30 layers and speeches; what the demo would fetch is taken from there."""
    model, speeches = tmp_path / "model", tmp_path / "sotu.jsonl"
    tokenizer = small_tokenizer()
    torch.manual_seed(0)
    small_llama(tokenizer, num_hidden_layers=30, num_key_value_heads=1).save_pretrained(model)
    tokenizer.save_pretrained(model)
    lines = [{"id": f"{year}-Nobody-1", "text": TEXT * 60} for year in (1999, 2001, 2002, 2003, 2004)]
    speeches.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(demo, "smollm2", lambda folder, progress: model)
    monkeypatch.setattr(demo, "sotu", lambda folder, progress: speeches)
    small = {"LENGTH": 512, "NEEDLE_LENGTH": 640, "NEW_TOKENS": 4, "STEPS": 2, "STEP_LENGTH": 64, "HELD_OUT": 2}
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)
    return tmp_path


def test_demo_shows_every_plan_and_measures_once(fetched, monkeypatch):
    said: list[str] = []
    results = demo.run(fetched / "out", device="cpu", say=said.append)
    names = [demo.PARENT, demo.ALL_LOCAL, demo.RULE, demo.MEASURED]
    for part in ("plans", "loss", "needle", "cost"):
        assert list(results[part]) == names
    assert results == json.loads((fetched / "out" / "results.json").read_text())
    said_lines = "\n".join(said)
    assert "256 to 511" in said_lines
    assert "KV held, MB" in said_lines
    page = (fetched / "out" / "index.html").read_text()
    assert all(name in page and any(name in line for line in said) for name in names)
    assert results["text"][demo.MEASURED]["kv_bytes"] < results["text"][demo.PARENT]["kv_bytes"]
    # Positions that no window can cut short lose nothing, later ones differ.
    parent, local = (results["loss"][name]["buckets"] for name in (demo.PARENT, demo.ALL_LOCAL))
    assert [b["nats"] for b in parent if b["high"] <= 128] == pytest.approx(
        [b["nats"] for b in local if b["high"] <= 128], rel=1e-4
    )
    assert parent[-1]["nats"] != pytest.approx(local[-1]["nats"], rel=1e-6)

    monkeypatch.setattr(demo, "loss_by_position", None)
    monkeypatch.setattr(demo, "score", None)
    monkeypatch.setattr(demo, "generate_text", None)
    assert demo.run(fetched / "out", device="cpu", say=said.append) == results


def test_needle_is_asked_under_the_plan_that_is_named(fetched, monkeypatch):
    seen = []

    def score(model, tokenizer, items):
        seen.append((plan_of(model), len(items)))
        return [Score("passkey", item.depth, 1.0, -1.0, 1.0, (True,)) for item in items]

    monkeypatch.setattr(demo, "score", score)
    demo.run(fetched / "out", device="cpu", say=lambda line: None)
    assert seen == [(plan, demo.PASSKEYS) for plan in demo.plans(30).values()]
