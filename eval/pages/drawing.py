"""How a page looks: paper, typefaces, handwriting, bars, markers, and shapes in the tints of what is behind them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vtc.eval.material import Split, crop, digits, shape_mask
from vtc.eval.pages.content import SIDE, Fact, Page
from vtc.eval.scenes import COLORS

FONTS = ("DejaVuSansMono", "DejaVuSansMono-Bold")
"""Typefaces that matplotlib ships, whose letters are all equally wide."""
SIZES = (12, 10, 8, 6)
"""Of text, in pixels of a page of SIDE x SIDE."""
GRID = (4, 2)
"""What is written begins at multiples of so many such pixels across and down, as on a typewriter."""
_OPEN = ("map", "camouflage")
"""Kinds of page that lie on a photograph; the others lie on paper with a photograph's grain."""


@dataclass(frozen=True)
class _Style:
    """What a page has throughout. `scale`: pixels of one of SIDE; `ink`: (red, green, blue) of text."""

    scale: float
    font: ImageFont.FreeTypeFont
    ink: tuple[int, int, int]
    by_hand: bool


def draw(page: Page, split: Split, random: Random, size: int = SIDE) -> tuple[Image.Image, Page]:
    """The page on `size` x `size` pixels, and the page with each fact's box where its ink is."""
    dark = random.random() < 0.3
    image = _open_ground(split, random, size) if page.kind in _OPEN else _paper(split, random, size, dark)
    ink = tuple(random.randint(205, 255) if dark else random.randint(0, 50) for _ in range(3))
    style = _Style(size / SIDE, _typeface(page, random.choice(FONTS), size / SIDE), ink, random.random() < 0.4)
    if page.kind not in _OPEN:
        _rules(page, image, random, dark)
    elif page.kind == "map":
        _roads(image, random)
    inked = tuple(replace(fact, box=_put(fact, page.kind, image, split, style, random)) for fact in page.facts)
    return image, replace(page, facts=inked)


# ---------------------------------------------------------------- ground


def _photo(split: Split, random: Random, size: int) -> Image.Image:
    photo = crop(split, random, size, largest=100)
    return ImageOps.autocontrast(photo, preserve_tone=True)  # a dark corner of a photograph has a grain, too


def _paper(split: Split, random: Random, size: int, dark: bool) -> Image.Image:
    contrast, black = random.uniform(0.1, 0.3), random.randint(0, 20) if dark else random.randint(150, 178)
    photo = np.asarray(_photo(split, random, size)) * contrast + black
    # where the photograph has no grain
    grain = np.random.default_rng(random.getrandbits(32)).normal(0, 2.5, (size, size, 1))
    return Image.fromarray((photo + grain).round().clip(0, 255).astype(np.uint8))


def _open_ground(split: Split, random: Random, size: int) -> Image.Image:
    contrast, black = random.uniform(0.6, 0.8), random.randint(10, 50)
    return _photo(split, random, size).point(lambda level: round(level * contrast) + black)


def _rules(page: Page, image: Image.Image, random: Random, dark: bool) -> None:
    """Stripes or lines between rows, over the whole width."""
    tops = sorted({fact.box[1] for fact in page.facts})
    scale, height = image.width / SIDE, tops[1] - tops[0]
    look = random.choice(("stripes", "lines", "grain"))
    tint = 255 if dark else 0
    veil = Image.new("L", image.size)
    pen = ImageDraw.Draw(veil)
    for index, top in enumerate(tops):
        if look == "stripes" and index % 2:
            pen.rectangle((0, top * scale, image.width, (top + height) * scale - 1), fill=26)
        elif look == "lines":
            pen.line((0, top * scale, image.width, top * scale), fill=110, width=max(1, round(scale)))
    image.paste((tint,) * 3, mask=veil)


def _roads(image: Image.Image, random: Random) -> None:
    pen = ImageDraw.Draw(image)
    size = image.width
    for _ in range(random.randint(3, 6)):
        ends = [(random.uniform(0, size), 0), (random.uniform(0, size), size)]
        if random.random() < 0.5:
            ends = [(y, x) for x, y in ends]
        middle = (random.uniform(0, size), random.uniform(0, size))
        shade = tuple(random.randint(60, 200) for _ in range(3))
        pen.line((ends[0], middle, ends[1]), fill=shade, width=max(1, round(random.uniform(1, 2.5) * size / SIDE)))


# ---------------------------------------------------------------- facts


def _put(fact: Fact, kind: str, image: Image.Image, split: Split, style: _Style, random: Random) -> tuple[int, ...]:
    """Draw the fact in its slot; returns where its ink is, in pixels."""
    slot = tuple(edge * style.scale for edge in fact.box)
    if fact.kind == "bar":
        return _put_bar(fact, image, slot, style, random)
    if fact.kind in ("shape", "place"):
        return _put_shape(fact, image, slot, style, random)
    if fact.kind == "digit" and style.by_hand:
        mask = _handwritten(fact.name, split, round(style.font.size), random)
        left, top = _within(slot, mask.size, style.scale, random)
    else:
        mask, rise = _text(fact.name, style.font)
        left, top = _within(slot, (mask.width, round(style.font.size)), style.scale, random)
        top += rise
    if kind == "map":  # a name on a photograph needs a plate to be read
        plate = tuple(255 - level for level in style.ink)
        edge = round(style.scale)
        ground = Image.new("RGB", (mask.width + 2 * edge, mask.height + 2 * edge), plate)
        image.paste(ground, (left - edge, top - edge), Image.new("L", ground.size, 190))
    image.paste(style.ink, (left, top), mask)
    return left, top, left + mask.width, top + mask.height


def _within(slot: tuple[float, ...], size: tuple[int, int], scale: float, random: Random) -> tuple[int, int]:
    """A place for something of this (width, height) in the slot: anywhere across, near the middle in height."""
    left, top, right, bottom = slot
    width, height = size
    across, down = (step * scale for step in GRID)
    first, last = math.ceil(left / across), math.floor((right - width) / across)
    places = 1 + min(max(0, last - first), 2)
    column = first + int(places * random.random())  # one draw at any scale: a page is the same at all of them
    return round(column * across), round(round((top + bottom - height) / 2 / down) * down)


def _put_bar(fact: Fact, image: Image.Image, slot: tuple[float, ...], style: _Style, random: Random) -> tuple[int, ...]:
    left, top, right, bottom = (round(edge) for edge in slot)
    gap = max(1, round(0.12 * (bottom - top)))
    top, bottom = top + gap, bottom - gap
    shade = _near(COLORS[fact.name], 12, random)
    pen = ImageDraw.Draw(image)
    pen.rectangle((left, top, right - 1, bottom - 1), fill=shade, outline=style.ink)
    return left, top, right, bottom


def _put_shape(
    fact: Fact, image: Image.Image, slot: tuple[float, ...], style: _Style, random: Random
) -> tuple[int, ...]:
    side = round(style.scale * (9 if fact.kind == "place" else random.choice((10, 11, 12))))
    mask = shape_mask(fact.name, side)
    left = round((slot[0] + slot[2] - side) / 2)
    top = round((slot[1] + slot[3] - side) / 2)
    if fact.kind == "place":
        shade = _near(COLORS[fact.of[0]], 12, random)
        image.paste((0, 0, 0), (left - 1, top - 1), shape_mask(fact.name, side + 2))
    else:  # the tint of the ground under it, a little lighter or darker
        ground = image.crop((left, top, left + side, top + side)).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
        step = random.randint(38, 55) * (1 if sum(ground) < 3 * 128 else -1)
        shade = tuple(max(0, min(255, level + step)) for level in ground)
    image.paste(shade, (left, top), mask)
    return left, top, left + side, top + side


def _near(color: tuple[int, int, int], spread: int, random: Random) -> tuple[int, ...]:
    return tuple(max(0, min(255, level + random.randint(-spread, spread))) for level in color)


def _handwritten(digit: str, split: Split, side: int, random: Random) -> Image.Image:
    mask = random.choice([mask for name, mask in digits(split) if name == digit])
    return mask.resize((side, side), Image.Resampling.BICUBIC)


def _typeface(page: Page, name: str, scale: float) -> ImageFont.FreeTypeFont:
    """The typeface as large as every text of the page fits its slot, which is judged at SIDE x SIDE."""
    texts = [fact for fact in page.facts if fact.kind in ("word", "digit")]
    fitting = (size for size in SIZES if all(_fits(fact, _face(name, size)) for fact in texts))
    return _face(name, next(fitting, SIZES[-1]) * scale)


def _fits(fact: Fact, font: ImageFont.FreeTypeFont) -> bool:
    left, top, right, bottom = fact.box
    width, height = _text(fact.name, font)[0].size
    return width <= right - left - 2 and height <= bottom - top - 1


@cache
def _text(text: str, font: ImageFont.FreeTypeFont) -> tuple[Image.Image, int]:
    """The text as a mask cropped to its ink, and how far below the line's top that begins."""
    left, _, right, bottom = (round(edge) for edge in font.getbbox(text))
    mask = Image.new("L", (right - left + 2, bottom + 2))
    ImageDraw.Draw(mask).text((1 - left, 0), text, fill=255, font=font)
    ink = mask.getbbox()
    return mask.crop(ink), ink[1]


@cache
def _face(name: str, size: float) -> ImageFont.FreeTypeFont:
    try:
        import matplotlib
    except ImportError:
        from vtc.install import install_line

        raise ModuleNotFoundError(f"pages need matplotlib's fonts: {install_line('eval')}", name="matplotlib") from None
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)
