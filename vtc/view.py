"""All that a need may ask about the running decoder, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vtc.cache.held as held
from vtc.adapter import Adapter
from vtc.attention import attention_rows
from vtc.core.columns import Columns
from vtc.core.compact import gather
from vtc.core.rotary import Tables
from vtc.core.stream import Stream
from vtc.core.visibility import Visibility


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
        """The visual tokens' entries of a (batch, ..., length) tensor: (images, ..., tokens)."""
        return self.stream.of_tokens(x)

    def last_positions(self) -> Tensor:
        """Where the last token of each row's prompt is in the stream: (batch, 1)."""
        columns, length = self.stream.columns, self.stream.length
        real = columns.place[:, : length - self.ahead] >= 0
        return length - self.ahead - 1 - real.flip(1).long().argmax(1, keepdim=True)

    def text_after_images(self) -> tuple[Tensor, Tensor]:
        """The real text that follows a row's first image: positions (batch, queries), and whether each of them comes
        after an image: (images, queries) float32. Where a row has less of it, positions are filled up with others."""
        stream, columns = self.stream, self.stream.columns.place
        last = stream.start + stream.places.amax(1)
        first = columns.new_full((len(columns),), stream.start + stream.source.shape[1])
        first = first.scatter_reduce(0, stream.row, last, "amin")
        text = stream.stays(torch.zeros_like(stream.valid)) & (columns > first[:, None])
        text[:, stream.length - self.ahead :] = False
        positions = (~text).long().argsort(dim=1, stable=True)[:, : max(1, stream.text_after_images)]
        asks = text.gather(1, positions)[stream.row] & (gather(columns, positions)[stream.row] > last[:, None])
        return positions, asks.float()

    def rotated(self, layer: int, x: Tensor) -> Tensor:
        """Queries or keys (batch, heads, length, head_dim) of the stream in decoder layer `layer`, rotated."""
        return self.adapter.rotate(x, *self.tables[layer])

    def cached(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys, rotated, and values of a decoder layer that has run: (batch, key_heads, past + length, head_dim).

        Raises ValueError for caches that do not give them back.
        """
        keys, values = held.pair(self.cache, layer)
        if keys.shape[2] != self.past[layer].length + self.stream.length:
            raise ValueError(f"tokens have left the cache of decoder layer {layer} before this method looks at it")
        return keys, values

    def apart(self, layer: int) -> Tensor:
        """Keys, rotated, of the visual tokens that a step chooses from in a decoder layer: (batch, key_heads, tokens,
        head_dim)."""
        parted = held.parted(self.cache, layer)
        assert parted is not None
        return parted.visual[0]

    def rows(self, layer: int, query: Tensor, key: Tensor, positions: Tensor) -> Tensor:
        """Attention that the tokens at `positions` (batch, queries) pay in decoder layer `layer`.

        `query` (batch, queries, heads * head_dim) and `key` (batch, length, key_heads * head_dim) come before the
        rotary embedding. The softmax runs over the cached keys too. Returns (batch, heads, queries, length) float32.
        """
        attention, past = self.adapter.decoder_attention(self.adapter.layers[layer]), self.past[layer].length
        key = self.rotated(layer, attention.keys(key))
        if past:
            key = torch.cat((held.keys(self.cache, layer, past).to(key), key), dim=2)
        return self.attend(layer, query, key, positions)[0][..., past:]

    def attend(self, layer: int, query: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """As `rows`, over all `keys` (batch, key_heads, past + length, head_dim), which are rotated.

        Returns (batch, heads, queries, past + length) float32, and what is seen: (batch, [key_heads,] queries, ...).
        """
        attention = self.adapter.decoder_attention(self.adapter.layers[layer])
        query = self.adapter.rotate(attention.queries(query), *(gather(x, positions) for x in self.tables[layer]))
        columns = self.past[layer].then(self.stream.columns)
        seen = self.visibility.rows(layer, columns, gather(self.stream.columns.place, positions))
        return attention_rows(query, keys, attention.scale, seen, columns.weight, attention.softcap), seen
