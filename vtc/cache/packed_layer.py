"""A layer of a cache that holds some of its tokens at fewer bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vtc.core.compact as compact
from vtc.cache.own_layer import OwnLayer
from vtc.cache.packed import Packed, order
from vtc.cache.precision import Precision
from vtc.core.columns import Columns
from vtc.core.stream import Stream


class PackedLayer(OwnLayer):
    """A layer some of whose keys and values are packed. `keys` and `values` are the others, as they are.

    What is read stands where it stood, so that nothing else need know. The whole layer is dequantised anew for each
    step: that saves memory, but a step reads what is packed, and writes and reads a layer of full size besides.
    """

    OWN = ("level", "packed")
    level: Tensor
    """(batch, key_heads, length) uint8: 0 for what is as it is, n for the n-th of all levels that are packed."""
    packed: tuple[tuple[Packed, Packed], ...]
    """Keys and values of each prompt's visual tokens."""

    @classmethod
    def made_of(cls, layer: Any) -> PackedLayer:
        """A layer of a `DynamicCache`, changed in place."""
        if type(layer) is not cls:
            layer.__class__ = cls
            layer.level, layer.packed = torch.zeros_like(layer.keys[..., 0], dtype=torch.uint8), ()
        return layer

    @property
    def plain(self) -> tuple[Tensor, Tensor]:
        """The keys and values that are not packed."""
        return self.keys, self.values

    def take(self, now: Columns, stream: Stream, bits: Tensor, precision: Precision) -> None:
        """Pack of a stream, which it has just taken in, visual tokens at `bits` (images, [key_heads,] tokens); it holds
        the columns `now`. Raises ValueError where the model computes with another number of bits."""
        if self.dtype.itemsize * 8 != precision.native:
            raise ValueError(
                f"the cache is {self.dtype}, and the model had {precision.native} bits a number: wrap it again"
            )
        heads, reach = self.level.shape[1], None
        place = now.by_head(heads).place - stream.start
        own = stream.graded(bits).expand(-1, heads, -1).gather(2, place.clamp(min=0)).masked_fill(place < 0, 0)
        if precision.reach is not None:
            reach = torch.ones(len(own), heads * precision.head_dim, device=own.device)
            reach[stream.row] = stream.rows[precision.reach][..., 0]
            reach = reach.view(len(own), heads, -1)
        self.pack(own, precision, reach)

    def pack(self, bits: Tensor, precision: Precision, reach: Tensor | None) -> None:
        """Hold what `bits` (batch, key_heads, length) are not 0 of at these."""
        both, level, parts = self.read(), self.level.clone(), []
        number = sum(len(keys.levels) for keys, _ in self.packed)
        for wanted in precision.levels:
            if max(counts := (bits == wanted).sum(-1).flatten().tolist()):
                chosen = _chosen(both, bits == wanted, counts)
                parts.append((wanted, *chosen))
                if wanted < 16:
                    number += 1
                    level[bits == wanted] = number
        self.keys, self.values, _ = _chosen(both, level == 0, (level == 0).sum(-1).flatten().tolist())
        self.level, self.packed = level, (*self.packed, precision.pack(parts, reach))

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys and values: (batch, key_heads, length, head_dim)."""
        if not self.packed:
            return self.plain
        levels = [codes.tokens for keys, _ in self.packed for codes in keys.levels]
        index = order(self.level, [self.plain[0].shape[2], *levels])
        keys, values = (
            torch.cat([plain, *(x.to(plain) for packed in side for x in packed.numbers())], dim=2)
            for plain, side in zip(self.plain, zip(*self.packed, strict=True), strict=True)
        )
        return compact.gather_heads(keys, index), compact.gather_heads(values, index)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds, with all scales, zeros, factors and levels."""
        packed = sum(keys.nbytes + values.nbytes for keys, values in self.packed)
        return sum(x.nbytes for x in (*self.plain, self.level)) + packed

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        super().update(key_states, value_states)
        self.level = torch.nn.functional.pad(self.level, (0, key_states.shape[2]))
        return self.read()

    def get_seq_length(self) -> int:
        return self.level.shape[2]

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.level = self.level[..., : self.level.shape[2] - abs(tokens_to_remove)]

    def rows(self, index: Tensor) -> None:
        index = index.to(self.level.device)
        self.level, self.packed = self.level[index], tuple((k.rows(index), v.rows(index)) for k, v in self.packed)


def _chosen(both: tuple[Tensor, Tensor], chosen: Tensor, counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The `chosen` (batch, key_heads, length) of keys and values, `counts` of each head, and which of them are real."""
    plan = compact.plan(chosen.flatten(0, 1), counts)
    index = plan.index.view(*chosen.shape[:2], -1)
    real = torch.ones_like(index, dtype=torch.bool) if plan.real is None else plan.real.view(index.shape)
    return compact.gather_heads(both[0], index), compact.gather_heads(both[1], index), real
