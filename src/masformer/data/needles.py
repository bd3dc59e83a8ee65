"""Tasks that ask for something that was told once: passkeys, needles, pairs of a JSON object, pairs of tokens.

Keys and values are never those of training items (`recall.py`: numbers of 4, 6, 7 or 8 digits, words of its own list
joined by hyphens, codes of letters and digits): a passkey has 5 digits, a needle's number 9 (RULER's have 7), names
are made of the words below, none of which is in that list.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence

import numpy as np

from ..errors import InputError
from .filler import Ids, Redraw, Setting, TooShort, pick, random_places, room_for
from .items import Item

HEADS = (
    "ash", "barn", "beach", "bear", "bell", "bird", "bison", "bone", "book", "brick", "bull", "cable", "cake", "camp",
    "cart", "chalk", "chest", "cider", "clay", "cliff", "clock", "cork", "corn", "cow", "deer", "dog", "door", "dust",
    "eagle", "earth", "egg", "elm", "farm", "ferry", "field", "fire", "fish", "flag", "floor", "flour", "fog", "foot",
    "fox", "frog", "frost", "fruit", "gate", "ghost", "glass", "gold", "goose", "grape", "grass", "hair", "hand",
    "hawk", "hay", "heart", "hedge", "hill", "horse", "house", "iron", "jelly", "king", "lace", "lake", "lamb",
    "leaf", "light", "lilac", "lime", "linen", "lion", "milk", "mill", "moon", "moss", "mouse", "mud", "neck",
    "night", "north", "nut", "oak", "owl", "paint", "palm", "paper", "peach", "pig", "pipe", "plum", "pond", "queen",
    "rail", "rice", "road", "rock", "roof", "root", "rope", "rose", "salt", "sand", "sea", "sheep", "ship", "shoe",
    "silk", "sky", "slate", "smoke", "snow", "soap", "south", "steam", "steel", "storm", "straw", "sugar", "sun",
    "tar", "tea", "thorn", "tide", "tin", "toast", "town", "tree", "tulip", "turf", "wall", "water", "wax", "whale",
    "wheat", "wind", "wine", "wolf", "wood", "wool", "yarn", "zinc",
)  # fmt: skip
TAILS = (
    "arch", "bag", "band", "bank", "barrel", "basket", "beam", "bed", "belt", "bench", "blade", "block", "board",
    "boat", "bowl", "box", "branch", "bread", "bridge", "broom", "brush", "bucket", "bush", "button", "cap", "card",
    "case", "chain", "chair", "cloth", "coin", "comb", "court", "cup", "desk", "dish", "drum", "fence", "flute",
    "fork", "frame", "glove", "guard", "hall", "hammer", "harp", "hat", "hook", "horn", "jacket", "jar", "kettle",
    "key", "knife", "knot", "ladder", "lamp", "latch", "ledge", "lid", "line", "lock", "loom", "mark", "mask", "mast",
    "mirror", "nail", "needle", "nest", "net", "oar", "pan", "path", "pen", "pin", "plank", "plate", "pocket", "pole",
    "pump", "rack", "ring", "saddle", "sail", "saw", "scale", "screen", "seat", "shelf", "shell", "shield", "shovel",
    "sign", "skirt", "sled", "sleeve", "spoon", "stair", "stand", "stick", "stool", "stove", "strap", "string",
    "sword", "tent", "thread", "tile", "tool", "torch", "trail", "tray", "trunk", "tub", "tunnel", "vase", "vest",
    "vine", "wheel", "wing", "wire", "yard",
)  # fmt: skip
"""No head ends with another and no tail begins with another, so that no made word stands within another."""

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
DIGITS = 9
NEEDLES = 4
ONE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n"
)
MANY = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the numbers afterwards.\n"
)
MAGIC = "\nOne of the special magic numbers for {name} is: {value}.\n"
ASK_ONE = (
    "\nWhat is the special magic number for {name} mentioned in the provided text? "
    "The special magic number for {name} mentioned in the provided text is"
)
ASK_MANY = (
    "\nWhat are all the special magic numbers for {name} mentioned in the provided text? "
    "The special magic numbers for {name} mentioned in the provided text are"
)
EXTRACT = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
ASK_KEY = '\n\nKey: "{key}"\nCorresponding value:'
EXAMPLES = 2
PAIRS = (4, 64)
"""Fewest and most pairs of tokens: those of the paper's grid."""


def passkey(setting: Setting, random: np.random.Generator, depth: float) -> Item:
    """LongLoRA's passkey (passkey_retrivial.py), keys of five digits; the needle says the key twice."""
    key = str(random.integers(10_000, 100_000))
    needle = setting.encode(NEEDLE.format(key=key))
    tail = setting.tail(QUESTION, [("", f" {key}")])
    return setting.hide(
        "passkey", setting.encode(INTRODUCTION), [(depth, needle)], tail, random, only={key: 2}, depth=depth
    )


def niah_single(setting: Setting, random: np.random.Generator, depth: float) -> Item:
    """RULER's niah_single_1 and _2: one name with one number."""
    return _one_of(setting, random, depth, "niah_single", 1)


def niah_multikey(setting: Setting, random: np.random.Generator, depth: float) -> Item:
    """RULER's niah_multikey_1: four names with a number each, one is asked for."""
    return _one_of(setting, random, depth, "niah_multikey", NEEDLES)


def niah_multivalue(setting: Setting, random: np.random.Generator, depth: None) -> Item:
    """RULER's niah_multivalue: four numbers of one name; the right answer lists them as they come in the text."""
    return _all_of(setting, random, "niah_multivalue", _names(random, 1) * NEEDLES)


def niah_multiquery(setting: Setting, random: np.random.Generator, depth: None) -> Item:
    """RULER's niah_multiquery: four names with a number each, asked for in another order than that of the text."""
    return _all_of(setting, random, "niah_multiquery", _names(random, NEEDLES))


def _one_of(setting: Setting, random: np.random.Generator, depth: float, task: str, count: int) -> Item:
    names, values = _names(random, count), _values(random, count)
    places = [depth, *random.random(count - 1).tolist()]
    needles = setting.encode_all([MAGIC.format(name=n, value=v) for n, v in zip(names, values, strict=True)])
    return setting.hide(
        task,
        setting.encode(ONE),
        zip(places, needles, strict=True),
        setting.tail(ASK_ONE.format(name=names[0]), [("", f" {values[0]}")]),
        random,
        only={**dict.fromkeys(names, 1), **dict.fromkeys(values, 1), names[0]: 3},
        depth=depth,
    )


def _all_of(setting: Setting, random: np.random.Generator, task: str, names: list[str]) -> Item:
    """Needles in the order of the names, asked for in random order where the names differ."""
    values, different = _values(random, NEEDLES), list(dict.fromkeys(names))
    order = random.permutation(NEEDLES) if len(different) > 1 else range(NEEDLES)
    asked = _listed([names[i] for i in order]) if len(different) > 1 else names[0]
    needles = setting.encode_all([MAGIC.format(name=n, value=v) for n, v in zip(names, values, strict=True)])
    told = {name: names.count(name) + 2 for name in different}
    return setting.hide(
        task,
        setting.encode(MANY),
        zip(random_places(random, NEEDLES), needles, strict=True),
        setting.tail(ASK_MANY.format(name=asked), led([f" {values[i]}" for i in order])),
        random,
        only={**dict.fromkeys(values, 1), **told},
        room=room_for([" " + "9" * DIGITS, ","] * NEEDLES),
    )


def kv_retrieval(setting: Setting, random: np.random.Generator, depth: float) -> Item:
    """A value of a JSON object of uuid pairs (nelson-liu/lost-in-the-middle, make_kv_retrieval_data.py).

    As many pairs as fit, the asked one at the depth; two others are worked examples (HELMET, so that base models
    answer in form). The few tokens that hold no further pair are filler, at the very beginning.
    """
    (key, value), *examples = (_pair(random) for _ in range(EXAMPLES + 1))
    shown = "".join(f"{ASK_KEY.format(key=k)} {v}" for k, v in examples)
    tail = setting.tail(shown + ASK_KEY.format(key=key), [("", f" {value}")])
    head, opened, between, closed = setting.encode_all(["\n\n" + EXTRACT, "{", ",\n ", "}"])
    asked, *pairs = setting.encode_all([_line(*pair) for pair in [(key, value), *examples]])
    space = setting.space(None, head + opened + closed, tail)
    space -= sum(map(len, (asked, *pairs))) + EXAMPLES * len(between)
    pairs += _more_pairs(setting, random, space, between)
    pairs = [pairs[i] for i in random.permutation(len(pairs))]
    pairs.insert(round(depth * len(pairs)), asked)
    body = head + opened + pairs[0]
    for pair in pairs[1:]:
        body += between + pair
    return setting.hide("kv_retrieval", [], [(1.0, body + closed)], tail, random, only={key: 2, value: 1}, depth=depth)


def _more_pairs(setting: Setting, random: np.random.Generator, space: int, between: Ids) -> list[Ids]:
    """Pairs until the next one does not fit."""
    pairs: list[Ids] = []
    while space > 0:
        for pair in setting.encode_all([_line(*_pair(random)) for _ in range(32)]):
            space -= len(between) + len(pair)
            if space < 0:
                break
            pairs.append(pair)
    return pairs


def mqar(setting: Setting, random: np.random.Generator, depth: None) -> Item:
    """Multi-query associative recall (Zoology, associative_recall.py): pairs of tokens, then each key once more.

    One pair for 8 tokens, 4 to 64. Keys and values are whole words of the vocabulary, each a single token; the
    repeated keys with their values stand at the very end (Zoology spreads them), in random order.
    """
    count = min(max(PAIRS[0], setting.length // 8), PAIRS[1])
    space = setting.length - len(setting.start) - 4 * count
    if space < 0:
        raise TooShort(setting.length - space)
    words = setting.filler.once("whole words", lambda: _whole_words(setting))
    if len(words) < 2 * count:
        raise InputError(f"mqar needs {2 * count} tokens that are whole words, this tokenizer has {len(words)}")
    drawn = pick(random, words, 2 * count)
    pairs = list(zip(drawn[:count], drawn[count:], strict=True))
    ids = (
        setting.start
        + [token for pair in pairs for token in pair]
        + _filler_without(setting, set(drawn), space, random)
    )
    parts = tuple((len(ids) + 2 * number + 1, len(ids) + 2 * number + 2) for number in range(count))
    ids += [token for number in random.permutation(count) for token in pairs[number]]
    return Item("mqar", tuple(ids), parts, setting.length - parts[0][0])


def _whole_words(setting: Setting) -> list[int]:
    """Tokens that are a space and three or more ASCII letters, by id; the space is written Ġ or ▁ in vocabularies."""
    vocabulary = setting.tokenizer.get_vocab()
    special = set(setting.tokenizer.all_special_ids)
    return sorted(i for t, i in vocabulary.items() if re.fullmatch(r"[Ġ▁][A-Za-z]{3,}", t) and i not in special)


def _filler_without(setting: Setting, left_out: set[int], room: int, random: np.random.Generator) -> Ids:
    """Filler without these tokens, which are left out of it."""
    kept: Ids = []
    while len(kept) < room:
        more = [token for token in setting.filler.take(room, random) if token not in left_out]
        if not more:
            raise Redraw
        kept += more
    return kept[:room]


def led(answers: Sequence[str]) -> list[tuple[str, str]]:
    """Answers with commas between them."""
    return [("," if number else "", answer) for number, answer in enumerate(answers)]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f", and {names[-1]}"


def _names(random: np.random.Generator, count: int) -> list[str]:
    heads, tails = pick(random, HEADS, count), pick(random, TAILS, count)
    return [f"{head}-{tail}" for head, tail in zip(heads, tails, strict=True)]


def _values(random: np.random.Generator, count: int) -> list[str]:
    values: dict[str, None] = {}
    while len(values) < count:
        values[str(random.integers(10 ** (DIGITS - 1), 10**DIGITS))] = None
    return list(values)


def _pair(random: np.random.Generator) -> tuple[str, str]:
    key, value = (str(uuid.UUID(bytes=random.bytes(16), version=4)) for _ in range(2))
    return key, value


def _line(key: str, value: str) -> str:
    return f'"{key}": "{value}"'
