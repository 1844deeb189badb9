"""What becomes of the tokens that do not stay: recycled into others, always with a source map.

A source map `into` (images, tokens) int64 names for each token the one that took it in: itself where it stays, -1 where
it is dropped. Weights are the importances, (images, tokens) float32.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from vtc.choice import Seen, Selection
from vtc.grids import Grid
from vtc.select import top_k


def absorb(features: Tensor, into: Tensor, weights: Tensor) -> Tensor:
    """Features (images, tokens, width), those that took others in replaced by the weighted mean of them and themselves.

    Tokens that took in none come back bit for bit.
    """
    target = into.clamp(min=0)
    mass = torch.where(into >= 0, weights.float().clamp(min=1e-8), 0.0)
    total = torch.zeros_like(mass).scatter_add(1, target, mass)
    wide = target[..., None].expand_as(features)
    summed = torch.zeros_like(features, dtype=torch.float32).scatter_add(1, wide, features.float() * mass[..., None])
    taken = torch.zeros_like(target).scatter_add(1, target, (into >= 0).long())
    mean = (summed / total.clamp(min=1e-8)[..., None]).to(features.dtype)
    return torch.where((taken > 1)[..., None], mean, features)


def recycle(scores: Tensor, seen: Seen, keep: Tensor, cell: float) -> Selection:
    """VFlowOpt's recycling (arXiv 2508.05211, Eq. 6-7): the best stay, the others become one token a grid cell.

    `cell` is the side of a cell as a part of the grid's. The token of a cell sits where its most important member was.
    Only for a site where no token has left yet, so that the grid is whole.
    """
    cells = torch.stack([_cells(tuple(parts), cell, scores.shape[1]) for parts in seen.parts]).to(scores.device)
    number = int(cells.max()) + 1
    best = top_k(scores, seen, (keep - cells.amax(1) - 1).clamp(min=0)).keep
    group = torch.where(seen.valid & ~best, cells, number)  # the last group takes all that is not recycled
    floor = scores.new_full((len(scores), number + 1), -math.inf)
    highest = floor.scatter_reduce(1, group, scores, "amax").gather(1, group)
    first = (scores == highest) & (group < number)
    place = torch.arange(scores.shape[1], device=scores.device).expand_as(group)
    leader = torch.full_like(floor, scores.shape[1], dtype=torch.long)
    leader = leader.scatter_reduce(1, group, torch.where(first, place, scores.shape[1]), "amin").gather(1, group)
    leads = (leader == place) & (group < number)
    stays = top_k(torch.where(best | leads, scores + scores.abs().max() * 2 + 1, scores), seen, keep).keep
    led = (group < number) & ~stays & stays.gather(1, leader.clamp(max=scores.shape[1] - 1))
    return Selection(stays, torch.where(stays, place, torch.where(led, leader, -1)))


@lru_cache(maxsize=64)
def _cells(parts: tuple[Grid, ...], cell: float, length: int) -> Tensor:
    """The cell of each token, counted on from grid to grid, padded to `length`."""
    columns = math.ceil(1 / cell)
    cells = []
    for number, (height, width) in enumerate(parts):
        row = (torch.arange(height) / (cell * height)).floor().long()
        column = (torch.arange(width) / (cell * width)).floor().long()
        cells.append((row[:, None] * columns + column).flatten() + number * columns**2)
    cells = torch.cat(cells).unique(return_inverse=True)[1]  # cells without a token do not count
    return torch.nn.functional.pad(cells, (0, length - len(cells)))
