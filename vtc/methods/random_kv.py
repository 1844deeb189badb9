"""The baseline of the cache site: random keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated, ClassVar

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor

from vtc.choice import Seen
from vtc.grids import cells
from vtc.methods.window import AfterPrefill
from vtc.stage import Cache, Shape, Stage


@dataclass(frozen=True)
class RandomKv(AfterPrefill):
    """Keep a random subset of the visual keys and values in each layer's cache, for decoding; prefill is as before.

    The subset depends on the seed, the layer, the head and the patch's place alone.
    """

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    per_head: bool = True
    """Whether each key head keeps its own."""

    name: ClassVar[str] = "random-kv"
    paper: ClassVar[str] = "baseline"

    def stage(self, layer: int, shape: Shape) -> Stage:
        scores = partial(drawn, self.seed, layer, shape.key_heads if self.per_head else 1)
        return Stage(Cache(layer), scores if self.per_head else lambda seen: scores(seen)[:, 0])


def drawn(seed: int, layer: int, heads: int, seen: Seen) -> Tensor:
    """Random numbers: (images, heads, tokens)."""
    bits = max(14, max(map(cells, seen.parts), default=0).bit_length())
    numbers = _draw(seed, layer, heads, bits).to(seen.index.device)
    return rearrange(numbers[seen.index], "image token head -> image head token")


@lru_cache(maxsize=128)
def _draw(seed: int, layer: int, heads: int, bits: int) -> Tensor:
    """(2^bits, heads), more than any image has patches; a longer one begins with a shorter one, so that a patch's draw
    does not depend on the others."""
    return torch.rand(1 << bits, heads, generator=torch.Generator().manual_seed(seed * 1009 + layer))
