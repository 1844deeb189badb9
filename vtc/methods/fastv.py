"""FastV: after an early decoder layer, drop the image tokens that the last prompt token attends to least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import vtc.scores as scores
from vtc.observe import LastTokenRow
from vtc.stage import Layer, Method, Shape, Share, Stage


@dataclass(frozen=True)
class FastV(Method):
    """Before decoder layer K drop the image tokens that the last prompt token attends to least in layer K - 1.

    "An Image is Worth 1/2 Tokens After Layer 2" (arXiv 2403.06764), released code: the head-mean of the post-softmax
    row of the last prompt token only (the text speaks of the average over tokens; the code does not average);
    original positions; pruned once, at prefill. Without a cache (`use_cache=False`) each step is a prefill, and looks
    anew from the token that is then the last.
    """

    layer: Layer | None = None
    """K. None: the paper's 2 of 32, scaled to the depth of the decoder."""
    ratio: Share = 0.5
    """R, the share of image tokens that is dropped where no budget is given."""

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "FastV, arXiv 2403.06764"
    space: ClassVar[dict[str, tuple[float, float]]] = {"layer": (1, 8)}

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        (layer,) = shape.layers(None if self.layer is None else (self.layer,), 2, of=32)
        need = LastTokenRow(layer - 1)
        return (Stage(layer, lambda seen: scores.head_mean(seen[need]), (need,)),)

    def ratios(self) -> tuple[float, ...]:
        return (1 - self.ratio,)
