"""Passkey items and their score."""

import itertools

import pytest
import torch

from masformer.data.tasks import passkeys
from masformer.errors import InputError
from masformer.evaluation.recall import recall
from tests.small import TEXT, small_llama, small_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def test_items_have_the_length_and_the_key_stands_where_asked(tokenizer):
    depths = [0.0, 0.5, 1.0]
    items = passkeys(tokenizer, [TEXT * 40], 600, depths, seed=3)
    assert [len(item.prompt) + len(item.answer) for item in items] == [600] * 3
    for item in items:
        text = tokenizer.decode(item.prompt)
        assert text.count(item.key) == 2, "once, and once more in the same sentence"
        assert text.endswith(("The pass key is", "The pass key is "))
        assert tokenizer.decode(item.answer).strip() == item.key
    places = [tokenizer.decode(item.prompt).index(f"The pass key is {item.key}") for item in items]
    assert places == sorted(places)
    assert len({item.key for item in items}) == 3


def test_items_are_seeded(tokenizer):
    assert passkeys(tokenizer, [TEXT * 40], 500, [0.3], 1) == passkeys(tokenizer, [TEXT * 40], 500, [0.3], 1)
    assert passkeys(tokenizer, [TEXT * 40], 500, [0.3], 1) != passkeys(tokenizer, [TEXT * 40], 500, [0.3], 2)


def test_what_does_not_fit_is_refused(tokenizer):
    with pytest.raises(InputError, match="needs more than"):
        passkeys(tokenizer, [TEXT * 40], 50, [0.5], 0)
    with pytest.raises(InputError, match="the filler has"):
        passkeys(tokenizer, [TEXT], 5000, [0.5], 0)


def model_that_says(tokenizer, answer):
    """A model whose every prediction is the token of `answer` that follows the one at its input."""
    model = small_llama(tokenizer)
    following = dict(itertools.pairwise(answer))

    def forward(input_ids, logits_to_keep, **kwargs):
        logits = torch.zeros(*input_ids.shape, len(tokenizer))
        for column, token in enumerate(input_ids[0].tolist()):
            logits[0, column, following.get(token, answer[0])] = 20.0
        return type("Output", (), {"logits": logits[:, -logits_to_keep:]})

    model.forward = forward
    return model


def test_an_oracle_finds_it_and_a_blind_model_does_not(tokenizer):
    item = next(i for i in passkeys(tokenizer, [TEXT * 40], 600, [0.1] * 9, 0) if len(set(i.answer)) == len(i.answer))
    right = recall(model_that_says(tokenizer, list(item.answer)), item)
    assert right.found
    assert -0.01 < right.log_probability < 0
    wrong = recall(model_that_says(tokenizer, list(item.answer[::-1])), item)
    assert not wrong.found
    assert wrong.log_probability < -20


def test_an_item_beyond_the_positions_is_refused(tokenizer):
    (item,) = passkeys(tokenizer, [TEXT * 40], 600, [0.5], 0)
    with pytest.raises(InputError, match="600 tokens are more than the model's 512"):
        recall(small_llama(tokenizer, max_position_embeddings=512), item)
