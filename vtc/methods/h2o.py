"""H2O: after the prefill, each head keeps the visual tokens that have gathered most attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vtc.methods.window import AfterPrefill, WindowRow
from vtc.stage import Cache, Shape, Stage


@dataclass(frozen=True)
class H2O(AfterPrefill):
    """In each layer's cache keep, for each key head, the heavy hitters: what all of the prompt attends to most.

    "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models" (arXiv 2306.14048): attention
    summed over all queries. The paper keeps as many of the most recent tokens and goes on while decoding; here text is
    never dropped, so that all of the budget is heavy hitters, and what leaves, leaves after the prefill. The rows of
    all queries are made in blocks: this is the dearest of these scores. A budget is what a layer holds after the
    prefill. It saves memory and decoding, never the first token.
    """

    reduce: Literal["sum", "per-visible"] = "per-visible"
    """The paper's sum favours early tokens, which more queries see; "per-visible" divides by how many those are."""

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "H2O, arXiv 2306.14048"

    def stage(self, layer: int, shape: Shape) -> Stage:
        need = WindowRow(layer, "prompt", reduce=self.reduce)
        return Stage(Cache(layer), lambda seen: seen[need], (need,))
