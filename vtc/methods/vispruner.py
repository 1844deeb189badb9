"""VisPruner: keep the patches that [CLS] attends to, and of the others those that differ most from each other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

import vtc.scores as scores
from vtc.choice import Choice, Seen
from vtc.core.compact import gather
from vtc.cover import cosines
from vtc.observe import PatchStates, salience
from vtc.select import patches, preferring, top_k
from vtc.stage import Method, Shape, Share, Stage


@dataclass(frozen=True)
class VisPruner(Method):
    """Keep the patches that [CLS] attends to most, and a diverse rest: what is nearly the same leaves round by round.

    "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs" (arXiv 2412.01818),
    released code, in the block of the tower that the projector reads. `important` of the budget goes to the highest
    CLS attention, averaged over heads. The others stand in descending order of it; in each round those in even places
    are compared with those in odd places, by the cosine of what the projector reads, and the `step` even ones most
    similar to an odd one leave, until the budget is met. A tower without a CLS token scores by the mean attention that
    a patch receives. Survivors keep their original positions, which the code renumbers; tiles of an image share one
    budget, where each has its own in the code, and newlines between their rows leave first.
    """

    important: Share = 0.5
    """r, the share of the budget that goes to the patches with the highest attention."""
    step: PositiveInt = 8
    """How many patches leave in a round."""

    name: ClassVar[str] = "vispruner"
    paper: ClassVar[str] = "VisPruner, arXiv 2412.01818"
    space: ClassVar[dict[str, tuple[float, float]]] = {"important": (0.0, 1.0)}

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        last = shape.tower_layers - 1
        attention, states = salience(shape, last), PatchStates(last)
        select = preferring(patches(states), partial(important_and_diverse, states, self.important, self.step))
        return (Stage(0, lambda seen: scores.head_mean(seen[attention]), (attention, states), select),)


@torch.no_grad()
def important_and_diverse(
    states: PatchStates, share: float, step: int, scores: Tensor, seen: Seen, keep: Tensor
) -> Choice:
    """The best `share` of `keep`, and of the others those that `step` by step are not like another one."""
    important = top_k(scores, seen, (share * keep).long()).keep
    others, alike = seen.valid & ~important, cosines(seen[states])
    order = scores.masked_fill(~others, -torch.inf).argsort(dim=1, descending=True, stable=True)
    left, wanted = others.sum(1), keep - important.sum(1)
    image = torch.arange(len(keep), device=keep.device)[:, None, None]
    while bool((left > wanted).any()):
        order = order[:, : int(left.max())]
        place = torch.arange(order.shape[1], device=order.device)
        real = place < left[:, None]
        even, odd = order[:, ::2], order[:, 1::2]
        twins = alike[image, even[:, :, None], odd[:, None]].masked_fill(~real[:, None, 1::2], -torch.inf)
        likeness = torch.nn.functional.pad(twins, (0, 1), value=-2).amax(2).masked_fill(~real[:, ::2], -torch.inf)
        leaves = torch.minimum((left - wanted).clamp(min=0, max=step), (left + 1) // 2)
        rank = likeness.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        goes = torch.zeros_like(real).index_copy(1, place[::2], rank < leaves[:, None])
        order = gather(order, (goes | ~real).long().argsort(dim=1, stable=True))
        left = left - leaves
    spare = torch.zeros(len(keep), scores.shape[1] + 1, dtype=torch.bool, device=keep.device)
    stays = order.where(torch.arange(order.shape[1], device=order.device) < left[:, None], scores.shape[1])
    return Choice(important | spare.scatter(1, stays, True)[:, :-1])
