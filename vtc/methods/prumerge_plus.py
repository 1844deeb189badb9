"""LLaVA-PruMerge+: PruMerge with evenly spaced patches among those that are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from vtc.methods.prumerge import PruMerge


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """Keep an even grid of patches and, for each three of it, one that [CLS] attends to most; merge as PruMerge does.

    "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models" (arXiv 2403.15388), released code:
    patches at a third of the step that the outliers' number makes, so three for each outlier, and then the outliers.
    The code's samples are evenly spaced along the raster, those here over the grid; where it samples an outlier it has
    one token less, here the next best patch. All else as in `PruMerge`.
    """

    ratio: Annotated[float, Field(gt=0, le=1)] = 1 / 4
    """The share of patches that is left where no budget is given: the paper's average."""

    name: ClassVar[str] = "prumerge-plus"
    paper: ClassVar[str] = "LLaVA-PruMerge+, arXiv 2403.15388"
    uniform: ClassVar[float] = 0.75
