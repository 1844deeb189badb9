"""pages: a procedural benchmark like scenes whose images carry information everywhere.

Documents, tables, receipts, charts, maps and fields of camouflaged shapes fill 120 x 120 pixels to the edge, on paper
with the grain of a photograph or on the photograph itself: at the model's 8-pixel patches no token is background that
costs nothing. A question needs one word, one cell, one bar, a comparison, a count. Three levels put more and more on a
page; `Example.density` says how much, in bits a patch, for pages and scenes alike.

Everything follows from (split, seed, index). Splits share neither seeds nor regions of photographs nor handwriting, and
what a page says belongs to one split alone. They do share words and typefaces.
"""

from __future__ import annotations

from random import Random
from typing import get_args

from PIL import Image

from vtc.eval.material import Split
from vtc.eval.pages.content import KINDS, LEVELS, SIDE, TASKS, WORDS, Fact, Page, ask, caption, kind_of, tasks_of, write
from vtc.eval.pages.drawing import draw
from vtc.eval.scenes import Example

__all__ = [
    "KINDS",
    "LEVELS",
    "SIDE",
    "TASKS",
    "WORDS",
    "Fact",
    "Page",
    "caption",
    "draw",
    "example",
    "load",
    "training_page",
    "write",
]

QUESTIONS = 6
"""How often training asks each task about a page; repeats are left out."""
TAUGHT = (*KINDS, "document", "table", "receipt")
"""Kinds of the training's pages in turn: counting, the most, and from a price to its item are learned last."""


def load(split: Split = "test", limit: int | None = None, seed: int = 0, size: int = SIDE) -> list[Example]:
    """The benchmark: one question an image, tasks in turn and then levels, so that any prefix is balanced.

    `limit` defaults to 2,000 questions. Question i is the same whatever the limit.
    """
    return [example(split, seed, index, size) for index in range(2000 if limit is None else limit)]


def example(split: Split, seed: int, index: int, size: int = SIDE) -> Example:
    """Question `index`, from its own random stream."""
    return _drawn(split, seed, index, size)[0]


def _drawn(split: Split, seed: int, index: int, size: int = SIDE) -> tuple[Example, Page]:
    """The question with the page as it was drawn."""
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(get_args(Split))}")
    task, level = TASKS[index % len(TASKS)], LEVELS[index // len(TASKS) % len(LEVELS)]
    random = Random(f"pages/{split}/{seed}/{index}")
    page = write(split, kind_of(task), level, random)
    asked = ask(page, task, random)
    image, page = draw(page, split, random, size)
    return Example(f"{split}-{seed}-{index:05d}", task, image, *asked, page.density), page


def training_page(
    split: Split, seed: int, index: int, size: int = SIDE
) -> tuple[Image.Image, Page, list[tuple[str, str, str]]]:
    """A page, as drawn, with many of the questions that it allows: (task, question, answer), without repeats."""
    random = Random(f"pages/{split}/many/{seed}/{index}")
    kind, level = TAUGHT[index % len(TAUGHT)], random.choice(LEVELS)
    page = write(split, kind, level, random)
    asked = [(task, *ask(page, task, random)) for task in tasks_of(kind) for _ in range(QUESTIONS)]
    return *draw(page, split, random, size), list(dict.fromkeys(asked))
