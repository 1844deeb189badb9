"""Tokens in groups: how they are grouped, how an image's number is shared out among groups, who suppresses whom.

A grouping is (images, tokens) int64, the number of each token's group; where there is no token any number may stand.
Scores, `seen` and `keep` as in `select`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from vtc.choice import Choice, Seen
from vtc.core.compact import gather
from vtc.cover import greedy
from vtc.scores import rank
from vtc.select import top_k


def sizes(group: Tensor, valid: Tensor, groups: int) -> Tensor:
    """How many tokens each group has: (images, groups) int64."""
    return torch.zeros(len(group), groups, dtype=torch.long, device=group.device).scatter_add(1, group, valid.long())


def means(x: Tensor, group: Tensor, valid: Tensor, groups: int) -> Tensor:
    """The mean of x (images, tokens) over each group: (images, groups), 0 where it has no token."""
    total = torch.zeros(len(x), groups, device=x.device).scatter_add(1, group, x.masked_fill(~valid, 0).float())
    return total / sizes(group, valid, groups).clamp(min=1)


def ranks(scores: Tensor, group: Tensor, valid: Tensor, groups: int) -> Tensor:
    """The place of each token among those of its group, the highest score being 0: (images, tokens) int64."""
    last = group.masked_fill(~valid, groups)  # hidden tokens are one more
    place, count = (last * group.shape[1] + rank(scores, valid)).argsort(1).argsort(1), sizes(group, valid, groups)
    return place - (count.cumsum(1) - count).gather(1, group)


def by_shares(shares: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Largest remainders: what of `keep` each group gets for its share (images, groups), rounded down, and who is first
    to get one more; of equal remainders the larger share."""
    exact = shares * keep[:, None]
    base = exact.floor()
    larger = shares.argsort(dim=1, descending=True, stable=True)
    order = larger.gather(1, (exact - base).gather(1, larger).argsort(dim=1, descending=True, stable=True))
    return base.long(), -order.argsort(dim=1)


def quota(scores: Tensor, seen: Seen, keep: Tensor, group: Tensor, base: Tensor, first: Tensor) -> Choice:
    """The `base` (images, groups) int64 highest scores of each group, and what is left of `keep` in turns of one.

    In each turn the groups with the highest `first` (images, groups) come first, and a group that has no more tokens is
    passed over: so an image keeps `keep` tokens whatever the sizes of its groups. The sum of `base` is at most that.
    """
    place = ranks(scores, group, seen.valid, base.shape[1])
    turn = (place + 1 - base.gather(1, group)).clamp(min=0)
    order = first.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return top_k(-(turn * base.shape[1] + order.gather(1, group)).float(), seen, keep)


def unsuppressed(scores: Tensor, valid: Tensor, rivals: Tensor) -> Tensor:
    """Greedy non-maximum suppression: the tokens whose rivals with higher scores are all suppressed themselves.

    `rivals` (images, tokens, tokens) bool, symmetric; of equal scores the earlier token is the higher. In each round
    all tokens are judged at once by those that stood in the one before, until that changes nothing.
    """
    place = rank(scores, valid)
    beats, stands, before = (rivals & (place[:, :, None] < place[:, None])).float(), valid, ~valid
    while not torch.equal(stands, before):
        before, stands = stands, valid & ((stands[:, None].float() @ beats)[:, 0] == 0)
    return stands


@torch.no_grad()
def k_means(features: Tensor, valid: Tensor, count: int, spherical: bool = False, rounds: int = 10) -> Tensor:
    """The grouping of features (images, channels, tokens) into `count` groups by Lloyd's algorithm, in `rounds` rounds.

    The first centres are the image's first token and, one after the other, the farthest from those before it; a group
    that loses all its tokens keeps its centre. Spherical: of features of length 1, with means of length 1.
    """
    x = features.float().nan_to_num(0, 0, 0).transpose(1, 2)
    square = torch.linalg.vector_norm(x, dim=2).square()
    nearest = torch.full(valid.shape, torch.inf, device=x.device)

    def taken(pick: Tensor) -> Tensor:
        nonlocal nearest
        apart = square + square.gather(1, pick) - 2 * (x @ gather(x, pick).transpose(1, 2))[..., 0]
        nearest = torch.minimum(nearest, apart)
        return nearest

    start = torch.zeros(valid.shape, device=x.device)
    centres = gather(x, greedy(start, valid, count, taken))
    spare = torch.arange(count, device=x.device) >= valid.sum(1, keepdim=True)
    for number in range(rounds + 1):
        apart = centres.square().sum(2)[:, None] - 2 * (x @ centres.transpose(1, 2))
        group = apart.masked_fill(spare[:, None], torch.inf).argmin(2)
        if number < rounds:
            member = (one_hot(group, count) * valid[..., None]).float()
            size = member.sum(1)[..., None]
            mean = member.transpose(1, 2) @ x / size.clamp(min=1)
            centres = (normalize(mean, dim=2) if spherical else mean).where(size > 0, centres)
    return group


@torch.no_grad()
def components(features: Tensor, valid: Tensor, count: int) -> Tensor:
    """Loadings of an image's tokens on its `count` leading principal components: (images, tokens, count), 0 where there
    is no token or no more component.

    Tokens are the variables, and channels the observations, of features (images, channels, tokens). By a block Krylov
    space of `KRYLOV` blocks (Musco and Musco, "Randomized Block Krylov Methods for Stronger and Faster Approximate
    Singular Value Decomposition", 2015) from a fixed start, so that nothing is drawn at random.
    """
    x = features.float().nan_to_num(0, 0, 0)
    x = (x - x.mean(1, keepdim=True)).masked_fill(~valid[:, None], 0)
    block = x.transpose(1, 2) @ _draw(x.shape[1], count).to(x)
    blocks = []
    for _ in range(KRYLOV):
        block = torch.linalg.qr(x.transpose(1, 2) @ (x @ block)).Q
        blocks.append(block)
    basis = torch.linalg.qr(torch.cat(blocks, dim=2)).Q
    mapped = x @ basis
    _, turn = torch.linalg.eigh(mapped.transpose(1, 2) @ mapped)
    found = basis @ turn[..., -count:].flip(2)
    return torch.nn.functional.pad(found, (0, count - found.shape[2])).masked_fill(~valid[..., None], 0)


KRYLOV = 6
"""Blocks of the Krylov space of `components`."""


@lru_cache(maxsize=16)
def _draw(height: int, width: int) -> Tensor:
    return torch.randn(height, width, generator=torch.Generator().manual_seed(0))
