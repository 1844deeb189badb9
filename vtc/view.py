"""All that a need may ask about the running decoder, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vtc.held as held
from vtc.adapter import Adapter
from vtc.attention import attention_rows
from vtc.columns import Columns
from vtc.compact import gather
from vtc.rotary import Tables
from vtc.stream import Stream
from vtc.visibility import Visibility


@dataclass(frozen=True, eq=False)
class View:
    """What a need sees of a decoder between two layers."""

    adapter: Adapter
    stream: Stream
    hidden: Tensor
    """(batch, length, width): the states that come out of the last layer and go into the next one."""
    ahead: int
    """Tokens at the end that do not belong to the prompt: guesses in assisted generation."""
    tables: dict[int, Tables]
    """The rotary tables of each decoder layer so far, over the running stream."""
    past: tuple[Columns, ...]
    """What the cache held of each layer before this call."""
    visibility: Visibility
    cache: Any

    @property
    def alive(self) -> Tensor:
        """(images, tokens) bool: which entries are tokens at all."""
        return self.stream.alive

    def of_tokens(self, x: Tensor) -> Tensor:
        """The visual tokens' entries of a (batch, channels, length) tensor: (images, channels, tokens)."""
        return self.stream.of_tokens(x)

    def last_positions(self) -> Tensor:
        """Where the last token of each row's prompt is in the stream: (batch, 1)."""
        columns, length = self.stream.columns, self.stream.length
        real = columns.place[:, : length - self.ahead] >= 0
        return length - self.ahead - 1 - real.flip(1).long().argmax(1, keepdim=True)

    def text_after_images(self) -> tuple[Tensor, Tensor]:
        """The real text that follows a row's first image: positions (batch, queries), and whether each of them comes
        after an image: (images, queries) float32."""
        stream, position = self.stream, self.stream.position
        places = torch.arange(stream.length, device=position.device)
        end = position.masked_fill(~stream.valid, -1).amax(1)
        start = torch.full((len(stream.columns.place),), stream.length, device=position.device)
        start = start.scatter_reduce(0, stream.row, end, "amin")
        text = (places > start[:, None]) & (places < stream.length - self.ahead) & (stream.columns.place >= 0)
        text[stream.row[:, None].expand_as(position)[stream.valid], position[stream.valid]] = False
        positions = (~text).long().argsort(dim=1, stable=True)[:, : max(1, int(text.sum(1).max()))]
        asks = text.gather(1, positions)[stream.row] & (positions[stream.row] > end[:, None])
        return positions, asks.float()

    def rotated(self, layer: int, x: Tensor) -> Tensor:
        """Queries or keys (batch, heads, length, head_dim) of the stream in decoder layer `layer`, rotated."""
        return self.adapter.rotate(x, *self.tables[layer])

    def rows(self, layer: int, query: Tensor, key: Tensor, positions: Tensor) -> Tensor:
        """Attention that the tokens at `positions` (batch, queries) pay in decoder layer `layer`.

        `query` (batch, queries, heads * head_dim) and `key` (batch, length, key_heads * head_dim) come before the
        rotary embedding. The softmax runs over the cached keys too. Returns (batch, heads, queries, length) float32.
        """
        attention, past = self.adapter.decoder_attention(self.adapter.layers[layer]), self.past[layer]
        query = self.adapter.rotate(attention.queries(query), *(gather(x, positions) for x in self.tables[layer]))
        key = self.rotated(layer, attention.keys(key))
        if past.length:
            key = torch.cat((held.keys(self.cache, layer, past.length).to(key), key), dim=2)
        columns = past.then(self.stream.columns)
        seen = self.visibility.rows(layer, columns, gather(self.stream.columns.place, positions))
        rows = attention_rows(query, key, attention.scale, seen, columns.weight, attention.softcap)
        return rows[..., past.length :]
