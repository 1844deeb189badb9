"""SpecPrefill: the first decoder layers judge for all later ones, chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

import vtc.methods.groups as groups
from vtc.choice import Seen
from vtc.grids import cells, squares
from vtc.methods.window import Kernel, pooled
from vtc.observe import LastTokenRow
from vtc.stage import Layer, Method, Shape, Stage


@dataclass(frozen=True)
class SpecPrefill(Method):
    """Before decoder layer K keep the chunks of an image that some head of the layers so far attends to most.

    "Speculative Prefill: Turbocharging TTFT with Lightweight and Training-Free Token Importance Estimation" (arXiv
    2502.02789): the attention of the last prompt token, pooled over neighbours, its maximum over all layers and heads,
    averaged over chunks; positions stay the original ones. The paper's judge is a small model that reads the whole
    prompt and looks a few tokens ahead; here it is the model's own first K layers, which cannot look ahead and whose
    time is part of the prefill. Chunks are squares of an image's grid, where the paper has 32 tokens of text, and
    neighbours those on the grid. The last chunk that stays may stay in part: a budget is met to the token.
    """

    layer: Layer | None = None
    """K. None: a quarter of the decoder's depth."""
    kernel: Kernel = 3
    chunk: Annotated[int, Field(ge=1)] = 2
    """Cells on the side of a chunk."""

    name: ClassVar[str] = "specprefill"
    paper: ClassVar[str] = "SpecPrefill, arXiv 2502.02789"
    space: ClassVar[dict[str, tuple[float, float]]] = {"layer": (1, 16), "chunk": (1, 4)}

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        (layer,) = shape.layers(None if self.layer is None else (self.layer,), 1, of=4)
        needs = tuple(map(LastTokenRow, range(layer)))

        def score(seen: Seen) -> Tensor:
            heads = torch.cat([seen[need] for need in needs], dim=1)
            chunk = seen.by_grids(partial(squares, side=self.chunk))[0]
            most = pooled(heads, seen, self.kernel).amax(1)
            return groups.means(most, chunk, seen.valid, max(map(cells, seen.parts))).gather(1, chunk)

        return (Stage(layer, score, needs),)
