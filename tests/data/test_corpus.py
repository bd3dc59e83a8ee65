import errno
import json
import os
import shutil
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from masformer import files
from masformer.data import corpus as corpus_module
from masformer.data.corpus import Corpus, Counts, fingerprint
from masformer.data.documents import Document, Source
from masformer.errors import CorruptError, InputError, ResourceError
from tests.small import small_tokenizer

from .made import made_corpus

TEXTS = ["the quick brown fox", "jumps over", "the lazy dog and runs away. " * 5, "<s>x"]


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture
def lines(tmp_path):
    return write_lines(tmp_path / "a.jsonl", TEXTS)


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class Refusing:
    """A tokenizer that may be asked what it is, but not to tokenise."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *_, **__):
        raise AssertionError("tokenised again")


@pytest.mark.parametrize("eos", [False, True])
def test_documents_come_back_as_the_tokenizer_gives_them(lines, tokenizer, tmp_path, eos):
    corpus = Corpus.build(lines, tokenizer, tmp_path / "cache", eos=eos)
    expected = [plain(tokenizer, text) + [tokenizer.eos_token_id] * eos for text in TEXTS]
    assert [corpus.document(number).tolist() for number in range(len(corpus))] == expected
    assert corpus.lengths.tolist() == [len(ids) for ids in expected]
    assert corpus.counts == Counts(4, sum(map(len, expected)), max(map(len, expected)), 0, max(map(max, expected)))
    assert corpus.eos == (tokenizer.eos_token_id if eos else None)
    assert isinstance(corpus.tokens, np.memmap)
    assert corpus.tokens.dtype == np.uint16


def test_no_special_token_is_added_by_the_tokenizer(lines, tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = small_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert tokenizer("fox")["input_ids"][0] == 0
    corpus = Corpus.build(lines, tokenizer, tmp_path / "cache", eos=False)
    assert corpus.document(0).tolist() == plain(tokenizer, TEXTS[0])
    assert 0 not in corpus.document(0)


def test_a_large_vocabulary_takes_four_bytes(lines, tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(2**16 - len(tokenizer))])
    assert Corpus.build(lines, tokenizer, tmp_path / "cache", eos=False).tokens.dtype == np.uint16
    tokenizer.add_tokens(["zebra"])
    corpus = Corpus.build([Document("1", "zebra")], tokenizer, tmp_path / "cache", eos=False)
    assert corpus.tokens.dtype == np.uint32
    assert corpus.tokens.tolist() == [2**16]
    assert corpus.counts.highest == 2**16


def test_empty_documents_are_counted_and_passed_over(tokenizer, tmp_path):
    source = write_lines(tmp_path / "a.jsonl", ["", "fox", " \n", "dog"])
    corpus = Corpus.build(source, tokenizer, tmp_path / "cache", eos=True)
    assert len(corpus) == corpus.counts.documents == 2
    assert corpus.counts.empty == 2
    with pytest.raises(InputError, match="no token in these documents: all 1 are empty"):
        Corpus.build([Document("1", " ")], tokenizer, tmp_path / "cache", eos=True)


def test_batches_change_nothing_and_progress_counts(tokenizer, tmp_path, monkeypatch):
    documents = [Document(str(number), TEXTS[number % 4] * (number + 1)) for number in range(20)]
    whole = Corpus.build(documents, tokenizer, tmp_path / "whole", eos=True)
    seen = []
    monkeypatch.setattr(corpus_module, "BATCH", 300)
    parts = Corpus.build(documents, tokenizer, tmp_path / "parts", eos=True, progress=seen.append)
    assert len(seen) > 5
    assert [counts.documents for counts in seen] == sorted({counts.documents for counts in seen})
    assert seen[-1] == parts.counts == whole.counts
    assert parts.tokens.tolist() == whole.tokens.tolist()
    assert parts.fingerprint == whole.fingerprint


def test_the_same_source_is_found_again_wherever_it_lies(lines, tokenizer, tmp_path):
    first = Corpus.build(lines, tokenizer, tmp_path / "cache", eos=True)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(lines, moved / "b.jsonl")
    again = Corpus.build(moved / "b.jsonl", Refusing(small_tokenizer()), tmp_path / "cache", eos=True)
    assert again.fingerprint == first.fingerprint
    folder = Corpus.build(Source(moved), Refusing(tokenizer), tmp_path / "cache", eos=True)
    assert folder.fingerprint == first.fingerprint


def test_anything_else_is_tokenised_anew(lines, tokenizer, tmp_path):
    def build(source, tokenizer=tokenizer, eos=True):
        return Corpus.build(source, tokenizer, tmp_path / "cache", eos=eos)

    build(lines)
    other = small_tokenizer()
    other.add_tokens(["fox"])
    for changed in (
        lambda: build(lines, other),
        lambda: build(lines, eos=False),
        lambda: build(Source(lines, limit=2)),
    ):
        before = len(list((tmp_path / "cache").iterdir()))
        changed()
        assert len(list((tmp_path / "cache").iterdir())) == before + 1
    date = os.stat(lines).st_mtime_ns
    lines.write_bytes(lines.read_bytes().replace(b"fox", b"dog"))
    os.utime(lines, ns=(date, date))  # the same size and date
    assert build(lines).document(0).tolist() == [*plain(tokenizer, "the quick brown dog"), tokenizer.eos_token_id]


def test_documents_in_memory_are_known_by_their_texts(tokenizer, tmp_path):
    documents = [Document("1", "fox"), Document("2", "dog")]
    first = Corpus.build(documents, tokenizer, tmp_path, eos=False)
    again = Corpus.build([Document("x", "fox"), Document("y", "dog")], Refusing(tokenizer), tmp_path, eos=False)
    assert again.fingerprint == first.fingerprint
    assert Corpus.build(documents[::-1], tokenizer, tmp_path, eos=False).fingerprint != first.fingerprint


def test_the_fingerprint_of_a_tokenizer_is_what_it_does(tokenizer, tmp_path):
    assert fingerprint(tokenizer) == fingerprint(small_tokenizer())
    tokenizer.save_pretrained(tmp_path / "copy")
    assert fingerprint(type(tokenizer).from_pretrained(tmp_path / "copy")) == fingerprint(tokenizer)
    used = small_tokenizer()
    used("fox fox fox", truncation=True, max_length=2)
    used.pad_token = "<s>"
    used(["fox", "fox fox fox"], padding=True, pad_to_multiple_of=8)
    assert used.backend_tokenizer.truncation or used.backend_tokenizer.padding
    assert fingerprint(used) == fingerprint(tokenizer)
    lower = small_tokenizer()
    from tokenizers.normalizers import Lowercase

    lower.backend_tokenizer.normalizer = Lowercase()
    assert fingerprint(lower) != fingerprint(tokenizer)


def test_a_tokenizer_that_will_not_do_is_refused(lines, tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end token"):
        Corpus.build(lines, tokenizer, tmp_path / "cache", eos=True)
    with pytest.raises(InputError, match="object is not a fast tokenizer"):
        Corpus.build(lines, object(), tmp_path / "cache", eos=False)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), OSError("?")])
def test_an_interrupted_build_leaves_nothing(lines, tokenizer, tmp_path, error):
    def stop(_):
        raise error

    names = {errno.ENOSPC: ResourceError, None: InputError}
    expected = names[error.errno] if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        Corpus.build(lines, tokenizer, tmp_path / "cache", eos=True, progress=stop)
    assert list((tmp_path / "cache").iterdir()) == []
    Corpus.build(lines, tokenizer, tmp_path / "cache", eos=True)


@pytest.mark.parametrize("moment", ["write", "manifest", "rename"])
def test_a_killed_build_leaves_nothing_that_looks_complete(lines, tokenizer, tmp_path, monkeypatch, moment):
    cache = tmp_path / "cache"
    pid = forked()
    if pid == 0:
        place = {"write": (corpus_module, "write_manifest"), "manifest": (files, "sync"), "rename": (os, "rename")}[
            moment
        ]
        monkeypatch.setattr(*place, lambda *_: os._exit(9))
        Corpus.build(lines, tokenizer, cache, eos=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert [path.name[0] for path in cache.iterdir()] == ["."]
    corpus = Corpus.build(lines, tokenizer, cache, eos=True)
    assert corpus.counts.documents == 4
    whole = [path for path in cache.iterdir() if path.name[0] != "."]
    assert len(whole) == 1
    assert Corpus.open(whole[0], verify=True).fingerprint == corpus.fingerprint


def forked():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that the child does not use
        return os.fork()


def test_two_builders_at_once_agree(lines, tokenizer, tmp_path):
    """The second finishes first: its result is taken."""
    inner = []

    def other(_):
        if not inner:
            inner.append(None)
            inner[0] = Corpus.build(lines, tokenizer, tmp_path / "cache", eos=True)

    outer = Corpus.build(lines, tokenizer, tmp_path / "cache", eos=True, progress=other)
    assert outer.fingerprint == inner[0].fingerprint
    assert len(list((tmp_path / "cache").iterdir())) == 1


def built(lines, tokenizer, tmp_path):
    Corpus.build(lines, tokenizer, tmp_path / "cache", eos=True)
    return next((tmp_path / "cache").iterdir())


def test_opening_checks_what_it_is_given(lines, tokenizer, tmp_path):
    folder = built(lines, tokenizer, tmp_path)
    assert len(Corpus.open(folder, documents=lines, tokenizer=tokenizer, verify=True)) == 4
    other = small_tokenizer()
    other.add_tokens(["fox"])
    with pytest.raises(CorruptError, match="made with another tokenizer"):
        Corpus.open(folder, tokenizer=other)
    with pytest.raises(CorruptError, match="made from other documents"):
        Corpus.open(folder, documents=write_lines(tmp_path / "b.jsonl", ["fox"]))


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "longer", "empty"])
def test_a_file_of_another_size_is_found_at_once(lines, tokenizer, tmp_path, name, damage):
    folder = built(lines, tokenizer, tmp_path)
    file = folder / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": content[:-1], "longer": content + b"}", "empty": b""}[damage])
    with pytest.raises(CorruptError, match=name):
        Corpus.open(folder)
    with pytest.raises(CorruptError, match=name):
        Corpus.build(lines, tokenizer, tmp_path / "cache", eos=True)


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "manifest.json"])
def test_a_flipped_bit_is_found_where_it_is_looked_for(lines, tokenizer, tmp_path, name):
    folder = built(lines, tokenizer, tmp_path)
    content = (folder / name).read_bytes()
    whole = Corpus.open(folder)
    found = 0
    for bit in np.random.default_rng(0).integers(0, 8 * len(content), 60).tolist():
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(damaged)
        try:
            corpus = Corpus.open(folder, verify=True)
        except CorruptError:
            found += 1
        else:  # white space between the fields of the manifest
            assert name == "manifest.json"
            assert chr(content[bit // 8]).isspace()
            assert (corpus.fingerprint, corpus.counts) == (whole.fingerprint, whole.counts)
    assert found > 45


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"digest": 1}', "[" * 100_000, "\x00"])
def test_a_manifest_of_something_else_is_refused(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(CorruptError, match="is damaged"):
        Corpus.open(tmp_path)


def test_another_format_is_refused(lines, tokenizer, tmp_path, monkeypatch):
    folder = built(lines, tokenizer, tmp_path)
    monkeypatch.setattr(corpus_module, "FORMAT", 2)
    with pytest.raises(CorruptError, match="has format 1, this version reads 2"):
        Corpus.open(folder)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=12), st.integers(0, 3), st.data())
def test_a_split_parts_documents_never_tokens(sizes, seed, data):
    corpus = made_corpus(sizes)
    count = data.draw(st.integers(1, len(sizes) - 1))
    training, held_out = corpus.split(count, seed)
    assert (len(training), len(held_out)) == (len(sizes) - count, count)
    parts = [part.document(number).tolist() for part in (training, held_out) for number in range(len(part))]
    assert sorted(parts) == [corpus.document(number).tolist() for number in range(len(corpus))]
    for part in (training, held_out):
        assert part.counts.tokens == part.lengths.sum()
        assert part.counts.longest == part.lengths.max()
        assert part.counts.documents == len(part)
    assert len({corpus.fingerprint, training.fingerprint, held_out.fingerprint}) == 3
    assert corpus.split(count, seed)[0].fingerprint == training.fingerprint


def test_a_part_can_be_split_again_and_seeds_differ():
    corpus = made_corpus([2] * 100)
    rest, _ = corpus.split(0.1, seed=0)
    training, validation = rest.split(0.1, seed=0)
    assert (len(rest), len(training), len(validation)) == (90, 81, 9)
    assert set(training.members) | set(validation.members) == set(rest.members)
    assert corpus.split(0.1, seed=1)[1].members.tolist() != corpus.split(0.1, seed=0)[1].members.tolist()
    assert len(corpus.split(0.0001, seed=0)[1]) == 1


@pytest.mark.parametrize("held_out", [0, -1, 3, 4, 0.0, 1.0, 0.99, -0.5, float("nan")])
def test_a_split_that_leaves_a_side_empty_is_refused(held_out):
    with pytest.raises(InputError, match=r"cannot hold out .* of 3 documents"):
        made_corpus([1, 2, 3]).split(held_out, seed=0)


def test_a_missing_source_is_the_users_to_mend(tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*missing\.txt: No such file"):
        Corpus.build(tmp_path / "missing.txt", tokenizer, tmp_path / "cache", eos=True)
    with pytest.raises(InputError, match=r"data set owner/name from the hub"):
        Corpus.build("owner/name", tokenizer, tmp_path / "cache", eos=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file"):
        Corpus.build([Document("1", "fox")], tokenizer, tmp_path / "file", eos=True)
