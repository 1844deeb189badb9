"""scenes: a procedural visual question answering benchmark that needs no download.

A scene holds a few small things on a dimmed photograph with clutter strokes: coloured shapes of 8 to 12
pixels (of 96), a tiny dot, a handwritten digit, a printed word. A thing covers one to six of the 12 x 12
patches, so that most visual tokens are background and losing the wrong one loses the answer. Digits and
photographs are real and come with scikit-learn.

Everything follows from (split, seed, index). Splits share neither seeds nor real material: digits are divided
by sample, photographs by region.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Literal, get_args

from PIL import Image, ImageDraw, ImageFont

from vtc.eval.marking import is_correct
from vtc.eval.material import Placed, Split, crop, digits, shape_mask

COLORS = {
    "red": (230, 45, 45),
    "green": (45, 190, 60),
    "blue": (60, 95, 255),
    "yellow": (245, 225, 45),
    "orange": (255, 140, 15),
    "purple": (165, 55, 225),
    "cyan": (45, 220, 230),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
WORDS = ("cat", "dog", "sun", "car", "hat", "bus", "key", "fox", "cup", "egg", "map", "pen")
DIGITS = tuple("0123456789")
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five"}
"""How many shapes a scene may hold, and the answers to the counting question."""
TASKS = ("color", "digit", "exist", "small", "shape", "count", "word", "position", "relation")
CAPTION = "list the things."

CELLS = 12
"""A scene is laid out on CELLS x CELLS cells; at 96 pixels a cell is the model's 8-pixel patch."""
_FOOTPRINT = {"shape": (2, 2), "digit": (2, 2), "word": (3, 2), "dot": (1, 1)}
_ASKED = {task: 1 for task in TASKS} | {"color": 2, "shape": 2, "exist": 4, "position": 3, "relation": 3}
"""How often training asks each task about a scene: more often where there is more to ask and more to learn."""
CLEAR = 0.09
"""How far, as a part of the width, a thing's centre must be off the middle to be asked about, and half of how far
two must be apart: nobody has to guess."""


@dataclass(frozen=True)
class Example:
    """One question about one image; `answer` is a single lower-case word or digit.

    `density` is what the image says, in bits a cell or patch: what it takes to say which of the possible values each
    thing has.
    """

    question_id: str
    task: str
    image: Image.Image
    question: str
    answer: str
    density: float | None = None

    def correct(self, prediction: str) -> float:
        """What a prediction is worth, 0 to 1: here whether it is the answer."""
        return is_correct(prediction, self.answer)


@dataclass(frozen=True)
class Thing(Placed):
    """Something one can ask about.

    `name` is the shape, the digit or the word; `box` is (left, top, right, bottom) in pixels.
    """

    kind: Literal["shape", "digit", "word", "dot"]
    name: str
    color: str
    box: tuple[int, int, int, int]

    @property
    def noun(self) -> str:
        """What a question calls it: the shape, or "digit", "word", "dot"."""
        return self.name if self.kind == "shape" else self.kind

    @property
    def words(self) -> tuple[str, ...]:
        """Its description, as in a caption: "red circle", "blue digit 7", "white word cat", "cyan dot"."""
        return (self.color, self.noun, self.name) if self.kind in ("digit", "word") else (self.color, self.noun)


@dataclass(frozen=True)
class Scene:
    """An image and what is on it; things in reading order."""

    image: Image.Image
    things: tuple[Thing, ...]

    @property
    def density(self) -> float:
        """Bits a cell."""
        values = {"shape": len(COLORS) * len(SHAPES), "dot": len(COLORS)}
        values |= {"digit": len(COLORS) * len(DIGITS), "word": len(COLORS) * len(WORDS)}
        return sum(math.log2(values[thing.kind]) for thing in self.things) / CELLS**2

    @property
    def shapes(self) -> list[Thing]:
        return [thing for thing in self.things if thing.kind == "shape"]

    def nameable(self, *kinds: str) -> list[Thing]:
        """Things of these kinds (default: of any) whose noun names nothing else in the scene."""
        nouns = [thing.noun for thing in self.things]
        return [t for t in self.things if nouns.count(t.noun) == 1 and (not kinds or t.kind in kinds)]


def load(split: Split = "test", limit: int | None = None, seed: int = 0, size: int = 96) -> list[Example]:
    """The benchmark: one question an image, tasks in turn, so that any prefix is balanced.

    `limit` defaults to 2,000 questions. Question i is the same whatever the limit.
    """
    return [example(split, seed, index, size) for index in range(2000 if limit is None else limit)]


def example(split: Split, seed: int, index: int, size: int = 96) -> Example:
    """Question `index`: the first scene of its own random stream on which its task can be asked without ambiguity."""
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(get_args(Split))}")
    task = TASKS[index % len(TASKS)]
    random = Random(f"scenes/{split}/{seed}/{index}")
    while True:
        found = draw(split, random, size)
        if asked := ask(found, task, random):
            return Example(f"{split}-{seed}-{index:05d}", task, found.image, *asked, found.density)


def training_scene(split: Split, seed: int, index: int, size: int = 96) -> tuple[Scene, list[tuple[str, str, str]]]:
    """A scene with many of the questions that it allows: (task, question, answer), without repeats."""
    random = Random(f"scenes/{split}/many/{seed}/{index}")
    scene = draw(split, random, size)
    asked = [(task, *qa) for task, times in _ASKED.items() for _ in range(times) if (qa := ask(scene, task, random))]
    return scene, list(dict.fromkeys(asked))


def caption(things: list[Thing] | tuple[Thing, ...]) -> str:
    """The things in reading order: "red circle, blue word cat, cyan dot"."""
    return ", ".join(" ".join(thing.words) for thing in things) or "nothing"


# ---------------------------------------------------------------- questions


def ask(scene: Scene, task: str, random: Random) -> tuple[str, str] | None:
    """A question of this task with its answer, or None where the scene allows no unambiguous one."""
    return _ASK[task](scene, random)


def _color(scene: Scene, random: Random) -> tuple[str, str] | None:
    if things := scene.nameable("shape", "digit", "word"):
        thing = random.choice(things)
        return f"what color is the {thing.noun}?", thing.color
    return None


def _small(scene: Scene, random: Random) -> tuple[str, str] | None:
    dots = scene.nameable("dot")
    return ("what color is the dot?", dots[0].color) if dots else None


def _shape(scene: Scene, random: Random) -> tuple[str, str] | None:
    colors = [thing.color for thing in scene.shapes]
    if things := [thing for thing in scene.shapes if colors.count(thing.color) == 1]:
        thing = random.choice(things)
        return f"which shape is {thing.color}?", thing.name
    return None


def _exist(scene: Scene, random: Random) -> tuple[str, str]:
    present = {(thing.color, thing.name) for thing in scene.shapes}
    if random.random() < 0.5:
        color, name = random.choice(sorted(present))
        return f"is there a {color} {name}?", "yes"
    # hard negatives first: a colour and a shape that are both there, but not together
    absent = [(c, n) for c in {c for c, _ in present} for n in {n for _, n in present} if (c, n) not in present]
    if not absent or random.random() < 0.25:
        absent = [(c, n) for c in COLORS for n in SHAPES if (c, n) not in present]
    color, name = random.choice(sorted(absent))
    return f"is there a {color} {name}?", "no"


def _count(scene: Scene, random: Random) -> tuple[str, str]:
    return "how many shapes are there?", COUNTS[len(scene.shapes)]


def _digit(scene: Scene, random: Random) -> tuple[str, str] | None:
    digits = scene.nameable("digit")
    return ("what digit is it?", digits[0].name) if digits else None


def _word(scene: Scene, random: Random) -> tuple[str, str] | None:
    words = scene.nameable("word")
    return ("what word is it?", words[0].name) if words else None


def _position(scene: Scene, random: Random) -> tuple[str, str] | None:
    width, height = scene.image.size
    axis = random.randrange(2)
    low, high, middle = (("left", "right", width / 2), ("top", "bottom", height / 2))[axis]
    things = [thing for thing in scene.nameable() if abs(thing.center[axis] - middle) >= CLEAR * width]
    if not things:
        return None
    thing = random.choice(things)
    return f"is the {thing.noun} on the {low} or {high}?", low if thing.center[axis] < middle else high


def _relation(scene: Scene, random: Random) -> tuple[str, str] | None:
    things = scene.nameable()
    gap = 2 * CLEAR * scene.image.width
    pairs = [(a, b) for a in things for b in things if abs(a.center[0] - b.center[0]) >= gap]
    if not pairs:
        return None
    one, other = random.choice(pairs)
    answer = "left" if one.center[0] < other.center[0] else "right"
    return f"is the {one.noun} left or right of the {other.noun}?", answer


_ASK = {
    "color": _color,
    "small": _small,
    "shape": _shape,
    "exist": _exist,
    "count": _count,
    "digit": _digit,
    "word": _word,
    "position": _position,
    "relation": _relation,
}


# ---------------------------------------------------------------- drawing


def draw(split: Split, random: Random, size: int = 96) -> Scene:
    """A new scene of `size` x `size` pixels."""
    image = _background(split, random, size)
    _clutter(image, random)
    kinds = ["word"] * (random.random() < 0.75) + ["digit"] * (random.random() < 0.75)
    kinds += ["shape"] * random.choice(list(COUNTS)) + ["dot"] * (random.random() < 0.75)
    free = {(x, y) for x in range(CELLS) for y in range(CELLS)}
    things = []
    for kind in kinds:
        cell = _place(kind, free, random)
        things.append(_put(kind, cell, image, split, random))
    things.sort(key=lambda thing: (thing.box[1] * CELLS // size, thing.box[0]))
    return Scene(image, tuple(things))


def _place(kind: str, free: set[tuple[int, int]], random: Random) -> tuple[int, int]:
    """The upper left of free cells for a thing of this kind; takes them out of `free`."""
    width, height = _FOOTPRINT[kind]
    while True:  # things cover at most 35 of 144 cells: there is always room
        x, y = random.randrange(CELLS - width + 1), random.randrange(CELLS - height + 1)
        cells = {(x + i, y + j) for i in range(width) for j in range(height)}
        if cells <= free:
            free -= cells
            return x, y


def _put(kind: str, cell: tuple[int, int], image: Image.Image, split: Split, random: Random) -> Thing:
    """Draw a thing of this kind somewhere within its cells."""
    unit = image.width / CELLS
    color = random.choice(list(COLORS))
    if kind == "shape":
        name = random.choice(SHAPES)
        mask = shape_mask(name, round(unit * random.choice((1.0, 1.125, 1.25, 1.375, 1.5))))
    elif kind == "dot":
        name, mask = "dot", shape_mask("circle", round(unit * random.choice((0.5, 0.625))))
    elif kind == "digit":
        pick = random.choice(digits(split))
        upright = pick[1].resize((round(unit * 1.75),) * 2, Image.Resampling.BICUBIC)
        name, mask = pick[0], upright.rotate(random.uniform(-12, 12), Image.Resampling.BILINEAR)
    else:
        name = random.choice(WORDS)
        mask = _word_mask(name, round(unit * 1.375))
    width, height = (round(cells * unit) for cells in _FOOTPRINT[kind])
    left = round(cell[0] * unit) + random.randint(0, max(0, width - mask.width))
    top = round(cell[1] * unit) + random.randint(0, max(0, height - mask.height))
    shade = tuple(max(0, min(255, level + random.randint(-12, 12))) for level in COLORS[color])
    image.paste(shade, (left, top), mask)
    return Thing(kind, name, color, (left, top, left + mask.width, top + mask.height))


def _background(split: Split, random: Random, size: int) -> Image.Image:
    """A dimmed square crop of a photograph, from the columns that belong to the split."""
    photo = crop(split, random, size, largest=96)
    contrast, black = random.uniform(0.15, 0.4), random.randint(0, 25)
    return photo.point(lambda level: round(level * contrast) + black)


def _clutter(image: Image.Image, random: Random) -> None:
    """Thin strokes in dim colours that no thing has."""
    canvas = ImageDraw.Draw(image)
    size = image.width
    for _ in range(random.randint(2, 6)):
        x, y = random.uniform(0, size), random.uniform(0, size)
        angle, length = random.uniform(0, 2 * math.pi), random.uniform(0.1, 0.35) * size
        end = (x + length * math.cos(angle), y + length * math.sin(angle))
        shade = tuple(random.randint(50, 120) for _ in range(3))
        canvas.line((x, y, *end), fill=shade, width=max(1, size // 96))


@cache
def _word_mask(word: str, size: int) -> Image.Image:
    """The word in Pillow's own typeface, cropped to its ink."""
    font = ImageFont.load_default(size=size)
    mask = Image.new("L", (4 * size, 3 * size))
    ImageDraw.Draw(mask).text((size, size), word, fill=255, font=font, stroke_width=size / 40)
    return mask.crop(mask.getbbox())
