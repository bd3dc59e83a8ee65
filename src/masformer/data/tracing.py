"""Tasks that need more than one look: chains of variables, counting words, and who carried what where.

What is asked for is never a key of training items (`recall.py`): names of variables are five capitals and their
values five digits, words are made of those of `needles.py` or of six random letters, and no location, person or thing
of the worlds is a word or an owner there.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import string
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .filler import NOISE, Ids, Setting, TooShort, pick, random_places, room_for
from .items import Item
from .needles import HEADS, TAILS, led

CHAIN = 5
TRACK = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
ASK_CHAIN = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. "
    "Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assigned the value {value}, they are:"
)

WANTED = 10
COUNTS, COUNTS_BELOW, LONG = (30, 3), (6, 1), 4096
"""How often the wanted words and the others stand in the list, and the same below 4096 tokens."""
LIST = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
ASK_COMMON = (
    "\nQuestion: What are the {count} most common words in the above list? "
    "Answer: The top {count} words that appear most often in the list are:"
)

CODED = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words."
)
ASK_FREQUENT = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '...'. "
    "What are the three most frequently appeared words in the above coded text? "
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)
LETTERS = 6
FEWEST = 80
"""Words that a coded text needs at least: from here on the fourth and the fifth word differ by one or more."""

LOCATIONS = ("attic", "balcony", "bathroom", "bedroom", "hallway", "pantry")
PERSONS = (
    "Agnes", "Boris", "Celia", "Desmond", "Edith", "Fergus", "Gwendolyn", "Hector", "Imogen", "Jasper", "Leopold",
    "Mabel", "Norbert", "Ottilie", "Percival", "Rosalind", "Silas", "Thelma", "Ulric", "Wilbur",
)  # fmt: skip
THINGS = (
    "accordion", "bagpipe", "compass", "crayon", "doughnut", "hairbrush", "harmonica", "magnet", "paperweight",
    "pineapple", "skateboard", "stapler", "teapot", "thermometer", "toothbrush", "trombone", "tweezers", "typewriter",
    "umbrella", "xylophone",
)  # fmt: skip
MOVES = ("went to", "moved to", "walked to", "travelled to", "hurried to")
GRABS = ("picked up", "took", "got")
DROPS = ("put down", "dropped", "left")
WALK, EVENTS = 10, 9
WORLD = (
    "Facts about {what} are scattered over the following text, which is about other things. Memorize them. "
    "I will ask for the latest state at the end.\n"
)
ASK_WHERE = "\nQuestion: Where is {who} now?\nAnswer: {name} is in the"


def variable_tracking(setting: Setting, random: np.random.Generator, depth: None) -> Item:
    """RULER's variable tracking (variable_tracking.py): one chain of four hops, in order at random places."""
    (example, names), (shown, value) = _chains(random)
    lines = _assignments(example, shown)
    worked = "\n".join([TRACK, NOISE, *lines[:3], NOISE, *lines[3:]])
    worked += ASK_CHAIN.format(value=shown, count=CHAIN) + "".join(f" {name}" for name in example) + "\n\n"
    needles = setting.encode_all([f"\n{line}\n" for line in _assignments(names, value)])
    return setting.hide(
        "variable_tracking",
        setting.encode(worked + TRACK),
        zip(random_places(random, CHAIN), needles, strict=True),
        setting.tail(ASK_CHAIN.format(value=value, count=CHAIN), [("", f" {name}") for name in names]),
        random,
        only={**dict.fromkeys(names, 2), names[-1]: 1, value: 3},
        room=room_for([" " + "A" * CHAIN] * CHAIN),
    )


def _chains(random: np.random.Generator) -> tuple[tuple[list[str], list[str]], list[str]]:
    """Five names for the worked example and five for the chain, and a value for each, all different."""
    names: dict[str, None] = {}
    while len(names) < 2 * CHAIN:
        names[_letters(random, string.ascii_uppercase, 5)] = None
    values: dict[str, None] = {}
    while len(values) < 2:
        values[str(random.integers(10_000, 99_999))] = None
    return (list(names)[:CHAIN], list(names)[CHAIN:]), list(values)


def _assignments(names: Sequence[str], value: str) -> list[str]:
    sources = [value, *(f"VAR {name}" for name in names)]
    return [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=False)]


def common_words(setting: Setting, random: np.random.Generator, depth: None) -> Item:
    """RULER's common words (common_words_extraction.py): the ten that stand in a shuffled list most often.

    As many other words as fit; the few tokens that hold no further one are filler, at the very beginning. The right
    answer has the words in the order of their first places in the list.
    """
    often, seldom = COUNTS if setting.length >= LONG else COUNTS_BELOW
    made = setting.filler.once("made words", lambda: _made_words(setting))
    words = pick(random, list(made), len(made))
    example, wanted, others = words[: 2 * WANTED], words[2 * WANTED : 3 * WANTED], words[3 * WANTED :]
    head = setting.encode("\n\n" + _worked_list(random, example) + LIST)
    tail = setting.tail(ASK_COMMON.format(count=WANTED), _numbered(wanted))
    room = room_for([f" {number}." for number in range(2, WANTED + 1)]) + WANTED * max(map(len, made.values()))
    taken = _that_fit(setting, setting.space(room, head, tail), wanted, others, (often, seldom))
    entries = _shuffled(random, wanted, taken, (often, seldom))
    body = head + [
        token
        for number, word in enumerate(entries)
        for part in (_number(setting, number), made[word])
        for token in part
    ]
    only = dict.fromkeys(wanted, often)
    return setting.hide("common_words", [], [(1.0, body)], tail, random, only=only, room=room)


def _made_words(setting: Setting) -> dict[str, Ids]:
    """Each word of a list with its tokens after a space."""
    words = [head + tail for head in HEADS for tail in TAILS]
    return dict(zip(words, setting.encode_all([f" {word}" for word in words]), strict=True))


def _worked_list(random: np.random.Generator, words: list[str]) -> str:
    """RULER's example: ten words three times and ten once."""
    entries = _shuffled(random, words[:WANTED], words[WANTED:], (3, 1))
    listed = " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1))
    answer = "".join(lead + word for lead, word in _numbered(words[:WANTED]))
    return f"{LIST}{listed}{ASK_COMMON.format(count=WANTED)}{answer}\n\n"


def _shuffled(random: np.random.Generator, wanted: list[str], others: list[str], counts: tuple[int, int]) -> list[str]:
    """The words so often in random order, except that the wanted ones come first in the order given."""
    slots = np.repeat(np.arange(len(wanted) + len(others)), [counts[0]] * len(wanted) + [counts[1]] * len(others))
    order = random.permutation(slots).tolist()
    first = dict.fromkeys(slot for slot in order if slot < len(wanted))
    words = {**dict(zip(first, wanted, strict=True)), **dict(enumerate(others, len(wanted)))}
    return [words[slot] for slot in order]


def _that_fit(setting: Setting, space: int, wanted: list[str], others: list[str], counts: tuple[int, int]) -> list[str]:
    """The first of the others that fit into `space` tokens beside the wanted words, one at least."""
    made = setting.filler.once("made words", lambda: _made_words(setting))
    entries, taken = counts[0] * len(wanted), 0
    space -= counts[0] * sum(len(made[word]) for word in wanted)
    space -= sum(len(_number(setting, number)) for number in range(entries))
    for word in others:
        cost = counts[1] * len(made[word])
        cost += sum(len(_number(setting, number)) for number in range(entries, entries + counts[1]))
        if cost > space:
            break
        space, entries, taken = space - cost, entries + counts[1], taken + 1
    else:
        raise InputError(f"common_words has {len(made):,} words, too few for a list of {setting.length:,} tokens")
    if not taken:
        raise TooShort(setting.length + cost - space)
    return others[:taken]


def _number(setting: Setting, index: int) -> Ids:
    """The tokens before entry `index` of the list, from 0: its number and a full stop."""
    block, place = divmod(index, 1000)
    return setting.filler.once(f"numbers {block}", lambda: _numbers(setting, block))[place]


def _numbers(setting: Setting, block: int) -> list[Ids]:
    numbers = range(1000 * block + 1, 1000 * block + 1001)
    return setting.encode_all([f" {number}." if number > 1 else "1." for number in numbers])


def _numbered(words: Sequence[str]) -> list[tuple[str, str]]:
    return [(f" {number}.", f" {word}") for number, word in enumerate(words, 1)]


def frequent_words(setting: Setting, random: np.random.Generator, depth: None) -> Item:
    """RULER's frequent words (freq_words_extraction.py): counts by a zeta law, alpha 2, the first word as dots.

    One word of the vocabulary for 50 tokens, 8 at least; as many words as fit. The few tokens that hold no further
    one are filler, at the very beginning.
    """
    words = _coded(random, max(8, setting.length // 50))
    pieces = setting.encode_all([" ...", *(f" {word}" for word in words[1:])])
    tail = setting.tail(ASK_FREQUENT, led([f" {word}" for word in words[1:4]]))
    head, room = setting.encode("\n\n" + CODED), room_for([" " + "a" * LETTERS, ","] * 3)
    counts = _zeta_counts(setting, setting.space(room, head, tail), np.array([len(piece) for piece in pieces]))
    order = random.permutation(np.repeat(np.arange(len(words)), counts)).tolist()
    body = head + [token for number in order for token in pieces[number]]
    only = {word: int(count) for word, count in zip(words[1:4], counts[1:4], strict=True)}
    return setting.hide("frequent_words", [], [(1.0, body)], tail, random, only=only, room=room)


def _zeta_counts(setting: Setting, space: int, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each word stands in the longest text of `space` tokens; the words have so many tokens each."""
    shares = np.arange(1, len(sizes) + 1) ** -2.0 / (math.pi**2 / 6)

    def tokens(words: int) -> int:
        return int(np.floor(words * shares) @ sizes)

    if tokens(FEWEST) > space:
        raise TooShort(setting.length + tokens(FEWEST) - space)
    words = bisect.bisect_right(range(2 * space), space, lo=FEWEST, key=tokens) - 1
    return np.floor(words * shares).astype(np.int64)


def _coded(random: np.random.Generator, count: int) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < count:
        words[_letters(random, string.ascii_lowercase, LETTERS)] = None
    return list(words)


def _letters(random: np.random.Generator, alphabet: str, count: int) -> str:
    return "".join(alphabet[number] for number in random.integers(len(alphabet), size=count))


def babi_1(setting: Setting, random: np.random.Generator, depth: float) -> Item:
    """After bAbI's task qa1 in other text (BABILong): where is a person who moved several times?

    The last move of the person asked for stands at the depth, with moves of others after it.
    """
    walk, last = _walk(random, depth)
    before = [depth * place for place in random_places(random, last)]
    after = [depth + (1 - depth) * place for place in random_places(random, len(walk.facts) - last - 1)]
    asked = walk.asked
    question = ASK_WHERE.format(who=asked, name=asked)
    return _world(setting, random, "babi_1", walk, [*before, depth, *after], question, "persons", depth)


def babi_2(setting: Setting, random: np.random.Generator, depth: None) -> Item:
    """After bAbI's task qa2 in other text (BABILong): where is a thing that somebody has carried?"""
    story = _errands(random)
    places = random_places(random, len(story.facts))
    question = ASK_WHERE.format(who=f"the {story.asked}", name=f"The {story.asked}")
    return _world(setting, random, "babi_2", story, places, question, "persons and things", None)


@dataclasses.dataclass(frozen=True)
class Story:
    """Facts in order, each told once; `names` is what the answer turns on."""

    facts: list[str]
    names: list[str]
    asked: str
    answer: str


def _world(
    setting: Setting,
    random: np.random.Generator,
    task: str,
    story: Story,
    places: Sequence[float],
    question: str,
    what: str,
    depth: float | None,
) -> Item:
    facts = setting.encode_all([f"\n{fact}\n" for fact in story.facts])
    own = " ".join([*story.facts, question])
    return setting.hide(
        task,
        setting.encode(WORLD.format(what=what)),
        zip(places, facts, strict=True),
        setting.tail(question, [("", f" {story.answer}")]),
        random,
        only={**{name: own.count(name) for name in story.names}, **dict.fromkeys(story.facts, 1)},
        depth=depth,
    )


def _walk(random: np.random.Generator, depth: float) -> tuple[Story, int]:
    """Ten moves of four persons, and the index of the one that decides: the first person's last, who is asked for."""
    persons, (answer,) = pick(random, PERSONS, 4), pick(random, LOCATIONS, 1)
    last = min(max(round(depth * (WALK - 1)), 2), WALK - 3)
    while True:
        who = [*random.integers(4, size=last), 0, *random.integers(1, 4, size=WALK - last - 1)]
        who[int(random.integers(last))] = 0
        at: dict[int, str] = {}
        facts = []
        for number, person in enumerate(who):
            barred = {at.get(person), answer if person == 0 else None}
            free = [place for place in LOCATIONS if place not in barred]
            at[person] = answer if number == last else pick(random, free, 1)[0]
            facts.append(_move(random, persons[person], at[person]))
        if len(set(facts)) == len(facts):
            return Story(facts, [persons[0]], persons[0], answer), last


def _errands(random: np.random.Generator) -> Story:
    """Three persons move, take things and put them down; the thing asked for was carried from one place to another."""
    while True:
        errands = Errands(pick(random, PERSONS, 3), pick(random, THINGS, 3))
        for person in errands.persons:
            errands.move(random, person)
        for _ in range(EVENTS):
            errands.step(random)
        carried = [thing for thing in errands.things if thing in errands.carried]
        if carried and len(set(errands.facts)) == len(errands.facts):
            asked = pick(random, carried, 1)[0]
            holders = [p for p in errands.persons if any(p in f and f"the {asked}" in f for f in errands.facts)]
            names = [*holders, asked]
            return Story(errands.facts, names, asked, errands.place(asked))


class Errands:
    """A small world: where persons are, who holds what, where things lie. A thing not yet seen may be anywhere."""

    def __init__(self, persons: list[str], things: list[str]) -> None:
        self.persons, self.things = persons, things
        self.at: dict[str, str] = {}
        self.holder: dict[str, str] = {}
        self.lies: dict[str, str] = {}
        self.carried: set[str] = set()
        """Things that went with a person to another place."""
        self.facts: list[str] = []

    def place(self, thing: str) -> str:
        return self.at[self.holder[thing]] if thing in self.holder else self.lies[thing]

    def step(self, random: np.random.Generator) -> None:
        """Takes something, puts something down or moves, a third each; moves where the other cannot be."""
        person, kind = pick(random, self.persons, 1)[0], int(random.integers(3))
        free = [t for t in self.things if t not in self.holder and self.lies.get(t, self.at[person]) == self.at[person]]
        held = [thing for thing in self.things if self.holder.get(thing) == person]
        if kind == 0 and free:
            thing = pick(random, free, 1)[0]
            self.holder[thing] = person
            self.facts.append(f"{person} {pick(random, GRABS, 1)[0]} the {thing} there.")
        elif kind == 1 and held:
            thing = pick(random, held, 1)[0]
            self.lies[thing] = self.at[self.holder.pop(thing)]
            self.facts.append(f"{person} {pick(random, DROPS, 1)[0]} the {thing} there.")
        else:
            self.move(random, person)

    def move(self, random: np.random.Generator, person: str) -> None:
        free = [place for place in LOCATIONS if place != self.at.get(person)]
        self.at[person] = pick(random, free, 1)[0]
        self.carried |= {thing for thing, holder in self.holder.items() if holder == person}
        self.facts.append(_move(random, person, self.at[person]))


def _move(random: np.random.Generator, person: str, place: str) -> str:
    return f"{person} {pick(random, MOVES, 1)[0]} the {place}."
