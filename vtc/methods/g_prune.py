"""G-Prune: keep the tokens to which importance flows on the graph of their likeness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

import vtc.cover as cover
import vtc.select as select
from vtc.choice import Seen
from vtc.observe import TokenStates
from vtc.stage import Method, Shape, Share, Stage


@dataclass(frozen=True)
class GPrune(Method):
    """Five steps of a random walk between alike tokens, begun at their norms; what arrives per neighbour is the score.

    G-Prune ("What Kind of Visual Tokens Do We Need? Training-free Visual Token Pruning for Multi-modal Large Language
    Models from the Perspective of Graph", arXiv 2501.02268), released code: projected tokens are neighbours where their
    cosine is at least 0.5, a token itself too; the walk's steps are the softmax over a token's neighbours of cosine /
    0.03; the score of a token is what arrives at it after 5 steps, divided by the number of its neighbours.

    The norms are walked step by step, which the code does by a matrix power; the result is the same. Each tile is a
    graph of its own and shares the image's tokens by its size. The code keeps all newline tokens beyond its budget;
    here they are tokens among others. Survivors keep their positions.
    """

    threshold: Share = 0.5
    temperature: PositiveFloat = 0.03
    steps: PositiveInt = 5

    name: ClassVar[str] = "g-prune"
    paper: ClassVar[str] = "G-Prune, arXiv 2501.02268"
    space: ClassVar[dict[str, tuple[float, float]]] = {"threshold": (0.0, 0.9), "temperature": (0.01, 0.3)}

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        features = TokenStates(0)

        def score(seen: Seen) -> Tensor:
            alike, (grid, _, _) = cover.cosines(seen[features]), seen.places()
            near = (alike >= self.threshold) & (grid[:, :, None] == grid[:, None]) & seen.valid[:, None]
            near = near | torch.eye(near.shape[1], dtype=torch.bool, device=near.device)  # rounding, and what is hidden
            walk = (alike / self.temperature).masked_fill(~near, -torch.inf).softmax(2)
            arrived = seen[features].norm(dim=1)[:, None].masked_fill(~seen.valid[:, None], 0)
            for _ in range(self.steps):
                arrived = arrived @ walk
            return arrived[:, 0] / near.sum(2)

        return (Stage(0, score, (features,), select.top_k_each),)
