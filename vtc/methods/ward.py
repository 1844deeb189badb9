"""Ward's clustering in rounds ("Hierarchical Grouping to Optimize an Objective Function", JASA 58, 1963)."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.compact import gather


@torch.no_grad()
def ward(states: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """Ward's clustering: the source map that leaves `count` (images,) groups, each in the place of its first token.

    Joining groups a and b of n and m tokens costs n m / (n + m) times the squared distance of their means. In each
    round the cheaper half of the mutually nearest pairs is joined; among equals the earlier ones. Costs are held and
    updated (Lance and Williams, "A General Theory of Classificatory Sorting Strategies", 1967), for as many images at
    once as `ENTRIES` allows.

    Args:
        states: (images, tokens, width).
        valid: (images, tokens) bool; other tokens join none, and are mapped to -1.
        count: int64; an image of fewer tokens, or told to keep none, keeps what it has or one group.
    """
    images = max(1, ENTRIES // max(1, states.shape[1]) ** 2)
    parts = zip(*(x.split(images) for x in (states.float().nan_to_num(0, 0, 0), valid, count)), strict=True)
    return torch.cat([_ward(*part) for part in parts])


ENTRIES = 2**25
"""Costs that are held at once, where more than one image is clustered."""
ROUNDS = 4
"""Rounds between two looks at whether enough is joined: each makes the host wait for the device."""


def _ward(states: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    (images, tokens), device = valid.shape, valid.device
    place = torch.arange(tokens + 1, device=device).expand(images, -1)  # the last one stands for no pair
    cost, size = _costs(states, valid), torch.ones(place.shape, device=device)
    into, left, half = place, valid.sum(1), (tokens // 2 + 1) // 2
    for done in range(tokens):
        if done % ROUNDS == 0 and not bool((left > count.clamp(min=1)).any()):
            break
        nearest = cost.argmin(2)
        price = cost.gather(2, nearest[..., None])[..., 0]
        first = (nearest.gather(1, nearest) == place) & (place < nearest) & price.isfinite()
        price, pair = price.masked_fill(~first, torch.inf).sort(dim=1, stable=True)
        number = torch.minimum((first.sum(1) + 1) // 2, (left - count.clamp(min=1)).clamp(min=0))
        joins = place[:, :half] < number[:, None]
        a = pair[:, :half].where(joins, tokens)
        b = nearest.gather(1, a).where(joins, tokens)
        size = _join(cost, size, a, b, price[:, :half].where(joins, 0))
        into, left = place.scatter(1, b, a).gather(1, into), left - number
    return into[:, :-1].where(valid, -1)


def _costs(states: Tensor, valid: Tensor) -> Tensor:
    """What joining two tokens costs: (images, tokens + 1, tokens + 1), symmetric, infinite where they cannot be."""
    states = states - states.mean(1, keepdim=True)  # small numbers round little
    product = states @ states.transpose(1, 2)
    square = product.diagonal(dim1=1, dim2=2)
    cost = ((square[:, :, None] + square[:, None]) / 2 - (product + product.transpose(1, 2)) / 2).clamp(min=0)
    apart = valid[:, :, None] & valid[:, None] & ~torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    return torch.nn.functional.pad(cost.masked_fill(~apart, torch.inf), (0, 1, 0, 1), value=torch.inf)


def _join(cost: Tensor, size: Tensor, a: Tensor, b: Tensor, price: Tensor) -> Tensor:
    """Let the groups `b` (images, pairs) join `a`, which costs `price`: new sizes, and new entries in `cost`."""

    def union(costs: Tensor, size: Tensor) -> Tensor:
        """(images, pairs, others): what joining the unions costs, from `costs` (images, groups, others)."""
        own, new, other = size_a[..., None], size_b[..., None], size[:, None]
        both = (own + other) * gather(costs, a) + (new + other) * gather(costs, b) - other * price[..., None]
        return both / (own + new + other)

    size_a, size_b = size.gather(1, a), size.gather(1, b)
    rows = union(cost, size)
    among = union(rows.transpose(1, 2), size_a + size_b)
    across = a[:, None].expand_as(among)
    rows = rows.scatter(2, across, (among + among.transpose(1, 2)) / 2)  # symmetric, so that a pair is always mutual
    wide = a[..., None].expand_as(rows)
    cost.scatter_(1, wide, rows).scatter_(2, wide.transpose(1, 2), rows.transpose(1, 2))
    gone = b[..., None].expand_as(rows)
    cost.scatter_(1, gone, torch.inf).scatter_(2, gone.transpose(1, 2), torch.inf)
    return size.scatter(1, a, (size_a + size_b).where(a < cost.shape[1] - 1, 1))
