"""Density-peak clustering (Rodriguez and Laio, "Clustering by fast search and find of density peaks", 2014)."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.scores import rank


@torch.no_grad()
def density_peaks(states: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """Which of an image's entries is the centre of each one's cluster, itself at a centre: (images, entries) int64.

    As in kNN-DPC: the density of an entry is exp(-mean of its `count` smallest squared distances, its own 0 included),
    its delta the distance to the nearest denser one, that of the densest the largest distance of all. The `count`
    entries with the largest density * delta are centres, and each other one joins the nearest. Ties go to the earlier.

    Args:
        states: (images, entries, width); distances are divided by sqrt(width).
        valid: (images, entries) bool; what stands for the others means nothing.
        count: (images,) int64, centres of each image: 1 to as many as it has entries.
    """
    width = states.shape[2]
    pairs = valid[:, :, None] & valid[:, None]
    apart = torch.cdist(states.float(), states.float()) / width**0.5
    apart.diagonal(dim1=1, dim2=2).zero_()
    apart = apart.masked_fill(~pairs, torch.inf)
    nearest = (apart**2).sort(dim=2).values.cumsum(2)
    last = (count - 1)[:, None, None].expand(-1, len(nearest[0]), 1)
    density = (-nearest.gather(2, last)[..., 0] / count[:, None]).exp()
    place = rank(density, valid)
    denser = place[:, None] < place[:, :, None]
    delta = apart.masked_fill(~denser, torch.inf).amin(2)
    largest = apart.masked_fill(~pairs, 0).amax((1, 2))[:, None]
    centre = rank(density * torch.minimum(delta, largest), valid) < count[:, None]
    joined = apart.masked_fill(~centre[:, None], torch.inf).argmin(2)
    return torch.where(centre, torch.arange(centre.shape[1], device=centre.device), joined)
