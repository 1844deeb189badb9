"""DivPrune: keep the tokens that are farthest from each other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import vtc.cover as cover
from vtc.observe import TokenStates
from vtc.stage import Method, Shape, Stage


@dataclass(frozen=True)
class DivPrune(Method):
    """Max-min diversity: keep the projected tokens whose smallest cosine distance to each other is greedily largest.

    "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models" (arXiv 2503.02175), released code: the
    first token is the one whose nearest other token is farthest, the next always the one that is farthest from its
    nearest kept one. Neither attention nor the question is looked at. Tiles of an image compete, and survivors keep
    their positions.
    """

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = "DivPrune, arXiv 2503.02175"

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        features = TokenStates(0)
        diverse = partial(cover.farthest, of=features, power=0.0, alone=True)
        return (Stage(0, lambda seen: seen.valid.float(), (features,), diverse),)
