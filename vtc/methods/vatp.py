"""VATP: after the prefill, each head keeps the visual tokens that are attended to and have something to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc.methods.window import AfterPrefill, Window, WindowRow
from vtc.stage import Cache, Shape, Stage


@dataclass(frozen=True)
class VATP(AfterPrefill):
    """In each layer's cache keep, for each key head, the visual tokens of most attention times length of value.

    "Attention Score is Not All You Need for Token Importance Indicator in KV Cache Reduction: Value Also Matters"
    (arXiv 2406.12335): a base's attention times the L1 norm of the cached value. The released code has two bases: the
    mean over the last 400 queries of the prompt, which the question stands for here, and H2O's sum over all
    (`window="prompt"`). Its guard of the first 20 tokens is not needed: text is never dropped. Heads that share a key
    are summed. A budget is what a layer holds after the prefill. It saves memory and decoding, never the first token.
    """

    window: Window = "question"

    name: ClassVar[str] = "vatp"
    paper: ClassVar[str] = "VATP, arXiv 2406.12335"

    def stage(self, layer: int, shape: Shape) -> Stage:
        need = WindowRow(layer, self.window, by_length)
        return Stage(Cache(layer), lambda seen: seen[need], (need,))


def by_length(rows: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """An `Entry`: attention times the L1 norm of the value."""
    return rows * values.abs().sum(-1)[:, :, None, None]
