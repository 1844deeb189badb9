"""What becomes of the tokens that do not stay: recycled into others, always with a source map.

A source map `into` (images, tokens) int64 names for each token the one that took it in: itself where it stays, -1 where
it is dropped. Weights are the importances, (images, tokens) float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vtc.choice import Choice, Seen


def absorb(features: Tensor, into: Tensor, weights: Tensor) -> Tensor:
    """Features (images, tokens, width), those that took others in replaced by the weighted mean of them and themselves.

    Tokens that took in none come back bit for bit.
    """
    target = into.clamp(min=0)
    mass = torch.where(into >= 0, weights.float().clamp(min=1e-8), 0.0)
    total = torch.zeros_like(mass).scatter_add(1, target, mass)
    wide = target[..., None].expand_as(features)
    summed = torch.zeros_like(features, dtype=torch.float32).scatter_add(1, wide, features.float() * mass[..., None])
    taken = torch.zeros_like(target).scatter_add(1, target, (into >= 0).long())
    mean = (summed / total.clamp(min=1e-8)[..., None]).to(features.dtype)
    return torch.where((taken > 1)[..., None], mean, features)


def sizes(into: Tensor) -> Tensor:
    """How many tokens each one stands for by a source map: (images, tokens) float32, 0 where it is not left."""
    spare = torch.zeros(len(into), into.shape[1] + 1, device=into.device)  # the last one takes what is dropped
    return spare.scatter_add(1, into % spare.shape[1], torch.ones_like(into, dtype=torch.float32))[:, :-1]


def weighed(select: Callable[[Tensor, Seen, Tensor], Choice]) -> Callable[[Tensor, Seen, Tensor], Choice]:
    """A select function that merges, whose tokens count as many times as they stand for others and themselves."""

    def chosen(scores: Tensor, seen: Seen, keep: Tensor) -> Choice:
        choice = select(scores, seen, keep)
        return choice if choice.into is None else replace(choice, weight=sizes(choice.into).clamp(min=1))

    return chosen
