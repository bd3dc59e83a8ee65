import copy
import functools
import hashlib
import json
import os
import re
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from masformer.data import needles, recall, tracing
from masformer.data.filler import NOISE
from masformer.data.generators import DEPTHS, TASKS, Filler, make_items
from masformer.data.seeds import generator
from masformer.errors import InputError

KINDS = ("bytes", "pieces")
LENGTHS = (2500, 4500)
PLACED = ("passkey", "niah_single", "niah_multikey", "kv_retrieval", "babi_1")
SINGLE = (*PLACED, "babi_2")
HIDDEN = ("passkey", "niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "variable_tracking")
STORY = "A farmer said that the road was long and the night dark; nobody heard. "
TEXTS = (
    STORY * 40,
    "",
    "Another day, another page. " * 300,
    "Short. ",
    "Ein Mann zählte Schafe, über Nacht ☕ 17 an der Zahl. " * 200,
)


@functools.lru_cache
def made_tokenizer(kind):
    """Byte-level and without a beginning token, or of pieces with ▁ for a space (also put first) and with one."""
    text = " ".join([*needles.HEADS, *needles.TAILS, NOISE, STORY])
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else [*string.printable, *"▁ä☕ü"]
    tokenizer = Tokenizer(models.BPE())
    if kind == "bytes":
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
    else:
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator(
        [text] * 3,
        trainers.BpeTrainer(
            vocab_size=1300, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
        ),
    )
    if kind == "pieces":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@functools.lru_cache
def made_filler(kind):
    return Filler.of(made_tokenizer(kind), TEXTS)


@functools.lru_cache
def noise(kind):
    return Filler.of(made_tokenizer(kind), None)


@functools.lru_cache
def made(task, kind="bytes", length=2500, count=5, seed=0):
    tokenizer = made_tokenizer(kind)
    return make_items(task, tokenizer, length=length, count=count, filler=made_filler(kind), seed=seed)


def prompt(item, kind="bytes"):
    return made_tokenizer(kind).decode(list(item.prompt))


def answers(item, kind="bytes"):
    return [made_tokenizer(kind).decode(list(item.ids[begin:end])) for begin, end in item.parts]


every = pytest.mark.parametrize("task", TASKS)
kinds = pytest.mark.parametrize("kind", KINDS)
lengths = pytest.mark.parametrize("length", LENGTHS)


def test_an_item_begins_with_all_that_the_tokenizer_puts_before_a_text():
    tokenizer = copy.deepcopy(made_tokenizer("pieces"))
    specials = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> </s> $A </s>", special_tokens=specials
    )
    (item,) = make_items("passkey", tokenizer, length=400, count=1, filler=Filler.of(tokenizer, None))
    assert item.ids[:2] == (0, 1)
    assert not {0, 1} & set(item.ids[2:])
    assert len(item.ids) == 400


def test_the_tasks_in_order():
    assert " ".join(TASKS) == (
        "passkey niah_single niah_multikey niah_multivalue niah_multiquery kv_retrieval mqar variable_tracking "
        "common_words frequent_words babi_1 babi_2"
    )
    assert tuple(name for name in TASKS if TASKS[name].placed) == PLACED
    assert all(task.name == name and task.asks and task.source for name, task in TASKS.items())


@every
@kinds
@lengths
def test_the_length_is_exact_and_the_parts_hold_the_answers(task, kind, length):
    items = made(task, kind, length)
    for number, item in enumerate(items):
        assert (item.task, item.length, len(item.prompt) + item.room) == (task, length, length)
        assert item.depth == (DEPTHS[number] if task in PLACED else None)
        assert len(item.ids) - len(item.prompt) <= item.room
        assert item.parts[-1][1] == len(item.ids)
        assert all(begin < end for begin, end in item.parts)
        assert all(one[1] <= other[0] for one, other in zip(item.parts, item.parts[1:], strict=False))
        if task in SINGLE or task == "mqar":
            assert len(item.ids) == length
        if task != "mqar":
            assert [answer.strip() for answer in answers(item, kind)] == list(item.references)
        decode = made_tokenizer(kind).decode
        assert all(decode(item.ids[begin : begin + 1]).strip() for begin, _ in item.parts)
    if task not in SINGLE:
        assert len({(item.room, len(item.prompt)) for item in items}) == 1


@every
@kinds
def test_a_beginning_token_only_where_the_tokenizer_puts_one(task, kind):
    begin = made_tokenizer(kind).bos_token_id
    for item in made(task, kind):
        assert item.ids.count(begin) == (kind == "pieces")
        assert (item.ids[0] == begin) == (kind == "pieces")


@kinds
def test_answers_have_their_space_where_it_is_one_token_with_them(kind):
    for item in made("common_words", kind):
        assert item.ids[item.parts[0][0] - 1] != made_tokenizer(kind).encode(" ", add_special_tokens=False)[-1]
        if kind == "bytes":
            assert all(answer == f" {word}" for answer, word in zip(answers(item), item.references, strict=True))


@kinds
def test_the_passkey_stands_in_its_needle_alone(kind):
    for item in made("passkey", kind):
        (key,), text = item.references, prompt(item, kind)
        assert re.fullmatch(r"[1-9]\d{4}", key)
        assert text.count(key) == 2
        assert f"The pass key is {key}. Remember it. {key} is the pass key." in text
        assert text.endswith(("The pass key is", "The pass key is "))


@kinds
@pytest.mark.parametrize(
    ("task", "names", "values", "asked"),
    [("niah_single", 1, 1, 1), ("niah_multikey", 4, 1, 1), ("niah_multivalue", 1, 4, 1), ("niah_multiquery", 4, 1, 4)],
)
def test_needles_say_every_number_once(task, names, values, asked, kind):
    shuffled = False
    for item in made(task, kind):
        text = prompt(item, kind)
        told = re.findall(r"special magic numbers for (\S+) is: (\d{9})\.", text)
        assert Counter(Counter(name for name, _ in told).values()) == {values: names}
        assert all(text.count(value) == 1 for _, value in told)
        question = text[text.rindex("What ") :]
        order = sorted({name for name, _ in told if name in question}, key=question.index)
        assert len(order) == asked
        assert all(question.count(name) == 2 for name in order)
        assert all(text.count(name) == values + 2 * (name in order) for name, _ in told)
        assert item.references == tuple(value for wanted in order for name, value in told if name == wanted)
        shuffled |= order != [name for name, _ in told if name in order]
    assert shuffled == (task in ("niah_multivalue", "niah_multiquery")) or task == "niah_multikey"


@kinds
@lengths
def test_the_json_object_holds_the_value_at_its_depth(kind, length):
    for item in made("kv_retrieval", kind, length):
        text = prompt(item, kind)
        front, rest = text.split("Extract the value")
        pairs = json.loads(rest[rest.index("{") : rest.index("}") + 1])
        (value,), (*shown, (key, nothing)) = (
            item.references,
            re.findall(r'Key: "(.*)"\n *Corresponding value: ?(\S*)', text),
        )
        assert nothing == ""
        assert pairs[key] == value
        assert (text.count(key), text.count(value)) == (2, 1)
        assert list(pairs).index(key) == round(item.depth * (len(pairs) - 1))
        assert len(shown) == 2
        assert all(pairs[k] == v and k != key for k, v in shown)
        assert len(set(pairs.values())) == len(pairs)
        line = made_tokenizer(kind).encode(f',\n "{key}": "{value}"', add_special_tokens=False)
        assert len(made_tokenizer(kind).encode(front, add_special_tokens=False)) < len(line) + 8


@kinds
@pytest.mark.parametrize(("length", "count"), [(40, 5), (104, 13), (2500, 64)])
def test_pairs_of_tokens_come_once_more_at_the_end(kind, length, count):
    tokenizer = made_tokenizer(kind)
    for item in made("mqar", kind, length):
        ids = item.ids[1:] if kind == "pieces" else item.ids
        assert (len(item.ids), len(item.parts), item.references) == (length, count, ())
        pairs = dict(zip(ids[: 2 * count : 2], ids[1 : 2 * count : 2], strict=True))
        assert len({*pairs, *pairs.values()}) == 2 * count
        queries = ids[-2 * count :]
        assert dict(zip(queries[::2], queries[1::2], strict=True)) == pairs
        assert list(queries[::2]) != list(pairs)
        assert [item.ids[begin:end] for begin, end in item.parts] == [(value,) for value in queries[1::2]]
        assert not {*pairs, *pairs.values()} & {*ids[2 * count : -2 * count]}
        assert item.room == 2 * count - 1
        for token in pairs:
            assert re.fullmatch(r"\S (?:[A-Za-z]{3,})", tokenizer.decode([*tokenizer.encode("a")[-1:], token]))


@kinds
def test_the_chain_leads_from_the_value_to_all_names(kind):
    for item in made("variable_tracking", kind):
        worked, text = re.split(r"(?<=\S)\s*Memorize and track", prompt(item, kind))[-2:]
        for part, names in ((worked, worked.split("they are:")[1].split()), (text, list(item.references))):
            told = [words.split() for words in re.findall(r"VAR (\w{5} = (?:VAR )?\w{5})", part)]
            (value,) = set(re.findall(r"assigned the value (\d{5})", part))
            assert [line[0] for line in told] == names
            assert [line[-1] for line in told] == [value, *names[:-1]]
        assert [prompt(item, kind).count(name) for name in item.references] == [2, 2, 2, 2, 1]
        assert len(set(re.findall(r"\b[A-Z]{5}\b", prompt(item, kind)))) == 10


@kinds
@pytest.mark.parametrize(("length", "often", "seldom"), [(2500, 6, 1), (4095, 6, 1), (4500, 30, 3)])
def test_the_ten_words_are_the_most_common(kind, length, often, seldom):
    for item in made("common_words", kind, length, 2):
        example, listed = re.findall(r"1\. .*?\n", prompt(item, kind))[:3:2]
        for text, counts in ((example, (3, 1)), (listed, (often, seldom))):
            entries = re.findall(r"(\d+)\. (\w+)", text)
            words = Counter(word for _, word in entries)
            assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
            assert Counter(words.values())[counts[0]] == 10
            assert set(words.values()) == set(counts)
        assert item.references == tuple(word for word in words if words[word] == often)
        assert all(prompt(item, kind).count(word) == often for word in item.references)


@kinds
def test_the_three_words_are_the_most_frequent_after_the_dots(kind):
    for item in made("frequent_words", kind):
        words = Counter(
            re.findall(r" (\.\.\.|[a-z]{6})(?= |\n)", prompt(item, kind).split("coded words.")[1].split("Question:")[0])
        )
        (dots, most), *others = words.most_common(6)
        assert dots == "..."
        assert tuple(word for word, _ in others[:3]) == item.references
        counts = [count for _, count in others]
        assert counts[0] > counts[1] > counts[2] > counts[3]
        assert [round(count / most * rank**2, 1) for rank, count in enumerate(counts[:2], 2)] == pytest.approx(
            [1, 1], abs=0.15
        )
        assert all(prompt(item, kind).count(word) == words[word] for word in item.references)


def moves(text):
    return re.findall(r"(\w+) (?:went|moved|walked|travelled|hurried) to the (\w+)\.", text)


@kinds
def test_the_person_is_where_the_last_move_led(kind):
    for item in made("babi_1", kind, 2500, 40):
        text = prompt(item, kind)
        person = re.search(r"Where is (\w+) now", text)[1]
        told = moves(text)
        own = [place for name, place in told if name == person]
        assert len(told) == 10
        assert len(own) >= 2
        assert (own[-1],) == item.references
        assert item.references[0] not in own[:-1]
        assert told[-1][0] != person
        assert text.count(person) == len(own) + 2
        assert len(re.findall(rf"{person} \w+ to the {own[-1]}\.", text)) == 1


def where(text, thing):
    """Plays the story again."""
    at, holder, lies = {}, {}, {}
    for line in text.splitlines():
        words = line.strip(" .").split()
        if moves(line):
            ((person, place),) = moves(line)
            assert at.get(person) != place
            at[person] = place
        elif re.search(r"\w+ (picked up|took|got) the \w+ there\.", line):
            assert words[-2] not in holder
            assert lies.get(words[-2], at[words[0]]) == at[words[0]]
            holder[words[-2]] = words[0]
        elif re.search(r"\w+ (put down|dropped|left) the \w+ there\.", line):
            assert holder.pop(words[-2]) == words[0]
            lies[words[-2]] = at[words[0]]
    return at[holder[thing]] if thing in holder else lies[thing]


@kinds
def test_the_thing_is_where_it_was_carried(kind):
    for item in made("babi_2", kind, 2500, 20):
        text = prompt(item, kind)
        thing = re.search(r"Where is the (\w+) now", text)[1]
        assert (where(text, thing),) == item.references
        facts = re.findall(r"^ *\w+ \w+ \w+ the \w+\.$|^ *\w+ .*the \w+ there\.$", text, re.M)
        assert len(facts) == len(set(facts)) == 12
        taken = text.index(next(fact for fact in facts if f"the {thing}" in fact))
        assert any(fact for fact in facts if moves(fact) and text.index(fact) > taken)


@pytest.mark.parametrize("task", PLACED)
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.8, 1.0])
def test_the_fact_stands_at_its_depth(task, depth):
    tokenizer = made_tokenizer("bytes")
    filler = Filler.of(tokenizer, ["~" * 5000])
    (item,) = make_items(task, tokenizer, length=2500, count=1, filler=filler, depths=[depth])
    if task == "kv_retrieval":
        lines = re.findall(r'"(\S+)": "(\S+)"', prompt(item))
        assert [value for _, value in lines].index(*item.references) == round(depth * (len(lines) - 1))
        return
    fact = {"passkey": "pass key is {}. Re", "babi_1": "to the {}.\n"}.get(task, " is: {}.")
    text = prompt(item)
    begin = text.index(fact.format(*item.references))
    if task == "babi_1":
        person = re.search(r"Where is (\w+) now", text)[1]
        begin = re.search(rf"{person} \w+ to the {item.references[0]}\.", text).start()
    assert text[:begin].count("~") == round(depth * text.count("~"))


def test_places_without_a_depth_are_all_over_the_filler():
    tokenizer = made_tokenizer("bytes")
    for task, mark in (("niah_multivalue", " is: "), ("variable_tracking", "\nVAR "), ("babi_2", "to the ")):
        items = make_items(task, tokenizer, length=2500, count=30, filler=Filler.of(tokenizer, ["~" * 5000]))
        shares = []
        for item in items:
            text = prompt(item)
            shares += [text[: found.start()].count("~") / text.count("~") for found in re.finditer(mark, text)]
        inner = np.array([share for share in shares if 0 < share < 1])
        assert len(inner) >= 100
        assert 0.4 < inner.mean() < 0.6
        assert inner.min() < 0.1 < 0.9 < inner.max()


def digest():
    """Of every task with both tokenizers."""
    items = [made(task, kind, 2500, 2) for task in TASKS for kind in KINDS]
    return hashlib.sha256(repr(items).encode()).hexdigest()


def test_items_are_the_same_in_another_process():
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    code = "from tests.data.test_generators import digest; print(digest())"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == digest(), done.stderr


@every
def test_an_item_does_not_depend_on_how_many_there_are(task):
    assert made(task, count=2) == made(task)[:2]
    assert len({item.ids for item in made(task)}) == 5


@every
def test_another_seed_or_length_has_other_answers(task):
    first = [item.references or item.ids[:100] for item in made(task)]
    assert first != [item.references or item.ids[:100] for item in made(task, seed=1)]
    assert first != [item.references or item.ids[:100] for item in made(task, length=4500)]


@pytest.mark.parametrize("task", HIDDEN)
def test_what_the_filler_holds_is_drawn_again(task):
    tokenizer = made_tokenizer("bytes")

    def built(text):
        return make_items(task, tokenizer, length=2500, count=1, filler=Filler.of(tokenizer, [text]))[0]

    plain = built("~" * 3000)
    assert built("~" * 2999 + "-").references == plain.references
    held = built("~" * 20 + plain.references[-1] + "~" * 3000)
    assert not set(held.references) & set(plain.references)
    assert prompt(held).count(plain.references[-1]) == 1


@pytest.mark.parametrize("task", ["babi_1", "babi_2"])
def test_persons_of_the_filler_are_not_those_of_the_story(task):
    tokenizer = made_tokenizer("bytes")
    barred = tracing.PERSONS[:10]
    text = " ".join(barred) + " " + "~" * 3000
    items = make_items(task, tokenizer, length=2500, count=10, filler=Filler.of(tokenizer, [text]))
    for item in items:
        text = prompt(item)
        asked = re.search(r"Where is (?:the )?(\w+) now", text)[1]
        names = {asked, *re.findall(rf"^(\w+) .* the {asked} there\.$", text, re.M)}
        assert not names & {*barred}
        assert (len(names) > 1) == (task == "babi_2")
    full = Filler.of(tokenizer, [" ".join(tracing.PERSONS) * 9 + "~" * 3000])
    with pytest.raises(InputError, match="in 50 tries"):
        make_items(task, tokenizer, length=2500, count=1, filler=full)


def test_tokens_of_pairs_are_left_out_of_the_filler():
    tokenizer = made_tokenizer("bytes")
    filler = Filler.of(tokenizer, [" ".join([*needles.HEADS, *needles.TAILS]) * 20])
    for item in make_items("mqar", tokenizer, length=900, count=5, filler=filler):
        drawn = item.ids[:128]
        assert len(item.ids) == 900
        assert not {*drawn} & {*item.ids[128:-128]}


def test_nothing_asked_for_is_a_training_key():
    keys = {answer.strip() for n in range(1000) for _, answer in recall.draw_item(generator("t", 0, n), 8).questions}
    assert {len(key) for key in keys if key.isdigit()} == set(recall.DIGITS)
    for task in TASKS:
        for item in made(task):
            assert not keys & {*item.references}
            assert not {len(text) for text in item.references if text.isdigit()} & set(recall.DIGITS)
    trained = {word for text in (*recall.WORDS, *recall.OWNERS, *recall.THINGS) for word in text.split()}
    assert not {*needles.HEADS, *needles.TAILS} & set(recall.WORDS)
    assert not {*tracing.LOCATIONS, *tracing.PERSONS, *tracing.THINGS} & trained


def test_no_made_word_stands_within_another():
    for words, within in ((needles.HEADS, str.endswith), (needles.TAILS, str.startswith)):
        assert not [(one, other) for one in words for other in words if one != other and within(one, other)]
        assert len(set(words)) == len(words)
    made_words = {head + tail for head in needles.HEADS for tail in needles.TAILS}
    assert len(made_words) == len(needles.HEADS) * len(needles.TAILS) == 17_712
    assert not {*needles.HEADS} & {*needles.TAILS}


@pytest.mark.parametrize("task", ["babi_1", "babi_2"])
def test_a_guesser_without_the_text_has_chance(task):
    tokenizer = made_tokenizer("bytes")
    filler = Filler.of(tokenizer, None)
    seen, items = (make_items(task, tokenizer, length=1000, count=300, filler=filler, seed=s) for s in (1, 0))

    def subject(item):
        return re.search(r"Where is ([\w ]+) now", prompt(item))[1]

    chance = TASKS[task].chance
    bound = 4 * (chance * (1 - chance) / 300) ** 0.5
    common, own = Counter(item.references[0] for item in seen), {}
    assert set(common) == set(tracing.LOCATIONS)
    for item in seen:
        own.setdefault(subject(item), Counter())[item.references[0]] += 1
    guesses = [[common.most_common(1)[0][0]] * 300, [own[subject(item)].most_common(1)[0][0] for item in items]]
    for guess in guesses:
        right = np.mean([one == item.references[0] for one, item in zip(guess, items, strict=True)])
        assert abs(right - chance) < bound


def test_tasks_without_options_have_no_chance():
    assert {name: task.chance for name, task in TASKS.items() if task.chance} == {"babi_1": 1 / 6, "babi_2": 1 / 6}


@every
@kinds
def test_a_length_that_is_too_short_says_what_it_takes(task, kind):
    tokenizer = made_tokenizer(kind)
    filler = noise(kind)
    with pytest.raises(InputError, match=rf"^{task} needs at least about \d+ tokens, length is 12$") as error:
        make_items(task, tokenizer, length=12, count=3, filler=filler)
    needs = int(re.search(r"\d+ tokens", str(error.value))[0].split()[0])
    length = needs
    for _ in range(9):
        try:
            assert make_items(task, tokenizer, length=length, count=3, filler=filler)[0].length == length
            break
        except InputError as again:
            length = int(re.search(r"(\d+) tokens", str(again))[1])
    assert length <= needs + 60
    with pytest.raises(InputError):
        make_items(task, tokenizer, length=needs - 60, count=3, filler=filler)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "needle"}, "no task 'needle', the tasks are passkey, niah_single, .*, babi_2$"),
        ({"count": 0}, "at least one item, got a count of 0"),
        ({"depths": [0.5, 1.1]}, r"depths lie between 0 and 1, one at least, got \[0.5, 1.1\]"),
        ({"depths": [-0.1]}, "depths lie"),
        ({"depths": [float("nan")]}, "depths lie"),
        ({"depths": []}, "depths lie"),
        ({"seed": -1}, "a seed lies between"),
        ({"texts": ["", ""]}, "the filler has no tokens: 2 texts"),
        ({"texts": []}, "the filler has no tokens: 0 texts"),
    ],
)
def test_refusals(changes, message):
    tokenizer = made_tokenizer("bytes")
    filler = Filler.of(tokenizer, changes.pop("texts", None))
    values = {"task": "passkey", "length": 2500, "count": 1, "filler": filler, **changes}
    with pytest.raises(InputError, match=message):
        make_items(values.pop("task"), tokenizer, **values)


def test_tokenizers_that_cannot_spell_the_answer_are_refused():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator([string.ascii_letters + " .\n"], trainers.BpeTrainer(show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    for task, message in (("passkey", "reads back as it was"), ("mqar", "has 0")):
        with pytest.raises(InputError, match=message):
            make_items(task, tokenizer, length=900, count=1, filler=Filler.of(tokenizer, None))


def test_a_list_that_needs_more_words_than_there_are_is_refused(monkeypatch):
    monkeypatch.setattr(tracing, "HEADS", needles.HEADS[:5])
    monkeypatch.setattr(tracing, "TAILS", needles.TAILS[:20])
    with pytest.raises(InputError, match="common_words has 100 words, too few for a list of 8,000 tokens"):
        make_items(
            "common_words",
            length=8000,
            filler=Filler.of(made_tokenizer("bytes"), None),
            count=1,
            tokenizer=made_tokenizer("bytes"),
        )


def test_filler_begins_with_a_document_and_goes_on_with_the_next():
    tokenizer = made_tokenizer("bytes")
    filler = Filler.of(tokenizer, ["aaaa " * 20, "", "bbbb " * 20])
    first, last = (filler.document(number).tolist() for number in (0, 2))
    begins = set()
    for number in range(40):
        for room in (0, 1, 7, len(first) + 3, 2 * len(first) + 2 * len(last)):
            taken = filler.take(room, generator("filler", 0, number))
            begun = [whole for whole in ((first + last) * 3, (last + first) * 3) if whole[:room] == taken]
            assert len(taken) == room
            assert begun
            begins.update(taken[:1])
    assert {first[0], last[0]} <= begins


def test_documents_are_tokenised_when_needed_and_once():
    calls = []

    def tokenizer(text, **_):
        calls.append(text)
        return {"input_ids": list(range(len(text)))}

    filler = Filler.of(tokenizer, ["x" * 100, "y" * 90])
    assert calls == []
    for _ in range(5):
        filler.take(10, generator("filler", 0))
    assert len(calls) == 1


def test_without_texts_the_filler_is_noise():
    tokenizer = made_tokenizer("bytes")
    text = tokenizer.decode(Filler.of(tokenizer, None).take(500, generator("filler", 0)))
    assert (f"{NOISE}\n" * 40).startswith(text)
    assert len(text) > 600


def test_a_filler_of_another_tokenizer_is_refused():
    with pytest.raises(InputError, match="another tokenizer"):
        make_items("passkey", made_tokenizer("bytes"), length=900, count=1, filler=noise("pieces"))
