import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from masformer.data.mixture import BLOCK, Mixture
from masformer.data.packing import CorpusSequences
from masformer.data.sequences import Stream, length_at
from masformer.errors import CorruptError, InputError

from .made import SIZES, curricula, made_corpus
from .test_sequences import content, taken

WEIGHTS = {"a": 2, "b": 1, "c": 0.5}


def mixture_of(lengths=4, seed=0, weights=WEIGHTS, sizes=(5, 7, 2)):
    modes = itertools.cycle(["packed", "single"])
    parts = {
        name: (CorpusSequences(made_corpus([*sizes, i + 2]), lengths, mode=next(modes), seed=i, pad_id=0), weight)
        for i, (name, weight) in enumerate(weights.items())
    }
    return Mixture(parts, seed=seed)


@settings(deadline=None, max_examples=40)
@given(SIZES, curricula(), st.integers(0, 3))
def test_every_part_gives_its_own_sequences_in_order_at_the_length_of_the_whole(sizes, curriculum, seed):
    mixture = mixture_of(curriculum, seed, sizes=sizes)
    read = dict.fromkeys(WEIGHTS, 0)
    for index in range(25):
        assert mixture.counts(index) == read
        name = mixture.choice(index)
        sequence = mixture.sequence(index)
        assert content(sequence) == content(mixture.parts[name].sequence(read[name]))
        assert len(sequence.input_ids) == length_at(mixture.lengths, index)
        read[name] += 1


@settings(deadline=None, max_examples=30)
@given(curricula(), st.integers(0, 30), st.integers(1, 3))
def test_resuming_and_seeking_change_nothing(curriculum, rounds, world):
    whole = taken(Stream(mixture_of(curriculum)), (rounds + 3) * world)
    for rank in range(world):
        stream = Stream(mixture_of(curriculum)).shard(rank, world)
        taken(stream, rounds)
        state = json.loads(json.dumps(stream.state()))
        resumed, sought = (Stream(mixture_of(curriculum)).shard(rank, world) for _ in range(2))
        resumed.load_state(state)
        sought.seek(rounds * world)
        rest = whole[rounds * world + rank :: world]
        assert taken(resumed, 3) == taken(sought, 3) == taken(stream, 3) == rest


@pytest.mark.parametrize("count", [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_counts_are_those_of_the_choices_across_blocks(count):
    mixture = mixture_of(seed=5)
    choices = [mixture.choice(index) for index in range(count)]
    expected = {name: choices.count(name) for name in WEIGHTS}
    assert mixture.counts(count) == mixture_of(seed=5).counts(count) == expected
    assert mixture.counts(10) == {name: choices[:10].count(name) for name in WEIGHTS}  # backwards too


def test_proportions_come_near_the_weights():
    proportions = mixture_of().proportions(100_000)
    assert sum(proportions.values()) == pytest.approx(1)
    for name, weight in WEIGHTS.items():
        assert proportions[name] == pytest.approx(weight / 3.5, abs=0.006)  # four standard deviations
    assert mixture_of().proportions(0) == {"a": 0, "b": 0, "c": 0}


def test_choices_depend_on_the_seed_and_do_not_come_again():
    first, second = ([mixture_of(seed=seed).choice(index) for index in range(50)] for seed in (0, 1))
    assert first != second
    assert first != [mixture_of(seed=0).choice(BLOCK + index) for index in range(50)]


def test_a_mixture_can_be_a_part():
    inner = mixture_of([(0, 4), (6, 8)])
    plain = CorpusSequences(made_corpus([30]), [(0, 4), (6, 8)], mode="packed", seed=0)
    outer = Mixture({"inner": (inner, 3), "plain": (plain, 1)}, seed=0)
    assert [len(outer.sequence(index).input_ids) for index in range(12)] == [4] * 6 + [8] * 6


def test_a_state_of_another_mixture_is_refused():
    state = Stream(mixture_of()).state()
    others = [(mixture_of(seed=1), "seed is 0"), (mixture_of(weights={**WEIGHTS, "b": 2}), "parts.b.weight is 1.0")]
    for other, message in others:
        with pytest.raises(InputError, match=message):
            Stream(other).load_state(state)
    state["next"]["b"]["read"] += 1
    with pytest.raises(CorruptError, match=r"b\.read is 1 in the state and 0 here"):
        Stream(mixture_of()).load_state(state)


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": 1, "b": -1}, {"a": float("nan")}, {"a": float("inf")}])
def test_weights_that_cannot_be_are_refused(weights):
    with pytest.raises(InputError, match="positive weights"):
        mixture_of(weights=weights)


def test_parts_of_unlike_lengths_are_refused():
    four, five = (CorpusSequences(made_corpus([9]), length, mode="packed", seed=0) for length in (4, 5))
    with pytest.raises(InputError, match="the same lengths"):
        Mixture({"four": (four, 1), "five": (five, 1)}, seed=0)
