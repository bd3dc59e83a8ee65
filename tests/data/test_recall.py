import itertools
import json
import re

import numpy as np
import pytest

from masformer.data import needles, recall
from masformer.data.recall import RecallSequences, draw_item
from masformer.data.seeds import generator
from masformer.data.sequences import IGNORED, Stream
from masformer.errors import InputError
from tests.small import small_tokenizer

from .made import made_corpus
from .test_sequences import content, taken

EOS = 0


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def recall_of(tokenizer, lengths=800, seed=0, loss_on="answer"):
    """The filler is one token only, so that everything else stands out."""
    sizes = [40, 3000, 7, 900]
    tokens = np.full(sum(sizes), tokenizer.encode("~")[0], np.uint16)
    tokens[np.cumsum(sizes) - 1] = EOS
    return RecallSequences(tokenizer, made_corpus(sizes, eos=EOS, tokens=tokens), lengths, seed=seed, loss_on=loss_on)


def items(count=3000):
    return [draw_item(generator("test", 0, number), number % 8 + 1) for number in range(count)]


def answers(labels):
    """Runs of labelled tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], labels != IGNORED, [False]]).astype(int)))
    return [labels[begin:end] for begin, end in edges.reshape(-1, 2)]


def test_an_item_reads_like_this():
    random = generator("example", 0)
    item = draw_item(random, 2)
    assert len(item.needles) == 2
    assert 1 <= len(item.questions) <= 2
    for question, answer in item.questions:
        name = re.search(r"the [a-z ]+ of (the )?\w+( \w+)?", question)[0]
        assert sum(answer.strip() in needle and name.rstrip(":") in needle for needle in item.needles) == 1


def test_every_question_has_one_answer_and_some_facts_are_not_asked_for():
    asked = 0
    for item in items(500):
        for question, answer in item.questions:
            owner = max((owner for owner in recall.OWNERS if f" of {owner}" in question), key=len)
            told = [needle for needle in item.needles if f" of {owner}" in needle]
            assert len(told) == 1
            assert answer.strip() in told[0]
            assert sum(answer.strip() in needle for needle in item.needles) == 1
        asked += len(item.questions)
    assert 500 < asked < sum(len(item.needles) for item in items(500)) / 1.5


def test_the_evaluations_keys_are_never_used():
    """Those are the numbers of five digits."""
    keys = {answer.strip() for item in items() for _, answer in item.questions}
    evaluated = {str(number) for number in range(10_000, 100_000)}
    assert not keys & evaluated
    assert not [item for item in items() for text in item.needles if re.search(r"\b\d{5}\b", text)]
    kinds = {re.sub(r"[A-Z]", "A", re.sub(r"[a-z]+", "w", re.sub(r"\d", "9", key))) for key in keys}
    assert {"9999", "999999", "9999999", "99999999", "w-w", "w-w-w"} <= kinds
    assert len(keys) > 3000


def test_the_evaluations_wording_never_occurs():
    evaluation = [needles.INTRODUCTION, *needles.NEEDLE.split("{key}"), needles.QUESTION, "pass key", "info hidden"]
    phrases = [phrase.strip(" .\n") for phrase in evaluation if len(phrase.strip(" .\n")) > 2]
    assert len(phrases) >= 5
    for item in items():
        text = "".join([item.introduction, *item.needles, *map("".join, item.questions)])
        assert not [phrase for phrase in phrases if phrase.lower() in text.lower()]


def test_all_wordings_are_used():
    drawn = items()
    assert {item.introduction for item in drawn} == set(recall.INTRODUCTIONS)
    for templates, texts in [
        (recall.NEEDLES, [item.needles[0] for item in drawn]),
        (recall.QUESTIONS, [item.questions[0][0] for item in drawn]),
    ]:
        for template in templates:
            pattern = re.escape(template.replace("{{", "{").replace("}}", "}"))
            pattern = re.sub(r"\\{name\\}|\\{key\\}", ".+", pattern)
            assert any(re.fullmatch(pattern, text) for text in texts), template


def test_the_shortest_length_holds_an_item_of_a_token_for_every_byte():
    longest = max(recall.WORDS, key=len)
    name = f"the {max(recall.THINGS, key=len)} of {max(recall.OWNERS, key=len)}"
    key = "-".join([longest] * 3)
    parts = [
        max(recall.INTRODUCTIONS, key=len),
        max((needle.format(name=name, key=key) for needle in recall.NEEDLES), key=len),
        max((question.format(name=name) for question in recall.QUESTIONS), key=len),
        f" {key}",
    ]
    assert len("".join(parts).encode()) < recall.SHORTEST


@pytest.mark.parametrize("length", [512, 513, 800, 4000])
def test_a_sequence_has_the_exact_length_and_its_answers_at_the_end(tokenizer, length):
    sequences = recall_of(tokenizer, length)
    for index in range(20):
        sequence = sequences.sequence(index)
        assert len(sequence.input_ids) == length
        assert sequence.position_ids.tolist() == list(range(length))
        assert sequence.attention_mask is None
        assert sequence.padding == 0
        assert EOS not in sequence.input_ids
        labelled = sequence.labels != IGNORED
        assert (sequence.labels[labelled] == sequence.input_ids[labelled]).all()
        text = tokenizer.decode(sequence.input_ids)
        found = answers(sequence.labels)
        assert 1 <= len(found) <= recall.MOST_QUESTIONS
        for answer in found:
            key = tokenizer.decode(answer).strip()
            assert text.count(key) >= 2
        assert labelled[-1]
        assert text.count("~") >= length // 3


def test_needles_stand_anywhere(tokenizer):
    sequences = recall_of(tokenizer, 4000)
    depths = []
    for index in range(60):
        sequence = sequences.sequence(index)
        other = np.flatnonzero(sequence.input_ids != tokenizer.encode("~")[0])
        starts = other[1:][np.diff(other) > 1]
        depths += (starts[:-1] / 4000).tolist()
    assert np.histogram(depths, bins=4, range=(0, 1))[0].min() > len(depths) / 10


def test_the_loss_may_be_on_everything(tokenizer):
    answered, everything = (recall_of(tokenizer, loss_on=loss_on).sequence(3) for loss_on in ("answer", "all"))
    assert answered.input_ids.tolist() == everything.input_ids.tolist()
    assert everything.labels.tolist() == [IGNORED, *everything.input_ids[1:].tolist()]


def test_a_sequence_is_a_function_of_seed_and_index(tokenizer):
    first, again = recall_of(tokenizer), recall_of(tokenizer)
    far = content(again.sequence(10**12))
    assert content(again.sequence(7)) == content(first.sequence(7))
    assert content(first.sequence(10**12)) == far
    different = [recall_of(tokenizer, seed=seed).sequence(index) for seed in (0, 1) for index in (7, 8)]
    assert len({tuple(sequence.input_ids) for sequence in different}) == 4


def test_a_stream_resumes(tokenizer):
    lengths = [(0, 600), (4, 900)]
    stream = Stream(recall_of(tokenizer, lengths))
    taken(stream, 3)
    state = json.loads(json.dumps(stream.state()))
    resumed = Stream(recall_of(tokenizer, lengths))
    resumed.load_state(state)
    assert [len(sequence.input_ids) for sequence in itertools.islice(stream, 2)] == [600, 900]
    assert content(resumed.sequences.sequence(4)) == taken(resumed, 2)[1]
    with pytest.raises(InputError, match="loss_on is 'answer' in the state and 'all' here"):
        Stream(recall_of(tokenizer, lengths, loss_on="all")).load_state(state)


def test_other_wording_is_another_stream(tokenizer, monkeypatch):
    state = Stream(recall_of(tokenizer)).state()
    monkeypatch.setattr(recall, "NEEDLES", recall.NEEDLES[1:])
    with pytest.raises(InputError, match="wording is"):
        Stream(recall_of(tokenizer)).load_state(state)


@pytest.mark.parametrize(
    ("lengths", "loss_on", "message"),
    [
        (511, "answer", "at least 512 tokens"),
        ([(0, 600), (1, 100)], "all", "at least 512"),
        (600, "both", "got 'both'"),
    ],
)
def test_what_cannot_be_is_refused(tokenizer, lengths, loss_on, message):
    with pytest.raises(InputError, match=message):
        recall_of(tokenizer, lengths, loss_on=loss_on)
