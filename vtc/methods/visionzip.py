"""VisionZip: keep the patches that [CLS] attends to, and merge the rest into a few contextual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

import vtc.scores as scores
from vtc.choice import Choice, Seen
from vtc.cover import cosines
from vtc.merge import weighed
from vtc.observe import PatchKeys, Tower, salience
from vtc.select import patches, top_k
from vtc.stage import Method, Shape, Stage


@dataclass(frozen=True)
class VisionZip(Method):
    """Keep the dominant patches, those that [CLS] attends to; the others become contextual tokens by their keys.

    "VisionZip: Longer is Better but Not Necessary in Vision Language Models" (arXiv 2412.04467), released code, in the
    block of the tower that the projector reads. Dominant tokens have the highest CLS attention, summed over heads. Of
    the others, every R // C-th in raster order is a target, C in all, and each of the rest joins the target whose key,
    averaged over heads, has the highest cosine with its own. A tower without a CLS token scores by the mean attention
    that a patch receives.

    A contextual token is the mean of its members here; the code adds the mean of those that join to the target, which
    about doubles its length. The mean is of projected features, the code's of what the projector reads. Contextual
    tokens stay where their target was; the code puts them behind all others and renumbers. The code's first dominant
    token is the CLS token itself, which has no place in the prompt here. Tiles of an image share one budget here, and
    newline tokens leave first; in the code each tile has its own.
    """

    contextual: Annotated[float, Field(ge=0, lt=1)] = 10 / 64
    """Share of the tokens that are left which are contextual: the paper's 10 of 64, 20 of 128 and 30 of 192."""
    weighs: bool = False
    """Whether a contextual token counts as many times as it has patches; not in the paper."""

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "VisionZip, arXiv 2412.04467"
    merges: ClassVar[bool] = True
    space: ClassVar[dict[str, tuple[float, float]]] = {"contextual": (0.0, 0.9)}

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        attention, keys = salience(shape, shape.tower_layers - 1), MeanKeys(shape.tower_layers - 1)
        zipped = partial(dominant_and_contextual, keys, self.contextual)
        select = weighed(zipped) if self.weighs else zipped
        return (Stage(0, lambda seen: scores.head_mean(seen[attention]), (attention, keys), select),)


@dataclass(frozen=True)
class MeanKeys(PatchKeys):
    """The same, averaged over heads: (crops, head_dim, patches)."""

    def row(self, record: dict[str, Tensor], tower: Tower) -> Tensor:
        key = tower.states(self.layer, record).key.float().mean(1)
        return key[:, int(tower.adapter.has_cls()) :].transpose(1, 2)


def dominant_and_contextual(keys: MeanKeys, share: float, scores: Tensor, seen: Seen, keep: Tensor) -> Choice:
    """The best stay; `share` of `keep` are targets at even steps among the others, which join the most similar one.

    Newlines are targets only where other patches do not suffice, and count for nothing in a mean.
    """
    contextual = (share * keep).round().long()
    others = seen.valid & ~top_k(scores, seen, keep - contextual).keep
    patch = patches(keys)(seen)
    among = torch.where(((others & patch).sum(1) < contextual)[:, None], others, others & patch)
    place = among.cumsum(1) - 1
    step = (among.sum(1) // contextual.clamp(min=1)).clamp(min=1)[:, None]
    target = among & (place % step == 0) & (place // step < contextual[:, None])
    nearest = cosines(seen[keys]).masked_fill(~target[:, None], -torch.inf).argmax(2)
    stays = target | seen.valid & ~others
    into = torch.where(stays, torch.arange(stays.shape[1], device=stays.device), nearest)
    joins = stays | others & (contextual > 0)[:, None]
    return Choice(stays, into.where(joins, -1), mass=patch.float())
