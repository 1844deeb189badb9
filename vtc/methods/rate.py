"""Rate: keep a few pivots along a random direction, and the tokens that are least like them; of vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn.functional import normalize

from vtc.choice import Seen
from vtc.observe import TokenStates
from vtc.stage import Method, Shape, Stage


@dataclass(frozen=True)
class Rate(Method):
    """Keep pivots, evenly spaced in the value of a random projection, and the tokens with the lowest cosines to them.

    vLLM's image pruning by "rate", as proposed there (pull request 60963); no paper. Unit tokens are projected on 8
    random directions, whose sum lays them on a line. The line between its 1 % tails is cut into N / 32 equal bins; the
    first tokens at or behind their borders are the pivots. They stay; the others go by their mean cosine to the pivots,
    the lowest stay. Where fewer may stay than there are pivots, those of them that are least alike do.

    In the revision that was read bins have no or a negative width (the tails are subtracted the wrong way round), so
    that a prefix of the image stays; this is what it means. The directions depend on the seed alone, so that a row
    gets the same ones in any batch.
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    tokens_per_bin: PositiveInt = 32
    tail: Annotated[float, Field(ge=0, lt=0.5)] = 0.01
    """The share of tokens at each end of the line that lies outside all bins."""

    name: ClassVar[str] = "rate"
    paper: ClassVar[str] = "of vLLM"

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        features = TokenStates(0)

        def novelty(seen: Seen) -> Tensor:
            unit = normalize(seen[features], dim=1).masked_fill(~seen.valid[:, None], 0)
            pivots = self._pivots((unit * _direction(unit.shape[1], self.seed).to(unit)).sum(1), seen.valid)
            mean = (unit * pivots[:, None]).sum(2, keepdim=True) / pivots.sum(1)[:, None, None].clamp(min=1)
            return 2 * pivots - (unit * mean).sum(1)  # no cosine makes up for not being a pivot

        return (Stage(0, novelty, (features,)),)

    def _pivots(self, line: Tensor, valid: Tensor) -> Tensor:
        """The first tokens at or behind the borders of the bins on the line (images, tokens): bool of that shape."""
        line, order = line.masked_fill(~valid, torch.inf).sort(dim=1, stable=True)
        number = valid.sum(1, keepdim=True)
        ends = [(share * (number - 1)).round().long().clamp(min=0) for share in (self.tail, 1 - self.tail)]
        low, high = (line.gather(1, end) for end in ends)
        bins = (number // self.tokens_per_bin).clamp(min=1)
        border = torch.arange(int(bins.max()) + 1, device=line.device)
        places = torch.searchsorted(line, torch.lerp(low, high, border / bins))
        real = (border <= bins) & (number > 0)
        places = places.clamp(max=line.shape[1] - 1).where(real, line.shape[1])
        spare = torch.zeros(len(line), line.shape[1] + 1, dtype=torch.bool, device=line.device)
        sorted_pivots = spare.scatter(1, places, True)[:, :-1]
        return torch.zeros_like(valid).scatter(1, order, sorted_pivots) & valid


@lru_cache(maxsize=16)
def _direction(width: int, seed: int) -> Tensor:
    """The sum of 8 random directions: (width, 1)."""
    return torch.randn(8, width, generator=torch.Generator().manual_seed(seed)).sum(0)[:, None]
