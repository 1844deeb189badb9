"""Training batches: images with labels for the tower, questions packed behind one image for the decoder."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vtc.eval import benchmarks as known
from vtc.eval import pages, scenes
from vtc.eval.pages import Fact
from vtc.eval.reference.model import ASSISTANT, BOS, EOS, SYSTEM, USER, Preset, shared_tokenizer
from vtc.eval.scenes import Thing

QUESTIONS = 12
"""Packed behind an image, beside its caption."""
WORDS_A_PATCH = 16
"""A patch that two things touch is named by both."""


@dataclass
class Batch:
    """pixels (batch, 3, size, size) uint8; patch_words (batch, patches, WORDS_A_PATCH) token ids, -1 for none; present
    (batch, len(labels(...))) float, the kinds of thing that the image shows."""

    pixels: Tensor
    patch_words: Tensor
    present: Tensor
    samples: list[Sample]

    def part(self, number: int, of: int) -> Batch:
        """Consecutive images: benchmarks come in turn, so that each part has some of each."""
        images = slice(len(self.samples) * number // of, len(self.samples) * (number + 1) // of)
        return Batch(**{name: value[images] for name, value in vars(self).items()})


@dataclass
class Sample:
    """An image of a benchmark at its own size, what is on it in reading order, and (task, question, answer)s."""

    benchmark: str
    image: Image.Image
    things: tuple[Thing | Fact, ...]
    asked: list[tuple[str, str, str]]

    def touched(self, thing: Thing | Fact, grid: int) -> list[int]:
        """Raster indices of the patches that a thing touches, of `grid` x `grid` over the image."""
        return thing.patches(self.image.width / grid, grid)

    def caption(self, kept: set[int], grid: int) -> str:
        """The things that these patches touch."""
        seen = [thing for thing in self.things if kept.intersection(self.touched(thing, grid))]
        return known.find(self.benchmark).caption(seen)


@cache
def encode(text: str, benchmarks: tuple[str, ...] = ("scenes",)) -> tuple[int, ...]:
    return tuple(shared_tokenizer(benchmarks).encode(text, add_special_tokens=False))


@cache
def head(benchmarks: tuple[str, ...] = ("scenes",)) -> tuple[int, ...]:
    """What the chat template puts ahead of the image."""
    return encode(BOS + SYSTEM + USER, benchmarks)


@cache
def labels(benchmarks: tuple[str, ...] = ("scenes",)) -> dict[tuple[str, ...], int]:
    """Everything that the CLS token has to name: the last two of a thing's words."""
    names = [(color, shape) for color in scenes.COLORS for shape in scenes.SHAPES]
    names += [(color, "dot") for color in scenes.COLORS]
    names += [("digit", digit) for digit in scenes.DIGITS] + [("word", word) for word in scenes.WORDS]
    if "pages" in benchmarks:
        names += [("word", word) for word in pages.WORDS] + [("bar", color) for color in scenes.COLORS]
        names += [(kind, shape) for kind in ("shape", "place") for shape in scenes.SHAPES]
    return {name: index for index, name in enumerate(dict.fromkeys(names))}


def make_batch(split: scenes.Split, seed: int, start: int, count: int, preset: Preset) -> Batch:
    """Images start .. start + count of the split; of several benchmarks in turn."""
    samples = [_sample(split, seed, *preset.image(number)) for number in range(start, start + count)]
    return Batch(
        pixels=torch.stack([to_pixels(sample.image, preset.size) for sample in samples]),
        patch_words=torch.stack([_patch_words(sample, preset) for sample in samples]),
        present=torch.stack([_present(sample, preset) for sample in samples]),
        samples=samples,
    )


def _sample(split: scenes.Split, seed: int, benchmark: str, index: int) -> Sample:
    if benchmark == "pages":
        image, page, asked = pages.training_page(split, seed, index)
        return Sample(benchmark, image, page.facts, asked)
    scene, asked = scenes.training_scene(split, seed, index)
    return Sample(benchmark, scene.image, scene.things, asked)


def to_pixels(image: Image.Image, size: int | None = None) -> Tensor:
    """(3, height, width) uint8; with `size`, squeezed to size x size as the model's processor does it."""
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _patch_words(sample: Sample, preset: Preset) -> Tensor:
    """What touches a patch, its letters there, and the halves of the image that it is in; or the word "nothing"."""
    named: dict[int, list[int]] = defaultdict(list)
    for thing in sample.things:
        x, y = (2 * c < sample.image.width for c in thing.center)
        words = (*thing.words, "left" if x else "right", "top" if y else "bottom")
        ids = [encode(f" {word}", preset.benchmarks)[0] for word in words]
        for patch in sample.touched(thing, preset.grid):
            named[patch] += ids + _letters(sample, thing, patch, preset)
    nothing = encode(" nothing", preset.benchmarks)
    found = (dict.fromkeys(named.get(patch, nothing)) for patch in range(preset.grid**2))
    return torch.tensor([([*ids] + [-1] * WORDS_A_PATCH)[:WORDS_A_PATCH] for ids in found])


def _letters(sample: Sample, thing: Thing | Fact, patch: int, preset: Preset) -> list[int]:
    """Which letters of a word on a page stand on a patch: small ones are read much sooner when they are asked for."""
    if not isinstance(thing, Fact) or thing.kind != "word":
        return []
    side, (left, top, right, bottom) = sample.image.width / preset.grid, thing.box
    x, y = patch % preset.grid * side - left, patch // preset.grid * side
    if min(bottom, y + side) - max(top, y) < side / 3:
        return []
    letter = (right - left) / len(thing.name)
    seen = thing.name[max(0, math.floor(x / letter)) : math.ceil((x + side) / letter)]
    return [encode(each, preset.benchmarks)[0] for each in seen]


def _present(sample: Sample, preset: Preset) -> Tensor:
    names = labels(preset.benchmarks)
    target = torch.zeros(len(names))
    for thing in sample.things:
        target[names[thing.words[-2:]]] = 1
    return target


class _Steps(Dataset):
    def __init__(self, preset: Preset, seed: int, first: int, last: int):
        self.preset, self.seed, self.first, self.last = preset, seed, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> Batch:
        return make_batch("train", self.seed, *self.preset.span(self.first + index), self.preset)


def batches(preset: Preset, seed: int, first: int, last: int, workers: int = 1) -> Iterator[Batch]:
    """The batches of steps first .. last: the same whether or not the training was interrupted before them."""
    steps = _Steps(preset, seed, first, last)
    yield from DataLoader(steps, batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None)


# ---------------------------------------------------------------- text behind an image


@dataclass
class Pack:
    """Blocks of text side by side behind one image: all (batch, length). A block sees the image and itself, and its
    positions start anew behind the image, so that training sees each question just as a prompt shows it.

    head (batch, n): what stands ahead of the image. block: 1, 2, ... per question, -1 where padded. offset: position
    behind the image. target: the token to predict, or -1. caption: whether that token belongs to a caption."""

    head: Tensor
    ids: Tensor
    block: Tensor
    offset: Tensor
    target: Tensor
    caption: Tensor


def pack(rows: Sequence[Sequence[tuple[str, str]]], benchmarks: tuple[str, ...] = ("scenes",)) -> Pack:
    """Pack (question, answer) pairs a row, in the words of a model of these benchmarks."""
    flat = [[_block(index + 1, *pair, benchmarks) for index, pair in enumerate(row)] for row in rows]
    columns = [[sum(parts, ()) for parts in zip(*row, strict=True)] for row in flat]
    length = max(len(row[0]) for row in columns)
    length = -(-length // 16) * 16

    def stack(column: int, fill: int) -> Tensor:
        return torch.tensor([[*row[column], *[fill] * (length - len(row[0]))] for row in columns])

    opening = torch.tensor(head(benchmarks)).expand(len(rows), -1)
    return Pack(opening, stack(0, 0), stack(1, -1), stack(2, 0), stack(3, -1), stack(4, 0).bool())


def _block(index: int, question: str, answer: str, benchmarks: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    ask = encode(question, benchmarks) + encode(ASSISTANT, benchmarks)
    reply = encode(f" {answer}", benchmarks) + encode(EOS, benchmarks)
    ids = ask + reply[:-1]
    target = (-1,) * (len(ask) - 1) + reply
    is_caption = (int(question == scenes.CAPTION),) * len(ids)
    return ids, (index,) * len(ids), tuple(range(len(ids))), target, is_caption
