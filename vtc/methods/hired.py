"""HiRED: the tiles of an image share its tokens by where the overview is looked at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar

import torch
from torch import Tensor

import vtc.methods.groups as groups
import vtc.scores as scores
from vtc.choice import Choice, Seen
from vtc.grids import Grid, cells, places
from vtc.need import Need
from vtc.observe import salience
from vtc.stage import Method, Shape, Share, Stage


@dataclass(frozen=True)
class HiRED(Method):
    """The overview keeps its part of an image's tokens, and its tiles share the rest by early attention to their place.

    "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models" (arXiv
    2408.10945), of T tokens. floor(alpha T) stay of the overview, N tokens. Its floor((1 - alpha) N) tokens with the
    highest CLS attention in the tower's first block are marks; a tile's share of the rest is that of the marks which
    lie in its rectangle, rounded down. In overview and tiles those with the highest CLS attention in the block that the
    projector reads stay, head means.

    The released code cuts the overview's raster into equally long strips in place of the tiles' rectangles (`strips`),
    and leaves what the rounding loses; here it goes to the tiles by largest remainders. Its default for alpha is 1, no
    tiles at all, its report's 0.5. An image without tiles keeps the highest attention, and a tower without a CLS token
    scores by the mean attention that a patch receives. A newline counts to the tile before it. Positions are kept.
    """

    alpha: Share = 0.5
    """The part of the overview."""
    strips: bool = False
    """Whether marks are counted as the released code does, on which its figures rest."""

    name: ClassVar[str] = "hired"
    paper: ClassVar[str] = "HiRED, arXiv 2408.10945"
    space: ClassVar[dict[str, tuple[float, float]]] = {"alpha": (0.1, 1.0)}

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        first, last = salience(shape, 0), salience(shape, shape.tower_layers - 1)
        needs = tuple(dict.fromkeys((first, last)))
        return (Stage(0, lambda seen: scores.head_mean(seen[last]), needs, partial(self._select, first)),)

    def _select(self, first: Need, late: Tensor, seen: Seen, keep: Tensor) -> Choice:
        tile, place = seen.by_grids(partial(_tiles, strips=self.strips))
        overview = seen.valid & (tile == 0)
        size = overview.sum(1)
        marked = scores.rank(scores.head_mean(seen[first]), overview) < ((1 - self.alpha) * size).long()[:, None]
        number = int(tile.max()) + 1
        marks = groups.sizes(place, marked & (place > 0), number)
        full = torch.minimum((self.alpha * keep).long(), size)
        base, turn = groups.by_shares(marks / marks.sum(1, keepdim=True).clamp(min=1), keep - full)
        base[:, 0], turn[:, 0] = full, -number
        return groups.quota(late, seen, keep, tile, base, turn)


@lru_cache(maxsize=256)
def _tiles(parts: tuple[Grid, ...], strips: bool) -> Tensor:
    """The tile of each token, from 1 on, 0 in the overview; and the tile in which a token of the overview lies, else 0:
    (2, tokens) int64. An image that is not an overview and a larger mosaic of tiles, with newlines, is all overview."""
    grid, row, column = places(parts)
    if len(parts) != 2 or cells(parts[1:]) <= cells(parts[:1]):
        return torch.zeros(2, len(grid), dtype=torch.long)
    (high, wide), (height, width) = parts[0], (parts[1][0], parts[1][1] - 1)
    rows, columns = math.ceil(height / high), math.ceil(width / wide)
    top, left = (rows * high - height) // 2, (columns * wide - width) // 2  # what was padded is cut off again
    tile = 1 + (row + top) // high * columns + (column.clamp(max=width - 1) + left) // wide
    y, x = (2 * row + 1) * height // (2 * high), (2 * column + 1) * width // (2 * wide)
    place = 1 + (y + top) // high * columns + (x + left) // wide
    if strips:
        place = 1 + (row * wide + column) * rows * columns // (high * wide)
    return torch.stack((tile * grid, place * (1 - grid)))
