"""PyramidDrop: halve the image tokens after each quarter of the decoder, by what the instruction's last token reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import vtc.scores as scores
from vtc.methods.progressive import Progressive
from vtc.observe import LastTokenRow
from vtc.stage import Layer, Share, Stage


@dataclass(frozen=True)
class PyramidDrop(Progressive):
    """After each quarter of the decoder drop the half of the image tokens that the last prompt token attends to least.

    "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction" (arXiv
    2410.17247), released code: the head-mean of the post-softmax row of the instruction's last token, in the layer that
    follows the pruning, on the states that are about to enter it. Survivors keep their original positions; the code
    renumbers them without gaps. The code prunes the first image of a prompt; here each image has its own budget.
    """

    layers: tuple[Layer, ...] | None = None
    """Decoder layers to prune before. None: the paper's 8, 16 and 24 of 32, scaled to the depth of the decoder."""
    keep_ratios: tuple[Share, ...] = (0.5, 0.25, 0.125)
    """Shares of the image's tokens that are left after each pruning."""

    PAPER: ClassVar[tuple[int, ...]] = (8, 16, 24)

    name: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[str] = "PyramidDrop, arXiv 2410.17247"
    space: ClassVar[dict[str, tuple[float, float]]] = {"keep_ratios.0": (0.1, 0.99), "keep_ratios.1": (0.05, 0.99)}

    def stage(self, layer: int) -> Stage:
        need = LastTokenRow(layer, ahead=True)
        return Stage(layer, lambda seen: scores.head_mean(seen[need]), (need,))
