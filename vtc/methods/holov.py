"""HoloV: each strip of the image keeps tokens by how salient and how varied it is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

import vtc.cover as cover
import vtc.methods.groups as groups
import vtc.scores as scores
from vtc.choice import Choice, Seen
from vtc.need import Need
from vtc.observe import PatchStates, salience
from vtc.stage import Method, Shape, Stage


@dataclass(frozen=True)
class HoloV(Method):
    """Quotas for 16 strips of raster-ordered patches, by CLS attention and by the variance of likeness within.

    HoloV ("Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention", arXiv
    2510.02912), released code: a patch's score is 1000 a + 0.09 v, v first scaled to the mean of 1000 a; a is its CLS
    attention in the block that the projector reads, and v the variance of its cosines with the other patches of its
    strip (the code's sum includes the patch's own entry, as 0). A strip's quota is its share of the strips' mean
    scores, rounded down; what is left goes to the strips with the highest shares. Within a strip the highest attention
    stays: `by`.

    The code loses what a strip's quota exceeds its patches by and pads the image with zero vectors; here the other
    strips get it, in turns. Order and positions are kept, tiles are one line of strips, and a tower without a CLS token
    scores by the mean attention that a patch receives.
    """

    strips: PositiveInt = 16
    variance: NonNegativeFloat = 0.09
    """The weight of v."""
    by: Literal["attention", "score"] = "attention"
    """What decides within a strip."""

    name: ClassVar[str] = "holov"
    paper: ClassVar[str] = "HoloV, arXiv 2510.02912"
    space: ClassVar[dict[str, tuple[float, float]]] = {"variance": (0.0, 1.0)}

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        last = shape.tower_layers - 1
        states, row = PatchStates(last), salience(shape, last)
        return (Stage(0, lambda seen: scores.head_mean(seen[row]), (row, states), partial(self._select, states)),)

    @torch.no_grad()
    def _select(self, states: Need, attention: Tensor, seen: Seen, keep: Tensor) -> Choice:
        strip = _strip(seen.valid, self.strips)
        varied = _variance(cover.cosines(seen[states]), strip, seen.valid)
        unit = scores.mean(1000 * attention, seen.valid) / scores.mean(varied, seen.valid).clamp(min=1e-8)
        score = 1000 * attention + self.variance * varied * unit[:, None]
        weight = groups.means(score, strip, seen.valid, self.strips)
        share = weight / weight.sum(1, keepdim=True).clamp(min=1e-8)
        base = (share * keep[:, None]).floor().long()
        return groups.quota(attention if self.by == "attention" else score, seen, keep, strip, base, share)


def _strip(valid: Tensor, strips: int) -> Tensor:
    """The strip of each token: as many in each, and one more in the first ones: (images, tokens) int64."""
    place, count = valid.long().cumsum(1) - 1, valid.sum(1, keepdim=True)
    size, longer = count // strips, count % strips
    early = place // (size + 1)
    return early.where(early < longer, longer + (place - longer * (size + 1)) // size.clamp(min=1)).clamp(0, strips - 1)


def _variance(alike: Tensor, strip: Tensor, valid: Tensor) -> Tensor:
    """The variance of each token's cosines within its strip, its own one being 0: (images, tokens)."""
    same = (strip[:, :, None] == strip[:, None]) & valid[:, None] & valid[:, :, None]
    size = same.sum(2)
    alike = alike.masked_fill(~same | torch.eye(len(strip[0]), dtype=torch.bool, device=strip.device), 0)
    mean = alike.sum(2) / (size - 1).clamp(min=1)
    return ((alike - mean[..., None]).square() * same).sum(2) / (size - 1).clamp(min=1)
