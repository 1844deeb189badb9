"""ToMe: merge similar patches inside the vision tower, so that the tower gets faster, too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from vtc import scores
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
        return (Stage(0, lambda seen: scores.head_mean(seen[need]), (need,)),)

    def ratios(self) -> tuple[float, ...] | None:
        return None if self.share is None else (self.share,)
