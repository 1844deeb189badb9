"""The baseline of precision: random visual keys and values at more bits, the others at fewer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

from pydantic import Field

from vtc.cache.packed import Grain
from vtc.cache.precision import Precision
from vtc.methods.random_kv import drawn
from vtc.methods.window import AfterPrefill
from vtc.stage import Cache, Shape, Stage


@dataclass(frozen=True)
class Bits(AfterPrefill):
    """Keep all visual tokens in each layer's cache, at 16, 8, 4 or 2 bits a number, as a budget of bytes allows.

    Tokens are at one number of bits or at the next one, and which of them are at more is drawn as in `random-kv`: what
    a method that knows which are important has to beat. Rounding is that of "KIVI: A Tuning-Free Asymmetric 2bit
    Quantization for KV Cache" (arXiv 2402.02750): each channel of keys has a scale, and each token's values; but over
    all tokens of a level at once. It saves memory, and neither the first token nor what a step reads.
    """

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    name: ClassVar[str] = "bits"
    paper: ClassVar[str] = "baseline"

    def stage(self, layer: int, shape: Shape) -> Stage:
        grains = Grain(channels=1, tokens=True), Grain()
        precision = Precision((16, 8, 4, 2), *grains, shape.key_heads, shape.head_dim, shape.bits)
        scores = partial(drawn, self.seed, layer, shape.key_heads)
        return Stage(Cache(layer), scores, select=precision.select, precision=precision)
