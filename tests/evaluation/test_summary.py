"""Prompts token by token, summaries against plain generation, ROUGE worked by hand, and refused files."""

import json
import sys

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from masformer.errors import InputError
from masformer.evaluation import summary
from masformer.evaluation.summary import INSTRUCTION, Pair, lead, read_pairs, rouge, summarise
from masformer.models.convert import applied
from masformer.spans import SpanPlan

from ..small import TEXT, small_llama, small_tokenizer

POSITIONS = 200


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def beginning(tokenizer):
    """A tokenizer that puts <s> before every text and <bot> behind it."""
    other = small_tokenizer()
    names = [(name, other.convert_tokens_to_ids(name)) for name in ("<s>", "<bot>")]
    other.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A <bot>", special_tokens=names)
    return other


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": POSITIONS}
    return small_llama(tokenizer, initializer_range=0.4, **sizes)


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that are handed to generation, which says nothing."""
    seen = []

    def noted(model, tokenizer, ids, new_tokens, beams):
        seen.append(ids[0].tolist())
        return [" said \n"]

    monkeypatch.setattr(summary, "continued", noted)
    return seen


def test_a_short_document_is_read_whole(model, tokenizer, prompts):
    expected = plain(tokenizer, TEXT) + plain(tokenizer, INSTRUCTION)
    made = summarise(model, tokenizer, TEXT, length=POSITIONS, new_tokens=10)
    assert prompts == [expected]
    assert made == summary.Summary("said", len(expected), cut=False)


def test_a_longer_document_is_cut_to_the_token_and_says_so(model, tokenizer, beginning, prompts):
    document, instruction = plain(tokenizer, TEXT), plain(tokenizer, INSTRUCTION)
    exact = 1 + len(document) + len(instruction) + 10
    for less in (0, 1, len(document) - 1):
        made = summarise(model, beginning, TEXT, length=exact - less, new_tokens=10)
        kept = document[: len(document) - less]
        assert prompts.pop() == [beginning.bos_token_id, *kept, *instruction]
        assert made.prompt_tokens + 10 == exact - less
        assert made.cut == (less > 0)
    with pytest.raises(InputError, match="leave the document none"):
        summarise(model, beginning, TEXT, length=exact - len(document), new_tokens=10)


def test_special_tokens_at_the_start_of_a_document_are_its_own(model, tokenizer, prompts):
    summarise(model, tokenizer, "<s>" + TEXT, length=POSITIONS, new_tokens=10)
    assert prompts[0][:3] == [tokenizer.bos_token_id, *plain(tokenizer, TEXT)[:2]]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("plan", [None, "window:6,block:5"])
def test_a_summary_is_what_the_model_generates(model, tokenizer, beams, plan):
    ids = torch.tensor([plain(tokenizer, TEXT) + plain(tokenizer, INSTRUCTION)])
    with applied(model, SpanPlan.parse(plan)) if plan else torch.no_grad():
        how = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "use_cache": False}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        made = summarise(model.train(), tokenizer, TEXT, length=POSITIONS, new_tokens=8, beams=beams)
        assert model.training
    model.eval()
    assert made.text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert made.text


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        (" \n", {}, "the document is empty"),
        (TEXT, {"length": POSITIONS + 1}, "201 tokens are more than the model's 200"),
        (TEXT, {"new_tokens": 0}, "at least 1, got 0 and 1"),
        (TEXT, {"beams": 0}, "at least 1, got 10 and 0"),
    ],
)
def test_what_makes_no_summary_is_refused(model, tokenizer, text, options, words):
    with pytest.raises(InputError, match=words):
        summarise(model, tokenizer, text, **{"length": POSITIONS, "new_tokens": 10, **options})


def test_the_lead_is_the_first_words():
    assert lead("one  two\nthree four", words=3) == "one two three"
    assert lead("one two") == "one two"
    assert len(lead("word " * 100).split()) == 75


def test_rouge_worked_by_hand():
    # Of 6 and 5 words, "the" (once), "cat", "sat" and "on" are common; so are "the cat", "cat sat" and "sat on".
    got = rouge("the cat sat on the mat", "the cat sat on it")
    assert got == pytest.approx({"rouge1": 2 * 4 / (6 + 5), "rouge2": 2 * 3 / (5 + 4), "rougeL": 2 * 4 / (6 + 5)})
    # All words in another order: the longest common subsequence has 2 of 4, no pair is common.
    got = rouge("a b c d", "b d a c")
    assert got == pytest.approx({"rouge1": 1, "rouge2": 0, "rougeL": 0.5})
    # The stem of both is "protocol"; words of up to three letters are taken as they are.
    assert rouge("Protocols!", "protocol")["rouge1"] == 1
    assert rouge("bus", "bu")["rouge1"] == 0
    # Not symmetric in count: 3 "the" against 1 count once.
    assert rouge("the the the", "the")["rouge1"] == pytest.approx(2 * 1 / 4)
    assert rouge("something", "") == {"rouge1": 0, "rouge2": 0, "rougeL": 0}


def test_without_rouge_score_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    summary._scorer.cache_clear()
    with pytest.raises(InputError, match=r"pip install 'masformer\[eval\]'"):
        rouge("a", "a")


def write(file, *records):
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file


GOOD = {"id": "x", "text": "Long.", "summary": "Short."}


def test_pairs_are_read_from_a_file_and_from_a_folder(tmp_path):
    second = write(tmp_path / "b.jsonl", {"text": "T é", "summary": "S", "abstract": 5}, b" ", {**GOOD, "id": 7})
    write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    write(tmp_path / "notes.txt", b"no pairs")
    assert read_pairs(second) == [Pair("b.jsonl:1", "T é", "S"), Pair("7", "Long.", "Short.")]
    assert read_pairs(str(tmp_path)) == [Pair("x", "Long.", "Short."), *read_pairs(second)]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"text": "T", "abstract": "A"}, 'line 2 has no "summary"'),
        ({"summary": "T"}, 'line 2 has no "text"'),
        ({"text": "T", "summary": " \n"}, 'line 2 has no "summary", or one that is empty'),
        ({"text": ["T"], "summary": "S"}, 'line 2 has no "text"'),
        (["text", "summary"], 'line 2 has no "text"'),
        (b"{", "line 2 is not JSON"),
        (b'{"text": "caf\xe9"}', "line 2 is not UTF-8: byte 13 is 0xe9"),
        ({"text": "T", "summary": "\ud800"}, 'line 2 has half a surrogate pair in its "summary"'),
    ],
)
def test_a_line_that_is_no_pair_is_refused_by_file_and_line(tmp_path, record, words):
    file = write(tmp_path / "a.jsonl", GOOD, record, GOOD)
    with pytest.raises(InputError, match="a.jsonl, " + words):
        read_pairs(file)


def test_places_without_pairs_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"is no \.jsonl file, nor a folder"):
        read_pairs(tmp_path)
    with pytest.raises(InputError, match=r"cannot read .*none.jsonl: No such file"):
        read_pairs(tmp_path / "none.jsonl")
    write(tmp_path / "a.txt", GOOD)
    with pytest.raises(InputError, match=r"is no \.jsonl file, nor a folder"):
        read_pairs(tmp_path / "a.txt")
    write(tmp_path / "a.jsonl", GOOD)
    write(tmp_path / "b.jsonl", b" ")
    with pytest.raises(InputError, match=r"b.jsonl holds no pairs"):
        read_pairs(tmp_path)
