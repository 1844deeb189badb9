"""DART: keep a few pivots, and the image tokens that are least like them; no attention is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import normalize

from vtc.adapter import Adapter
from vtc.choice import Choice, Seen
from vtc.need import Need
from vtc.select import top_k
from vtc.stage import Layer, Method, Shape, Stage
from vtc.view import View


@dataclass(frozen=True)
class Dart(Method):
    """Before decoder layer K keep pivots, the tokens with the largest keys, and the image tokens least like a pivot.

    "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More" (arXiv 2502.11494), as
    ports of its code have it; the authors' own was not read. Pivots are the image tokens, and the text tokens after the
    image, whose keys in layer K - 1, rotated, over all heads, have the largest L1 norms. One pivot after the other, the
    image's first, takes its equal share of the budget: of the image tokens still there those with the lowest cosine to
    it, of the states that enter layer K, after the decoder's last norm. Original positions. The ports round shares
    down; here the first pivots take the rest, so that the budget is met.
    """

    layer: Layer | None = None
    """K. None: the paper's 2 of 32, scaled to the depth of the decoder."""
    image_pivots: PositiveInt = 4
    text_pivots: NonNegativeInt = 4

    name: ClassVar[str] = "dart"
    paper: ClassVar[str] = "DART, arXiv 2502.11494"
    space: ClassVar[dict[str, tuple[float, float]]] = {"layer": (1, 8), "image_pivots": (1, 16), "text_pivots": (0, 16)}

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        (layer,) = shape.layers(None if self.layer is None else (self.layer,), 2, of=32)
        need = Likeness(layer - 1, self.image_pivots, self.text_pivots)
        return (Stage(layer, lambda seen: seen[need][:, 0], (need,), partial(least_alike, need)),)


@dataclass(frozen=True)
class Likeness(Need):
    """The L1 norm of each visual token's key in decoder layer `layer`, and after it the cosine to each pivot.

    (images, 1 + pivots, tokens); infinite where an image has fewer pivots.
    """

    image_pivots: int
    text_pivots: int

    reads_text: ClassVar[bool] = True

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        return {"key": adapter.decoder_attention(adapter.layers[self.layer]).key}

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        attention, row = view.adapter.decoder_attention(view.adapter.layers[self.layer]), view.stream.row[:, None]
        norms = view.rotated(self.layer, attention.keys(record["key"])).float().abs().sum((1, 3))
        features = normalize(view.adapter.decoder.norm(view.hidden).float(), dim=-1)
        text, asks = view.text_after_images()

        def largest(valid: Tensor, positions: Tensor, count: int) -> tuple[Tensor, Tensor]:
            """Where the `count` largest norms at `positions` (images, tokens) are, and which of those are tokens."""
            order = norms[row, positions].masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
            return positions.gather(1, order[:, :count]), valid.gather(1, order[:, :count])

        own, said = view.stream.position, text[view.stream.row]
        pivots = largest(view.alive, own, self.image_pivots), largest(asks > 0, said, self.text_pivots)
        places, real = (torch.cat(parts, dim=1) for parts in zip(*pivots, strict=True))
        cosines = features[row, places] @ view.of_tokens(features.transpose(1, 2))
        return torch.cat((norms[row, own][:, None], cosines.masked_fill(~real[..., None], torch.inf)), dim=1)


def least_alike(need: Likeness, scores: Tensor, seen: Seen, keep: Tensor) -> Choice:
    """The image pivots, and for one pivot after the other the tokens least like it; `keep` in all."""
    cosines = seen[need][:, 1:]
    kept = top_k(scores, seen, keep.clamp(max=need.image_pivots)).keep
    real = cosines.isfinite().any(2)
    left, pivots = (keep - kept.sum(1))[:, None], real.sum(1, keepdim=True).clamp(min=1)
    shares = (left // pivots + (real.cumsum(1) <= left % pivots)).where(real, 0)
    for cosine, share in zip(cosines.unbind(1), shares.unbind(1), strict=True):
        kept = kept | top_k((-cosine).masked_fill(kept, -torch.inf), seen, share).keep
    return Choice(kept)
