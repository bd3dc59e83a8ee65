import copy
import dataclasses
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from masformer.data.packing import CorpusSequences
from masformer.data.sequences import Stream
from masformer.errors import CorruptError, InputError

from .made import SIZES, Unreadable, curricula, made_corpus


def stream_of(sizes=(5, 7, 2, 9), lengths=4, mode="packed", seed=0):
    return Stream(CorpusSequences(made_corpus(list(sizes)), lengths, mode=mode, seed=seed, pad_id=0))


def content(sequence):
    fields = dataclasses.asdict(sequence)
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in fields.items()}


def taken(stream, count):
    return [content(sequence) for sequence in itertools.islice(stream, count)]


@settings(deadline=None, max_examples=60)
@given(SIZES, curricula(), st.sampled_from(["packed", "single"]), st.integers(0, 20), st.integers(0, 9), st.data())
def test_state_and_seek_go_on_as_if_nothing_had_happened(sizes, curriculum, mode, first, second, data):
    whole = taken(stream_of(sizes, curriculum, mode), first + second + 12)
    stream = stream_of(sizes, curriculum, mode)
    for count in (first, second):  # the second resume starts from the state of the first
        taken(stream, count)
        state = json.loads(json.dumps(stream.state()))
        stream = stream_of(sizes, curriculum, mode)
        taken(stream, data.draw(st.integers(0, 5)))  # wherever it was before
        stream.load_state(state)
        assert stream.state() == state
    sought = stream_of(sizes, curriculum, mode)
    sought.seek(first + second)
    assert sought.state() == stream.state()
    assert taken(stream, 12) == taken(sought, 12) == whole[first + second :]


@settings(deadline=None, max_examples=30)
@given(SIZES, curricula(), st.integers(1, 4), st.integers(0, 5))
def test_ranks_share_the_sequences_and_the_state(sizes, curriculum, world, rounds):
    whole = taken(stream_of(sizes, curriculum), 2 * world * (rounds + 1))
    shards = [stream_of(sizes, curriculum).shard(rank, world) for rank in range(world)]
    got = [taken(shard, rounds) for shard in shards]
    assert [got[index % world][index // world] for index in range(world * rounds)] == whole[: world * rounds]
    states = [shard.state() for shard in shards]
    assert all(state == states[0] for state in states)
    for rank in range(world):
        resumed = stream_of(sizes, curriculum).shard(rank, world)
        resumed.load_state(states[-1 - rank])
        assert taken(resumed, 2) == [whole[world * (rounds + i) + rank] for i in range(2)]


def test_another_number_of_ranks_goes_on_where_it_can():
    four = stream_of().shard(3, 4)
    taken(four, 3)
    assert four.state()["read"] == 12
    two = stream_of().shard(1, 2)
    two.load_state(four.state())
    assert taken(two, 1) == taken(stream_of(), 14)[13:]
    with pytest.raises(InputError, match="12 sequences are not a whole number of rounds of 5 ranks"):
        stream_of().shard(0, 5).load_state(four.state())


def test_a_shard_begins_where_its_stream_stands():
    stream = stream_of()
    taken(stream, 4)
    assert taken(stream.shard(1, 2), 1) == taken(stream_of(), 6)[5:]


def test_the_state_says_in_words_what_comes_next():
    stream = stream_of(lengths=[(0, 4), (2, 6)])
    taken(stream, 3)
    assert stream.state() == {
        "format": 1,
        "identity": {
            "corpus": "made of [5, 7, 2, 9]",
            "mode": "packed",
            "seed": 0,
            "lengths": [[0, 4], [2, 6]],
        },
        "read": 3,
        "next": stream.sequences.place(3),
    }
    assert set(stream.state()["next"]) == {"epoch", "turn", "document", "offset"}


def test_seeking_reads_no_tokens():
    corpus = dataclasses.replace(made_corpus([50] * 100), tokens=Unreadable())
    stream = Stream(CorpusSequences(corpus, 64, mode="packed", seed=0))
    stream.seek(10**9)
    saved = stream.state()
    stream.load_state(saved)
    assert stream.read == 10**9
    with pytest.raises(AssertionError, match="tokens were read"):
        next(stream)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed is 0 in the state and 1 here"),
        ({"mode": "single"}, "mode is 'packed' in the state and 'single' here"),
        ({"sizes": [5, 7, 2, 8]}, r"corpus is 'made of \[5, 7, 2, 9\]' in the state and 'made of \[5, 7, 2, 8\]' here"),
        ({"lengths": 5}, r"lengths is \[\[0, 4\]\] in the state and \[\[0, 5\]\] here"),
    ],
)
def test_a_state_of_other_sequences_is_refused_with_both_values(changes, message):
    stream = stream_of(**changes)
    taken(stream, 1)
    with pytest.raises(InputError, match=message):
        stream.load_state(stream_of().state())
    assert stream.read == 1


@pytest.mark.parametrize(
    "path",
    [("read",), ("next", "epoch"), ("next", "turn"), ("next", "document"), ("next", "offset")],
)
def test_a_state_that_contradicts_itself_is_refused(path):
    stream = stream_of()
    taken(stream, 3)
    state = copy.deepcopy(stream.state())
    inner = state if len(path) == 1 else state[path[0]]
    inner[path[-1]] += 1
    with pytest.raises(CorruptError, match="contradicts itself"):
        stream.load_state(state)
    assert stream.read == 3


@pytest.mark.parametrize("change", [{"read": -1}, {"read": 2.0}, {"read": True}, {"format": 2}, {"more": 0}])
def test_what_is_no_state_is_refused(change):
    stream = stream_of()
    with pytest.raises(CorruptError, match="state of"):
        stream.load_state({**stream.state(), **change})
    with pytest.raises(CorruptError, match="no state"):
        stream.load_state([])


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_that_does_not_exist_is_refused(rank, world):
    with pytest.raises(InputError, match=f"rank {rank} of {world} does not exist"):
        stream_of().shard(rank, world)


@pytest.mark.parametrize("read", [-1, 3])
def test_half_a_round_is_refused(read):
    with pytest.raises(InputError, match=f"{read} sequences are not a whole number of rounds of 2"):
        stream_of().shard(0, 2).seek(read)
