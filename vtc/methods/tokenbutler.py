"""TokenButler: one small trained predictor tells after layer 0 what all later layers will attend to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vtc.adapter import Adapter
from vtc.compact import gather_heads
from vtc.methods.window import question
from vtc.need import Need
from vtc.stage import Shape, Stage
from vtc.trained import Trained
from vtc.view import View

DIM = 16
"""Channels of an importance query and of an importance key, d'."""


class Predictor(nn.Module):
    """States (batch, length, width) to queries and keys of importance, each (batch, channels, length, DIM), rotated.

    A block of causal attention and a feed-forward net, both narrow, add to the states what precedes them; one MLP makes
    the queries of them, the other the keys. A channel is a key head of a decoder layer.
    """

    def __init__(self, width: int, narrow: int, hidden: int, channels: int):
        super().__init__()
        self.width, self.channels = width, channels
        self.narrow, self.qkv = nn.Linear(width, narrow), nn.Linear(narrow, 3 * narrow)
        self.norm = nn.LayerNorm(narrow)
        self.feed = nn.Sequential(nn.Linear(narrow, 2 * narrow), nn.SiLU(), nn.Linear(2 * narrow, width))
        self.query, self.key = (
            nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, channels * DIM)) for _ in range(2)
        )

    def forward(self, states: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """`place` (batch, length) is the position of each state in the prompt, -1 of filling."""
        inner = self.narrow(states)
        query, key, value = rearrange(self.qkv(inner), "b n (x h d) -> x b h n d", x=3, d=DIM)
        sees = (place[:, None] <= place[:, :, None]) & (place[:, None] >= 0) | (place[:, :, None] < 0)
        mixed = scaled_dot_product_attention(rotated(query, place), rotated(key, place), value, sees[:, None])
        inner = self.norm(inner + rearrange(mixed, "b h n d -> b n (h d)"))
        states = states + self.feed(inner)
        query, key = (rearrange(mlp(states), "b n (c d) -> b c n d", d=DIM) for mlp in (self.query, self.key))
        return rotated(query, place), rotated(key, place)


def rotated(x: Tensor, place: Tensor) -> Tensor:
    """The rotary embedding of x (batch, heads, length, DIM) at `place` (batch, length)."""
    angle = place[:, None, :, None] * 10000 ** (-torch.arange(0, DIM, 2, device=x.device) / DIM)
    (a, b), cos, sin = x.chunk(2, dim=-1), angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@dataclass(frozen=True)
class Importance(Need):
    """Predicted attention of the question to the visual tokens, (images, 1, tokens), from the states entering `layer`.

    The mean over the queries, and over the key heads of all layers from `layer` on.
    """

    reads_text: ClassVar[bool] = True

    predictor: Predictor | None

    @property
    def before(self) -> int:
        return self.layer

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        shape = adapter.shape()
        here = adapter.decoder.config.hidden_size, (shape.decoder_layers - self.layer) * shape.key_heads
        if self.predictor is not None and (known := (self.predictor.width, self.predictor.channels)) != here:
            raise ValueError(
                f"these modules of tokenbutler are of another model: they read states of {known[0]} channels and know "
                f"{known[1]} key heads in all layers, and here are {here[0]} and {here[1]}"
            )
        return {}

    def logits(self, view: View) -> Iterator[Tensor]:
        """For each layer from `layer` on, q k / sqrt(DIM) of the `question`: (images, key_heads, queries, tokens)."""
        assert self.predictor is not None, "bind finds it or raises"
        states = view.adapter.layers[self.layer].input_layernorm(view.hidden)
        query, key = self.predictor(states.float(), view.stream.columns.place)
        positions, heads = question(view)[0], view.adapter.shape().key_heads
        asking = gather_heads(query, positions[:, None])
        for own, keys in zip(asking.split(heads, dim=1), key.split(heads, dim=1), strict=True):
            rows = rearrange(own @ keys.transpose(2, 3) / DIM**0.5, "b g q n -> b (g q) n")
            yield rearrange(view.of_tokens(rows), "i (g q) n -> i g q n", g=heads)

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        asks = question(view)[1]
        weights, hidden = asks / asks.sum(1, keepdim=True), ~view.alive[:, None, None]
        rows = [x.masked_fill(hidden, torch.finfo(x.dtype).min).softmax(-1).mean(1) for x in self.logits(view)]
        return torch.einsum("iqn,iq->in", torch.stack(rows).mean(0), weights)[:, None]


@dataclass(frozen=True)
class TokenButler(Trained):
    """Before decoder layer 1 drop the visual tokens that a predictor expects the later layers to attend to least.

    "TokenButler: Token Importance is Predictable" (arXiv 2503.07518): one predictor beside layer 0, with the layers and
    heads of the whole decoder in its outputs, is trained to give their logits before the softmax; the model is frozen.
    """

    name: ClassVar[str] = "tokenbutler"
    paper: ClassVar[str] = "TokenButler, arXiv 2503.07518"
    any_budget: ClassVar[bool] = True

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        (layer,) = shape.layers((1,), of=1)
        need = Importance(layer, self.predictor)
        return (Stage(layer, lambda seen: seen[need][:, 0], (need,)),)

    @property
    def predictor(self) -> Predictor | None:
        return None if self.modules is None else cast(Predictor, self.modules[0])

    # -- the trained modules --------------------------------------------------------------------------------------

    def untrained(self, shape: Shape, width: int) -> TokenButler:
        """With a new predictor for this model, ready for training; `width` is the decoder's."""
        narrow, channels = max(DIM, width // 4 // DIM * DIM), (shape.decoder_layers - 1) * shape.key_heads
        return replace(self, modules=nn.ModuleList([Predictor(width, narrow, min(512, width), channels)]))

    @property
    def parts(self) -> int:
        return 1

    def built(self, state: dict[str, Tensor]) -> nn.ModuleList:
        (narrow, width), (out, hidden) = state["0.narrow.weight"].shape, state["0.key.2.weight"].shape
        return nn.ModuleList([Predictor(width, narrow, hidden, out // DIM)])
