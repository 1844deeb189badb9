"""TokenSelect: nothing is evicted; each decoded token reads the visual tokens that its own query looks for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from vtc.adapter import Adapter
from vtc.choice import Seen
from vtc.need import Need
from vtc.stage import Cache, Method, Shape, Stage
from vtc.view import View


@dataclass(frozen=True)
class TokenSelect(Method):
    """At each decoded token each layer reads the visual tokens that its heads vote for, and all text.

    "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV Cache
    Selection" (arXiv 2411.02886): the products of the query with the cached keys, as they are, go through a softmax
    over the candidates in each head; heads vote by their sum; the highest are read by all heads, and read again while
    the query is alike, all heads taken together. A prompt of text alone, as in a next turn, reads by the mean of its
    queries, as the paper's chunks do. Here candidates are the visual tokens, all images of a row together, where the
    paper takes all but the first 128 and the last 512 tokens; queries and keys are rotated, where the paper's come
    before the rotary embedding; a prompt with images reads everything, where the paper's chunks choose, too.

    A budget is what the attention of a layer reads at a decoded token. It saves bytes that a decoded token reads,
    neither memory nor the first token. The keys of all candidates are read as well, for their scores, also where a
    choice is read again: to know that, the host would have to wait for the device.
    """

    alike: Annotated[float, Field(ge=-1, le=1)] = 0.9
    """The cosine of two queries from which on the second one reads what the first one chose; 1: hardly ever."""

    name: ClassVar[str] = "tokenselect"
    paper: ClassVar[str] = "TokenSelect, arXiv 2411.02886"

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        return tuple(map(self._stage, range(shape.decoder_layers)))

    def _stage(self, layer: int) -> Stage:
        query, products = StepQuery(layer), StepProducts(layer)
        return Stage(
            Cache(layer),
            lambda seen: votes(seen[products], seen),
            (query, products),
            when="decode",
            reuse=(query, self.alike),
        )


def votes(products: Tensor, seen: Seen) -> Tensor:
    """Of products (rows, heads, tokens) the softmax over a row's candidates, summed over the heads: (rows, tokens)."""
    return products.masked_fill(~seen.valid[:, None], -math.inf).softmax(2).sum(1)


@dataclass(frozen=True)
class StepQuery(Need):
    """The mean query of a step's tokens, rotated, its heads one after the other: (rows, heads * head_dim, 1)."""

    reads_text: ClassVar[bool] = True

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        return {"query": adapter.decoder_attention(adapter.layers[self.layer]).query}

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        attention = view.adapter.decoder_attention(view.adapter.layers[self.layer])
        query, real = view.rotated(self.layer, attention.queries(record["query"])), view.stream.columns.place >= 0
        total = torch.einsum("bhnd,bn->bhd", query.float(), real.float())
        return (total / real.sum(1).clamp(min=1)[:, None, None]).flatten(1)[..., None]


@dataclass(frozen=True)
class StepProducts(StepQuery):
    """Its products with the keys of the visual tokens: (rows, heads, tokens), no 1 / sqrt(head_dim) in them."""

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        keys = view.apart(self.layer)
        query = rearrange(super().row(record, view)[..., 0], "b (g r d) -> b g r d", g=keys.shape[1], d=keys.shape[3])
        return in_full(query, keys).flatten(1, 2)


def in_full(query: Tensor, keys: Tensor) -> Tensor:
    """Products of queries (batch, key_heads, queries, head_dim) with keys (batch, key_heads, tokens, head_dim): (batch,
    key_heads, queries, tokens) float32, as they may be beyond the range of the keys' own type."""
    if MIXED and keys.is_cuda and keys.dtype in (torch.float16, torch.bfloat16):  # without a copy of the keys
        both = query.to(keys).flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)
        return torch.bmm(*both, out_dtype=torch.float32).unflatten(0, keys.shape[:2])
    return query.float() @ keys.float().transpose(2, 3)


MIXED = torch.version.hip is None and "dtype" in torch.ops.aten.bmm.overloads()
"""Whether this torch multiplies half precision into float32 on CUDA."""
