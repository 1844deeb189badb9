"""HiPrune: anchors of a middle block, their neighbours, and what the last blocks attend to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from vtc.attention import attention_rows
from vtc.choice import Choice, Seen
from vtc.need import Need
from vtc.observe import ReceivedAttention, Tower
from vtc.select import top_k
from vtc.stage import Method, Shape, Share, Stage


@dataclass(frozen=True)
class HiPrune(Method):
    """Keep a few anchors that a middle block attends to, their grid neighbours, and else what the last block does.

    "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models" (arXiv
    2508.00553), released code: a patch's score in a block is the attention that it receives, mean over heads and all
    queries, the CLS token's too. Of T tokens round(alpha T / 5) are anchors, the highest of block 9 of 24; their
    neighbours in the grid stay with them; the rest are the highest of the block that the projector reads.

    The code's neighbours are the patches before and behind in raster order, which at the end of a row lie on the
    other side of the image, and those one row up and down; here they are those of the true grid, of a tile or a frame.
    Where anchors and neighbours are more than T (alpha near 1) neighbours leave first. Tiles of an image compete, which
    share its tokens equally in the code. Works without a CLS token. Survivors keep their positions.
    """

    alpha: Share = 0.1
    """The share of anchors and neighbours among the tokens that stay."""

    name: ClassVar[str] = "hiprune"
    paper: ClassVar[str] = "HiPrune, arXiv 2508.00553"
    space: ClassVar[dict[str, tuple[float, float]]] = {"alpha": (0.0, 0.6)}

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        depth = shape.tower_layers
        middle, last = ReceivedFromAll(max(0, round(9 * (depth + 1) / 24) - 1)), ReceivedFromAll(depth - 1)
        select = partial(self._select, middle)
        return (Stage(0, lambda seen: seen[last][:, 0], (middle, last), select),)

    def _select(self, middle: Need, scores: Tensor, seen: Seen, keep: Tensor) -> Choice:
        count = (self.alpha * keep / 5).round().long()
        anchors = top_k(seen[middle][:, 0], seen, count).keep
        beside = _beside(seen) & anchors[:, None]
        near = beside.any(2) & (scores > 0)  # no newlines
        return top_k(scores + 2 * anchors + near, seen, keep)  # attention is below 1


def _beside(seen: Seen) -> Tensor:
    """Whether two tokens are neighbours in a row or a column of the same grid: (images, tokens, tokens) bool."""
    grid, row, column = (x[:, :, None] - x[:, None] for x in seen.places())
    return (grid == 0) & (row.abs() + column.abs() == 1)


@dataclass(frozen=True)
class ReceivedFromAll(ReceivedAttention):
    """Mean attention that each patch receives from all of its crop, a CLS token too: (crops, 1, patches)."""

    def row(self, record: dict[str, Tensor], tower: Tower) -> Tensor:
        received = super().row(record, tower)
        if not tower.adapter.has_cls():
            return received
        states, patches = tower.states(self.layer, record), received.shape[2]
        cls = attention_rows(states.query[:, :, :1], states.key, states.scale)[:, :, 0, 1:].mean(1, keepdim=True)
        return (patches * received + cls) / (patches + 1)
