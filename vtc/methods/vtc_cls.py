"""VTC-CLS: rank patches by the attention that the vision tower's own [CLS] token pays to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from einops import reduce
from pydantic import PositiveInt
from torch import Tensor

import vtc.scores as scores
import vtc.select as select
from vtc.choice import Seen
from vtc.observe import salience
from vtc.stage import Method, Shape, Stage


@dataclass(frozen=True)
class VtcCls(Method):
    """Keep the patches that the vision tower's [CLS] token attends to, summed over a few late blocks.

    "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs" (arXiv 2412.05819), released code: the
    head-mean of the post-softmax CLS row, not re-normalised over patches, summed over the last `layers` blocks that the
    projector can see (LLaVA reads hidden_states[-2], so the tower's last block takes no part); top-k, raster order.
    A tower without a CLS token scores by the mean attention that a patch receives. The released code knows one crop of
    fixed size; the tiles of an anyres image compete for its budget here.
    """

    layers: PositiveInt | None = None
    """Blocks of the ensemble, counted back from the one that the projector reads. None: the paper's 3 of 24, scaled."""
    ensemble: Literal["sum", "mean", "max"] = "sum"
    """How the blocks' scores are combined. The released code sums, which ranks as the mean does."""
    positions: Literal["original", "contiguous"] = "original"
    """The released code renumbers the survivors without gaps: "contiguous"."""
    tiles: Literal["compete", "even"] = "compete"
    """How an image's tiles, or a video's frames, share its budget: by their scores, or each by its size."""

    name: ClassVar[str] = "vtc-cls"
    paper: ClassVar[str] = "VTC-CLS, arXiv 2412.05819"
    space: ClassVar[dict[str, tuple[float, float]]] = {"layers": (1, 8)}

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        depth = shape.tower_layers
        layers = max(1, round(3 * (depth + 1) / 24)) if self.layers is None else self.layers
        if self.layers is not None and layers > depth:
            raise ValueError(
                f"layers={layers} must lie in 1 to {depth}: the projector sees no more blocks of this tower"
            )
        needs = tuple(salience(shape, layer) for layer in range(depth - layers, depth))

        def score(seen: Seen) -> Tensor:
            rows = [scores.head_mean(seen[need]) for need in needs]
            return reduce(rows, "layer image token -> image token", self.ensemble)

        chosen = select.top_k if self.tiles == "compete" else select.top_k_each
        return (Stage(0, score, needs, chosen, contiguous=self.positions == "contiguous"),)
