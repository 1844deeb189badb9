"""Which tokens stay: pure functions from importances to a `Selection`.

Shapes: `scores` (images, tokens) float32; `seen.valid` (images, tokens) bool, False where an image has fewer tokens
than the widest one; `keep` (images,) int64, the number that stays of each image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from vtc.observe import Part, Seen


@dataclass(frozen=True)
class Selection:
    """Which tokens stay, and what becomes of the others."""

    keep: Tensor
    """(images, tokens) bool."""
    into: Tensor | None = None
    """(images, tokens) int64, a source map (see `merge`): None where all the others are dropped."""
    gate: Tensor | None = None
    """(images, tokens) in (0, 1), in training: nothing leaves, and log(gate) biases the tokens as keys from here on."""


def top_k(scores: Tensor, seen: Seen, keep: Tensor) -> Selection:
    """The `keep` highest scores of each image; among equals the earlier token wins."""
    order = scores.masked_fill(~seen.valid, -math.inf).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return Selection((rank < keep[:, None]) & seen.valid)


def grid(scores: Tensor, seen: Seen, keep: Tensor) -> Selection:
    """`keep` tokens evenly spaced over each image's grids, each by its size; the scores are not looked at.

    Of an image that is partly hidden, the tokens that can be seen are taken as one line.
    """
    picked = torch.zeros_like(seen.valid)
    for image, (parts, count) in enumerate(zip(seen.parts, keep.tolist(), strict=True)):
        if (shown := seen.valid[image].nonzero()[:, 0].tolist()) != list(range(sum(h * w for h, w in parts))):
            picked[image, [shown[cell] for cell in evenly_spaced(1, len(shown), count)]] = True
            continue
        for (height, width), (start, _, share) in zip(parts, shares(parts, count), strict=True):
            picked[image, [start + cell for cell in evenly_spaced(height, width, share)]] = True
    return Selection(picked)


def top_k_each(scores: Tensor, seen: Seen, keep: Tensor) -> Selection:
    """The highest scores of each grid of an image: tiles and frames share the image's `keep` by their sizes.

    At the encoder site only, where all tokens are there yet. What is hidden is no part of a grid's size.
    """
    picked = torch.zeros_like(seen.valid)
    scores = scores.masked_fill(~seen.valid, -math.inf)
    for image, (parts, count) in enumerate(zip(seen.parts, keep.tolist(), strict=True)):
        ends = list(accumulate((height * width for height, width in parts), initial=0))
        shown = [(int(seen.valid[image, start:end].sum()), 1) for start, end in pairwise(ends)]
        for (start, end), (_, _, share) in zip(pairwise(ends), shares(shown, count), strict=True):
            best = scores[image, start:end].argsort(descending=True, stable=True)[:share]
            picked[image, start + best] = True
    return Selection(picked)


def shares(parts: Sequence[Part], count: int) -> list[tuple[int, int, int]]:
    """Where each grid starts and ends among an image's tokens, and how many of `count` are its own, by its size."""
    ends = list(accumulate((height * width for height, width in parts), initial=0))
    filled = [count * end // max(ends[-1], 1) for end in ends]
    return [(*span, after - before) for span, (before, after) in zip(pairwise(ends), pairwise(filled), strict=True)]


def evenly_spaced(height: int, width: int, count: int) -> list[int]:
    """Raster indices of `count` cells of a height x width grid: evenly spaced rows, each with evenly spaced cells."""
    if count == 0:
        return []
    rows = min(height, max(math.ceil(count / width), round(math.sqrt(count * height / width))))
    ends = [count * row // rows for row in range(rows + 1)]
    cells = []
    for row, (start, end) in enumerate(pairwise(ends)):
        y = (2 * row + 1) * height // (2 * rows)
        cells += [y * width + (2 * cell + 1) * width // (2 * (end - start)) for cell in range(end - start)]
    return cells
