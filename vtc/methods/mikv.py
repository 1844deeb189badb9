"""MiKV: after the prefill, each head keeps the heavy hitters as they are and all other visual tokens at a few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from einops import rearrange, repeat
from torch import Tensor, nn

from vtc.adapter import Adapter
from vtc.cache.packed import Grain
from vtc.cache.precision import Precision
from vtc.methods.window import AfterPrefill, Window, WindowRow
from vtc.need import Need
from vtc.stage import Cache, Shape, Stage
from vtc.view import View


@dataclass(frozen=True)
class MiKV(AfterPrefill):
    """In each layer's cache keep, for each key head, important visual tokens at `high` bits and the others at `low`.

    "No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision Quantization" (arXiv
    2402.18096): importance is H2O's, the attention of all queries. Each token's keys and values are rounded in groups
    of half a head; channels of keys are first balanced by the root of the queries' largest over the keys' largest, for
    outliers. The paper holds 20 % of the prompt as important, half of these the most recent; here text is never
    quantised, so that all of them are heavy hitters, and how many is what the budget says. Keys' largest are those of
    the visual tokens. A budget is the size of what a layer holds, scales included, and the floor is all at `low`;
    above all at `high` the most important are as they are. It saves memory and never the first token; reading is not
    faster, as the cache is dequantised anew for each step.
    """

    high: Literal[16, 8, 4] = 16
    """Bits a number; 16 is as they are, also where a model computes with more."""
    low: Literal[8, 4, 2] = 2
    window: Window = "prompt"
    """The queries whose attention is summed; each token's sum is divided by how many see it."""

    name: ClassVar[str] = "mikv"
    paper: ClassVar[str] = "MiKV, arXiv 2402.18096"

    def stage(self, layer: int, shape: Shape) -> Stage:
        attention, reach = WindowRow(layer, self.window, reduce="per-visible"), QueryReach(layer)
        half = Grain(channels=shape.head_dim // 2)
        levels = tuple(dict.fromkeys((16, self.high, self.low)))
        precision = Precision(levels, half, half, shape.key_heads, shape.head_dim, shape.bits, reach)
        return Stage(
            Cache(layer), lambda seen: seen[attention], (attention, reach), precision.select, precision=precision
        )


@dataclass(frozen=True)
class QueryReach(Need):
    """The largest absolute value of each channel of a layer's rotated queries, over the prompt and the heads that share
    a key: (images, key_heads * head_dim, tokens), for all tokens of an image the same."""

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        return {"query": adapter.decoder_attention(adapter.layers[self.layer]).query}

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        attention, stream = view.adapter.decoder_attention(view.adapter.layers[self.layer]), view.stream
        query = view.rotated(self.layer, attention.queries(record["query"])).float().abs()
        query = query.masked_fill((stream.columns.place < 0)[:, None, :, None], 0)
        query[:, :, stream.length - view.ahead :] = 0
        grouped = rearrange(query, "b (g r) n d -> b (g d) (r n)", g=attention.key_heads)
        return repeat(grouped.amax(2)[stream.row], "i c -> i c n", n=stream.index.shape[1])
