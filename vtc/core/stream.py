"""The sequence that runs through the decoder: its columns, its visual tokens, and what was seen of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import vtc.core.compact as compact
import vtc.merge as merge
from vtc.choice import Choice, Seen
from vtc.core.columns import Columns
from vtc.core.features import Placed
from vtc.grids import Grid
from vtc.need import Need


@dataclass(frozen=True, eq=False)
class Stream:
    """A running sequence. Nothing in it is changed: what leaves, leaves a new stream behind."""

    columns: Columns
    start: int
    """The first column of this call."""
    tail: int
    """How many tokens at the end are the same in every layer: the text after the last image, or hole, of any row."""
    source: Tensor
    """(batch, entered): which position answers for each one that came in, its last survivor at or before it."""
    images: Sequence[Placed]
    row: Tensor
    """(images,): the batch row of each image."""
    places: Tensor
    """(images, tokens): where each visual token came in, in its row."""
    index: Tensor
    """(images, left): which token of its image each one is that is left."""
    valid: Tensor
    """(images, left) bool, False at the filling, and where the attention mask hides a token: that is none."""
    lengths: list[int]
    """Real positions of each row, where there are images."""
    counts: list[int]
    """How many tokens are left of each image."""
    rows: dict[Need, Tensor] = field(default_factory=dict)
    """What was seen of those: (images, channels, left) float32."""

    @classmethod
    def entering(cls, start: int, real: Tensor | None, embeds: Tensor, images: Sequence[Placed]) -> Stream:
        """The unpruned sequence of `embeds` (batch, length, width), whose columns begin at `start`.

        `real` (batch, length) bool tells padding. With images the host asks the device once how long rows are; without
        images it never does.
        """
        (batch, length), device = embeds.shape[:2], embeds.device
        row = torch.tensor([image.first // length for image in images], dtype=torch.long, device=device)
        places = pad_sequence([image.places % length for image in images], batch_first=True) if images else row[:, None]
        index = torch.arange(places.shape[1], device=device).expand_as(places)
        counts, lengths, hole = [len(image.places) for image in images], [length] * batch, 0
        valid = index < torch.tensor(counts, dtype=torch.long, device=device)[:, None]
        if images and real is not None:
            valid = valid & real[row[:, None], places]
            holes = (~real & (real.cumsum(1) > 0)).any(0) * torch.arange(1, length + 1, device=device)
            *measured, hole = torch.cat((real.sum(1), valid.sum(1), holes.amax(0, keepdim=True))).tolist()
            lengths, counts = measured[:batch], measured[batch:]
            real = None if min(lengths) == length else real
        images = [replace(image, shown=count) for image, count in zip(images, counts, strict=True)]
        tail = length - max(hole, *(1 + image.last % length for image in images), 0)
        columns = Columns.counted(start, real, (batch, length), device)
        source = torch.arange(length, device=device).expand(batch, length)
        return cls(columns, start, tail, source, images, row, places, index, valid, lengths, counts)

    @property
    def device(self) -> torch.device:
        return self.places.device

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
        if self.columns.weight is None:
            return self.valid
        return self.valid & (self.columns.weight[self.row[:, None], self.position] > 0.5)

    def seen(self, needs: Sequence[Need]) -> Seen:
        """What score and select functions get."""
        shown = [image.shown for image in self.images]
        return Seen({need: self.rows[need] for need in needs}, self.alive, self.index, self.grids, shown)

    @property
    def batch_rows(self) -> list[int]:
        """The batch row of each image."""
        return [image.first // self.source.shape[1] for image in self.images]

    @property
    def text_after_images(self) -> int:
        """Tokens that follow a row's first image and are no image's, in the row that has most; padding is counted."""
        first: dict[int, int] = {}
        after: dict[int, int] = {}
        length = self.source.shape[1]
        for row, image in zip(self.batch_rows, self.images, strict=True):
            if row not in first:
                first[row], after[row] = image.last, length - 1 - image.last % length
            elif image.first > first[row]:
                after[row] -= len(image.places)
        return max(after.values(), default=0)

    @property
    def grids(self) -> list[list[Grid]]:
        return [image.image.grids for image in self.images]

    def observed(self, rows: dict[Need, Tensor]) -> Stream:
        return replace(self, rows=self.rows | rows)

    def of_tokens(self, x: Tensor) -> Tensor:
        """The visual tokens' entries of a (batch, ..., length) tensor: (images, ..., left)."""
        return x.movedim(-1, 1)[self.row[:, None], self.position].movedim(1, -1)

    @property
    def entered(self) -> Tensor:
        """(batch, length): where each token came in, in its row."""
        return (self.columns.place - self.start).clamp(min=0)

    def gone(self, before: Stream) -> Tensor:
        """(batch, entered) bool: the tokens of the stream that came in which are no longer there."""
        column = before.columns.place
        return (column >= 0) & (compact.gather(self.columns.place, self.source) != column)

    def apply(self, choice: Choice, counts: list[int], scores: Tensor, hidden: Tensor) -> tuple[Stream, Tensor]:
        """What a choice, by which `counts` tokens of each image stay, leaves of the stream and of its states
        (batch, length, width)."""
        if choice.into is not None:
            mass = scores if choice.mass is None else choice.mass
            absorb = partial(merge.absorb, into=choice.into, weights=mass)
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
        before = self.columns.weight
        gate = gate + 1e-6
        return self.weighed(gate if before is None else gate * before[self.row[:, None], self.position])

    def stays(self, keep: Tensor) -> Tensor:
        """(batch, [heads,] length) bool: text stays, filling goes, tokens as `keep` (images, [heads,] left) says."""
        real, heads = self.columns.place >= 0, keep.shape[1] if keep.ndim == 3 else 1
        spare = torch.cat((real, real[:, :1]), dim=1)[:, None].repeat(1, heads, 1)
        leaves = self.valid[:, None] & ~keep.view(len(keep), heads, -1)
        # the last column takes the writes of the tokens that stay
        spare[self.row[:, None, None], torch.arange(heads, device=keep.device)[:, None],
              torch.where(leaves, self.position[:, None], self.length)] = False  # fmt: skip
        return spare[..., :-1] if keep.ndim == 3 else spare[:, 0, :-1]

    def graded(self, bits: Tensor) -> Tensor:
        """(batch, heads, entered): the `bits` (images, [heads,] left) of visual tokens where they came in, else 0."""
        bits = bits if bits.ndim == 3 else bits[:, None]
        batch, length = self.source.shape
        heads = torch.arange(bits.shape[1], device=bits.device)[:, None]
        # the last entry takes the writes of what is no token
        entered = self.places.gather(1, self.index).masked_fill(~self.valid, length)
        graded = bits.new_zeros(batch, bits.shape[1], length + 1)
        graded[self.row[:, None, None], heads, entered[:, None]] = bits
        return graded[..., :-1]

    def lengths_after(self, counts: list[int]) -> list[int]:
        """Real positions of each row when `counts` tokens of each image are left. Raises ValueError where none are."""
        lengths = list(self.lengths)
        for row, before, after in zip(self.batch_rows, self.counts, counts, strict=True):
            lengths[row] -= max(0, before - after)
            if before > after and not lengths[row]:
                raise ValueError("a prompt of images alone has nothing left at budget 0: add text or raise the budget")
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
