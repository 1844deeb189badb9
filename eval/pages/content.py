"""What a page says: words, digits, bars, places and shapes with the slots that they stand in, and questions about them.

A page is written for a split, a kind and a level; how it looks is the business of `drawing`. Every page allows both
questions of its kind, so that no kind of page is more frequent than another for being easier to ask about.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from random import Random

from vtc.eval.material import TENTHS, Placed, Split
from vtc.eval.scenes import CLEAR, COLORS, DIGITS, SHAPES

WORDS = (
    *("clay", "dirt", "duck", "dusk", "dust", "egg", "fawn", "fern", "fire", "foam", "frog", "gold"),
    *("gum", "ice", "iris", "jade", "key", "kiwi", "lawn", "leaf", "lime", "milk", "mint", "moss"),
    *("mud", "navy", "pea", "pear", "pig", "pine", "plum", "rod", "rose", "ruby", "rust", "sage"),
    *("sand", "sap", "sea", "sky", "soup", "sun", "tea", "teal", "tree", "wine", "acid", "army"),
)
"""Nouns of the names that people gave to colours, in the list that matplotlib ships (xkcd)."""
TIMES = {1: "one", 2: "two", 3: "three", 4: "four"}
"""How often a word may stand on a document, and the answers to that question."""
MARKERS = ("circle", "square", "triangle", "diamond")
SIDE = 120
"""Slots are given in pixels of a page of SIDE x SIDE, which is 15 x 15 patches of 8 pixels."""
LEVELS = (1, 2, 3)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Fact(Placed):
    """Something that a page says at one place.

    `name` is the word, the digit, the colour of a bar, the shape; `of` says in words which fact it is: the row and the
    column of a cell, the item of a price. `size` is a bar's length. `box` is (left, top, right, bottom): the slot in a
    page that is written, the ink in pixels in a page that is drawn.
    """

    kind: str
    name: str
    box: Box
    of: tuple[str, ...] = ()
    size: int = 0

    @property
    def words(self) -> tuple[str, ...]:
        """Its description: "gold frog digit 7" is the 7 in column gold and row frog."""
        length = (DIGITS[self.size],) if self.size else ()
        return (*self.of, *length, self.kind, self.name)

    @property
    def bits(self) -> float:
        """What it takes to say which of the possible values it has."""
        values = {"word": len(WORDS), "digit": len(DIGITS), "bar": 9 * len(COLORS), "shape": len(SHAPES)}
        values["place"] = len(MARKERS) * len(COLORS)
        return math.log2(values[self.kind])


@dataclass(frozen=True)
class Page:
    """A kind of page and the facts on it, in reading order."""

    kind: str
    level: int
    facts: tuple[Fact, ...]

    @property
    def density(self) -> float:
        """Bits a patch of 8 x 8 pixels, of SIDE x SIDE."""
        return sum(fact.bits for fact in self.facts) / (SIDE / 8) ** 2

    def those(self, kind: str) -> list[Fact]:
        return [fact for fact in self.facts if fact.kind == kind]


def write(split: Split, kind: str, level: int, random: Random) -> Page:
    """A page that belongs to `split`: which one that is follows from what the page says, so that no two splits can
    hold the same text."""
    while True:
        page = Page(kind, level, tuple(_WRITE[kind](level - 1, random)))
        if share(page.facts) in TENTHS[split]:
            return page


def share(facts: tuple[Fact, ...]) -> int:
    """Which tenth of all pages one that says this is in, as handwriting samples are in tenths."""
    said = repr([(fact.kind, fact.name, fact.of, fact.size) for fact in facts])
    return int.from_bytes(hashlib.sha256(said.encode()).digest()) % 10


def caption(facts: list[Fact] | tuple[Fact, ...]) -> str:
    """The first eight facts in reading order: "word egg, egg digit 4"."""
    return ", ".join(" ".join(fact.words) for fact in facts[:8]) or "nothing"


# ---------------------------------------------------------------- kinds of page


def _slots(rows: int, columns: int, box: Box = (3, 1, 119, 119)) -> list[list[Box]]:
    """`box` in equal parts, a list a row."""
    left, top, right, bottom = box
    width, height = (right - left) / columns, (bottom - top) / rows
    return [
        [(left + x * width, top + y * height, left + (x + 1) * width, top + (y + 1) * height) for x in range(columns)]
        for y in range(rows)
    ]


def _document(level: int, random: Random) -> list[Fact]:
    """Lines of words: one stands there twice, one three times, one four times and all others once."""
    rows, columns = ((5, 3), (8, 4), (11, 4))[level]
    repeated = [2, 3, 4]
    words = random.sample(WORDS, rows * columns - sum(repeated) + len(repeated))
    said = [*words, *(word for word, times in zip(words, repeated, strict=False) for _ in range(times - 1))]
    random.shuffle(said)
    facts, before = [], ""
    for line in _slots(rows, columns):
        before = ""
        for box in line:
            word = said[len(facts)]
            facts.append(Fact("word", word, box, (before,) if before else ()))
            before = word
    return facts


def _table(level: int, random: Random) -> list[Fact]:
    """Rows and columns with names: digits in two columns, words in the others."""
    rows, columns = ((4, 2), (6, 3), (10, 3))[level]
    grid = _slots(rows + 1, columns + 1)
    names = random.sample(WORDS, rows + columns)
    heads, labels, words = names[:columns], names[columns:], [word for word in WORDS if word not in names]
    kinds = ["digit", "digit", *["word"] * (columns - 2)]
    random.shuffle(kinds)
    cells = [_with_one_largest(rows, random) if k == "digit" else random.choices(words, k=rows) for k in kinds]
    facts = [Fact("word", head, box) for head, box in zip(heads, grid[0][1:], strict=True)]
    for y, label in enumerate(labels):
        facts.append(Fact("word", label, grid[y + 1][0]))
        for x, head in enumerate(heads):
            facts.append(Fact(kinds[x], cells[x][y], grid[y + 1][x + 1], (head, label)))
    return facts


def _with_one_largest(count: int, random: Random) -> list[str]:
    """Digits of which one is above all others."""
    while True:
        digits = random.choices(DIGITS, k=count)
        if digits.count(max(digits)) == 1:
            return digits


def _receipt(level: int, random: Random) -> list[Fact]:
    """Items with prices, on the densest level in two columns; at least one price occurs once."""
    rows, columns = ((5, 1), (9, 1), (11, 2))[level]
    items = random.sample(WORDS, rows * columns)
    while True:
        prices = random.choices(DIGITS, k=len(items))
        if 1 in Counter(prices).values():
            break
    facts = []
    for box, item, price in zip(chain(*_slots(rows, columns)), items, prices, strict=True):
        left, top, right, bottom = box
        edge = right - 14
        facts += [
            Fact("word", item, (left, top, edge, bottom)),
            Fact("digit", price, (edge, top, right, bottom), (item,)),
        ]
    return facts


def _chart(level: int, random: Random) -> list[Fact]:
    """Bars from left to right under one another, with their names; one is longer than all others."""
    rows = (4, 7, 11)[level]
    labels = random.sample(WORDS, rows)
    while True:
        sizes = [random.randint(1, 9) for _ in range(rows)]
        if sizes.count(max(sizes)) == 1:
            break
    facts = []
    for [box], label, size in zip(_slots(rows, 1), labels, sizes, strict=True):
        left, top, _, bottom = box
        bar = (left + 30, top, left + 30 + 9.4 * size, bottom)
        facts.append(Fact("word", label, (left, top, left + 30, bottom)))
        facts.append(Fact("bar", random.choice(list(COLORS)), bar, (label,), size))
    return facts


def _map(level: int, random: Random) -> list[Fact]:
    """Places: a marker and a name; no two markers are alike, and the places are not all in one row."""
    places = (5, 9, 14)[level]
    slots = [*chain(*_slots(6, 3))]
    while True:
        chosen = sorted(random.sample(range(len(slots)), places))
        if len({index // 3 for index in chosen}) > 1:
            break
    markers = random.sample([(color, shape) for color in COLORS for shape in MARKERS], places)
    facts = []
    for index, (color, shape), name in zip(chosen, markers, random.sample(WORDS, places), strict=True):
        left, top, right, bottom = slots[index]
        facts.append(Fact("place", shape, (left, top, left + 11, bottom), (color,)))
        facts.append(Fact("word", name, (left + 11, top, right, bottom), (color, shape)))
    return facts


def _camouflage(level: int, random: Random) -> list[Fact]:
    """A field of shapes in the tints of what is behind them: three kinds many times, one only once."""
    cells = (4, 6, 8)[level]
    odd, *others = random.sample(SHAPES, 4)
    slots = [*chain(*_slots(cells, cells, (0, 0, SIDE, SIDE)))]
    names = [*others, *others, *random.choices(others, k=len(slots) - 6)]
    random.shuffle(names)
    place = random.choice([i for i, box in enumerate(slots) if abs((box[0] + box[2]) / 2 - SIDE / 2) > CLEAR * SIDE])
    while min(Counter(names[:place] + names[place + 1 :]).values()) < 2:
        random.shuffle(names)
    names[place] = odd
    return [Fact("shape", name, box, ("once",) * (name == odd)) for name, box in zip(names, slots, strict=True)]


_WRITE = {
    "document": _document,
    "table": _table,
    "receipt": _receipt,
    "chart": _chart,
    "map": _map,
    "camouflage": _camouflage,
}
KINDS = tuple(_WRITE)


# ---------------------------------------------------------------- questions


def ask(page: Page, task: str, random: Random) -> tuple[str, str]:
    """A question of this task, one of the two of the page's kind, with its answer."""
    return _ASK[task][1](page, random)


def _after(page: Page, random: Random) -> tuple[str, str]:
    times = Counter(fact.name for fact in page.facts)
    fact = random.choice([fact for fact in page.facts if fact.of and times[fact.of[0]] == 1])
    return f"which word comes after {fact.of[0]}?", fact.name


def _count(page: Page, random: Random) -> tuple[str, str]:
    times = Counter(fact.name for fact in page.facts)
    count = random.choice(list(TIMES))
    word = random.choice([word for word, found in times.items() if found == count])
    return f"how many times is the word {word} there?", TIMES[count]


def _cell(page: Page, random: Random) -> tuple[str, str]:
    fact = random.choice([fact for fact in page.facts if fact.of])
    return f"what is the {fact.of[0]} of {fact.of[1]}?", fact.name


def _most(page: Page, random: Random) -> tuple[str, str]:
    head = random.choice(list(dict.fromkeys(fact.of[0] for fact in page.those("digit"))))
    most = max((fact for fact in page.those("digit") if fact.of[0] == head), key=lambda fact: fact.name)
    return f"which row has the most {head}?", most.of[1]


def _price(page: Page, random: Random) -> tuple[str, str]:
    fact = random.choice(page.those("digit"))
    return f"what does the {fact.of[0]} cost?", fact.name


def _item(page: Page, random: Random) -> tuple[str, str]:
    prices = [fact.name for fact in page.those("digit")]
    fact = random.choice([fact for fact in page.those("digit") if prices.count(fact.name) == 1])
    return f"which item costs {fact.name}?", fact.of[0]


def _bar(page: Page, random: Random) -> tuple[str, str]:
    fact = random.choice(page.those("bar"))
    return f"what color is the bar of {fact.of[0]}?", fact.name


def _longest(page: Page, random: Random) -> tuple[str, str]:
    return "which bar is the longest?", max(page.those("bar"), key=lambda fact: fact.size).of[0]


def _place(page: Page, random: Random) -> tuple[str, str]:
    fact = random.choice(page.those("word"))
    return f"what is at the {fact.of[0]} {fact.of[1]}?", fact.name


def _north(page: Page, random: Random) -> tuple[str, str]:
    places = page.those("word")
    one, other = random.choice([(a, b) for a in places for b in places if abs(a.box[1] - b.box[1]) > SIDE / 8])
    answer = one if one.box[1] < other.box[1] else other
    return f"which is further north, {one.name} or {other.name}?", answer.name


def _odd(page: Page, random: Random) -> tuple[str, str]:
    return "which shape is there only once?", next(fact.name for fact in page.facts if fact.of)


def _side(page: Page, random: Random) -> tuple[str, str]:
    fact = next(fact for fact in page.facts if fact.of)
    return f"is the {fact.name} on the left or right?", "left" if fact.center[0] < SIDE / 2 else "right"


_ASK = {
    "after": ("document", _after),
    "cell": ("table", _cell),
    "price": ("receipt", _price),
    "bar": ("chart", _bar),
    "place": ("map", _place),
    "odd": ("camouflage", _odd),
    "count": ("document", _count),
    "most": ("table", _most),
    "item": ("receipt", _item),
    "longest": ("chart", _longest),
    "north": ("map", _north),
    "side": ("camouflage", _side),
}
TASKS = tuple(_ASK)


def kind_of(task: str) -> str:
    """The kind of page that a task is about."""
    return _ASK[task][0]


def tasks_of(kind: str) -> tuple[str, ...]:
    return tuple(task for task in TASKS if kind_of(task) == kind)
