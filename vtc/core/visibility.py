"""Who sees whom: one predicate on columns, as a kernel's mask or for a few queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import vtc.cache.held as held
from vtc.adapter import Adapter
from vtc.core.columns import Columns

Sight = tuple[Tensor, Tensor | None]
"""Columns and, where there are any, the blocks of these columns."""
DENSE = ("eager", "sdpa")
"""Kernels whose mask is a tensor, to which weights can be added."""


@dataclass(eq=False)
class Visibility:
    """Sight in the decoder layers of one call, whose own columns begin at `start`."""

    adapter: Adapter
    windows: Sequence[int | None]
    """How many positions back each layer sees; None where it sees all."""
    start: int
    reach: int
    """Columns in all: a window as wide as that hides nothing."""
    blocks: Tensor | None = None
    """(batch, length) int64: see `Adapter.blocks`."""
    made: dict[Any, Any] = field(default_factory=dict)
    """The masks of this call; layers that hold the same, under the same window, share one."""

    def window(self, layer: int) -> int | None:
        """The sliding window of a decoder layer, where it hides anything."""
        window = self.windows[layer]
        return window if window is not None and window < self.reach else None

    def sees(self, layer: int, query: Sight, key: Sight) -> Tensor:
        """Whether tokens see others in a decoder layer; all four tensors broadcast."""
        window, (column, block), (other, others) = self.window(layer), query, key
        same = None
        visible = other <= column
        if block is not None and others is not None:
            same = (block == others) & (block >= 0)
            visible = visible | same
        if window is not None:
            near = column - other < window
            visible = visible & (near if same is None or self.adapter.window_cuts_blocks else near | same)
        return visible & (other >= 0)

    def _sight(self, columns: Tensor) -> Sight:
        """With the block of each column; -1 for those of earlier calls."""
        if self.blocks is None:
            return columns, None
        place = (columns - self.start).clamp(min=0).to(self.blocks.device)
        block = self.blocks.gather(1, place.flatten(1)).view(place.shape).to(columns.device)
        return columns, block.masked_fill(columns < self.start, -1)

    def rows(self, layer: int, keys: Columns, queries: Tensor) -> Tensor:
        """What `queries` (batch, queries) columns see of a layer's keys: (batch, [heads,] queries, keys)."""
        query = self._sight(queries.view(len(queries), *(1,) * (keys.place.ndim - 2), -1))
        return self.sees(layer, _spread(query, -1), _spread(self._sight(keys.place), -2))

    def mask(self, layer: int, keys: Columns, queries: int, hidden: Tensor, cache: Any) -> Any:
        """The mask for the attention kernel of a decoder layer, whose last `queries` keys are the running stream's.

        Raises ValueError where the kernel cannot hide what has to be hidden.
        """
        place = id(keys), self.window(layer), held.sizes(cache, layer, queries)
        if place not in self.made:  # the keys are kept beside the mask, so that no others get their id
            self.made[place] = keys, self._mask(layer, keys, queries, hidden, cache)
        return self.made[place][1]

    def _mask(self, layer: int, keys: Columns, queries: int, hidden: Tensor, cache: Any) -> Any:
        config = self.adapter.decoder.config
        kernel, window = config._attn_implementation, self.window(layer)
        if window is not None and kernel not in (*DENSE, "flex_attention"):
            raise ValueError(
                f"{kernel} counts its sliding window of {window} tokens over the tokens that are left: use sdpa, eager "
                "or flex attention, or a prompt within the window"
            )
        heads = keys.place.ndim == 3 and (keys.ragged or window is not None)
        if (heads or keys.weight is not None) and kernel not in DENSE:
            raise ValueError(f"{kernel} cannot weigh keys, nor hide others from each head: use sdpa or eager attention")
        length, offset = held.sizes(cache, layer, queries)
        place = torch.nn.functional.pad(keys.place.to(hidden.device), (0, length + offset - keys.length), value=-1)
        if heads or keys.weight is not None:
            return self._biases(layer, place, keys, queries, slice(offset, offset + length), hidden.dtype)
        column, block = self._sight(place if place.ndim == 2 else place[:, 0])

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own, other = ((column[row, at], None if block is None else block[row, at]) for at in (query, key))
            return self.sees(layer, own, other)

        static = held.is_static(cache) and queries == 1  # a decoding step that is compiled wants its mask
        return ALL_MASK_ATTENTION_FUNCTIONS[kernel](
            batch_size=len(hidden),
            q_length=queries,
            kv_length=length,
            q_offset=keys.length - queries,
            kv_offset=offset,
            mask_function=sees,
            attention_mask=column >= 0 if keys.ragged else None,
            allow_is_causal_skip=block is None and window is None and not static,
            dtype=hidden.dtype,
            config=config,
            use_vmap=False,
            device=hidden.device,
        )

    def _biases(
        self, layer: int, place: Tensor, keys: Columns, queries: int, handed: slice, dtype: torch.dtype
    ) -> Tensor:
        """(batch, 1 or heads, queries, keys): the logarithm of each key's weight where it is seen."""
        column, block = self._sight(place if place.ndim == 3 else place[:, None])
        running = slice(keys.length - queries, keys.length)
        own, others = ((column[..., part], None if block is None else block[..., part]) for part in (running, handed))
        seen = self.sees(layer, _spread(own, -1), _spread(others, -2))
        bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        if keys.weight is not None:
            weight = torch.nn.functional.pad(keys.weight.to(seen.device), (0, place.shape[-1] - keys.length), value=1.0)
            weight = weight if weight.ndim == 3 else weight[:, None]
            bias = bias + weight[..., None, handed].log().to(dtype)
        hidden = ~seen & (own[0] >= 0)[..., None]  # filling sees all: a row of nothing spoils gradients in sdpa
        bias = bias.masked_fill(hidden, torch.finfo(dtype).min)
        heads = self.adapter.decoder_attention(self.adapter.layers[layer]).heads
        return bias if bias.shape[1] == 1 else bias.repeat_interleave(heads // bias.shape[1], dim=1)


def _spread(sight: Sight, dim: int) -> Sight:
    """Columns and blocks with one more axis, to broadcast over."""
    column, block = sight
    return column.unsqueeze(dim), None if block is None else block.unsqueeze(dim)
