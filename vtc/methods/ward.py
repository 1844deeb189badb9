"""Ward's clustering in rounds ("Hierarchical Grouping to Optimize an Objective Function", JASA 58, 1963)."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.core.compact import gather
from vtc.cover import centred


@torch.no_grad()
def ward(states: Tensor, valid: Tensor, count: Tensor, allowance: Tensor | None = None) -> Tensor:
    """Ward's clustering: the source map that leaves `count` (images,) groups, each in the place of its first token.

    Or more groups, where an `allowance` ends it first: the costs of an image's joins, which add up to the sum of
    squares of its tokens about the means of their groups, stay within it.

    Joining groups a and b of n and m tokens costs n m / (n + m) times the squared distance of their means. In each
    round the cheaper half of the mutually nearest pairs is joined; among equals the earlier ones. Costs are held and
    updated (Lance and Williams, "A General Theory of Classificatory Sorting Strategies", 1967), for as many images at
    once as `ENTRIES` allows.

    Args:
        states: (images, tokens, width).
        valid: (images, tokens) bool; other tokens join none, and are mapped to -1.
        count: int64; an image of fewer tokens, or told to keep none, keeps what it has or one group.
        allowance: (images,) float32. In each round as many of its cheapest pairs are joined as fit into what is left of
            it, and an image of which none fits is done. None: no bound.
    """
    allowance = torch.full(count.shape, torch.inf, device=states.device) if allowance is None else allowance
    images = max(1, ENTRIES // max(1, states.shape[1]) ** 2)
    parts = zip(*(x.split(images) for x in (states.float().nan_to_num(0, 0, 0), valid, count, allowance)), strict=True)
    return torch.cat([_ward(*part) for part in parts])


ENTRIES = 2**25
"""Costs that are held at once, where more than one image is clustered."""
ROUNDS = 4
"""Rounds between two looks at how many groups are left: each makes the host wait for the device."""


def _ward(states: Tensor, valid: Tensor, count: Tensor, allowance: Tensor) -> Tensor:
    """The same for images that are clustered together.

    `cost`, `size` and `first` (its first token) are of the groups that were left at the last look, and of one more at
    the end that stands for no group.
    """
    token = torch.arange(valid.shape[1] + 1, device=valid.device).expand(len(valid), -1)
    into, left, least = token, valid.sum(1), count.clamp(min=1)
    cost, size, first = _costs(states, valid), torch.nn.functional.pad(valid.float(), (0, 1), value=1), token
    for done in range(valid.shape[1]):
        if done % ROUNDS == 0:
            most, more = torch.stack((left.max(), (left > least).any())).tolist()
            if not more:
                break
            cost, size, first = _packed(cost, size, first, most)
        a, b, price, number = _pairs(cost, (left - least).clamp(min=0), allowance)
        least, allowance = least.where(number > 0, left), (allowance - price.sum(1)).clamp(min=0)
        size = _join(cost, size, a, b, price)
        into, left = token.scatter(1, first.gather(1, b), first.gather(1, a)).gather(1, into), left - number
    return into[:, :-1].where(valid, -1)


def _packed(cost: Tensor, size: Tensor, first: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Without the groups that have joined others, of which no image has more than `most` left."""
    none = size.shape[1] - 1
    if most == none:
        return cost, size, first
    order = (size[:, :-1] == 0).long().argsort(dim=1, stable=True)[:, :most]
    order = torch.nn.functional.pad(order, (0, 1), value=none)
    return gather(gather(cost, order).transpose(1, 2), order), size.gather(1, order), first.gather(1, order)


def _pairs(cost: Tensor, excess: Tensor, allowance: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pairs of a round, `excess` (images,) at most, for at most the `allowance` (images,): groups a and b, what
    joining them costs, and how many."""
    place = torch.arange(cost.shape[1], device=cost.device).expand(cost.shape[:2])
    none = cost.shape[1] - 1
    (price, nearest), half = cost.min(2), (none // 2 + 1) // 2
    leads = (nearest.gather(1, nearest) == place) & (place < nearest) & price.isfinite()
    price, a = price.masked_fill(~leads, torch.inf).sort(dim=1, stable=True)
    number = torch.minimum((leads.sum(1) + 1) // 2, excess).minimum(
        (price[:, :half].cumsum(1) <= allowance[:, None]).sum(1)
    )
    joins = place[:, :half] < number[:, None]
    a = a[:, :half].where(joins, none)
    return a, nearest.gather(1, a).where(joins, none), price[:, :half].where(joins, 0), number


def _costs(states: Tensor, valid: Tensor) -> Tensor:
    """What joining two tokens costs: (images, tokens + 1, tokens + 1), symmetric, infinite where they cannot be."""
    states = centred(states.transpose(1, 2), valid).transpose(1, 2)  # small numbers round little
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
    size = size.scatter(1, b, 0).scatter(1, a, size_a + size_b)
    size[:, -1] = 1
    return size
