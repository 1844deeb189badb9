"""The sequence that runs through the decoder: its columns, its visual tokens, and what was seen of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import vtc.compact as compact
import vtc.merge as merge
from vtc.choice import Choice, Seen
from vtc.columns import Columns
from vtc.features import Placed
from vtc.grids import Grid
from vtc.need import Need


@dataclass(frozen=True, eq=False)
class Stream:
    """A running sequence. Nothing in it is changed: what leaves, leaves a new stream behind."""

    columns: Columns
    source: Tensor
    """(batch, entered): which position answers for each one that came in, its last survivor at or before it."""
    lengths: list[int] = field(default_factory=list)
    """Real positions of each row, where there are images."""
    images: Sequence[Placed] = ()
    row: Tensor | None = None
    """(images,): the batch row of each image."""
    places: Tensor | None = None
    """(images, tokens): where each visual token came in, in its row."""
    index: Tensor | None = None
    """(images, left): which token of its image each one is that is left."""
    valid: Tensor | None = None
    """(images, left) bool, False where an image has fewer of them than another."""
    counts: list[int] = field(default_factory=list)
    """How many are left of each image."""
    rows: dict[Need, Tensor] = field(default_factory=dict)
    """What was seen of those: (images, channels, left) float32."""
    gate: Tensor | None = None
    """(images, left): the product of the soft gates so far, in training."""

    @classmethod
    def entering(cls, columns: Columns, images: Sequence[Placed], lengths: list[int]) -> Stream:
        """The unpruned sequence. `lengths` are wanted where there are images."""
        batch, length = columns.place.shape
        source = torch.arange(length, device=columns.place.device).expand(batch, length)
        if not images:
            return cls(columns, source)
        places = pad_sequence([image.places % length for image in images], batch_first=True)
        counts = [len(image.places) for image in images]
        row = torch.tensor([image.first // length for image in images], device=places.device)
        index = torch.arange(places.shape[1], device=places.device).expand_as(places)
        valid = index < torch.tensor(counts, device=places.device)[:, None]
        return cls(columns, source, lengths, images, row, places, index, valid, counts)

    @property
    def length(self) -> int:
        return self.columns.length

    @property
    def position(self) -> Tensor:
        """(images, left): where each visual token is now, in its row."""
        return self.source[self.row[:, None], self.places.gather(1, self.index)]

    @property
    def alive(self) -> Tensor:
        """(images, left) bool: the tokens that are left; under soft gates those that a hard drop would have left."""
        return self.valid if self.gate is None else self.valid & (self.gate > 0.5)

    def seen(self, needs: Sequence[Need]) -> Seen:
        """What score and select functions get."""
        return Seen({need: self.rows[need] for need in needs}, self.alive, self.index, self.grids)

    @property
    def batch_rows(self) -> list[int]:
        """The batch row of each image."""
        return [image.first // self.source.shape[1] for image in self.images]

    @property
    def grids(self) -> list[list[Grid]]:
        return [image.image.grids for image in self.images]

    def observed(self, rows: dict[Need, Tensor]) -> Stream:
        return replace(self, rows=self.rows | rows)

    def of_tokens(self, x: Tensor) -> Tensor:
        """The visual tokens' entries of a (batch, channels, length) tensor: (images, channels, left)."""
        x = x[self.row]
        return x.gather(2, self.position[:, None].expand(-1, x.shape[1], -1))

    def entered(self, start: int) -> Tensor:
        """(batch, length): where each token came in, in its row, whose columns begin at `start`."""
        return (self.columns.place - start).clamp(min=0)

    def gone(self, entered: Stream) -> Tensor:
        """(batch, entered) bool: the tokens of the stream that came in which are no longer there."""
        before = entered.columns.place
        return (before >= 0) & (compact.gather(self.columns.place, self.source) != before)

    def apply(self, choice: Choice, counts: list[int], scores: Tensor, hidden: Tensor) -> tuple[Stream, Tensor]:
        """What a choice, by which `counts` tokens of each image stay, leaves of the stream and of its states
        (batch, length, width)."""
        if choice.into is not None:
            absorb = partial(merge.absorb, into=choice.into, weights=scores)
            hidden = compact.change(hidden, self.row, self.position, self.valid, absorb)
        weighed = self if choice.weight is None else self.weighed(choice.weight)
        left, index = weighed.dropped(choice.keep, counts)
        return left, compact.gather(hidden, index)

    def weighed(self, weight: Tensor) -> Stream:
        """With visual tokens that count, as keys, as many times as `weight` (images, left) says."""
        before = self.columns.weight
        if before is None:
            before = torch.ones(self.columns.place.shape, device=weight.device)
        row = self.row[:, None].expand_as(self.position)
        after = before.index_put((row[self.valid], self.position[self.valid]), weight.float()[self.valid])
        return replace(self, columns=replace(self.columns, weight=after))

    def gated(self, gate: Tensor) -> Stream:
        """In training: nothing leaves, and tokens count as keys as much as all gates (images, left) so far let them."""
        gate = gate + 1e-6 if self.gate is None else self.gate * (gate + 1e-6)
        return replace(self.weighed(gate), gate=gate)

    def stays(self, keep: Tensor) -> Tensor:
        """(batch, [heads,] length) bool: text stays, filling goes, tokens as `keep` (images, [heads,] left) says."""
        real, heads = self.columns.place >= 0, keep.shape[1] if keep.ndim == 3 else 1
        spare = torch.cat((real, real[:, :1]), dim=1)[:, None].repeat(1, heads, 1)
        leaves = self.valid[:, None] & ~keep.view(len(keep), heads, -1)
        # the last column takes the writes of the tokens that stay
        spare[self.row[:, None, None], torch.arange(heads, device=keep.device)[:, None],
              torch.where(leaves, self.position[:, None], self.length)] = False  # fmt: skip
        return spare[..., :-1] if keep.ndim == 3 else spare[:, 0, :-1]

    def lengths_after(self, counts: list[int]) -> list[int]:
        """Real positions of each row when `counts` tokens of each image are left."""
        lengths = list(self.lengths)
        for row, before, after in zip(self.batch_rows, self.counts, counts, strict=True):
            lengths[row] -= max(0, before - after)
        return lengths

    def dropped(self, keep: Tensor, counts: list[int]) -> tuple[Stream, Tensor]:
        """Without the tokens that are not in `keep` (images, left) bool; and where those that are left were before."""
        lengths = self.lengths_after(counts)
        plan = compact.plan(self.stays(keep), lengths)
        order = (~keep).long().argsort(dim=1, stable=True)[:, : max(counts)]
        left = replace(
            self,
            columns=self.columns.kept(plan),
            source=compact.gather(plan.source, self.source),
            lengths=lengths,
            index=self.index.gather(1, order),
            valid=keep.gather(1, order),
            counts=counts,
            rows={need: row.gather(2, order[:, None].expand(-1, row.shape[1], -1)) for need, row in self.rows.items()},
        )
        return left, plan.index
