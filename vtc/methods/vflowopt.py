"""VFlowOpt: importance from a few relevant patches of the tower, pruning before and within the decoder, recycling."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from operator import mul
from typing import Annotated, ClassVar

from pydantic import Field, NonNegativeFloat
from torch import Tensor

from vtc import merge, select
from vtc.choice import Seen
from vtc.observe import PatchEntropy, RelevantAttention
from vtc.stage import Layer, Method, Shape, Share, Stage


@dataclass(frozen=True)
class VFlowOpt(Method):
    """Keep what the tower's most attended patches attend to; recycle the rest by grid cell; prune twice more inside.

    "Token Pruning with Visual Information Flow-Guided Optimization" (arXiv 2508.05211). Eq. 1-4: the importance map is
    the mean attention paid by the relatively important patches (those that receive more than `threshold` times the
    mean) in the block that the projector reads, plus `alpha` times the softmax of the patches' entropy; it serves all
    three sites. Eq. 6-7: before the decoder the tokens below the top become one token a grid cell, their
    importance-weighted mean.

    The defaults are the released ones for LLaVA-OneVision-7B at 25 %; `vtc tune` finds them for other models. Where no
    patch passes the threshold all do (the code gets NaN). The entropy is of de-normalised pixels (the code's wraps
    around) and in bits, as in the code. Recycled tokens count towards the budget exactly; the code's approximately.
    On images of tiles with newline tokens (LLaVA-NeXT, LLaVA-OneVision) a newline has the importance 0 here and 1 in
    the code, and cells are a part of each grid's sides here and of a fixed number of patches there.
    """

    retain: tuple[Share, Share, Share] = (0.265, 0.983, 0.877)
    """R1, R2, R3: the share of the tokens entering each site that stays."""
    threshold: NonNegativeFloat = 34.8
    """t: how many times the mean a patch must receive to be relatively important."""
    cell: Annotated[float, Field(ge=0.001, le=1)] = 15.6 / 27
    """a: the side of a recycling cell, as a part of the grid's side (the paper counts patches of a grid of 27)."""
    alpha: float = 0.0
    """Weight of the entropy term."""
    layers: tuple[Layer, Layer] | None = None
    """Decoder layers to prune before. None: the paper's 9 and 18 of 28, scaled to the depth of the decoder."""

    name: ClassVar[str] = "vflowopt"
    paper: ClassVar[str] = "VFlowOpt, arXiv 2508.05211"
    space: ClassVar[dict[str, tuple[float, float]]] = {
        "retain.0": (0.05, 0.99),
        "retain.1": (0.3, 1.0),
        "retain.2": (0.3, 1.0),
        "threshold": (0.0, 50.0),
        "cell": (0.1, 1.0),
        "alpha": (-1.0, 1.0),
    }

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        attention = RelevantAttention(shape.tower_layers - 1, self.threshold)
        entropy = (PatchEntropy(shape.tower_layers - 1),) if self.alpha else ()

        def score(seen: Seen) -> Tensor:
            importance = seen[attention][:, 0]
            return importance + self.alpha * seen[entropy[0]][:, 0] if entropy else importance

        needs = (attention, *entropy)
        sites = (0, *shape.layers(self.layers, 9, 18, of=28))
        selects = (partial(merge.recycle, cell=self.cell), select.top_k, select.top_k)
        return tuple(Stage(site, score, needs, chosen) for site, chosen in zip(sites, selects, strict=True))

    def ratios(self) -> tuple[float, ...]:
        return tuple(accumulate(self.retain, mul))
