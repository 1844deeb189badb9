"""ZipCache: after the prefill, each head keeps salient visual tokens at more bits than the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.cache.packed import Grain
from vtc.cache.precision import Precision
from vtc.methods.window import AfterPrefill, WindowRow
from vtc.stage import Cache, Shape, Share, Stage
from vtc.view import View


@dataclass(frozen=True)
class ZipCache(AfterPrefill):
    """In each layer's cache keep, for each key head, salient visual tokens at `high` bits and the others at `low`.

    "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification" (arXiv 2405.14256):
    salient is what probe queries attend to most, divided by how many of these see the token, and the probes are the
    prompt's last queries and as many of the earlier ones. Keys are rounded channel by channel over the tokens of a
    level; values token by token, over all heads, once each channel is divided by the root of its largest value. The
    released code draws the earlier probes, with replacement, where they are evenly spaced here, so that a prompt's
    answer does not depend on others. Text is never quantised, and nothing is quantised anew while decoding. Heads
    choose for themselves: values of different tokens share a scale then, as in the released code. A budget is the size
    of what a layer holds, scales included; one above all at `high` keeps the most salient as they are. It saves memory
    and never the first token; reading is not faster, as the cache is dequantised for each step.
    """

    high: Literal[16, 8, 4] = 4
    """Bits a number; 16 is as they are, also where a model computes with more."""
    low: Literal[8, 4, 2] = 2
    probes: Share = 0.05
    """Of the prompt: so many last queries, and so many of those before."""
    reduce: Literal["per-visible", "sum"] = "per-visible"
    """What the probes' attention to a token is divided by: how many of them see it, or, as in the released code
    ("sum"), how many queries of all the prompt do."""

    name: ClassVar[str] = "zipcache"
    paper: ClassVar[str] = "ZipCache, arXiv 2405.14256"

    def stage(self, layer: int, shape: Shape) -> Stage:
        saliency = ProbeRow(layer, reduce=self.reduce, probes=self.probes)
        grains = Grain(channels=1, tokens=True), Grain(heads=True, evened=True)
        levels = tuple(dict.fromkeys((16, self.high, self.low)))
        precision = Precision(levels, *grains, shape.key_heads, shape.head_dim, shape.bits)
        return Stage(Cache(layer), lambda seen: seen[saliency], (saliency,), precision.select, precision=precision)


@dataclass(frozen=True)
class ProbeRow(WindowRow):
    """Attention of the prompt's last queries and as many earlier ones, evenly spaced: (images, key_heads, tokens).

    A sum is divided by how many queries of all the prompt see the token.
    """

    probes: float = 0.05

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        rows = super().row(record, view)
        if self.reduce != "sum":
            return rows
        real = self._real(view).long()
        return rows / view.of_tokens(real.flip(1).cumsum(1).flip(1)[:, None]).clamp(min=1)

    def queries(self, view: View) -> tuple[Tensor, Tensor]:
        real = self._real(view)
        number, total = real.sum(1, keepdim=True), real.shape[1]
        order, asking = real.long().argsort(dim=1, stable=True), (self.probes * number).ceil().clamp(min=1)
        slot = torch.arange(max(1, math.ceil(self.probes * total)), device=real.device)
        before = torch.minimum(asking, number - asking)
        early = (total - number + (slot + 0.5) * (number - asking) / before.clamp(min=1)).long().clamp(max=total - 1)
        last = (total - 1 - slot).expand_as(early)
        asks = torch.cat((slot < before, slot < asking), dim=1)
        return order.gather(1, torch.cat((early, last), dim=1)), asks[view.stream.row].float()

    @staticmethod
    def _real(view: View) -> Tensor:
        """(batch, length) bool: the stream without what is no part of the prompt."""
        real = view.stream.columns.place >= 0
        real[:, real.shape[1] - view.ahead :] = False
        return real
