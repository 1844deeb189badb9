"""FastV: after an early decoder layer, drop the image tokens that the last prompt token attends to least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc import scores
from vtc.observe import LastTokenRow
from vtc.stage import Method, Shape, Stage


@dataclass(frozen=True)
class FastV(Method):
    """Before decoder layer K drop the image tokens that the last prompt token attends to least in layer K - 1.

    "An Image is Worth 1/2 Tokens After Layer 2" (arXiv 2403.06764), released code: the head-mean of the post-softmax
    row of the last prompt token only (the text speaks of the average over tokens; the code does not average);
    original positions; pruned once, at prefill.
    """

    layer: int | None = None
    """K. None: the paper's 2 of 32, scaled to the depth of the decoder."""
    ratio: float = 0.5
    """R, the share of image tokens that is dropped where no budget is given."""

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "FastV, arXiv 2403.06764"
    space: ClassVar[dict[str, tuple[float, float]]] = {"layer": (1, 8)}

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        layer = shape.scaled(2, of=32)[0] if self.layer is None else self.layer
        if not 1 <= layer < shape.decoder_layers:
            raise ValueError(
                f"layer={layer} must lie in 1 to {shape.decoder_layers - 1}: its score is seen in the one before"
            )
        need = LastTokenRow(layer - 1)
        return (Stage(layer, lambda seen: scores.head_mean(seen[need]), (need,)),)

    def ratios(self) -> tuple[float, ...]:
        return (1 - self.ratio,)
