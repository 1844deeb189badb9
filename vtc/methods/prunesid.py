"""PruneSID: groups by principal components, duplicates suppressed within, quotas by what is left."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

import vtc.cover as cover
import vtc.methods.groups as groups
from vtc.choice import Choice, Seen
from vtc.need import Need
from vtc.observe import PatchStates, salience
from vtc.scores import rank
from vtc.select import patches, preferring
from vtc.stage import Method, Shape, Stage


@dataclass(frozen=True)
class PruneSID(Method):
    """Keep what suppression of duplicates leaves of the groups that the patches' principal components make.

    "Prune Redundancy, Preserve Essence: Vision Token Compression in VLMs via Synergistic Importance-Diversity" (arXiv
    2603.09480), released code, of T tokens. Groups: T / 4 principal components of the sigmoid of the patch states that
    the projector reads, patches as variables; a patch belongs to the component on which its loading is largest. Within
    a group non-maximum suppression by CLS attention, summed over heads: a patch suppresses those whose cosine with it
    is above T / 32 times the mean cosine of the image. Each group gets one token, the others go by the numbers of
    survivors, no more than 5 ceil(T / 64), than its survivors, or than its patches; that bound is raised until T fit.
    In a group survivors come first, then the others, by attention.

    The code draws the components at random and stops early; here they start from fixed numbers and are exact to
    rounding where the spectrum falls: of components that explain almost equally much, as in noise, it is a mixture that
    is found. The code hands out the CLS token as one of the T; here all T are patches, in their order and positions.
    The paper's budget by the image's information is not in that code and not built. A tower without a CLS token scores
    by the mean attention that a patch receives, and newlines between rows of tiles leave first.
    """

    name: ClassVar[str] = "prunesid"
    paper: ClassVar[str] = "PruneSID, arXiv 2603.09480"

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        last = shape.tower_layers - 1
        states, row = PatchStates(last), salience(shape, last)
        select = preferring(patches(states), partial(_select, states))
        return (Stage(0, lambda seen: seen[row].sum(1), (row, states), select),)


@torch.no_grad()
def _select(states: Need, attention: Tensor, seen: Seen, keep: Tensor) -> Choice:
    number = (keep // 4).clamp(min=1)
    loading = groups.components(seen[states].sigmoid(), seen.valid, int(number.max())).abs()
    unused = torch.arange(loading.shape[2], device=keep.device) >= number[:, None]
    group = loading.masked_fill(unused[:, None], -1).argmax(2)
    alike = cover.cosines(seen[states])
    threshold = keep / 32 * _mean_cosine(alike, seen.valid)
    rivals = (alike > threshold[:, None, None]) & (group[:, :, None] == group[:, None])
    stands = groups.unsuppressed(attention, seen.valid, rivals)
    survivors = groups.sizes(group, stands, loading.shape[2])
    quota = _quota(groups.sizes(group, seen.valid, loading.shape[2]), survivors, keep)
    order = attention.shape[1] * stands - rank(attention, seen.valid)
    return groups.quota(order.float(), seen, keep, group, quota, survivors)


def _mean_cosine(alike: Tensor, valid: Tensor) -> Tensor:
    """Over the pairs of different tokens of each image: (images,)."""
    pairs = (valid[:, :, None] & valid[:, None]).triu(1)
    return alike.masked_fill(~pairs, 0).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


def _quota(sizes: Tensor, survivors: Tensor, keep: Tensor) -> Tensor:
    """How many of `keep` each group gets, from the numbers of its tokens and survivors: (images, groups) int64."""
    least = sizes.clamp(max=1)
    most = torch.minimum(survivors, 5 * (keep[:, None] / 64).ceil().long())
    while (short := (most.sum(1) < keep) & (most < sizes).any(1)).any():
        most = torch.minimum(most + short[:, None], sizes)
    rest = (keep - least.sum(1)).clamp(min=0)
    ends = (survivors.cumsum(1) / survivors.sum(1, keepdim=True).clamp(min=1) * rest[:, None]).round().long()
    got = torch.minimum(least + ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1])), most)
    order = survivors.argsort(dim=1, descending=True, stable=True)
    room = (most - got).gather(1, order)
    left = (keep - got.sum(1))[:, None] - (room.cumsum(1) - room)
    return got.scatter_add(1, order, torch.minimum(left.clamp(min=0), room))
