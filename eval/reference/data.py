"""Training batches: scenes with labels for the tower, questions packed behind one image for the decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vtc.eval import scenes
from vtc.eval.reference.model import ASSISTANT, BOS, EOS, SYSTEM, USER, Preset, shared_tokenizer
from vtc.eval.scenes import Thing

QUESTIONS = 12
"""Packed behind an image, beside its caption."""
WORDS_A_PATCH = 8
"""A patch that two things touch is named by both."""


@dataclass
class Batch:
    """pixels (batch, 3, size, size) uint8; patch_words (batch, patches, WORDS_A_PATCH) token ids, -1 for none; present
    (batch, len(labels())) float, the kinds of thing that the image shows."""

    pixels: Tensor
    patch_words: Tensor
    present: Tensor
    things: list[tuple[Thing, ...]]
    asked: list[list[tuple[str, str, str]]]


@cache
def encode(text: str) -> tuple[int, ...]:
    return tuple(shared_tokenizer().encode(text, add_special_tokens=False))


@cache
def head() -> tuple[int, ...]:
    """What the chat template puts ahead of the image."""
    return encode(BOS + SYSTEM + USER)


@cache
def labels() -> dict[tuple[str, ...], int]:
    """Everything that the CLS token has to name, as in Thing.words without the colour of digits and words."""
    names = [(color, shape) for color in scenes.COLORS for shape in scenes.SHAPES]
    names += [(color, "dot") for color in scenes.COLORS]
    names += [("digit", digit) for digit in scenes.DIGITS] + [("word", word) for word in scenes.WORDS]
    return {name: index for index, name in enumerate(names)}


def make_batch(split: scenes.Split, seed: int, start: int, count: int, preset: Preset) -> Batch:
    """Scenes start .. start + count of the split."""
    made = [scenes.training_scene(split, seed, start + i, preset.size) for i in range(count)]
    return Batch(
        pixels=torch.stack([to_pixels(scene.image) for scene, _ in made]),
        patch_words=torch.stack([_patch_words(scene.things, preset) for scene, _ in made]),
        present=torch.stack([_present(scene.things) for scene, _ in made]),
        things=[scene.things for scene, _ in made],
        asked=[asked for _, asked in made],
    )


def to_pixels(image: scenes.Image.Image) -> Tensor:
    """(3, height, width) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _patch_words(things: tuple[Thing, ...], preset: Preset) -> Tensor:
    """The description of whatever touches a patch and the halves of the image it is in, or the word "nothing"."""
    named: list[list[int]] = [[] for _ in range(preset.grid**2)]
    for thing in things:
        x, y = (2 * c < preset.size for c in thing.center)
        ids = [encode(f" {word}")[0] for word in (*thing.words, "left" if x else "right", "top" if y else "bottom")]
        for patch in thing.patches(preset.patch, preset.grid):
            named[patch] += ids
    words = torch.full((len(named), WORDS_A_PATCH), -1)
    for patch, ids in enumerate(named):
        ids = list(dict.fromkeys(ids or encode(" nothing")))[:WORDS_A_PATCH]
        words[patch, : len(ids)] = torch.tensor(ids)
    return words


def _present(things: tuple[Thing, ...]) -> Tensor:
    target = torch.zeros(len(labels()))
    for thing in things:
        target[labels()[thing.words[-2:]]] = 1
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

    block: 1, 2, ... per question, -1 where padded. offset: position behind the image. target: the token to predict, or
    -1. caption: whether that token belongs to a caption."""

    ids: Tensor
    block: Tensor
    offset: Tensor
    target: Tensor
    caption: Tensor


def pack(rows: Sequence[Sequence[tuple[str, str]]]) -> Pack:
    """Pack (question, answer) pairs a row."""
    flat = [[_block(index + 1, *pair) for index, pair in enumerate(row)] for row in rows]
    columns = [[sum(parts, ()) for parts in zip(*row, strict=True)] for row in flat]
    length = max(len(row[0]) for row in columns)
    length = -(-length // 16) * 16

    def stack(column: int, fill: int) -> Tensor:
        return torch.tensor([[*row[column], *[fill] * (length - len(row[0]))] for row in columns])

    return Pack(stack(0, 0), stack(1, -1), stack(2, 0), stack(3, -1), stack(4, 0).bool())


def _block(index: int, question: str, answer: str) -> tuple[tuple[int, ...], ...]:
    ask = encode(question) + encode(ASSISTANT)
    reply = encode(f" {answer}") + encode(EOS)
    ids = ask + reply[:-1]
    target = (-1,) * (len(ask) - 1) + reply
    is_caption = (int(question == scenes.CAPTION),) * len(ids)
    return ids, (index,) * len(ids), tuple(range(len(ids))), target, is_caption
