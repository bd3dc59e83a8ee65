import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masformer.attention.segments import Segments
from masformer.data.packing import CorpusSequences, Totals
from masformer.data.seeds import generator
from masformer.data.sequences import IGNORED
from masformer.errors import InputError

from .made import SIZES, Unreadable, curricula, made_corpus

PAD = 10**6
COUNT = 30
MODES = st.sampled_from(["packed", "single"])


def tokens_in_order(sizes, seed):
    """Every token of every epoch: (epoch, turn, document, offset)."""
    for epoch in itertools.count():
        for turn, document in enumerate(generator("epoch", seed, epoch).permutation(len(sizes)).tolist()):
            for offset in range(sizes[document]):
                yield epoch, turn, document, offset


def length_of(curriculum, index):
    if isinstance(curriculum, int):
        return curriculum
    return [length for first, length in curriculum if first <= index][-1]


def by_hand(sizes, curriculum, mode, seed, count):
    """The tokens of the first `count` sequences, one list each, and those passed over before each and the next."""
    tokens = list(itertools.islice(tokens_in_order(sizes, seed), 40 + 15 * COUNT * 9))
    sequences, passed, at = [], [], 0
    for index in range(count + 1):
        missed = 0
        while mode == "single" and (tokens[at + 1][:3] != tokens[at][:3] or tokens[at + 1][3] == 0):
            at, missed = at + 1, missed + 1  # a last token alone
        stop = at + length_of(curriculum, index)
        if mode == "single":
            stop = next(i for i in range(at + 1, stop + 1) if i == stop or tokens[i][3] == 0)
        sequences.append(tokens[at:stop])
        passed.append(missed)
        at = stop
    return sequences[:count], passed, sequences[count][0]


def expected_arrays(corpus, tokens, length):
    starts = [i for i, token in enumerate(tokens) if i == 0 or token[3] == 0]
    ids = [int(corpus.document(document)[offset]) for _, _, document, offset in tokens]
    positions = [i - max(s for s in starts if s <= i) for i in range(len(tokens))]
    labels = [IGNORED if i in starts else token for i, token in enumerate(ids)]
    rest = length - len(tokens)
    return ids + [PAD] * rest, positions + [0] * rest, labels + [IGNORED] * rest, rest, len(starts)


@settings(deadline=None, max_examples=150)
@given(SIZES, curricula(), MODES, st.integers(0, 5))
def test_sequences_places_and_totals_are_those_counted_by_hand(sizes, curriculum, mode, seed):
    corpus = made_corpus(sizes)
    sequences = CorpusSequences(corpus, curriculum, mode=mode, seed=seed, pad_id=PAD)
    found, passed, following = by_hand(sizes, curriculum, mode, seed, COUNT)
    totals = Totals(0, 0, 0, passed[0], 0)
    for index, tokens in enumerate(found):
        assert sequences.totals(index) == totals
        assert tuple(sequences.place(index).values()) == tokens[0]
        sequence = sequences.sequence(index)
        ids, positions, labels, padding, pieces = expected_arrays(corpus, tokens, length_of(curriculum, index))
        assert sequence.input_ids.tolist() == ids
        assert sequence.position_ids.tolist() == positions
        assert sequence.labels.tolist() == labels
        assert sequence.padding == padding
        if padding:
            assert sequence.attention_mask.tolist() == [1] * len(tokens) + [0] * padding
        else:
            assert sequence.attention_mask is None
        totals = Totals(
            totals.documents + sum(token[3] == 0 for token in tokens),
            totals.tokens + len(tokens),
            totals.pieces + pieces,
            totals.dropped + passed[index + 1],
            totals.padded + padding,
        )
    assert sequences.totals(COUNT) == totals
    assert tuple(sequences.place(COUNT).values()) == following


@settings(deadline=None, max_examples=50)
@given(SIZES, curricula(), MODES)
def test_attention_sees_the_pieces_and_the_padding(sizes, curriculum, mode):
    sequences = CorpusSequences(made_corpus(sizes), curriculum, mode=mode, seed=0, pad_id=PAD)
    for index in range(5):
        sequence = sequences.sequence(index)
        mask = None if sequence.attention_mask is None else torch.from_numpy(sequence.attention_mask)[None]
        positions = torch.from_numpy(sequence.position_ids)[None]
        segments = Segments.of(1, positions.shape[1], attention_mask=mask, position_ids=positions)
        edges = np.cumsum([0, *(piece.stop - piece.start for piece in sequences.pieces(index))]).tolist()
        if segments.pieces is None:
            assert edges == [0, positions.shape[1]]
        else:
            assert [(piece.first, piece.stop) for piece in segments.pieces] == list(itertools.pairwise(edges))


@settings(deadline=None, max_examples=50)
@given(SIZES, st.integers(2, 12), MODES)
def test_every_token_comes_once_an_epoch_or_is_counted_as_dropped(sizes, length, mode):
    corpus = made_corpus(sizes)
    sequences = CorpusSequences(corpus, length, mode=mode, seed=1, pad_id=PAD)
    ids = np.concatenate([sequences.sequence(index).input_ids for index in range(60)])
    seen = np.bincount(ids[ids != PAD], minlength=corpus.counts.tokens)
    epoch = sequences.place(60)["epoch"]
    dropped = {int(end) - 1 for size, end in zip(sizes, corpus.offsets[1:], strict=True) if size % length == 1}
    for token, times in enumerate(seen):
        assert times == 0 if mode == "single" and token in dropped else epoch <= times <= epoch + 1


def test_a_packed_sequence_as_a_reader_sees_it():
    """Document 1 (3 tokens), then document 0 (4), cut after 5 tokens; epoch 1 begins with document 0."""
    sequences = CorpusSequences(made_corpus([4, 3]), 5, mode="packed", seed=3)
    assert [sequences.place(index)["epoch"] for index in range(3)] == [0, 0, 1]
    first, second = sequences.sequence(0), sequences.sequence(1)
    assert first.input_ids.tolist() == [4, 5, 6, 0, 1]
    assert first.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert first.labels.tolist() == [-100, 5, 6, -100, 1]
    assert second.input_ids.tolist() == [2, 3, 0, 1, 2]
    assert second.position_ids.tolist() == [0, 1, 0, 1, 2]
    assert sequences.totals(2) == Totals(documents=3, tokens=10, pieces=4, dropped=0, padded=0)


def test_epochs_have_orders_of_their_own_and_seeds_too():
    corpus = made_corpus([2] * 40)

    def epoch(number, seed):
        sequences = CorpusSequences(corpus, 2, mode="packed", seed=seed)
        return [sequences.place(40 * number + i)["document"] for i in range(40)]

    assert sorted(epoch(0, 0)) == sorted(epoch(1, 0)) == list(range(40))
    assert len({tuple(epoch(number, seed)) for number in range(3) for seed in range(3)}) == 9


@pytest.mark.parametrize("mode", ["packed", "single"])
def test_far_away_is_reached_without_reading_tokens(mode):
    corpus = made_corpus(generator("sizes", 0).integers(1, 3000, 1000).tolist())
    blind = dataclasses.replace(corpus, tokens=Unreadable())
    stages = [(0, 512), (7_777, 2048)]
    sequences = CorpusSequences(blind, stages, mode=mode, seed=0, pad_id=0)
    place, totals = sequences.place(1_000_000), sequences.totals(20_000)
    assert place["epoch"] > 500
    assert totals.tokens + totals.padded == 7_777 * 512 + (20_000 - 7_777) * 2048
    with pytest.raises(AssertionError, match="tokens were read"):
        sequences.sequence(0)


def test_padding_is_labelled_by_its_number_only():
    """A token that happens to be the pad id is learnt."""
    corpus = made_corpus([3], tokens=np.array([7, 9, 7], np.uint16))
    sequence = CorpusSequences(corpus, 5, mode="single", seed=0, pad_id=7).sequence(0)
    assert sequence.input_ids.tolist() == [7, 9, 7, 7, 7]
    assert sequence.labels.tolist() == [-100, 9, 7, -100, -100]
    assert sequence.input_ids.dtype == sequence.position_ids.dtype == sequence.labels.dtype == np.int64


@pytest.mark.parametrize(
    ("sizes", "lengths", "options", "message"),
    [
        ([5], 1, {"mode": "packed"}, "at least 2 tokens"),
        ([5], [(0, 4), (3, 1)], {"mode": "packed"}, r"at least 2 tokens, got the lengths \[4, 1\]"),
        ([5], [], {"mode": "packed"}, "ascend from 0"),
        ([5], [(1, 4)], {"mode": "packed"}, r"ascend from 0, got \[1\]"),
        ([5], [(0, 4), (2, 4), (2, 8)], {"mode": "packed"}, r"ascend from 0, got \[0, 2, 2\]"),
        ([5], 4, {"mode": "single"}, "needs a pad_id"),
        ([5], 4, {"mode": "Packed"}, "'packed' or 'single', got 'Packed'"),
        ([1, 1], 4, {"mode": "packed"}, "no document of the corpus has two tokens"),
        ([5], 4, {"mode": "packed", "seed": -1}, "a seed lies between 0 and"),
    ],
)
def test_what_cannot_be_is_refused(sizes, lengths, options, message):
    with pytest.raises(InputError, match=message):
        CorpusSequences(made_corpus(sizes), lengths, **{"seed": 0, **options})
