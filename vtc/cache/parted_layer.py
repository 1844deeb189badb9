"""A layer of a cache whose visual tokens lie apart, so that a step can read some of them only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vtc.core.compact as compact
from vtc.cache.own_layer import OwnLayer
from vtc.core.columns import Columns
from vtc.core.shared import Shared
from vtc.core.stream import Stream


@dataclass(frozen=True, eq=False)
class Parting:
    """How what a layer has taken in is laid apart."""

    columns: Columns
    """What it holds after that: the visual tokens, and then the text."""
    taken: Tensor
    """(batch, tokens): where the visual tokens are, among the keys that do not lie apart yet."""
    stays: Tensor
    """(batch, others): where the rest of those is."""
    number: Tensor
    """(batch,) int64: how many of the visual tokens a step reads of each row."""
    most: int
    """The highest of these numbers, known on the host."""
    even: bool
    """Whether all rows read as many."""

    @classmethod
    def of(cls, before: Columns, now: Columns, stream: Stream, apart: int, counts: tuple[int, ...]) -> Parting:
        """Of a layer that held `before`, whose first `apart` keys lie apart already, and then took in a stream, which
        made it `now`. Steps are to read `counts` tokens of each image."""
        lengths, reads = [0] * len(stream.lengths), [0] * len(stream.lengths)
        for row, left, count in zip(stream.batch_rows, stream.counts, counts, strict=True):
            lengths[row] += left
            reads[row] += count
        plain, text = now.among(apart), stream.stays(torch.zeros_like(stream.valid))
        visual = F.pad((stream.columns.place >= 0) & ~text, (before.length - apart, 0))
        taken = compact.plan(visual, lengths)
        others = [row - images for row, images in zip(stream.lengths, lengths, strict=True)]
        rest, stays = plain.staying(before.among(apart), text, others)
        columns = now.among(0, apart).then(plain.kept(taken)).then(rest)
        number = torch.tensor(reads).to(visual.device, non_blocking=True)
        return cls(columns, taken.index, stays[:, 0], number, max(reads), min(reads) == max(reads))


Choose = Callable[[], Tensor]
"""Which visual tokens a step reads: (batch, `PartedLayer.most`) int64, those of a row that reads fewer at its end."""


class PartedLayer(OwnLayer):
    """A layer that holds visual tokens beside `keys` and `values`, which are those of the text and grow with it.

    The kernel is handed the visual ones first. Those that a step reads are gathered; what has been read stays where it
    is, and the visual tokens are not copied when the layer grows, as all else of a `DynamicLayer` is.
    """

    OWN = ("visual", "number", "most", "even", "last", "choose")
    visual: tuple[Tensor, Tensor]
    """Keys and values: (batch, key_heads, tokens, head_dim), rows that have fewer filled up at the start."""
    number: Tensor
    most: int
    """As in `Parting`, of all turns; where rows have been selected, perhaps more than any row reads."""
    even: bool
    last: tuple[Tensor, Tensor] | None
    """What the last choice was made for, (batch, channels) float32, and what it was."""
    choose: Choose | None
    """What the step that is running chooses by, once it has come so far; None: all is read."""

    @classmethod
    def made_of(cls, layer: Any) -> PartedLayer:
        """A layer of a `DynamicCache`, changed in place."""
        if type(layer) is not cls:
            layer.__class__ = cls
            layer.visual = layer.keys[:, :, :0], layer.values[:, :, :0]
            layer.number = torch.zeros(len(layer.keys), dtype=torch.long, device=layer.device)
            layer.most, layer.even = 0, True
        layer.last = layer.choose = None
        return layer

    @property
    def apart(self) -> int:
        return self.visual[0].shape[2]

    @property
    def handed(self) -> int:
        """How many of its keys the kernel gets in the step that is running."""
        return super().get_seq_length() + (self.apart if self.choose is None else self.most)

    def part(self, before: Columns, now: Columns, stream: Stream, counts: tuple[int, ...], shared: Shared) -> Columns:
        """Lay the visual tokens of a stream beside those that lie apart: see `Parting.of`. Returns what is held then.

        Raises ValueError for keys that count several times, or differ by head.
        """
        if now.weight is not None or now.place.ndim == 3:
            raise ValueError(
                "keys that count several times, or that differ by head, cannot be chosen anew at each step: take a "
                "method that only drops before this one, and a new cache"
            )
        how: Parting = shared(Parting.of, before, now, stream, self.apart, counts)
        taken = [compact.gather_heads(x, how.taken[:, None]) for x in (self.keys, self.values)]
        keys, values = (torch.cat(pair, dim=2) for pair in zip(self.visual, taken, strict=True))
        self.visual = keys, values
        self.values, self.keys = (compact.gather_heads(x, how.stays[:, None]) for x in (self.values, self.keys))
        self.number = self.number + how.number if self.most else how.number
        self.most, self.even = self.most + how.most, self.even and how.even
        return how.columns

    def settled(self, query: Tensor, chosen: Tensor, least: float) -> tuple[Tensor, Tensor]:
        """The choice of an earlier step in each row where `query` (batch, channels) is alike, else the one that was
        `chosen`; and which rows those are: (batch,) bool."""
        if self.last is None:
            self.last = query, chosen
            return chosen, query.new_zeros(len(query), dtype=torch.bool)
        before, earlier = self.last
        alike = F.cosine_similarity(query, before) >= least
        settled = earlier.where(alike[:, None], chosen)
        self.last = before.where(alike[:, None], query), settled
        return settled, alike

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys and values: (batch, key_heads, length, head_dim)."""
        keys, values = (torch.cat(pair, dim=2) for pair in zip(self.visual, (self.keys, self.values), strict=True))
        return keys, values

    @property
    def nbytes(self) -> int:
        """Bytes that it holds, with the last choice and what it was made for."""
        return sum(x.nbytes for x in (self.keys, self.values, *self.visual, self.number, *(self.last or ())))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        plain, choose, self.choose = super().update(key_states, value_states), self.choose, None
        if choose is None:
            return self.read()
        index = choose()[:, None]
        keys, values = (
            torch.cat((compact.gather_heads(visual, index), x), dim=2)
            for visual, x in zip(self.visual, plain, strict=True)
        )
        return keys, values

    def get_seq_length(self) -> int:
        return self.apart + super().get_seq_length()

    def crop(self, tokens_to_remove: int) -> None:
        """What was chosen for a token that leaves is forgotten: the next step chooses anew."""
        super().crop(tokens_to_remove)
        self.last = None if tokens_to_remove else self.last

    def rows(self, index: Tensor) -> None:
        index = index.to(self.number.device)
        keys, values = (x[index] for x in self.visual)
        self.visual, self.number = (keys, values), self.number[index]
        self.last = None if self.last is None else (self.last[0][index], self.last[1][index])
