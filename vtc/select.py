"""Which tokens stay: pure functions from importances to a `Choice`.

Shapes: `scores` (images, tokens) float32; `seen.valid` (images, tokens) bool, False where an image has fewer tokens
than the widest one; `keep` (images,) int64, the number that stays of each image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.choice import Choice, Seen
from vtc.grids import cells, evenly_spaced, shares
from vtc.scores import rank


def top_k(scores: Tensor, seen: Seen, keep: Tensor) -> Choice:
    """The `keep` highest scores of each image; among equals the earlier token wins."""
    return Choice((rank(scores, seen.valid) < keep[:, None]) & seen.valid)


def grid(scores: Tensor, seen: Seen, keep: Tensor) -> Choice:
    """`keep` tokens evenly spaced over each image's grids, each by its size; the scores are not looked at.

    Of an image that is partly hidden, the tokens that can be seen are taken as one line.
    """
    picked = torch.zeros_like(seen.valid)
    for image, (parts, count) in enumerate(zip(seen.parts, keep.tolist(), strict=True)):
        if (shown := seen.valid[image].nonzero()[:, 0].tolist()) != list(range(cells(parts))):
            picked[image, [shown[cell] for cell in evenly_spaced(1, len(shown), count)]] = True
            continue
        for (height, width), (start, _, share) in zip(parts, shares(parts, count), strict=True):
            picked[image, [start + cell for cell in evenly_spaced(height, width, share)]] = True
    return Choice(picked)


def top_k_each(scores: Tensor, seen: Seen, keep: Tensor) -> Choice:
    """The highest scores of each grid of an image: tiles and frames share the image's `keep` by their sizes.

    At the encoder site only, where all tokens are there yet. What is hidden is no part of a grid's size.
    """
    picked = torch.zeros_like(seen.valid)
    scores = scores.masked_fill(~seen.valid, -torch.inf)
    for image, (parts, count) in enumerate(zip(seen.parts, keep.tolist(), strict=True)):
        spans = [(start, end) for start, end, _ in shares(parts, count)]
        shown = [(int(seen.valid[image, start:end].sum()), 1) for start, end in spans]
        for (start, end), (_, _, share) in zip(spans, shares(shown, count), strict=True):
            best = scores[image, start:end].argsort(descending=True, stable=True)[:share]
            picked[image, start + best] = True
    return Choice(picked)
