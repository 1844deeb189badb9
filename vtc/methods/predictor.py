"""The predictor of TokenButler: from a decoder's states to queries and keys, whose products are importances."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vtc.core.compact import gather

DIM = 16
"""Channels of an importance query and of an importance key, d'."""


class Predictor(nn.Module):
    """States (batch, length, width) to importance queries of some of them, and keys of all: (batch, channels, n, DIM).

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

    def forward(self, states: Tensor, place: Tensor, asking: Tensor) -> tuple[Tensor, Tensor]:
        """`place` (batch, length) is the position of each state in the prompt, -1 of filling; those at `asking` (batch,
        queries) have queries."""
        inner = self.narrow(states)
        query, key, value = rearrange(self.qkv(inner), "b n (x h d) -> x b h n d", x=3, d=DIM)
        sees = (place[:, None] <= place[:, :, None]) & (place[:, None] >= 0) | (place[:, :, None] < 0)
        mixed = scaled_dot_product_attention(rotated(query, place), rotated(key, place), value, sees[:, None])
        inner = self.norm(inner + rearrange(mixed, "b h n d -> b n (h d)"))
        states = states + self.feed(inner)
        query, key = self.query(gather(states, asking)), self.key(states)
        query, key = (rearrange(x, "b n (c d) -> b c n d", d=DIM) for x in (query, key))
        return rotated(query, gather(place, asking)), rotated(key, place)


def rotated(x: Tensor, place: Tensor) -> Tensor:
    """The rotary embedding of x (batch, heads, length, DIM) at `place` (batch, length)."""
    angle = place[:, None, :, None] * 10000 ** (-torch.arange(0, DIM, 2, device=x.device) / DIM)
    (a, b), cos, sin = x.chunk(2, dim=-1), angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
