"""V2Drop: drop the image tokens that a decoder layer changes least; no attention is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from vtc.adapter import Adapter
from vtc.methods.progressive import Progressive
from vtc.need import Need
from vtc.stage import Layer, Share, Stage
from vtc.view import View


@dataclass(frozen=True)
class V2Drop(Progressive):
    """After three decoder layers drop the image tokens whose states that layer has changed least.

    "Variation-aware Vision Token Dropping for Faster Large Vision-Language Models" (arXiv 2509.01552), released code:
    the L2 norm of a token's state after the layer less that before it, which is the sum of what its two modules add.
    The code also takes the dropped tokens out of the cache of the layer that has just run; here they leave from the
    next layer on.
    """

    layers: tuple[Layer, ...] | None = None
    """Decoder layers to prune before. None: the code's after 3, 17 and 22 (from 0) of 32, scaled to the decoder."""
    keep_ratios: tuple[Share, ...] = (1 / 2, 1 / 4, 1 / 576)
    """Shares of the image's tokens that are left after each pruning: the code's 0.5, 0.5 and 0 of the remaining ones,
    where 0 leaves one token, here of LLaVA-1.5's 576."""

    PAPER: ClassVar[tuple[int, ...]] = (4, 18, 23)

    name: ClassVar[str] = "v2drop"
    paper: ClassVar[str] = "V2Drop, arXiv 2509.01552"
    space: ClassVar[dict[str, tuple[float, float]]] = {"keep_ratios.0": (0.1, 0.99), "keep_ratios.1": (0.05, 0.99)}

    def stage(self, layer: int) -> Stage:
        need = Variation(layer - 1)
        return Stage(layer, lambda seen: seen[need][:, 0], (need,))


@dataclass(frozen=True)
class Variation(Need):
    """L2 norm of what decoder layer `layer` adds to each visual token's state: (images, 1, tokens)."""

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        branches = adapter.branches(adapter.layers[self.layer])
        return {name: branches[name] for name in ("attention out", "feed-forward out")}

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        added = record["attention out"].float() + record["feed-forward out"].float()
        return view.of_tokens(added.norm(dim=-1)[:, None])
