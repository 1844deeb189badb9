"""EvoCut: keep the patches whose states evolve in a direction of their own; no attention is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from vtc.adapter import Adapter
from vtc.choice import Seen
from vtc.methods.groups import k_means
from vtc.need import Need
from vtc.observe import Tower
from vtc.stage import Method, Shape, Share, Stage


@dataclass(frozen=True)
class EvoCut(Method):
    """Keep the patches that change from block to block of the tower unlike any of the image's main directions.

    EvoCut (2026), from the formulas; no code is public. In each block of the tower's second half that the projector
    can see: directions are those of a patch's state after the block less before it; k-means makes `directions` main
    ones, and a patch's deviation is 1 less its cosine to the nearest. The score is their moving average over blocks.

    Our reading of what is left open: k-means on unit vectors from farthest points, 5 rounds; the average starts with
    the first block's deviation. Directions are a crop's; a visual token of several patches has the mean of their
    scores; of a tower with windows only the blocks that see all are looked at.
    """

    directions: PositiveInt = 8
    """M, the main directions of a crop."""
    memory: Share = 0.95
    """How much of the average is left at each block."""

    name: ClassVar[str] = "evocut"
    paper: ClassVar[str] = "EvoCut (2026)"
    space: ClassVar[dict[str, tuple[float, float]]] = {"directions": (2, 32), "memory": (0.0, 1.0)}

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        depth = shape.tower_layers
        first = min(depth, max(2, round(12 * (depth + 1) / 24)))  # of blocks counted from 1
        needs = tuple(Deviation(block - 1, self.directions) for block in range(first, depth + 1))

        def score(seen: Seen) -> Tensor:
            average = seen[needs[0]][:, 0]
            for need in needs[1:]:
                average = self.memory * average + (1 - self.memory) * seen[need][:, 0]
            return average

        return (Stage(0, score, needs),)


@dataclass(frozen=True)
class Deviation(Need):
    """1 less the cosine of what a tower block adds to a patch with the nearest of its crop's main directions:
    (crops, 1, patches)."""

    directions: int

    tower: ClassVar[bool] = True

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        blocks = list(adapter.encoder_blocks())
        number = blocks.index(adapter.tower_blocks()[self.layer])
        if number == 0:
            raise ValueError("this method compares blocks of the vision tower, of which the projector sees only one")
        return {"before": blocks[number - 1], "after": blocks[number]}

    def row(self, record: dict[str, Tensor], tower: Tower) -> Tensor:
        before, after = (tower.adapter.patches(record[name], tower.call).float() for name in ("before", "after"))
        valid = after.any(2)  # filling, in a batch of crops of different sizes
        direction = normalize(after - before, dim=2)
        group = k_means(direction.transpose(1, 2), valid, self.directions, spherical=True, rounds=5)
        member = (one_hot(group, self.directions) * valid[..., None]).float().transpose(1, 2)
        main = normalize(member @ direction, dim=2)
        cosine = (direction @ main.transpose(1, 2)).masked_fill(member.sum(2)[:, None] == 0, -torch.inf)
        return (1 - cosine.amax(2)).masked_fill(~valid, 0)[:, None]
