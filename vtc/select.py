"""Which tokens stay: pure functions from importances to a `Choice`.

Shapes: `scores` (images, tokens) float32; `seen.valid` (images, tokens) bool, False where an image has fewer tokens
than the widest one; `keep` (images,) int64, the number that stays of each image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vtc.choice import Choice, Seen
from vtc.grids import cells, evenly_spaced, shares
from vtc.need import Need
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


def preferring(
    first: Callable[[Seen], Tensor], select: Callable[[Tensor, Seen, Tensor], Choice]
) -> Callable[[Tensor, Seen, Tensor], Choice]:
    """`select` among the tokens that are `first` (images, tokens) bool, as if there were no others.

    Where those are fewer than `keep`, all of them stay, and of the others the highest scores. What does not stay of the
    others is taken in by none.
    """

    def chosen(scores: Tensor, seen: Seen, keep: Tensor) -> Choice:
        clear = seen.valid & first(seen)
        best = select(scores, replace(seen, valid=clear), torch.minimum(keep, clear.sum(1)))
        more = top_k(scores, replace(seen, valid=seen.valid & ~clear), (keep - clear.sum(1)).clamp(min=0)).keep
        into, weight = best.into, best.weight
        if into is not None:
            place = torch.arange(into.shape[1], device=into.device)
            into = into.masked_fill(~clear, -1).where(~more, place)
        if weight is not None:
            weight = weight.masked_fill(~clear, 1)
        return replace(best, keep=best.keep | more, into=into, weight=weight)

    return chosen


def patches(need: Need) -> Callable[[Seen], Tensor]:
    """Which tokens are patches (images, tokens) bool, by a need of the tower: newlines between the rows of tiles, of
    which a tower knows nothing, have only zeros there."""
    return lambda seen: seen[need].any(1)
