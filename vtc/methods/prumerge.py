"""LLaVA-PruMerge: keep the patches that stand out in [CLS] attention, and let them take in the others by their keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from einops import rearrange
from pydantic import Field, PositiveInt
from torch import Tensor

from vtc.attention import attention_rows
from vtc.choice import Choice, Seen
from vtc.cover import cosines
from vtc.observe import ClsRow, PatchKeys, ReceivedAttention, Tower
from vtc.select import grid, patches, top_k
from vtc.stage import Method, Shape, Stage


@dataclass(frozen=True)
class PruMerge(Method):
    """Keep the patches that [CLS] attends to most; each takes in the patches with the most similar keys.

    "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models" (arXiv 2403.15388), released code:
    attention as if the block had one head over its whole width; a kept patch takes in its `neighbours` most similar
    ones by that width's keys, weighted by their attention against 1 for itself; all that nobody takes in becomes one
    more token. A tower without a CLS token scores by the mean attention that a patch receives.

    A patch counts once here: it joins the most similar kept one that would take it in, and a kept one joins none; in
    the code it may be added to several, kept ones to each other, and the one more token has all that are not kept. What
    is merged is a mean here and a sum there, of features after the projector here and before it there. Attention and
    keys are of the block that the projector reads, as the tower's last one, which the code looks at, is not run. The
    paper keeps what is above the upper quartile by 1.5 interquartile ranges; here the budget says how many, and without
    one it is the paper's average.
    """

    ratio: Annotated[float, Field(gt=0, le=1)] = 1 / 18
    """The share of patches that is left where no budget is given: the paper's average."""
    neighbours: PositiveInt = 32
    """How many patches a kept one takes in."""

    name: ClassVar[str] = "prumerge"
    paper: ClassVar[str] = "LLaVA-PruMerge, arXiv 2403.15388"
    merges: ClassVar[bool] = True
    uniform: ClassVar[float] = 0.0
    """The share of the tokens kept that is evenly spaced instead of chosen by attention."""

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        layer = shape.tower_layers - 1
        attention, keys = (OneHeadClsRow if shape.cls else ReceivedAttention)(layer), PatchKeys(layer)
        return (Stage(0, lambda seen: seen[attention][:, 0], (attention, keys), partial(self._select, keys)),)

    def ratios(self) -> tuple[float, ...]:
        return (self.ratio,)

    def _select(self, keys: PatchKeys, scores: Tensor, seen: Seen, keep: Tensor) -> Choice:
        """Centres, a share `uniform` evenly spaced, but for newlines, and the rest the best; the patches that they take
        in; all others, which join the best of these, so that the centres are one less than `keep`."""
        centres = (keep - 1).clamp(min=0)
        spaced = grid(scores, seen, (self.uniform * centres).long()).keep & patches(keys)(seen)
        centre = top_k(scores.masked_fill(spaced, torch.inf), seen, centres).keep
        other = seen.valid & ~centre
        similar = cosines(seen[keys]).masked_fill(~other[:, None], -torch.inf)  # (images, centres, others)
        least = similar.topk(min(self.neighbours, similar.shape[2]), dim=2).values[:, :, -1:]
        taken = similar.masked_fill((similar < least) | ~centre[:, :, None], -torch.inf)
        best, nearest = taken.max(1)
        leader = scores.masked_fill(~other, -torch.inf).argmax(1, keepdim=True)
        place = torch.arange(scores.shape[1], device=scores.device)
        into = torch.where(centre | (place == leader), place, nearest.where(best > -torch.inf, leader))
        into = into.masked_fill(~seen.valid | (keep == 0)[:, None], -1)
        return Choice(into == place, into, mass=torch.where(centre, 1.0, scores))


@dataclass(frozen=True)
class OneHeadClsRow(ClsRow):
    """Post-softmax attention of the tower's CLS query where all heads are one: (crops, 1, patches)."""

    def row(self, record: dict[str, Tensor], tower: Tower) -> Tensor:
        states = tower.states(self.layer, record)
        query, key = (rearrange(x, "c h n d -> c 1 n (h d)") for x in (states.query[:, :, :1], states.key))
        return attention_rows(query, key, key.shape[-1] ** -0.5)[:, :, 0, 1:]
