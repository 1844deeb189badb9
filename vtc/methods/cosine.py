"""Cosine: keep the tokens that are least like all others; proposed to vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from vtc.choice import Seen
from vtc.observe import TokenStates
from vtc.stage import Method, Shape, Stage


@dataclass(frozen=True)
class Cosine(Method):
    """Keep the projected tokens whose cosines with all others of the image have the lowest sum.

    Image pruning by "cosine", as proposed to vLLM (pull request 60963 and a rival branch); no paper. Of N tokens the
    proposal keeps max(1, floor(N (1 - q))) at the rate q; here a budget says how many. Survivors keep their positions.
    """

    name: ClassVar[str] = "cosine"
    paper: ClassVar[str] = "of vLLM"

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        features = TokenStates(0)

        def novelty(seen: Seen) -> Tensor:
            unit = normalize(seen[features], dim=1).masked_fill(~seen.valid[:, None], 0)
            return 1 - (unit * unit.sum(2, keepdim=True)).sum(1)

        return (Stage(0, novelty, (features,)),)
