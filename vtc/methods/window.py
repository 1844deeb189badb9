"""The vocabulary of the cache site: which queries look, what each makes of a key, how that is summed up and pooled.

Methods that score a layer's keys and values after its prefill put their scores together from this. Queries are those
of the layer itself, keys and values those in its cache; no attention matrix is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vtc.adapter import Adapter
from vtc.choice import Seen
from vtc.core.compact import gather
from vtc.grids import Grid
from vtc.need import Need
from vtc.observe import QUERY_BLOCK
from vtc.stage import Method, Shape, Stage
from vtc.view import View

Window = Literal["question", "prompt"] | Annotated[int, Field(ge=1)]
"""The queries that look: the text after an image (where there is none, the prompt's last token), the whole prompt, or
its last tokens."""
Kernel = Literal[1, 3, 5, 7]
"""Cells on the side of the square that scores are pooled over."""
Entry = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What queries make of keys, (batch, key_heads, heads of each, queries, keys) float32: from their attention, of this
shape; from the values, (batch, key_heads, keys, head_dim) float32; and from what they see, (batch, key_heads, 1,
queries, keys) bool."""


@dataclass(frozen=True)
class AfterPrefill(Method):
    """A method of one `stage` at the cache of each decoder layer."""

    def stage(self, layer: int, shape: Shape) -> Stage:
        """What becomes of the cache of one layer."""
        raise NotImplementedError

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        return tuple(self.stage(layer, shape) for layer in range(shape.decoder_layers))


def attention(rows: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """An `Entry`: just that."""
    return rows


@dataclass(frozen=True)
class WindowRow(Need):
    """What a window of queries makes of the visual tokens in a layer's cache: (images, key_heads, tokens).

    The entries are summed over the heads that share a key, and over the queries.
    """

    reads_text: ClassVar[bool] = True

    window: Window = "question"
    entry: Entry = attention
    reduce: Literal["sum", "mean", "per-visible"] = "mean"
    """What the sum is divided by: 1, the number of queries, or that of the queries which see the token."""

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        return {"query": adapter.decoder_attention(adapter.layers[self.layer]).query}

    @torch.no_grad()
    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        keys, values = (x.float() for x in view.cached(self.layer))
        positions, asks = self.queries(view)
        blocks = zip(positions.split(QUERY_BLOCK, dim=1), asks.split(QUERY_BLOCK, dim=1), strict=True)
        sums = [self._block(view, gather(record["query"], at), keys, values, at, asking) for at, asking in blocks]
        total, number = torch.stack(sums).sum(0)
        if self.reduce == "sum":
            return total
        return total / (number if self.reduce == "per-visible" else asks.sum(1)[:, None, None]).clamp(min=1)

    def _block(self, view: View, query: Tensor, keys: Tensor, values: Tensor, at: Tensor, asking: Tensor) -> Tensor:
        """Of some queries the sum of entries, and how many see the token: (2, images, key_heads, tokens)."""
        rows, seen = view.attend(self.layer, query, keys, at)
        rows = rearrange(rows, "b (g r) q n -> b g r q n", g=keys.shape[1])
        seen = (seen if seen.ndim == 4 else seen[:, None]).expand_as(rows[:, :, 0])
        entries = self.entry(rows, values, seen[:, :, None]).sum(2)
        both = torch.stack((entries, seen.float()), dim=1)[..., view.past[self.layer].length :]
        tokens = rearrange(view.of_tokens(both.flatten(1, 3)), "i (x g q) n -> x i g q n", x=2, g=keys.shape[1])
        return torch.einsum("xigqn,iq->xign", tokens, asking)

    def queries(self, view: View) -> tuple[Tensor, Tensor]:
        """Where the queries are: (batch, queries); and whether each looks at an image: (images, queries) float32."""
        if self.window == "question":
            return question(view)
        real = view.stream.columns.place[:, : view.stream.length - view.ahead] >= 0
        number = real.shape[1] if self.window == "prompt" else self.window
        positions = real.long().argsort(dim=1, stable=True)[:, -number:]
        return positions, real.gather(1, positions)[view.stream.row].float()


def question(view: View) -> tuple[Tensor, Tensor]:
    """The text after an image, where there is none the prompt's last token: positions (batch, queries), and whether
    each of them asks about an image: (images, queries) float32."""
    positions, asks = view.text_after_images()
    unasked = 1 - asks.amax(1, keepdim=True)
    return torch.cat((positions, view.last_positions()), dim=1), torch.cat((asks, unasked), dim=1)


def pooled(scores: Tensor, seen: Seen, kernel: Kernel, how: Literal["mean", "max"] = "mean") -> Tensor:
    """Scores (images, heads, tokens), each the mean or maximum over the tokens in a square of its grid around it."""
    if kernel == 1:
        return scores
    table, high, wide = _canvas(tuple(map(tuple, seen.parts)), kernel // 2, scores.device)
    cell = table.gather(1, seen.index).masked_fill(~seen.valid, high * wide)[:, None]  # the last one is no token's

    def drawn(x: Tensor, empty: float) -> Tensor:
        canvas = x.new_full((*x.shape[:2], high * wide + 1), empty)
        return canvas.scatter(2, cell.expand_as(x), x)[..., :-1].unflatten(2, (high, wide))

    if how == "max":
        pool = F.max_pool2d(drawn(scores, -torch.inf), kernel, 1, kernel // 2)
    else:
        total, number = (drawn(x, 0.0) for x in (scores, torch.ones_like(scores[:, :1])))
        pool = F.avg_pool2d(total, kernel, 1, kernel // 2) / F.avg_pool2d(number, kernel, 1, kernel // 2)
    return F.pad(pool.flatten(2), (0, 1)).gather(2, cell.expand_as(scores))


@lru_cache(maxsize=32)
def _canvas(images: tuple[tuple[Grid, ...], ...], gap: int, device: torch.device) -> tuple[Tensor, int, int]:
    """The cell of each token, (images, tokens), where an image's grids stand below each other, `gap` rows apart, on a
    canvas of a height and a width that fit all images."""
    wide = max(width for grids in images for _, width in grids)
    tables, high = [], 0
    for grids in images:
        *tops, end = accumulate((height + gap for height, _ in grids), initial=0)
        rows = [torch.arange(top, top + height) for top, (height, _) in zip(tops, grids, strict=True)]
        cells = [row[:, None] * wide + torch.arange(width) for row, (_, width) in zip(rows, grids, strict=True)]
        tables.append(torch.cat([cell.flatten() for cell in cells]))
        high = max(high, end)
    return pad_sequence(tables, batch_first=True).to(device), high, wide
