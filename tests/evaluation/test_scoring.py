"""Scores against a planted oracle, a blind model, and whole logits of a tiny Llama."""

import dataclasses
import math
import types

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from masformer.data.items import Item
from masformer.errors import InputError
from masformer.evaluation.scoring import Score, continued, score, work
from masformer.models.convert import applied
from masformer.models.head import Head
from masformer.spans import SpanPlan

from ..small import small_llama, small_tokenizer

POSITIONS = 64


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    """Its logits differ much from token to token."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": POSITIONS}
    return small_llama(tokenizer, initializer_range=0.4, **sizes)


def item(length, *parts, seed=0, room=6, **fields):
    """Random tokens, none of them special or 0, which `argmax` of equal logits would choose."""
    ids = torch.randint(10, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Item(fields.pop("task", "made"), tuple(ids), parts, room, **fields)


class Planted(nn.Module):
    """The few things of a model that scoring needs. After each token of a known sequence it says the next one, with
    a logit of `certain` over 0; asked for text, it says that of `spoken`, by prompt.
    """

    def __init__(self, sequences, certain=30.0, spoken=None, vocabulary=320):
        super().__init__()
        self.config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=POSITIONS)
        self.generation_config = types.SimpleNamespace(eos_token_id=0)
        self.sequences, self.certain, self.spoken, self.device = sequences, certain, spoken, torch.device("cpu")
        self.head = nn.Linear(vocabulary, vocabulary, bias=False)
        nn.init.eye_(self.head.weight)
        self.asked = []

    def get_output_embeddings(self):
        return self.head

    def base_model(self, input_ids, use_cache):
        assert (use_cache, self.training, torch.is_grad_enabled()) == (False, False, False)
        self.asked.append(tuple(input_ids.shape))
        hidden = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            assert tuple(ids) in self.sequences
            for at, following in enumerate(ids[1:]):
                hidden[row, at, following] = self.certain
        return types.SimpleNamespace(last_hidden_state=hidden)

    def generate(self, ids, max_new_tokens, do_sample, num_beams, **kwargs):
        assert not do_sample
        assert num_beams == 1
        self.asked.append((*ids.shape, max_new_tokens))
        said = [[*self.spoken[tuple(row)], 0][:max_new_tokens] for row in ids.tolist()]
        longest = max(map(len, said))
        padded = [row + [kwargs["pad_token_id"]] * (longest - len(row)) for row in said]
        return types.SimpleNamespace(sequences=torch.cat([ids, torch.tensor(padded)], 1))


ITEMS = [
    item(20, (15, 20), depth=0.5),
    item(30, (10, 12), (20, 21), (25, 30), seed=1, task="three"),
    item(20, (19, 20), seed=2, depth=0.0),
]


def test_an_oracle_is_right_everywhere_and_a_blind_model_nowhere(tokenizer):
    sequences = {each.ids for each in ITEMS}
    seeing = score(Planted(sequences).train(), tokenizer, ITEMS, batch=2)
    assert [each.score for each in seeing] == [1, 1, 1]
    assert [each.rank for each in seeing] == [1, 1, 1]
    assert [each.right for each in seeing] == [(True,), (True, True, True), (True,)]
    assert [(each.task, each.depth, each.text) for each in seeing] == [
        ("made", 0.5, None), ("three", None, None), ("made", 0.0, None)
    ]  # fmt: skip
    assert all(-1e-6 < each.log_probability <= 0 for each in seeing)
    for certain, rank in ((0.0, 160.5), (-30.0, 320)):  # all logits alike: the middle of 320 places
        blind = score(Planted(sequences, certain), tokenizer, ITEMS)
        assert [each.score for each in blind] == [0, 0, 0]
        assert [each.rank for each in blind] == [rank] * 3
        assert [each.right for each in blind] == [(False,), (False,) * 3, (False,)]
    blind = score(Planted(sequences, 0.0), tokenizer, ITEMS)
    assert [each.log_probability for each in blind] == pytest.approx([-n * math.log(320) for n in (5, 8, 1)], rel=1e-6)


def test_answers_in_words_are_looked_for_in_what_is_said(tokenizer):
    items = [
        item(20, (12, 14), seed=seed, room=8, references=("fox jumps", "Lazy DOG", "quick cat")) for seed in range(3)
    ]
    texts = ["The FOX JUMPS over", "the lazy dog; fox jumps", "fox, it jumps"]
    spoken = {each.prompt: tokenizer(text)["input_ids"] for each, text in zip(items, texts, strict=True)}
    room = max(map(len, spoken.values())) + 1
    items = [dataclasses.replace(each, room=room) for each in items]
    scores = score(Planted({each.ids for each in items}, 0.0, spoken), tokenizer, items, batch=2)
    assert [each.text for each in scores] == texts
    assert [each.score for each in scores] == pytest.approx([1 / 3, 2 / 3, 0])
    assert [each.right for each in scores] == [(False,)] * 3, "of the answers given, which are not what is said"
    short = score(Planted({items[0].ids}, 0.0, spoken), tokenizer, [dataclasses.replace(items[0], room=2)])
    assert short[0].text == tokenizer.decode(spoken[items[0].prompt][:2])


def test_items_of_one_length_run_together_and_generation_by_prompt(tokenizer):
    words = {"references": ("a", "b"), "room": 5}
    items = [
        item(20, (10, 12), seed=1), item(24, (10, 12), seed=2, **words), item(20, (14, 15), seed=3, **words),
        item(20, (10, 20), seed=4, **words), item(20, (10, 11), seed=5, references=("a", "b"), room=7),
    ]  # fmt: skip
    planted = Planted({each.ids for each in items}, spoken={each.prompt: [40, 41] for each in items})
    done = []
    score(planted, tokenizer, items, batch=3, progress=done.append)
    assert planted.asked == [(3, 20), (1, 20), (1, 24), (2, 10, 5), (1, 14, 5), (1, 10, 7)]
    assert sum(done) == work(items) == 4 * 20 + 24 + 2 * 15 + 19 + 17
    assert len(done) == 6


def plain(model, each):
    """By whole logits, token by token in Python."""
    with torch.no_grad():
        logits = model(torch.tensor([each.ids])).logits[0].double()
    log_p, ranks, right = 0.0, [], []
    for low, high in each.parts:
        places = [logits[t - 1].sort(descending=True).indices.tolist().index(each.ids[t]) for t in range(low, high)]
        log_p += sum(float(logits[t - 1].log_softmax(-1)[each.ids[t]]) for t in range(low, high))
        ranks += [place + 1 for place in places]
        right.append(places == [0] * len(places))
    return Score(each.task, each.depth, sum(right) / len(right), log_p, sum(ranks) / len(ranks), tuple(right))


def greedy(model, prompt, count, end=None):
    ids = list(prompt)
    while len(ids) < len(prompt) + count and (end is None or end not in ids[len(prompt) :]):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return [token for token in ids[len(prompt) :] if token != end]


def right_item(model, length, seed):
    """An item of two parts whose second the model would say itself, and whose first it would not."""
    made = item(length - 4, (5, 7), seed=seed)
    said = greedy(model, made.ids, 4)
    return dataclasses.replace(made, ids=made.ids + tuple(said), parts=((5, 7), (length - 4, length)))


def close(got, expected, rel=1e-6):
    for one, other in zip(got, expected, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, rel=rel)
        assert dataclasses.replace(one, log_probability=0) == dataclasses.replace(other, log_probability=0)


@pytest.mark.parametrize("plan", [None, "window:6,block:5"])
def test_scores_are_those_of_whole_logits_in_any_batch_and_order(model, tokenizer, plan):
    made = [*ITEMS, *(right_item(model, length, length + seed) for seed in (0, 1) for length in (20, 30))]
    with applied(model, SpanPlan.parse(plan)) if plan else torch.no_grad():
        expected = [plain(model, each) for each in made]
        if not plan:
            assert [each.right for each in expected[3:]] == [(False, True)] * 4
        for batch in (1, 2, 7):
            close(score(model, tokenizer, made, batch=batch), expected)
            close(score(model, tokenizer, made[::-1], batch=batch)[::-1], expected)


def test_a_single_part_is_greedy_generation(model, tokenizer):
    prompt = item(20, (19, 20)).ids
    said = greedy(model, prompt, 5)
    for answer, right in ((said, True), ([*said[:-1], (said[-1] + 1) % 320], False)):
        (got,) = score(model, tokenizer, [Item("made", (*prompt, *answer), ((20, 25),), 5)])
        assert (got.score, got.right) == (float(right), (right,))


def test_generated_text_is_greedy_and_ends_at_the_end_token(model, tokenizer, monkeypatch):
    items = [item(20, (15, 17), seed=seed, room=12, references=("\n", "\t")) for seed in range(4)]
    whole = [greedy(model, each.prompt, 12) for each in items]
    end = next(t for t in whole[0][3:8] if sum(t in row for row in whole) < 4)
    assert any(end in row[:-1] for row in whole)
    expected = [tokenizer.decode(row) for row in whole]
    assert [each.text for each in score(model, tokenizer, items, batch=4)] == expected
    for name, value in {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_new_tokens": 9}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end, 1])
    ended = [tokenizer.decode(row[: row.index(end)] if end in row else row) for row in whole]
    assert ended != expected
    for batch in (1, 3, 4):
        assert [each.text for each in score(model, tokenizer, items, batch=batch)] == ended


def test_a_single_reference_is_scored_without_generating(model, tokenizer, monkeypatch):
    monkeypatch.setattr(type(model), "generate", None)
    one = item(20, (15, 17), room=2, references=("fox",))
    close(score(model, tokenizer, [one]), [plain(model, one)])


def test_references_are_shares(model, tokenizer):
    plain_item = item(20, (15, 17), room=12, references=("\x00", "\x01"))
    text = score(model, tokenizer, [plain_item])[0].text
    references = (text[:4].swapcase(), text[-4:], "not in it", "nor this")
    (got,) = score(model, tokenizer, [dataclasses.replace(plain_item, references=references)])
    assert got.score == 0.5


def test_more_beams_find_what_is_no_less_probable(model, tokenizer):
    prompt = torch.tensor([item(20, (19, 20), seed=3).ids])
    (greedily,), (searched,) = (continued(model, tokenizer, prompt, 6, beams=beams) for beams in (1, 8))
    assert greedily == tokenizer.decode(greedy(model, prompt[0].tolist(), 6))
    assert searched != greedily


def test_the_head_runs_on_the_answers_alone(model, tokenizer, monkeypatch):
    shapes, call = [], Head.__call__
    monkeypatch.setattr(Head, "__call__", lambda head, hidden: shapes.append(tuple(hidden.shape)) or call(head, hidden))
    score(model, tokenizer, ITEMS, batch=2)
    assert sorted(shapes) == [(1, 32), (5, 32), (8, 32)]


def test_the_mode_is_kept(model, tokenizer):
    dropping = small_llama(tokenizer, attention_dropout=0.5).train()
    close(score(dropping, tokenizer, ITEMS), score(dropping, tokenizer, ITEMS), rel=1e-12)
    assert dropping.training
    assert score(model, tokenizer, []) == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (item(65, (60, 65), room=2), "65 tokens are more than the model's 64"),
        (item(60, (55, 60), room=10), "65 tokens are more than the model's 64"),
        (item(20, (0, 3)), r"parts \(\(0, 3\),\) in 20 tokens"),
        (item(20, (5, 5)), "nothing to score"),
        (item(20, (5, 21)), "nothing to score"),
        (item(20), "nothing to score"),
    ],
)
def test_items_that_cannot_be_scored_are_refused_before_any_runs(tokenizer, wrong, words):
    planted = Planted({each.ids for each in ITEMS})
    with pytest.raises(InputError, match=words):
        score(planted, tokenizer, [*ITEMS, wrong])
    assert planted.asked == []


def test_a_batch_of_nothing_and_a_broken_model_are_refused(tokenizer):
    with pytest.raises(InputError, match="at least 1 item, got 0"):
        score(Planted(set()), tokenizer, ITEMS, batch=0)
    with pytest.raises(InputError, match="an answer of made has a log-probability of nan"):
        score(Planted({each.ids for each in ITEMS}, math.nan), tokenizer, ITEMS)
