"""TOVA: after the prefill, a layer keeps the visual tokens that the last token of the prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtc.methods.window import AfterPrefill, WindowRow
from vtc.stage import Cache, Shape, Stage


@dataclass(frozen=True)
class TOVA(AfterPrefill):
    """In each layer's cache keep the visual tokens that the prompt's last token attends to, its heads averaged.

    "Transformers are Multi-State RNNs" (arXiv 2401.06104), Token Omission Via Attention: all heads of a layer hold the
    same tokens. The paper goes on while decoding, a token for a token; here text is never dropped, and what leaves,
    leaves after the prefill. It saves memory and decoding, never the first token.
    """

    name: ClassVar[str] = "tova"
    paper: ClassVar[str] = "TOVA, arXiv 2401.06104"

    def stage(self, layer: int, shape: Shape) -> Stage:
        need = WindowRow(layer, window=1)
        return Stage(Cache(layer), lambda seen: seen[need].mean(1), (need,))
