"""What the patch viewer draws: the pictures, the grids of tokens over them, and what became of each token."""

from __future__ import annotations

from dataclasses import asdict
from itertools import accumulate
from typing import Any

import torch

from vtc import Trace, adapter
from vtc.demo.layout import layout
from vtc.demo.media import Picture, data_url
from vtc.eval.images import seen_box
from vtc.eval.reader import Reader
from vtc.grids import Grid
from vtc.stage import Cache


def pictures(reader: Reader, shown: tuple[Picture, ...], trace: Trace) -> list[dict[str, Any]]:
    """Each picture with its copies and grids, as JSON; grids hold the tokens in order.

    Raises ValueError where a model cuts several images into tiles that the prompt does not tell apart.
    """
    model, processor = reader.model, reader.processor.image_processor
    newlines = hasattr(adapter.find(model).backbone, "image_newline")
    result = []
    for picture, parts in zip(shown, _by_picture(trace.parts, len(shown)), strict=True):
        size = picture.image.size
        panels, grids = layout(parts, size, seen_box(size, processor), newlines)
        result.append(
            {
                "image": data_url(picture.image),
                "name": picture.name,
                "size": size,
                "panels": panels,
                "grids": [asdict(grid) for grid in grids],
            }
        )
    return result


def _by_picture(parts: list[list[Grid]], pictures: int) -> list[list[Grid]]:
    """The grids of each picture; a family that puts text between tiles counts each of them as an image."""
    if len(parts) % pictures:
        raise ValueError("This model cuts images into tiles, and with several images nobody can tell whose they are.")
    each = len(parts) // pictures
    return [[part for image in parts[start : start + each] for part in image] for start in range(0, len(parts), each)]


def fates(trace: Trace) -> dict[str, Any]:
    """What became of each visual token of a prompt, counted over all its images, as JSON.

    "left" holds for each token the decoder layer before which it left, None where it stayed; "into" the token that
    took it in, or None; "stages" the layer and the scores of the tokens that entered, None for the others.
    What leaves a cache has been read by every layer: stages there are left out.
    """
    total = sum(trace.sizes)
    first = torch.tensor([0, *accumulate(trace.sizes)][:-1])[:, None]
    left: list[int | None] = [None] * total
    into: list[int | None] = [None] * total
    stages = []
    for stage in trace.stages:
        if isinstance(stage.site, Cache):
            continue
        valid, places = stage.valid.cpu(), stage.entered.cpu() + first
        gone = valid & ~stage.kept.cpu()
        for token in places[gone].tolist():
            left[token] = stage.site
        if stage.into is not None:
            target = stage.into.cpu()
            taken = places.gather(1, target.clamp(min=0))
            merged = gone & (target >= 0)
            for token, taker in zip(places[merged].tolist(), taken[merged].tolist(), strict=True):
                into[token] = taker
        scores: dict[int, float] = {}
        if stage.scores is not None:
            scores = dict(zip(places[valid].tolist(), stage.scores.cpu()[valid].tolist(), strict=True))
        stages.append({"layer": stage.site, "scores": [scores.get(token) for token in range(total)]})
    return {"depth": trace.depth, "left": left, "into": into, "stages": stages}
