"""ToMe: merge similar patches inside the vision tower, so that the tower gets faster, too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from vtc.observe import Seen
from vtc.select import Selection, top_k
from vtc.stage import Budget, Method, Shape, Stage
from vtc.token_merging import MergedPatches


@dataclass(frozen=True)
class ToMe(Method):
    """Merge patches with similar keys between the tower's blocks; each group becomes one visual token.

    "Token Merging: Your ViT But Faster" (arXiv 2210.09461): bipartite matching on head-averaged keys, means weighted by
    size, attention proportional to size. A group's token sits where its first patch was. Where more groups are left
    than the budget allows (a block halves its patches at most), the largest stay.
    """

    share: float | None = None
    """The share of patches that is left before the tower's last block. None: that of the budget."""

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "ToMe, arXiv 2210.09461"

    def bind(self, model: nn.Module, budget: Budget | None, tokens: int | None) -> ToMe:
        if self.share is not None:
            return self
        if budget is None:
            raise ValueError("tome has no default number of tokens: pass budget=, for example budget=0.25")
        if isinstance(budget, int) and tokens is None:
            raise ValueError(f"images of this model differ in size: give tome a fraction, not {budget} tokens")
        return replace(self, share=min(1.0, budget if isinstance(budget, float) else budget / tokens))

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        need = MergedPatches(shape.tower_layers - 1, self.share)
        return (Stage(0, lambda seen: seen[need][:, 0], (need,), partial(_largest, need)),)

    def ratios(self) -> tuple[float, ...] | None:
        return None if self.share is None else (self.share,)


def _largest(need: MergedPatches, sizes: Tensor, seen: Seen, keep: Tensor) -> Selection:
    """The largest groups stay, each as the patch that stands for it; the others of a group are merged into that one."""
    stays, group = top_k(sizes, seen, keep).keep, seen[need][:, 1].long()
    place = torch.arange(sizes.shape[1], device=sizes.device).expand_as(group)
    leaders = torch.full((len(sizes), int(group.max()) + 1), -1, device=sizes.device)
    leaders.scatter_reduce_(1, group, torch.where(stays & seen.valid, place, -1), "amax")
    leaders[:, 0] = -1  # tokens that are no patch, such as the newlines of anyres
    return Selection(stays, torch.where(stays, place, leaders.gather(1, group)))
