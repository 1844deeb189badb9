"""The first baseline: a random subset."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vtc.choice import Seen
from vtc.stage import Method, Shape, Stage


@dataclass(frozen=True)
class Random(Method):
    """Keep a random subset before the decoder; the baseline that many methods fail to beat.

    The subset depends on the seed and the patch's place alone, so that a row gets the same one in any batch.
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "baseline"

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        return (Stage(0, self._scores),)

    def _scores(self, seen: Seen) -> Tensor:
        tokens = seen.valid.shape[1]
        draw = _draw(self.seed, max(16, tokens.bit_length()))[:tokens]
        return draw.to(seen.valid.device).expand_as(seen.valid)


@lru_cache(maxsize=16)
def _draw(seed: int, bits: int = 16) -> Tensor:
    """One long draw, of which every image takes the beginning: so it does not depend on the batch around the image.

    It has 2^bits numbers, and a longer one begins with a shorter one.
    """
    return torch.rand(1 << bits, generator=torch.Generator().manual_seed(seed))
