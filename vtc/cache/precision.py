"""At which bits a layer's cache keeps its visual tokens, and what size they have then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vtc.cache.packed import BITS, HALF, Grain, Packed
from vtc.choice import Choice, Seen
from vtc.need import Need
from vtc.scores import rank


@dataclass(frozen=True)
class Precision:
    """At which bits a stage keeps the visual tokens of a layer's cache, in place of dropping any.

    A size is that of one image's tokens in one layer, and is told in tokens that are held as they are: so budgets mean
    bytes. It has a byte of each token and head in it that says what it is at, but none of the text's own such bytes;
    images of one prompt share what they need not hold twice.
    """

    levels: tuple[int, ...]
    """Bits a number of the most important tokens, of the next ones, ..., of all others; 16 and more: as they are."""
    key: Grain
    value: Grain
    heads: int
    """Of keys and values in a layer."""
    head_dim: int
    native: int
    """Bits a number that the model computes with."""
    reach: Need | None = None
    """What sees the largest absolute value of each channel of the queries, (images, key_heads * head_dim, tokens):
    channels of keys are multiplied by the root of that over their own largest one."""

    def __post_init__(self) -> None:
        if any(bits not in BITS and bits < 16 for bits in self.levels):
            raise ValueError(
                f"bits {self.levels}: 16 stands for as it is, and {', '.join(map(str, BITS))} can be packed"
            )
        if list(self.levels) != sorted({*self.levels}, reverse=True):
            raise ValueError(f"bits {self.levels} must fall: the first are those of the most important tokens")
        if any(self.head_dim * bits % 8 for bits in self.packed):
            raise ValueError(
                f"numbers of {min(self.packed)} bits do not fill bytes: heads have {self.head_dim} channels"
            )

    @property
    def packed(self) -> tuple[int, ...]:
        """The levels that are packed."""
        return tuple(bits for bits in self.levels if bits < 16)

    @property
    def _unit(self) -> float:
        """Bytes of a token of one head as it is."""
        return 2 * self.head_dim * self.native / 8

    def _each(self, bits: int) -> float:
        """The size of a token."""
        if bits >= 16:
            return 1 + 1 / self._unit
        scales = sum(grain.scales(self.heads, self.head_dim)[0] for grain in (self.key, self.value))
        return (1 + 2 * self.head_dim * bits / 8 + 2 * HALF * scales) / self._unit

    def _besides(self, levels: int) -> float:
        """The size of what tokens share, where so many levels are packed."""
        scales = sum(grain.scales(self.heads, self.head_dim)[1] for grain in (self.key, self.value))
        factors = (self.reach is not None) + self.key.evened + self.value.evened
        return HALF * (2 * levels * scales + min(levels, 1) * factors * self.head_dim) / self._unit

    def all_at(self, bits: int, tokens: float) -> float:
        """The size of so many tokens, all of them at one number of bits."""
        return tokens * self._each(bits) + self._besides(int(bits < 16))

    def least(self, tokens: float) -> float:
        """The size at the fewest bits."""
        return self.all_at(self.levels[-1], tokens)

    def size(self, bits: Tensor) -> Tensor:
        """(images,) float32, where tokens (images, [key_heads,] tokens) are at so many bits, and 0 is no token."""
        alike = bits if bits.ndim == 2 else bits[:, 0]  # all heads have as many of each
        counts = torch.stack([(alike == level).sum(1) for level in self.levels], dim=1).cpu()
        packed = (counts > 0)[:, len(self.levels) - len(self.packed) :].sum(1)
        each = torch.tensor([self._each(level) for level in self.levels])
        return counts.float() @ each + torch.tensor([self._besides(n) for n in range(len(BITS) + 1)])[packed]

    def select(self, scores: Tensor, seen: Seen, keep: Tensor) -> Choice:
        """A `Select`: the bits of each token, so that the size of each image is nearest to `keep`, give or take half a
        token and what a level shares that no token is at.

        More important tokens get no fewer bits; among equals the earlier ones are more important.
        """
        place, number = rank(scores, seen.valid), seen.valid.sum(1)
        bits = torch.full_like(place, self.levels[-1])
        for more, less in reversed(list(pairwise(self.levels))):
            if (gain := self._each(more) - self._each(less)) > 0:
                room = keep - self._besides(1 if more >= 16 else 2)
                raised = ((room - number * self._each(less)) / gain).round()
                raised = raised.where(keep < number * self._each(more) + self._besides(int(more < 16)) - 1e-3, number)
                bits = bits.masked_fill(place < raised[:, None], more)
        return Choice(seen.valid, bits=bits.masked_fill(~seen.valid, 0))

    def pack(self, parts: Sequence[tuple[int, Tensor, Tensor, Tensor]], reach: Tensor | None) -> tuple[Packed, Packed]:
        """Keys and values of parts (bits, keys, values, which are real); `reach` (batch, key_heads, head_dim)."""
        keys, values = ([(bits, pair[side].float(), real) for bits, *pair, real in parts] for side in (0, 1))
        factors = [_largest(part).rsqrt() if grain.evened else None
                   for part, grain in ((keys, self.key), (values, self.value))]  # fmt: skip
        if reach is not None:
            factors[0] = (reach[:, :, None].clamp(min=LEAST) / _largest(keys)).sqrt()
        packed = [(bits < 16) for bits, *_ in parts]
        keys, values = ([part for part, small in zip(side, packed, strict=True) if small] for side in (keys, values))
        return Packed.of(keys, factors[0], self.key), Packed.of(values, factors[1], self.value)


LEAST = 1e-6


def _largest(parts: Sequence[tuple[int, Tensor, Tensor]]) -> Tensor:
    """(batch, key_heads, 1, head_dim): the largest absolute value of each channel."""
    largest = [x.abs().masked_fill(~real[..., None], 0).amax(2, keepdim=True) for _, x, real in parts]
    return torch.stack(largest).amax(0).clamp(min=LEAST)
