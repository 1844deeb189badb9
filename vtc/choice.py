"""Between what was seen of the visual tokens and what becomes of them: `Seen` goes in, a `Choice` comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtc.core.compact import gather
from vtc.grids import Grid, places
from vtc.need import Need


@dataclass(frozen=True, eq=False)
class Seen:
    """What score and select functions get: the rows that the stage asked for, and which entries are tokens at all."""

    rows: dict[Need, Tensor]
    valid: Tensor
    """(images, tokens) bool, False where an image has fewer tokens than the widest one."""
    index: Tensor
    """(images, tokens) int64: which patch of its image each token is, in raster order."""
    parts: Sequence[Sequence[Grid]]
    """The grids of each image's tokens, in token order, before any token left: tiles, frames."""
    shown: Sequence[int] = ()
    """How many tokens of each image the attention mask did not hide, before any left; empty where a step chooses."""

    def __getitem__(self, need: Need) -> Tensor:
        """(images, channels, tokens) float32, over the tokens that are left."""
        return self.rows[need]

    def by_grids(self, table: Callable[[tuple[Grid, ...]], Tensor]) -> Tensor:
        """(facts, images, tokens) of these tokens, from the (facts, tokens) of whole images with some grids."""
        tables = pad_sequence([table(tuple(grids)).T for grids in self.parts], batch_first=True).to(self.index.device)
        return gather(tables, self.index).movedim(2, 0)

    def places(self) -> tuple[Tensor, ...]:
        """Which of its image's grids each token is in, and its row and column there, all (images, tokens)."""
        return self.by_grids(places).unbind()


@dataclass(frozen=True, eq=False)
class Choice:
    """Which tokens stay, and what becomes of the others."""

    keep: Tensor
    """(images, tokens) bool; at a cache also (images, key_heads, tokens), equally many for each head."""
    into: Tensor | None = None
    """(images, tokens) int64, a source map (see `merge`): None where all the others are dropped."""
    mass: Tensor | None = None
    """(images, tokens) float32: how much each one counts in the mean of those that become one; None: as its score."""
    weight: Tensor | None = None
    """(images, tokens) float32: as how many tokens each one counts as a key, in all later layers; None: as one."""
    bits: Tensor | None = None
    """(images, tokens), or (images, key_heads, tokens), int64: the bits a number that a cache keeps each token at, of a
    stage with a `Precision`; 16 and more: as it is. None: all as they are."""
    gate: Tensor | None = None
    """(images, tokens) in (0, 1), in training: nothing leaves, and tokens count, as keys, only so much from here on."""


def by_head(select: Callable[[Tensor, Seen, Tensor], Choice], scores: Tensor, seen: Seen, keep: Tensor) -> Choice:
    """What `select` makes of scores (images, tokens), or head by head of (images, heads, tokens)."""
    if scores.ndim == 2:
        return select(scores, seen, keep)
    images, heads, _ = scores.shape
    valid, index, number = (x.repeat_interleave(heads, dim=0) for x in (seen.valid, seen.index, keep))
    parts = [grids for grids in seen.parts for _ in range(heads)]
    shown = [count for count in seen.shown for _ in range(heads)]
    choice = select(scores.flatten(0, 1), Seen({}, valid, index, parts, shown), number)
    if choice.bits is not None:
        return Choice(seen.valid, bits=choice.bits.view(images, heads, -1))
    return Choice(choice.keep.view(images, heads, -1))
