"""Keys and values at 8, 4 or 2 bits a number: quantised, and packed into bytes.

Rounding is asymmetric and to the nearest: numbers that share a scale s and a zero z are held as codes c, and read as
z + s c. What shares them is a method's choice (`Grain`); scales and zeros are float16, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

BITS = (8, 4, 2)
"""Bits a number that can be packed; a token of more is held as it is."""
HALF = 2
"""Bytes of a scale, a zero or a factor."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes below 2 ** bits, (..., width), as bytes: (..., width * bits / 8)."""
    parts = codes.chunk(8 // bits, dim=-1)
    return torch.stack([part << bits * number for number, part in enumerate(parts)]).sum(0, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes that were packed."""
    return torch.cat([packed >> bits * number & 2**bits - 1 for number in range(8 // bits)], dim=-1)


@dataclass(frozen=True)
class Grain:
    """Which numbers of (batch, key_heads, tokens, head_dim) share a scale and a zero, and what comes before."""

    channels: int | None = None
    """As many neighbouring channels of a head; None: all of them."""
    tokens: bool = False
    """Whether all tokens share them."""
    heads: bool = False
    """Whether the n-th tokens of all heads share them."""
    evened: bool = False
    """Whether each channel is divided by the root of its largest absolute value first."""

    def scales(self, heads: int, head_dim: int) -> tuple[float, float]:
        """Scales of one head: for each token, and besides."""
        number = head_dim / (self.channels or head_dim) / (heads if self.heads else 1)
        return (0.0, number) if self.tokens else (number, 0.0)


@dataclass(frozen=True, eq=False)
class Codes:
    """Some tokens' numbers at one number of bits."""

    packed: Tensor
    """(batch, key_heads, tokens, head_dim * bits / 8) uint8."""
    scale: Tensor
    """float16, as `zero`: (batch, key_heads or 1, tokens or 1, groups, 1)."""
    zero: Tensor
    bits: int

    @classmethod
    def of(cls, x: Tensor, real: Tensor, bits: int, grain: Grain) -> Codes:
        """Of x (batch, key_heads, tokens, head_dim) float32 where it is `real` (batch, key_heads, tokens).

        Raises ValueError for numbers beyond the range of float16.
        """
        groups = rearrange(x, "b h n (g c) -> b h n g c", c=grain.channels or x.shape[-1])
        dims = [4, *[2] * grain.tokens, *[1] * grain.heads]
        hidden = ~real[..., None, None]
        low, high = groups.masked_fill(hidden, torch.inf), groups.masked_fill(hidden, -torch.inf)
        low, high = low.amin(dims, keepdim=True), high.amax(dims, keepdim=True)
        filling = low > high
        low, high = low.masked_fill(filling, 0), high.masked_fill(filling, 0)
        zero, scale = low.half(), ((high - low) / (2**bits - 1)).clamp(min=TINY).half()
        if not torch.isfinite(torch.stack((zero, scale))).all():
            raise ValueError("keys and values beyond the range of float16 cannot be quantised")
        codes = ((groups - zero) / scale).round().clamp(0, 2**bits - 1).to(torch.uint8)
        return cls(pack(codes.flatten(3), bits), scale, zero, bits)

    @property
    def tokens(self) -> int:
        return self.packed.shape[2]

    def numbers(self) -> Tensor:
        """What is read: (batch, key_heads, tokens, head_dim) float32."""
        codes = unpack(self.packed, self.bits)
        groups = codes.unflatten(3, (self.scale.shape[3], -1))
        return (groups * self.scale.float() + self.zero).flatten(3)

    def rows(self, index: Tensor) -> Codes:
        return Codes(self.packed[index], self.scale[index], self.zero[index], self.bits)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes + self.zero.nbytes


TINY = 2.0**-24
"""The smallest number that float16 holds: no scale is less."""


@dataclass(frozen=True, eq=False)
class Packed:
    """Keys, or values, of a layer's visual tokens: those of one level after the other."""

    levels: tuple[Codes, ...]
    factor: Tensor | None
    """(batch, key_heads, 1, head_dim) float16: what each channel was multiplied by before it was quantised."""

    @classmethod
    def of(cls, parts: Sequence[tuple[int, Tensor, Tensor]], factor: Tensor | None, grain: Grain) -> Packed:
        """Of parts (bits, numbers, which of them are real): see `Codes.of`."""
        if factor is not None:
            factor = factor.half()
            parts = [(bits, x * factor, real) for bits, x, real in parts]
        return cls(tuple(Codes.of(x, real, bits, grain) for bits, x, real in parts), factor)

    def numbers(self) -> list[Tensor]:
        """Of each level (batch, key_heads, tokens, head_dim) float32."""
        numbers = [codes.numbers() for codes in self.levels]
        return numbers if self.factor is None else [x / self.factor for x in numbers]

    def rows(self, index: Tensor) -> Packed:
        """Of other rows of the batch."""
        factor = None if self.factor is None else self.factor[index]
        return Packed(tuple(codes.rows(index) for codes in self.levels), factor)

    @property
    def nbytes(self) -> int:
        return sum(codes.nbytes for codes in self.levels) + (0 if self.factor is None else self.factor.nbytes)


def order(level: Tensor, counts: Sequence[int]) -> Tensor:
    """Where each position finds its entry behind one another: (batch, key_heads, positions) int64.

    Args:
        level: (batch, key_heads, positions): 0 for what is not packed, n for the n-th of the packed levels.
        counts: entries of each, 0 the first; a row that has fewer is filled up at the start.
    """
    found, start = torch.zeros_like(level, dtype=torch.long), 0
    for number, count in enumerate(counts):
        here = level == number
        place = here.long().cumsum(-1) + start + count - 1 - here.sum(-1, keepdim=True)
        found, start = place.where(here, found), start + count
    return found
