"""Scenes of the benchmark as examples: files that carry their number in their name, so that the answer is known."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from random import randrange
from tempfile import TemporaryDirectory

from PIL import Image

from vtc.eval import scenes
from vtc.eval.scenes import Example

SHOWN = (0, 5, 7, 8, 10)
"""Questions of the test split that the page offers."""
SCENES = 2000
"""Questions that a new scene is drawn from."""


@cache
def _folder() -> TemporaryDirectory:
    """Removed when the server ends."""
    return TemporaryDirectory(prefix="vtc-scenes-")


def scene(number: int | None = None) -> tuple[str, str]:
    """A file with an image of the test split, any where `number` is None, and its question."""
    example = scenes.example("test", 0, randrange(SCENES) if number is None else number)
    path = Path(_folder().name, f"scene-{example.question_id}.png")
    if not path.exists():
        example.image.save(path)
    return str(path), example.question


def number(name: str) -> int | None:
    """The number that the name of a scene's file holds; None for any other."""
    found = re.fullmatch(r"(?:scene-)?test-0-(\d{5})(?:\.png)?", name)
    return int(found[1]) if found and int(found[1]) < SCENES else None


def known(name: str, image: Image.Image) -> Example | None:
    """The benchmark's question to this image, where the name says which it is and the pixels are the same."""
    if (index := number(name)) is None:
        return None
    example = scenes.example("test", 0, index)
    return example if example.image.tobytes() == image.tobytes() else None
