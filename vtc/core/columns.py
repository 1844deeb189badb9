"""A token is its column: the position that it had in the unpruned prompt, over all turns; -1 is filling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtc.core.compact import Plan, gather, plan


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns of a sequence: of the running stream, or of the keys that a decoder layer holds."""

    place: Tensor
    """(batch, length) int64; (batch, key_heads, length) where the heads of a layer hold different tokens."""
    ragged: bool = False
    """Whether there may be filling. Known on the host, as is `whole`: nothing waits for the device to decide."""
    whole: bool = True
    """Whether no token has left."""
    weight: Tensor | None = None
    """As `place`, float32: as how many tokens each one counts, as a key; None: as one."""

    @classmethod
    def counted(cls, start: int, real: Tensor | None, shape: tuple[int, int], device: Any) -> Columns:
        """All columns from `start` on, for a sequence of `shape` (batch, length), where it is `real`."""
        place = torch.arange(start, start + shape[1], device=device).expand(shape)
        return cls(place if real is None else place.masked_fill(~real, -1), ragged=real is not None)

    @property
    def length(self) -> int:
        return self.place.shape[-1]

    def then(self, new: Columns) -> Columns:
        """These keys and then those of a stream."""
        if not self.length:
            return new
        batch, device, heads = len(new.place), new.place.device, self.place.shape[1:-1]

        def wide(x: Tensor, like: Tensor) -> Tensor:
            return x.to(device).view(len(x), *(1,) * (like.ndim - x.ndim), *x.shape[1:]).expand(batch, *heads, -1)

        place = torch.cat((wide(self.place, self.place), wide(new.place, self.place)), dim=-1)
        weight = None
        if self.weight is not None or new.weight is not None:
            parts = (x.place.new_ones((), dtype=torch.float32).expand(x.place.shape) if x.weight is None else x.weight
                     for x in (self, new))  # fmt: skip
            weight = torch.cat([wide(part, self.place) for part in parts], dim=-1)
        return Columns(place, self.ragged or new.ragged, self.whole and new.whole, weight)

    def kept(self, plan: Plan) -> Columns:
        """What a plan over (batch, length), or over (batch * key_heads, length), leaves."""
        shape = (*self.place.shape[:-1], plan.index.shape[1])
        place = gather(self.place.flatten(0, -2), plan.index)
        if plan.real is not None:
            place = place.masked_fill(~plan.real, -1)
        weight = None if self.weight is None else gather(self.weight.flatten(0, -2), plan.index).view(shape)
        return Columns(place.view(shape), plan.real is not None, False, weight)

    def staying(self, before: Columns, stays: Tensor, lengths: list[int]) -> tuple[Columns, Tensor]:
        """What stays of the keys of a layer, which are those `before` and then a stream's.

        That is all of the first, and of the second where `stays` (batch, [key_heads,] length) bool says so, `lengths`
        in each row. Returns columns, and where they were: (batch, key_heads or 1, kept) int64.
        """
        now = self.by_head(stays.shape[1]) if stays.ndim > self.place.ndim else self
        heads, everything = now.place[0].numel() // now.length, now.place >= 0
        everything[..., before.length :] = stays if stays.ndim == everything.ndim else stays[:, None]
        counts = torch.tensor(lengths)[:, None].expand(-1, heads)
        held = everything[..., : before.length].sum(-1).view(-1, heads).cpu() if before.ragged else before.length
        chosen = plan(everything.flatten(0, -2), (counts + held).flatten().tolist())
        return now.kept(chosen), chosen.index.view(len(now.place), heads, -1)

    def hidden_by(self, shown: Tensor) -> bool:
        """Whether a mask (batch, columns) bool hides any of these. That waits for the device."""
        place, shown = self.place.flatten(1), shown.to(self.place.device)
        return bool((~shown.gather(1, place.clamp(min=0)) & (place >= 0)).any())

    def by_head(self, heads: int) -> Columns:
        """The same for each of a layer's key heads."""
        if self.place.ndim == 3:
            return self
        return self._each(lambda x: x[:, None].expand(-1, heads, -1))

    def cropped(self, count: int) -> Columns:
        """Without the last `count`."""
        return self.among(0, self.length - count)

    def among(self, start: int, end: int | None = None) -> Columns:
        """Those from the place `start` to `end` in the sequence."""
        return self._each(lambda x: x[..., start:end])

    def rows(self, index: Tensor) -> Columns:
        """Other rows of the batch."""
        return self._each(lambda x: x[index.to(x.device)])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Columns:
        weight = None if self.weight is None else change(self.weight)
        return replace(self, place=change(self.place), weight=weight)
