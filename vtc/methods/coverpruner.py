"""CoverPruner: keep the tokens that stand best for all that the question asks about."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

import vtc.cover as cover
import vtc.scores as scores
from vtc.choice import Seen
from vtc.observe import TextRow, TokenStates
from vtc.stage import Method, Shape, Stage


@dataclass(frozen=True)
class CoverPruner(Method):
    """Facility location over the projected tokens: each asks for a good likeness among the kept, as the question cares.

    CoverPruner (arXiv 2609.03158), from its abstract and notes: greedy maximisation of sum_i w_i max_j s_ij over the
    kept j, s the cosine of mean-centred projected tokens, no less than 0, and w demands from an attention probe of the
    first decoder layer. Not stated there, and chosen here: the probe is the mean over heads and over the text after the
    image of that layer's attention, on what enters the decoder; w is its share of the image. An image without later
    text asks for all its tokens alike. Only the probe's queries and keys are computed twice: nothing else of the layer
    runs before tokens leave. Survivors keep their positions.
    """

    name: ClassVar[str] = "coverpruner"
    paper: ClassVar[str] = "CoverPruner, arXiv 2609.03158"

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        features, probe = TokenStates(0), TextRow(0)

        def demand(seen: Seen) -> Tensor:
            asked = seen[probe][:, 0].masked_fill(~seen.valid, 0)
            return scores.share(asked.where(asked.any(1, keepdim=True), 1), seen.valid)

        return (Stage(0, demand, (features, probe), partial(cover.facility, of=features)),)
