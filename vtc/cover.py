"""Selections that cover: greedy, each pick being the token that adds most to those that are picked already.

Scores, `seen` and `keep` as in `select`; `of` is the need whose rows are the tokens' features. All images take a step
together, one a pick; among equals the earlier token wins, and none is taken that is hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtc.choice import Choice, Seen
from vtc.core.compact import gather
from vtc.need import Need


def cosines(rows: Tensor) -> Tensor:
    """Cosines between the features (images, channels, tokens) of each image: (images, tokens, tokens)."""
    unit = normalize(rows.float().nan_to_num(0, 0, 0), dim=1)
    return unit.transpose(1, 2) @ unit


def centred(rows: Tensor, valid: Tensor) -> Tensor:
    """Features (images, channels, tokens) less the mean of their image's; 0 where there is no token."""
    rows = rows.masked_fill(~valid[:, None], 0)
    return (rows - rows.sum(2, keepdim=True) / valid.sum(1).clamp(min=1)[:, None, None]).masked_fill(~valid[:, None], 0)


def greedy(gain: Tensor, valid: Tensor, count: int, taken: Callable[[Tensor], Tensor]) -> Tensor:
    """The first `count` picks of each image, in their order: (images, count) int64.

    `gain` (images, tokens) is what each token adds at first; `taken` is told of picks (images, 1) and returns what each
    token adds now. Once an image has no token left, its picks mean nothing.
    """
    left, picks = valid, []
    for _ in range(count):
        gain = gain.nan_to_num(-1e30, neginf=-1e30).masked_fill(~left, -math.inf)
        most = gain.amax(1, keepdim=True)
        picks.append((gain >= most - 1e-6 * most.abs()).int().argmax(1, keepdim=True))  # the first, but for rounding
        left = left.scatter(1, picks[-1], False)
        gain = taken(picks[-1])
    return torch.cat(picks, dim=1) if picks else valid.new_zeros(len(valid), 0, dtype=torch.long)


def _choice(gain: Tensor, seen: Seen, keep: Tensor, taken: Callable[[Tensor], Tensor]) -> Choice:
    picks = greedy(gain, seen.valid, int(keep.max()), taken)
    early = torch.arange(picks.shape[1], device=keep.device) < keep[:, None]
    return Choice((keep.new_zeros(gain.shape).scatter_add(1, picks, early.long()) > 0) & seen.valid)


def row(matrix: Tensor, pick: Tensor) -> Tensor:
    """The rows (images, tokens) of a (images, tokens, tokens) matrix that belong to picks (images, 1)."""
    return gather(matrix, pick)[:, 0]


@torch.no_grad()
def farthest(scores: Tensor, seen: Seen, keep: Tensor, of: Need, power: float = 1.0, alone: bool = False) -> Choice:
    """Weighted farthest points: the highest score, then always the most of score^power times the distance.

    The distance is 1 - cosine to the nearest token that is picked (Gonzalez, "Clustering to minimize the maximum
    intercluster distance", 1985, weighted). `alone`: the first pick is the token whose nearest other one is farthest.
    """
    apart, weight = (1 - cosines(seen[of])).clamp(min=0), scores.clamp(min=0) ** power
    nearest, first = torch.full_like(scores, 2.0), scores
    if alone:
        none = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device) | ~seen.valid[:, None]
        first = apart.masked_fill(none, 2.0).amin(2)

    def taken(pick: Tensor) -> Tensor:
        torch.minimum(nearest, row(apart, pick), out=nearest)
        return nearest * weight

    return _choice(first, seen, keep, taken)


@torch.no_grad()
def facility(scores: Tensor, seen: Seen, keep: Tensor, of: Need) -> Choice:
    """Greedy facility location: the most of sum_i score_i max_j cos+(x_i, x_j) over the picked j.

    x are the features less their image's mean, and a negative cosine is none (Nemhauser et al., "An analysis of
    approximations for maximizing submodular set functions", 1978: at least 1 - 1/e of the best).
    """
    alike = cosines(centred(seen[of], seen.valid)).clamp(min=0)
    demand = scores.masked_fill(~seen.valid, 0)[..., None]
    covered, more = torch.zeros_like(scores), torch.empty_like(alike)

    def taken(pick: Tensor) -> Tensor:
        torch.maximum(covered, row(alike, pick), out=covered)
        return (torch.sub(alike, covered[:, None], out=more).relu_() @ demand)[..., 0]

    return _choice((alike @ demand)[..., 0], seen, keep, taken)


@torch.no_grad()
def dpp(scores: Tensor, seen: Seen, keep: Tensor, of: Need) -> Choice:
    """Greedy MAP of the determinantal point process with the kernel score_i cos(x_i, x_j) score_j.

    By updates of the Cholesky factor (Chen et al., "Fast Greedy MAP Inference for Determinantal Point Process to
    Improve Recommendation Diversity", 2018). Tokens in the span of those that are picked come last, by their scores.
    """
    kernel = scores[:, :, None] * cosines(seen[of]) * scores[:, None]
    own, last = kernel.diagonal(dim1=1, dim2=2), scores - scores.amax(1, keepdim=True) - 1
    gain, factor = own, [torch.zeros_like(scores)]

    def taken(pick: Tensor) -> Tensor:
        nonlocal gain
        before, pivot = torch.stack(factor, dim=1), gain.gather(1, pick)
        new = row(kernel, pick) - (before.gather(2, pick[:, None].expand(-1, before.shape[1], -1)) * before).sum(1)
        factor.append((new * pivot.clamp(min=1e-36).rsqrt()).where(pivot > 0, 0))
        gain = gain - factor[-1] ** 2
        gain = gain.where(gain > 1e-5 * own, last)
        return gain

    return _choice(gain, seen, keep, taken)
