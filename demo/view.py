"""What the patch viewer draws: a picture, a rectangle for each visual token, and what became of it."""

from __future__ import annotations

import base64
import io
import math
from itertools import accumulate
from typing import Any

import torch
from PIL import Image

from vtc import Trace
from vtc.eval.images import seen_box
from vtc.grids import Grid

PIXELS = 1024
"""The longer side of the picture that is sent to the browser."""
Box = tuple[float, float, float, float]
"""Left, top, width and height."""


def view(image: Image.Image, trace: Trace, image_processor: Any) -> dict[str, Any]:
    """One image's tokens for viewer.js, as JSON.

    "left" holds for each token the decoder layer before which it left, None where it stayed; "into" the token that
    took it in, or None; "stages" the layer, the scores and the ranks (1 is the highest) of the tokens that entered.
    """
    parts = [part for image_parts in trace.parts for part in image_parts]
    panels, rectangles = layout(parts, image.size, seen_box(image.size, image_processor))
    return {
        "image": data_url(image),
        "size": image.size,
        "panels": panels,
        "patches": [[round(x, 2) for x in box] for box in rectangles],
        "depth": trace.depth,
        **fates(trace),
    }


def fates(trace: Trace) -> dict[str, Any]:
    """What became of each visual token of a prompt, counted over all its images; see `view`."""
    total = sum(trace.sizes)
    first = torch.tensor([0, *accumulate(trace.sizes)][:-1])[:, None]
    left: list[int | None] = [None] * total
    into: list[int | None] = [None] * total
    stages = []
    for stage in trace.stages:
        valid, places = stage.valid.cpu(), stage.entered.cpu() + first
        for token in places[valid & ~stage.kept.cpu()].tolist():
            left[token] = stage.site
        if stage.into is not None:
            target = stage.into.cpu()
            taken = places.gather(1, target.clamp(min=0))
            merged = valid & (target >= 0) & ~stage.kept.cpu()
            for token, taker in zip(places[merged].tolist(), taken[merged].tolist(), strict=True):
                into[token] = taker
        scores: dict[int, float] = {}
        if stage.scores is not None:
            scores = dict(zip(places[valid].tolist(), stage.scores.cpu()[valid].tolist(), strict=True))
        ranks = {token: rank for rank, token in enumerate(sorted(scores, key=scores.get, reverse=True), 1)}
        stages.append(
            {
                "layer": stage.site,
                "scores": [scores.get(token) for token in range(total)],
                "ranks": [ranks.get(token) for token in range(total)],
            }
        )
    return {"left": left, "into": into, "stages": stages}


def layout(parts: list[Grid], size: tuple[int, int], seen: tuple[int, int, int, int]) -> tuple[list[Box], list[Box]]:
    """Where copies of a (width, height) image go, and over them each token's rectangle, in pixels of the image.

    One grid lies over what the model sees of the image. Several grids of one shape are tiles in place, row by row, and
    the overview after them; grids of different shapes are several looks at the whole image.
    """
    width, height = size
    if len(parts) == 1:
        left, top, right, bottom = seen
        return [(0, 0, width, height)], _cells(parts[0], (left, top, right - left, bottom - top))
    step = 1.04 * width
    if len(set(parts)) > 1:
        looks = [(number * step, 0, width, height) for number in range(len(parts))]
        return looks, [cell for part, look in zip(parts, looks, strict=True) for cell in _cells(part, look)]
    rows, columns = _tiling(len(parts) - 1, width / height)
    tiles = [
        (column * width / columns, row * height / rows, width / columns, height / rows)
        for row in range(rows)
        for column in range(columns)
    ]
    looks = [(0, 0, width, height), (step, 0, width, height)]
    return looks, [cell for box in (*tiles, looks[1]) for cell in _cells(parts[0], box)]


def _tiling(tiles: int, aspect: float) -> tuple[int, int]:
    """Rows and columns of so many tiles, as near as can be to the image's width over height."""
    rows = [rows for rows in range(1, tiles + 1) if tiles % rows == 0]
    best = min(rows, key=lambda count: abs(math.log(tiles / count / count / aspect)))
    return best, tiles // best


def _cells(part: Grid, box: Box) -> list[Box]:
    """The cells of a grid over a box, in raster order."""
    (rows, columns), (left, top, width, height) = part, box
    down, across = height / rows, width / columns
    return [(left + x * across, top + y * down, across, down) for y in range(rows) for x in range(columns)]


def data_url(image: Image.Image) -> str:
    """The image, scaled down to `PIXELS` where it is larger, for the browser."""
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((PIXELS, PIXELS))
    lossless = max(image.size) <= 256
    small.save(buffer, "PNG" if lossless else "JPEG", quality=90)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
