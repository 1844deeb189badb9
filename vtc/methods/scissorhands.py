"""Scissorhands: after the prefill, each head keeps the visual tokens that most queries find pivotal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc.methods.window import AfterPrefill, Window, WindowRow
from vtc.stage import Cache, Shape, Stage


@dataclass(frozen=True)
class Scissorhands(AfterPrefill):
    """In each layer's cache keep, for each key head, the visual tokens that are pivotal to most queries of a window.

    "Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache Compression at Test Time" (arXiv
    2305.17118): a key is pivotal to a query that attends to it more than evenly, above 1 over the number of keys that
    it sees; those with the fewest such queries leave. Ties, of which the paper does not speak, go by mean attention.
    Here the window is the question, where the paper has the last 400 queries; heads that share a key vote together; all
    layers hold the same number, where the paper leaves later ones more; and what leaves, leaves after the prefill,
    where the paper goes on while decoding. It saves memory and decoding, never the first token.
    """

    window: Window = "question"

    name: ClassVar[str] = "scissorhands"
    paper: ClassVar[str] = "Scissorhands, arXiv 2305.17118"

    def stage(self, layer: int, shape: Shape) -> Stage:
        votes, ties = WindowRow(layer, self.window, pivotal, "sum"), WindowRow(layer, self.window)
        return Stage(Cache(layer), lambda seen: seen[votes] + seen[ties] / (1 + seen[ties]), (votes, ties))


def pivotal(rows: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """An `Entry`: 1 where a query attends to a key more than evenly, else 0."""
    return (rows > 1 / seen.sum(-1, keepdim=True)).float()
