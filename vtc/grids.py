"""The grids that visual tokens form: where each token is, which cells are evenly spaced, how a number is shared out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

Grid = tuple[int, int]
"""(height, width) of a grid of visual tokens: a whole image, a tile, or a frame."""


def cells(grids: Sequence[Grid]) -> int:
    """How many tokens `grids` have."""
    return sum(height * width for height, width in grids)


@lru_cache(maxsize=256)
def places(grids: tuple[Grid, ...]) -> Tensor:
    """Which of `grids` each token is in, in token order, and its row and column there: (3, tokens) int64."""
    axes = [[torch.tensor([number]), *map(torch.arange, grid)] for number, grid in enumerate(grids)]
    return torch.cat([torch.cartesian_prod(*three) for three in axes]).T


@lru_cache(maxsize=256)
def squares(grids: tuple[Grid, ...], side: float) -> Tensor:
    """The square of `side` cells, or as a float of that part of its grid's sides, that each token is in: (1, tokens)
    int64. Squares are counted on from grid to grid, and none is empty."""
    sides = [(1, side, side) if isinstance(side, int) else (1, side * high, side * wide) for high, wide in grids]
    found = places(grids)
    square = (found / torch.tensor(sides).T[:, found[0]]).floor()
    return square.unique(dim=1, return_inverse=True)[1][None]


def shares(grids: Sequence[Grid], count: int) -> list[tuple[int, int, int]]:
    """Where each grid starts and ends among an image's tokens, and how many of `count` are its own, by its size."""
    ends = list(accumulate((height * width for height, width in grids), initial=0))
    filled = [count * end // max(ends[-1], 1) for end in ends]
    return [(*range_, after - before) for range_, (before, after) in zip(pairwise(ends), pairwise(filled), strict=True)]


def evenly_spaced(height: int, width: int, count: int) -> list[int]:
    """Raster indices of `count` cells of a height x width grid: evenly spaced rows, each with evenly spaced cells."""
    if count == 0:
        return []
    rows = min(height, max(math.ceil(count / width), round(math.sqrt(count * height / width))))
    ends = [count * row // rows for row in range(rows + 1)]
    found = []
    for row, (start, end) in enumerate(pairwise(ends)):
        y = (2 * row + 1) * height // (2 * rows)
        found += [y * width + (2 * cell + 1) * width // (2 * (end - start)) for cell in range(end - start)]
    return found
