"""SnapKV: after the prefill, each head keeps the visual tokens that the question attends to, and their neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vtc.methods.window import AfterPrefill, Kernel, Window, WindowRow, pooled
from vtc.stage import Cache, Shape, Stage


@dataclass(frozen=True)
class SnapKV(AfterPrefill):
    """In each layer's cache keep, for each key head, the visual tokens that a window of queries attends to.

    "SnapKV: LLM Knows What You are Looking for Before Generation" (arXiv 2404.14469): the mean attention of the
    prompt's last queries, pooled over neighbours, summed over the heads that share a key. Here the window is the
    question, text is never dropped, and neighbours are those on the image's grid, where the paper pools along the text
    (kernel 5). A budget is what a layer holds after the prefill. It saves memory and decoding, never the first token.
    """

    window: Window = "question"
    """An int is the paper's window of that many last queries (16 to 64)."""
    kernel: Kernel = 3
    pooling: Literal["mean", "max"] = "mean"

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "SnapKV, arXiv 2404.14469"

    def stage(self, layer: int, shape: Shape) -> Stage:
        need = WindowRow(layer, self.window)
        return Stage(Cache(layer), lambda seen: pooled(seen[need], seen, self.kernel, self.pooling), (need,))
