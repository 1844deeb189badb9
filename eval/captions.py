"""captions: list the things of a scene, so that an answer is 20 and more tokens long.

The scenes of `scenes` that hold enough, and the words that the reference model was trained to list them in. A question
is worth the F1 of its list: of the things that are named and the things that are there, both with their colours, twice
as many as match over as many as both lists hold. So leaving a thing out costs, and so does one that is not there.
"""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import get_args

from vtc.eval.marking import normalise
from vtc.eval.material import Split
from vtc.eval.scenes import CAPTION, Example, caption, draw

TASKS = ("caption",)
MEASURE = "F1 of the things named"
LONGEST = 48
"""Tokens of an answer, where nothing else is asked for."""
WORDS = 20
"""Words and commas that a caption has at least; each is a token of the reference model."""


class Caption(Example):
    def correct(self, prediction: str) -> float:
        return f1(prediction, self.answer)


def load(split: Split = "test", limit: int | None = None, seed: int = 0, size: int = 96) -> list[Caption]:
    """The benchmark: one image each. `limit` defaults to 500; image i is the same whatever the limit."""
    return [example(split, seed, index, size) for index in range(500 if limit is None else limit)]


def example(split: Split, seed: int, index: int, size: int = 96) -> Caption:
    """Image `index`: the first scene of its own random stream whose caption is long enough."""
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(get_args(Split))}")
    random = Random(f"captions/{split}/{seed}/{index}")
    while True:
        scene = draw(split, random, size)
        if sum(len(thing.words) for thing in scene.things) + len(scene.things) - 1 >= WORDS:
            answer = caption(scene.things)
            return Caption(f"{split}-{seed}-{index:05d}", TASKS[0], scene.image, CAPTION, answer, scene.density)


def f1(prediction: str, answer: str) -> float:
    """Of the things in two lists "red circle, blue digit 7, ...", in any order; 1 where both name the same."""
    said, there = (
        Counter(normalise(thing) for thing in text.split(",") if thing.strip()) for text in (prediction, answer)
    )
    return 2 * (said & there).total() / max(1, said.total() + there.total())
