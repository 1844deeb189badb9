"""Where visual tokens lie: for each picture copies of it, and grids of tokens over them, in pixels of the picture."""

from __future__ import annotations

import math
from dataclasses import dataclass

import vtc.grids as grids

Box = tuple[float, float, float, float]
"""Left, top, width and height."""


@dataclass(frozen=True)
class Grid:
    """One grid of tokens, in raster order."""

    rows: int
    columns: int
    """Of these, the last is a newline's where `newlines`."""
    box: Box
    """What its tokens see, newlines aside."""
    newlines: bool = False
    """Whether each row ends in a token that shows nothing of the image."""
    seams: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    """Where tiles meet: x and y."""


def layout(
    parts: list[grids.Grid], size: tuple[int, int], seen: tuple[int, int, int, int], newlines: bool = False
) -> tuple[list[Box], list[Grid]]:
    """Where copies of a (width, height) picture go, and its grids over them.

    One grid lies over `seen` (left, top, right, bottom), what the model sees of the picture. With `newlines` an
    overview comes first and then the mosaic of the tiles, each row with a newline after it. Several grids of one shape
    are tiles in place, row by row, and the overview after them; others are several looks at the whole picture.
    """
    width, height = size
    if len(parts) == 1:
        left, top, right, bottom = seen
        return [(0, 0, width, height)], [Grid(*parts[0], (left, top, right - left, bottom - top))]
    step = 1.06 * width
    if newlines or len(set(parts)) > 1:
        looks = [(number * step, 0, width, height) for number in range(len(parts))]
        ended = [newlines and number > 0 for number in range(len(parts))]
        return looks, [
            Grid(*part, look, end, _seams(part, parts[0], look) if end else ((), ()))
            for part, look, end in zip(parts, looks, ended, strict=True)
        ]
    rows, columns = _tiling(len(parts) - 1, width / height)
    tiles = [
        (column * width / columns, row * height / rows, width / columns, height / rows)
        for row in range(rows)
        for column in range(columns)
    ]
    looks = [(0, 0, width, height), (step, 0, width, height)]
    return looks, [Grid(*parts[0], box) for box in (*tiles, looks[1])]


def _tiling(tiles: int, aspect: float) -> tuple[int, int]:
    """Rows and columns of so many tiles, as near as can be to the picture's width over height."""
    rows = [rows for rows in range(1, tiles + 1) if tiles % rows == 0]
    best = min(rows, key=lambda count: abs(math.log(tiles / count / count / aspect)))
    return best, tiles // best


def _seams(mosaic: grids.Grid, tile: grids.Grid, box: Box) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Where the tiles of an unpadded mosaic meet: padding was cut off evenly on both sides."""
    (rows, columns), (left, top, width, height) = (mosaic[0], mosaic[1] - 1), box

    def meet(cells: int, side: int, start: float, length: float) -> tuple[float, ...]:
        tiles = math.ceil(cells / side)
        cut = (tiles * side - cells) // 2
        return tuple(start + (number * side - cut) * length / cells for number in range(1, tiles))

    return (meet(columns, tile[1], left, width) if columns else ()), meet(rows, tile[0], top, height)
