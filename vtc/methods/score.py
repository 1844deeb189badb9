"""SCoRe: the most salient patch, and then always the one that is salient and far from all that are kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from pydantic import NonNegativeFloat

import vtc.cover as cover
import vtc.scores as scores
from vtc.observe import PatchStates, salience
from vtc.select import patches, preferring
from vtc.stage import Method, Shape, Stage


@dataclass(frozen=True)
class SCoRe(Method):
    """Weighted farthest points among the patches that the projector reads, weighted by CLS attention.

    "SCoRe: Salience-Coverage Reduction for Vision Token Pruning in Vision-Language Models" (CVPR 2026). The first patch
    is the most salient one; the next is always the one with the most of m w^alpha, where w is the attention of the CLS
    token in the block that the projector reads, head mean, and m the cosine distance to the nearest patch that is kept.

    Known from a third party's selector and notes of the paper; no code by its authors was read. A tower without a CLS
    token weighs by the mean attention that a patch receives, tiles of an image compete, newlines between their rows
    leave first, and survivors keep their positions, each of which is ours.
    """

    alpha: NonNegativeFloat = 0.8
    """The paper's; 0 covers only, and the larger it is the more salience alone decides."""

    name: ClassVar[str] = "score"
    paper: ClassVar[str] = "SCoRe, CVPR 2026"
    space: ClassVar[dict[str, tuple[float, float]]] = {"alpha": (0.0, 2.0)}

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        last = shape.tower_layers - 1
        states, row = PatchStates(last), salience(shape, last)
        covering = partial(cover.farthest, of=states, power=self.alpha)
        return (
            Stage(0, lambda seen: scores.head_mean(seen[row]), (row, states), preferring(patches(states), covering)),
        )
