"""What both procedural benchmarks are drawn from: scikit-learn's handwriting and photographs by split, and shapes."""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Literal

from PIL import Image, ImageDraw

Split = Literal["train", "val", "test"]

TENTHS: dict[Split, tuple[int, ...]] = {"train": (0, 1, 2, 3, 4, 5, 6), "val": (7,), "test": (8, 9)}
"""The tenths of all handwriting samples, and of all texts of pages, that belong to a split."""
COLUMNS: dict[Split, tuple[int, int]] = {"train": (0, 400), "val": (400, 500), "test": (500, 640)}
"""The columns of each photograph that belong to a split: from, up to."""


@cache
def digits(split: Split) -> list[tuple[str, Image.Image]]:
    """(digit, 8 x 8 mask) of the split's handwriting samples."""
    from sklearn.datasets import load_digits

    data = load_digits()
    mine = [i for i in range(len(data.target)) if i % 10 in TENTHS[split]]
    masks = (data.images * (255 / 16)).clip(0, 255).astype("uint8")
    return [(str(data.target[i]), Image.fromarray(masks[i])) for i in mine]


@cache
def photographs() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def crop(split: Split, random: Random, size: int, largest: int) -> Image.Image:
    """A square of a photograph, of up to `largest` pixels a side, at size x size; from the split's columns."""
    photo = random.choice(photographs())
    low, high = COLUMNS[split]
    side = random.randint(60, largest)
    left, top = random.randint(low, high - side), random.randint(0, photo.height - side)
    return photo.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


class Placed:
    """Something that stands in a box of a picture: (left, top, right, bottom) in pixels."""

    box: tuple[float, float, float, float]

    @property
    def center(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    def patches(self, patch: float, grid: int) -> list[int]:
        """Raster indices of the patches (of `patch` pixels, `grid` a side) that its box touches."""
        left, top, right, bottom = self.box
        rows = range(int(top // patch), int((bottom - 1) // patch) + 1)
        columns = range(int(left // patch), int((right - 1) // patch) + 1)
        return [row * grid + column for row in rows for column in columns]


@cache
def shape_mask(name: str, size: int) -> Image.Image:
    """The shape as a smooth mask of size x size pixels."""
    big = 8 * size
    mask = Image.new("L", (big, big))
    pen = ImageDraw.Draw(mask)
    last = big - 1
    if name in ("circle", "ring"):
        pen.ellipse((0, 0, last, last), fill=255)
        if name == "ring":
            pen.ellipse((0.27 * big, 0.27 * big, 0.73 * big, 0.73 * big), fill=0)
    elif name == "square":
        pen.rectangle((0.05 * big, 0.05 * big, 0.95 * big, 0.95 * big), fill=255)
    elif name == "triangle":
        pen.polygon([(last / 2, 0), (last, last), (0, last)], fill=255)
    elif name == "diamond":
        pen.polygon([(last / 2, 0), (last, last / 2), (last / 2, last), (0, last / 2)], fill=255)
    else:
        pen.rectangle((0.35 * big, 0, 0.65 * big, last), fill=255)
        pen.rectangle((0, 0.35 * big, last, 0.65 * big), fill=255)
    return mask.resize((size, size), Image.Resampling.BOX)
