"""Between what was seen of the visual tokens and what becomes of them: `Seen` goes in, a `Selection` comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.grids import Grid, cells, places
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

    def __getitem__(self, need: Need) -> Tensor:
        """(images, channels, tokens) float32, over the tokens that are left."""
        return self.rows[need]

    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of each token in its own grid, both (images, tokens)."""
        longest = max(map(cells, self.parts))
        table = torch.stack([places(tuple(grids), longest) for grids in self.parts]).to(self.index.device)
        row, column = table.gather(2, self.index[:, None].expand(-1, 2, -1)).unbind(1)
        return row, column


@dataclass(frozen=True, eq=False)
class Selection:
    """Which tokens stay, and what becomes of the others."""

    keep: Tensor
    """(images, tokens) bool."""
    into: Tensor | None = None
    """(images, tokens) int64, a source map (see `merge`): None where all the others are dropped."""
    weight: Tensor | None = None
    """(images, tokens) float32: as how many tokens each one counts as a key, in all later layers; None: as one."""
    gate: Tensor | None = None
    """(images, tokens) in (0, 1), in training: nothing leaves, and each token counts, as a key, only so much from here on."""
