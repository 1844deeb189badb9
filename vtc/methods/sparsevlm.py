"""SparseVLM: the text tokens that match the image rate its tokens; what is dropped is partly recycled."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

import vtc.scores as scores
from vtc.attention import attention_rows
from vtc.choice import Choice, Seen
from vtc.core.compact import gather
from vtc.methods.density_peaks import density_peaks
from vtc.methods.progressive import Progressive
from vtc.observe import DecoderRow, TokenStates
from vtc.select import top_k
from vtc.stage import Layer, Share, Stage
from vtc.view import View


@dataclass(frozen=True)
class SparseVLM(Progressive):
    """Keep the image tokens that rater tokens of the text attend to, and recycle the best of the others in clusters.

    "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference" (arXiv 2410.04417), released
    code, version 1. Raters are the text tokens after the image that its tokens match more than the mean one, by a
    softmax over these text tokens of the products of their embeddings; where none does, all rate. A token's score is
    the mean attention that raters pay it in the layer before the pruning, over all heads. Of the dropped ones the best
    30 % become a tenth as many tokens, by density peaks of their states, each the plain mean of its cluster.

    A cluster's token stays where its centre was; the code puts them behind the image, and renumbers. `keep_ratios`, and
    so budgets, count them. Ties of densities, to which the code adds noise, go to the earlier token. The code never
    keeps all; a full budget here does. Of an image without later text, which nobody rates, the first tokens stay.
    """

    layers: tuple[Layer, ...] | None = None
    """Decoder layers to prune before. None: the code's after 2, 6 and 15 (from 0) of 32, scaled to the decoder."""
    keep_ratios: tuple[Share, ...] = (309 / 576, 204 / 576, 113 / 576)
    """Shares of the image's tokens that are left after each pruning, recycled ones included: the code's for 192."""
    plus: bool = False
    """SparseVLM+, the code's version 2: attention is divided by what rotary embeddings alone make of it, 14 of 32 heads
    count, those in which raters attend to the image most, and nothing is recycled. In a later turn rotary embeddings
    are compared over the tokens of that turn."""

    PAPER: ClassVar[tuple[int, ...]] = (3, 7, 16)

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "SparseVLM, arXiv 2410.04417"
    merges: ClassVar[bool] = True
    space: ClassVar[dict[str, tuple[float, float]]] = {"keep_ratios.0": (0.1, 0.99), "keep_ratios.1": (0.05, 0.99)}

    def stage(self, layer: int) -> Stage:
        raters, row, states = Raters(0), RaterRow(layer - 1, debiased=self.plus), TokenStates(layer)
        if self.plus:
            return Stage(layer, lambda seen: _most_attentive(seen[row], seen.valid), (raters, row))
        return Stage(layer, lambda seen: scores.head_mean(seen[row]), (raters, row, states), partial(recycled, states))


def _most_attentive(row: Tensor, valid: Tensor) -> Tensor:
    """The mean over the 14 of 32 heads with the largest sums: (images, heads, tokens) -> (images, tokens)."""
    count = max(1, round(row.shape[1] * 14 / 32))
    heads = row.masked_fill(~valid[:, None], 0).sum(2).topk(count, dim=1).indices
    return row.gather(1, heads[..., None].expand(-1, -1, row.shape[2])).mean(1)


@dataclass(frozen=True)
class Raters(TokenStates):
    """Which of the text tokens after an image rate it: (images, text, tokens), 1 or 0, the same for all its tokens."""

    reads_text: ClassVar[bool] = True

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        positions, asks = view.text_after_images()
        text = gather(view.hidden.float(), positions)[view.stream.row]
        matches = (text @ super().row(record, view)).masked_fill(asks[..., None] == 0, -torch.inf).softmax(1)
        matched = matches.masked_fill(~view.alive[:, None], 0).sum(2) / view.alive.sum(1, keepdim=True).clamp(min=1)
        rates = (matched > 1 / asks.sum(1, keepdim=True)) & (asks > 0)  # the mean of a distribution
        rates = torch.where(rates.any(1, keepdim=True), rates, asks > 0).float()
        return rates[..., None].expand_as(matches)


@dataclass(frozen=True)
class RaterRow(DecoderRow):
    """Mean attention that an image's raters pay it in decoder layer `layer`: (images, heads, tokens)."""

    debiased: bool = False
    """Whether it is divided by the attention of queries and keys that are all ones."""

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        positions, _ = view.text_after_images()
        rows = self.paid(record, view, positions)
        if self.debiased:
            rows = rows / self._of_ones(view, positions).clamp(min=1e-12)
        raters = view.stream.rows[Raters(0)][:, :, 0]
        return torch.einsum("ihqn,iq->ihn", view.of_tokens(rows), raters / raters.sum(1, keepdim=True).clamp(min=1))

    def _of_ones(self, view: View, positions: Tensor) -> Tensor:
        """What rotary embeddings alone make of attention: (batch, 1, queries, length)."""
        columns = view.stream.columns
        ones = torch.ones_like(view.tables[self.layer][0], dtype=torch.float32)[:, None]
        key = view.rotated(self.layer, ones.expand(len(positions), -1, -1, -1))
        seen = view.visibility.rows(self.layer, columns, gather(columns.place, positions))
        scale = view.adapter.decoder_attention(view.adapter.layers[self.layer]).scale
        return attention_rows(gather(key[:, 0], positions)[:, None], key, scale, seen)


def recycled(states: TokenStates, scores: Tensor, seen: Seen, keep: Tensor) -> Choice:
    """The best stay, and the next best become clusters: `keep` together."""
    total, clusters = seen.valid.sum(1), torch.zeros_like(keep)
    for _ in range(8):  # clusters take the place of tokens, which makes more to cluster, 3 % as many
        merged = (total - keep + clusters) * 3 // 10 + 1
        clusters = torch.minimum(merged // 10 + 1, keep - 1).clamp(min=0).where(total > keep, 0)
    best = top_k(scores, seen, keep - clusters).keep
    others = top_k(scores.masked_fill(best, -torch.inf), seen, merged.where(clusters > 0, 0)).keep & ~best
    order = others.long().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(others.sum(1).max()))]
    picked = others.gather(1, order)
    centre = density_peaks(gather(seen[states].transpose(1, 2), order), picked, clusters.clamp(min=1))
    place = torch.arange(scores.shape[1], device=scores.device)
    into = place.where(best, -1)
    into = into.scatter(1, order, order.gather(1, centre).where(picked, into.gather(1, order)))
    return Choice(into == place, into, mass=torch.ones_like(scores))
