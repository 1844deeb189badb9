"""FasterVLM: rank patches by the attention of the vision tower's [CLS] token in one block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import vtc.scores as scores
import vtc.select as select
from vtc.observe import salience
from vtc.stage import Method, Shape, Stage


@dataclass(frozen=True)
class FasterVLM(Method):
    """Keep the patches that the [CLS] token attends to most in the block of the tower that the projector reads.

    "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster" (arXiv
    2412.01818, version 1), released code: the head-mean of the post-softmax CLS row of one block; each crop keeps its
    share. A tower without a CLS token scores by the mean attention that a patch receives. The code renumbers survivors
    without gaps; here they keep their original positions.
    """

    name: ClassVar[str] = "fastervlm"
    paper: ClassVar[str] = "FasterVLM, arXiv 2412.01818"

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        need = salience(shape, shape.tower_layers - 1)
        return (Stage(0, lambda seen: scores.head_mean(seen[need]), (need,), select.top_k_each),)
