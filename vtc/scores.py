"""Importance of visual tokens: pure functions, tensors in, (images, tokens) float32 out."""

from __future__ import annotations

import torch
from einops import reduce
from torch import Tensor


def head_mean(row: Tensor) -> Tensor:
    """The mean over heads of an attention row: (images, heads, tokens) -> (images, tokens)."""
    return reduce(row, "image head token -> image token", "mean")


def rank(scores: Tensor, valid: Tensor) -> Tensor:
    """The place of each token, the highest score of its image being 0, the earlier first among equals: int64."""
    order = scores.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def mean(scores: Tensor, valid: Tensor) -> Tensor:
    """The mean over each image's tokens: (images,)."""
    return scores.masked_fill(~valid, 0).sum(1) / valid.sum(1).clamp(min=1)


def unit(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores (images, tokens) scaled to [0, 1] over each image's tokens; 0 where all are equal."""
    low = scores.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    high = scores.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    return ((scores - low) / (high - low).clamp(min=1e-8)).masked_fill(~valid, 0)


def share(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores (images, tokens) divided by their sum over the image's tokens."""
    scores = scores.masked_fill(~valid, 0)
    return scores / scores.sum(1, keepdim=True).clamp(min=1e-8)
