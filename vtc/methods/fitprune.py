"""FitPrune: drop a few image tokens after every decoder layer, by a schedule fitted to keep attention as it was."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from vtc.choice import Seen
from vtc.core.compact import gather
from vtc.methods.progressive import Progressive
from vtc.observe import QUERY_BLOCK, QueriesAndKeys
from vtc.stage import Layer, Shape, Share, Stage
from vtc.view import View

DELETED = (
    (3, 7, 49, 24, 29, 17, 59, 41, 26, 8, 10, 6, 2, 5, 7, 2, 30, 3, 13, 27, 5, 23, 2, 1, 0, 0, 1, 1, 2, 0, 0, 0),
    (14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4, 26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0),
    (128, 127, 118, 35, 26, 8, 13, 3, 2, 1, 0, 0, 0, 2, 1, 8, 7, 8, 5, 11, 2, 6, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0),
    (262, 153, 80, 19, 13, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 1, 2, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0),
)
"""How many of 576 image tokens each of 32 layers deletes, as published for LLaVA-1.5-7B with 50, 60, 80 and 90 % less
FLOPs."""


@dataclass(frozen=True)
class FitPrune(Progressive):
    """After every decoder layer drop the image tokens that neither the text nor the image attends to, by a schedule.

    "Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models" (arXiv
    2409.10197), released code: a token's score is the product of the mean attention that the text after the image and
    that the image tokens pay it, the largest over heads. How many leave after each layer is fitted to lose as little
    attention as possible (`vtc fit`); without a schedule of one's own those published for LLaVA-1.5-7B are scaled to
    the depth of the decoder, and a budget lies between two of them, or beyond the last one by a power of what it
    leaves. The code deletes between a layer's attention and its feed-forward; here tokens leave after the layer. Of an
    image without later text, where all products are 0, the first tokens stay.
    """

    layers: tuple[Layer, ...] | None = None
    """Decoder layers to prune before. None: all but the first."""
    keep_ratios: tuple[Share, ...] = ()
    """Shares of the image's tokens that are left after each pruning. None given: the published ones, by budget."""

    PAPER: ClassVar[tuple[int, ...]] = ()

    name: ClassVar[str] = "fitprune"
    paper: ClassVar[str] = "FitPrune, arXiv 2409.10197"

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        layers = shape.layers(self.layers or tuple(range(1, shape.decoder_layers)), of=32)
        return tuple(self.stage(layer) for layer in layers)

    def stage(self, layer: int) -> Stage:
        need = LargestOverHeads(layer - 1)
        return Stage(layer, lambda seen: seen[need].prod(1), (need,))

    def masses(self, stage: Stage, scores: Tensor, seen: Seen) -> Tensor:
        return seen[stage.needs[0]]

    def ratios(self) -> tuple[float, ...] | None:
        return self.keep_ratios or None

    def schedule(self, strength: float, shape: Shape) -> tuple[float, ...]:
        if self.keep_ratios:
            return super().schedule(strength, shape)
        left = [[1 - gone / 576 for gone in accumulate(deleted, initial=0)] for deleted in ((0,) * 32, *DELETED)]
        places = [round(layer * 32 / shape.decoder_layers) for layer in range(1, shape.decoder_layers)]
        if strength >= len(DELETED):
            return tuple(left[-1][place] ** (strength - len(DELETED) + 1) for place in places)
        low = int(strength)
        return tuple(left[low][p] + (strength - low) * (left[low + 1][p] - left[low][p]) for p in places)


@dataclass(frozen=True)
class LargestOverHeads(QueriesAndKeys):
    """Attention in decoder layer `layer`, the largest over heads, that each visual token gets: (images, 2, tokens).

    The mean over the text after the image, and the mean over the image's own tokens. The matrix is summed up in blocks
    of queries, never stored.
    """

    reads_text: ClassVar[bool] = True

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        stream, (positions, asks) = view.stream, view.text_after_images()
        pays = torch.zeros(len(asks), 2, stream.length, device=asks.device)
        pays[:, 0].scatter_(1, positions[stream.row], asks)
        pays[:, 1].scatter_add_(1, stream.position, view.alive.float())
        total = torch.zeros(*pays.shape[:2], view.alive.shape[1], device=asks.device)
        for block in torch.arange(stream.length, device=asks.device).split(QUERY_BLOCK):
            queries = block.expand(len(record["query"]), -1)
            rows = view.rows(self.layer, gather(record["query"], queries), record["key"], queries).amax(1)
            total += pays[:, :, block] @ view.of_tokens(rows)
        return total / pays.sum(2, keepdim=True).clamp(min=1)
