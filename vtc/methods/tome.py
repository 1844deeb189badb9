"""ToMe: merge similar patches inside the vision tower, so that the tower gets faster, too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from vtc import scores
from vtc.stage import Budget, Method, Shape, Share, Stage
from vtc.token_merging import MergedPatches


@dataclass(frozen=True)
class ToMe(Method):
    """Merge patches with similar keys between the tower's blocks; each group becomes one visual token.

    "Token Merging: Your ViT But Faster" (arXiv 2210.09461): bipartite matching on head-averaged keys, means weighted by
    size, attention proportional to size. Where more groups are left than the budget allows (a block halves its patches
    at most), the largest stay. ToMe merges between a block's attention and its feed-forward, and lets the order of the
    tokens go; here merging comes after both, and a group's token sits where the first of its patches that the decoder
    reads was, in raster order.
    """

    share: Share | None = None
    """The share of patches that is left before the tower's last block. Never less than the budget, the default."""

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "ToMe, arXiv 2210.09461"

    def bind(self, model: nn.Module, budget: Budget | None, tokens: int | None) -> ToMe:
        if budget is None:
            if self.share is None:
                raise ValueError("tome has no default number of tokens: pass budget=, for example budget=0.25")
            return self
        if isinstance(budget, int) and tokens is None:
            raise ValueError(f"images of this model differ in size: give tome a fraction, not {budget} tokens")
        spent = min(1.0, budget if isinstance(budget, float) else budget / tokens)
        return replace(self, share=max(spent, self.share or 0.0))

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        need = MergedPatches(shape.tower_layers - 1, self.share)
        return (Stage(0, lambda seen: scores.head_mean(seen[need]), (need,)),)

    def ratios(self) -> tuple[float, ...] | None:
        return None if self.share is None else (self.share,)
