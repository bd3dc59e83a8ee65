"""A conversation answers with a kept cache what it answers with a new one, and keeps none that is out of step."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from masformer.errors import InputError
from masformer.evaluation.generation import Conversation, chat_ids, generate_text, prompt_ids
from masformer.models.cache import SpanCache
from masformer.models.convert import convert
from masformer.spans import Block, Full, SpanPlan, Window
from tests.models.helpers import MIXED, VOCABULARY, tiny

SPECIAL = ["<pad>", "<s>", "</s>", "<system>", "<user>", "<bot>"]
TEMPLATE = """{% for m in messages %}
{%- if m.content == 'refused' %}{{ raise_exception('not that') }}{% endif -%}
{{ '<bot> ' if m.role == 'assistant' else '<' + m.role + '> ' }}{{ m.content }}{{ ' </s> ' }}
{%- endfor %}{% if add_generation_prompt %}<bot>{% endif %}"""
NEW = 9
LINES = ["a b c", "d e f g h i j k", "l", "m n o"]

PLANS = {
    "full": SpanPlan((Full(),) * 4),
    "window": SpanPlan((Window(5),) * 4),
    "sinks": SpanPlan((Window(4, sinks=3),) * 4),
    "block": SpanPlan((Block(6), Block(4, lookback=1), Block(5, 1, 2), Block(64))),
    "mixed": MIXED,
    "none": None,
}


@pytest.fixture
def tokenizer():
    """Words of one letter or number, so that what is decoded is encoded to the same ids again."""
    words = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz", *map(str, range(VOCABULARY))][:VOCABULARY]
    model = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>")
    plain = Tokenizer(model)
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=SPECIAL[3:]
    )
    fast.chat_template = TEMPLATE
    return fast


def model_for(plan, **changes):
    """A random model that says words only."""
    model = tiny(**changes)
    model.generation_config.suppress_tokens = list(range(len(SPECIAL)))
    return model if plan is None else convert(model, plan)


def prompt_of(conversation, text):
    return chat_ids(conversation.tokenizer, [*conversation.turns, {"role": "user", "content": text}])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("plan", PLANS)
def test_a_kept_cache_gives_the_same_answers_as_a_new_one(plan, temperature, tokenizer):
    model = model_for(PLANS[plan])
    talk = Conversation(model, tokenizer, new_tokens=NEW, temperature=temperature, system="x y")
    held = 0
    for seed, line in enumerate(LINES):
        ids = prompt_of(talk, line)
        torch.manual_seed(seed)
        fresh = generate_text(model, tokenizer, ids, new_tokens=NEW, temperature=temperature)
        torch.manual_seed(seed)
        got = talk.answer(line)
        assert (got.text, got.new_tokens, got.kv_bytes) == (fresh.text, NEW, fresh.kv_bytes)
        assert (got.prompt_tokens, got.computed_tokens) == (ids.shape[1], ids.shape[1] - held)
        held = ids.shape[1] + NEW - 1  # the last token was not run
        assert len(talk.seen) == held == talk.cache.get_seq_length()
        assert isinstance(talk.cache, SpanCache) == (plan != "none")
    assert [turn["role"] for turn in talk.turns] == ["system", *["user", "assistant"] * len(LINES)]


@pytest.mark.parametrize("plan", PLANS)
def test_the_model_runs_the_tokens_that_are_counted_and_no_others(plan, tokenizer):
    model, ran = model_for(PLANS[plan]), []
    model.register_forward_pre_hook(lambda _, args, kwargs: ran.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    talk = Conversation(model, tokenizer, new_tokens=NEW)
    for line in LINES:
        ran.clear()
        got = talk.answer(line)
        assert ran == [got.computed_tokens, *[1] * (NEW - 1)]


def test_the_logits_behind_a_kept_cache_are_those_of_a_new_one(tokenizer):
    """Equal words of a random model could be luck: its numbers are not."""
    model = model_for(MIXED)
    talk = Conversation(model, tokenizer, new_tokens=NEW)
    talk.answer(LINES[0])
    ids = prompt_of(talk, LINES[1])
    rest = ids[:, len(talk.seen) :]
    with torch.no_grad():
        got, whole = model(rest, past_key_values=talk.cache).logits, model(ids).logits
    torch.testing.assert_close(got, whole[:, -rest.shape[1] :], rtol=0, atol=1e-10)


def test_a_native_window_of_an_unconverted_parent_is_kept_too(tokenizer):
    model = model_for(None, family="mistral", sliding_window=5)
    talk = Conversation(model, tokenizer, new_tokens=NEW)
    for line in LINES:
        fresh = generate_text(model, tokenizer, prompt_of(talk, line), new_tokens=NEW)
        got = talk.answer(line)
        assert got.text == fresh.text
    assert got.computed_tokens < got.prompt_tokens


@pytest.mark.parametrize("at", [0, 3, -1])
def test_another_token_anywhere_means_a_new_cache(at, tokenizer):
    model = model_for(MIXED)
    talk = Conversation(model, tokenizer, new_tokens=NEW)
    talk.answer(LINES[0])
    talk.seen[at] += 1
    fresh = generate_text(model, tokenizer, prompt_of(talk, LINES[1]), new_tokens=NEW)
    got = talk.answer(LINES[1])
    assert got.computed_tokens == got.prompt_tokens
    assert got.text == fresh.text


def test_a_cache_as_long_as_the_prompt_is_not_used(tokenizer):
    """A forward needs a token."""
    talk = Conversation(model_for(MIXED), tokenizer, new_tokens=NEW)
    talk.answer(LINES[0])
    before = prompt_of(talk, LINES[1])[0].tolist()
    talk.seen = before
    got = talk.answer(LINES[1])
    assert got.computed_tokens == got.prompt_tokens == len(before)


def test_what_an_interrupted_answer_said_stays_and_its_cache_goes(tokenizer):
    model = model_for(MIXED)
    talk = Conversation(model, tokenizer, new_tokens=NEW)
    talk.answer(LINES[0])
    heard = []

    def stop(piece):
        if piece:
            heard.append(piece)
        if len(heard) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.answer(LINES[1], show=stop)
    assert talk.turns[-2:] == [
        {"role": "user", "content": LINES[1]},
        {"role": "assistant", "content": "".join(heard)},
    ]
    assert talk.cache is None
    fresh = generate_text(model, tokenizer, prompt_of(talk, LINES[2]), new_tokens=NEW)
    got = talk.answer(LINES[2])
    assert (got.text, got.computed_tokens) == (fresh.text, got.prompt_tokens)
    got = talk.answer(LINES[3])
    assert got.computed_tokens < got.prompt_tokens


def test_an_answer_interrupted_before_its_first_word_is_no_turn(tokenizer, monkeypatch):
    model = model_for(MIXED)
    talk = Conversation(model, tokenizer, new_tokens=NEW)
    talk.answer(LINES[0])
    before = list(talk.turns)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            talk.answer(LINES[1])
    assert (talk.turns, talk.cache) == (before, None)
    got = talk.answer(LINES[1])
    assert got.computed_tokens == got.prompt_tokens


@pytest.mark.parametrize(("text", "words"), [("a " * 60, "more than the model's 64"), ("refused", "not that")])
def test_a_refused_turn_leaves_the_conversation_and_its_cache(text, words, tokenizer):
    model = model_for(MIXED, max_position_embeddings=64)
    talk = Conversation(model, tokenizer, new_tokens=NEW)
    talk.answer(LINES[0])
    before = list(talk.turns)
    with pytest.raises(InputError, match=words):
        talk.answer(text)
    assert talk.turns == before
    got = talk.answer("b")
    assert got.computed_tokens < got.prompt_tokens


def test_reset_keeps_the_system_prompt_alone(tokenizer):
    talk = Conversation(model_for(MIXED), tokenizer, new_tokens=NEW, system="x y")
    first = talk.answer(LINES[0])
    talk.answer(LINES[1])
    talk.reset()
    assert talk.turns == [{"role": "system", "content": "x y"}]
    again = talk.answer(LINES[0])
    assert (again.text, again.computed_tokens) == (first.text, first.prompt_tokens)


def test_chat_needs_a_template(tokenizer):
    assert prompt_ids(tokenizer, "a", chat=True).tolist() == [[4, 6, 2, 5]]
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template: use masformer generate"):
        prompt_ids(tokenizer, "a", chat=True)
