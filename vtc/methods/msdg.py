"""MSDG-Prune: what the tower still changes late, in each direction, and what the question is about."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import normalize

import vtc.methods.groups as groups
from vtc.choice import Choice, Seen
from vtc.observe import PatchStates, QuestionCosine
from vtc.select import patches, preferring, top_k
from vtc.stage import Method, Shape, Stage


@dataclass(frozen=True)
class Msdg(Method):
    """Quotas over clusters of the directions in which the tower moved the patches; within, by change and relevance.

    MSDG-Prune (arXiv 2609.36916), whose layers l of 24 are counted from 1. Patches whose state after layer 12 exceeds
    50 in one channel are sinks and go first. The salience of the others is the length of h^19 - h^14, their relevance
    the highest cosine of the projected token with a token of the question as the decoder embeds it, their score the
    product. Directions: unit(unit(h^23) - unit(h^2)), in 20 clusters by spherical k-means of 10 rounds from farthest
    points. Quotas: the softmax over clusters of their mean scores, by largest remainders.

    The channel of sinks is the paper's for CLIP-L (650) and Qwen2.5-VL (849) where `channel` says so; else, ours, of
    the 8 channels with the largest states the one whose largest is most times its median over the image's patches.
    Layers are scaled to the depth of the tower, or of its blocks that can be seen (Qwen2.5-VL). The question is the
    text after the image. Tiles of an image compete, newlines between their rows leave first, and survivors keep their
    positions.
    """

    clusters: PositiveInt = 20
    channel: NonNegativeInt | None = None
    """The channel of sinks. None: the most extreme one of each image."""
    sink: PositiveFloat = 50.0
    """How large a state in that channel makes a sink."""

    name: ClassVar[str] = "msdg"
    paper: ClassVar[str] = "MSDG-Prune, arXiv 2609.36916"
    space: ClassVar[dict[str, tuple[float, float]]] = {"clusters": (4, 64)}

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        depth = shape.tower_layers
        layers = [min(depth, max(1, round(layer * (depth + 1) / 24))) for layer in (2, 12, 14, 19, 23)]
        early, sinks, before, after, late = (PatchStates(layer - 1) for layer in layers)
        if before == after:
            raise ValueError(
                f"this method compares what the tower's blocks 14 and 19 of 24 leave; of this one's {depth} are seen"
            )
        question = QuestionCosine(0, over="max")

        def score(seen: Seen) -> Tensor:
            return seen[question][:, 0] * (seen[after] - seen[before]).norm(dim=1)

        def select(scores: Tensor, seen: Seen, keep: Tensor) -> Choice:
            direction = normalize(seen[late], dim=1) - normalize(seen[early], dim=1)
            return self._select(direction, self._clear(seen[sinks].abs(), seen.valid), scores, seen, keep)

        return (Stage(0, score, (early, sinks, before, after, late, question), preferring(patches(late), select)),)

    def _clear(self, states: Tensor, valid: Tensor) -> Tensor:
        """The tokens that are no sinks, by the size of their states (images, width, tokens): (images, tokens) bool."""
        if self.channel is not None:
            return valid & (states[:, self.channel] <= self.sink)
        largest = states.masked_fill(~valid[:, None], 0).amax(2).topk(min(8, states.shape[1]), dim=1)
        states = states.gather(1, largest.indices[..., None].expand(-1, -1, states.shape[2]))
        middle = states.masked_fill(~valid[:, None], torch.nan).nanmedian(2).values
        channel = (largest.values / middle.clamp(min=1e-8)).argmax(1)
        return valid & (states[torch.arange(len(states)), channel] <= self.sink)

    @torch.no_grad()
    def _select(self, direction: Tensor, clear: Tensor, scores: Tensor, seen: Seen, keep: Tensor) -> Choice:
        cluster = groups.k_means(normalize(direction, dim=1), clear, self.clusters, spherical=True)
        empty = groups.sizes(cluster, clear, self.clusters) == 0
        mean = groups.means(scores, cluster, clear, self.clusters)
        shares = mean.masked_fill(empty, torch.finfo(mean.dtype).min).softmax(1)
        room = torch.minimum(keep, clear.sum(1))
        best = groups.quota(scores, replace(seen, valid=clear), room, cluster, *groups.by_shares(shares, room))
        return top_k(best.keep.float(), seen, keep)  # sinks fill up
