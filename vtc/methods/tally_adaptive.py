"""Tally with a budget in the mean: an image keeps as many groups as it takes to hide no more than others hide."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

import vtc.merge as merge
from vtc.budget import BudgetError, is_full
from vtc.choice import Choice, Seen
from vtc.methods.tally import Tally
from vtc.methods.ward import ward
from vtc.need import Need
from vtc.select import top_k
from vtc.stage import Budget, Layer, Method, Shape, Stage

Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class TallyAdaptive(Method):
    """As tally, but each image keeps as many groups as it takes to hide at most a share of its variance.

    Our own, without training or labels. What groups hide is the sum of squares of the patch states about the means of
    their groups; Ward's clustering goes on while it is at most `hidden` of the sum about the mean of the image, and
    leaves K0 of N tokens. In the middle of the decoder round(N (K0/N)^power) of the groups stay, by the attention of
    the text after the image. A budget is the mean over images like those that `shares` were measured on.
    """

    hidden: Share = 0.1
    """Where no budget is given; with the other defaults about 25 % of the tokens of the scenes that ship."""
    power: Annotated[float, Field(ge=1)] = 2.0
    """As in tally; at 1 there is no cut, and what stays does not depend on the question."""
    layer: Layer | None = None
    """The decoder layer to cut before. None: the middle one."""
    shares: tuple[Share, ...] = ()
    """Measured by `vtc fit`, ascending: the share of the tokens, mean over images and decoder layers, that stays"""
    hides: tuple[Share, ...] = ()
    """where groups hide as much as this. Between them budgets are read off straight lines; all stay where it is 0."""

    name: ClassVar[str] = "tally-adaptive"
    paper: ClassVar[str] = "of this package"
    adaptive: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.shares) != len(self.hides):
            raise ValueError(f"{self.name}: shares and hides: there must be as many of each")
        if any(a >= b for a, b in pairwise(self.shares)) or any(a <= b for a, b in pairwise(self.hides)):
            raise ValueError(f"{self.name}: shares have to ascend, and hides to descend")

    def bind(self, model: nn.Module, budget: Budget | None, tokens: int | None) -> Self:
        """With what a budget hides. Raises BudgetError below the curve, and ValueError without one."""
        if budget is None or is_full(budget, tokens):
            return self
        if not self.shares:
            raise ValueError(
                f"{self.name} has to know what a budget of {budget} hides on this model: measure that with "
                f"`vtc fit --method {self.name}` and name the file it writes, or set hidden and give no budget"
            )
        if isinstance(budget, int) and tokens is None:
            raise ValueError(f"images of this model differ in size: give {self.name} a fraction, not {budget} tokens")
        share, floor = budget / tokens if isinstance(budget, int) and tokens else float(budget), self.shares[0]
        if share < floor:
            raise BudgetError(
                f"{self.name} was measured down to {floor:g} of the tokens, and {share:g} is less: measure it anew "
                f"with `vtc fit --method {self.name}`, or ask for {math.ceil(1000 * floor) / 1000:g} or more",
                floor=floor,
            )
        ends = pairwise(zip((*self.shares, 1.0), (*self.hides, 0.0), strict=True))
        (low, most), (high, least) = next(pair for pair in ends if share <= pair[1][0])
        return replace(self, hidden=most + (least - most) * (share - low) / (high - low))

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        merging, *cutting = Tally(power=self.power, layer=self.layer).stages(shape)
        merged = merge.weighed(partial(_merged, merging.needs[0], self.hidden))
        cut = partial(_cut, self.power)
        return replace(merging, select=merged), *(replace(stage, select=cut) for stage in cutting)


def _merged(need: Need, hidden: float, scores: Tensor, seen: Seen, keep: Tensor) -> Choice:
    """Ward's groups of an image's tokens, at least `keep`, each in the place of its first one."""
    states = seen[need].transpose(1, 2)
    into = ward(states, seen.valid, keep, hidden * variation(states, seen.valid))
    return Choice((merge.sizes(into) > 0) & seen.valid, into)


def _cut(power: float, scores: Tensor, seen: Seen, keep: Tensor) -> Choice:
    """The highest scores, round(N (left/N)^power) of each image of N tokens that are shown, and at least `keep`."""
    tokens = torch.tensor(seen.shown).clamp(min=1).to(scores.device, non_blocking=True)
    left = (tokens * (seen.valid.sum(1) / tokens) ** power).round().long()
    return top_k(scores, seen, left.maximum(keep))


def variation(states: Tensor, valid: Tensor) -> Tensor:
    """The sum of squares about the mean of an image's tokens: (images,), of states (images, tokens, width)."""
    states = states.float().nan_to_num(0, 0, 0).masked_fill(~valid[..., None], 0)
    mean = states.sum(1, keepdim=True) / valid.sum(1).clamp(min=1)[:, None, None]
    return ((states - mean) * valid[..., None]).square().sum((1, 2))
