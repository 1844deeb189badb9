"""What a cache holds, by column, and what is done to it. Only the rooms of `vtc.cache` touch cache objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

import vtc.core.compact as compact
from vtc.cache.held_cache import held_length
from vtc.cache.own_layer import OwnLayer
from vtc.cache.packed_layer import PackedLayer
from vtc.cache.parted_layer import PartedLayer
from vtc.cache.precision import Precision
from vtc.choice import Choice
from vtc.core.columns import Columns
from vtc.core.shared import Shared
from vtc.core.stream import Stream
from vtc.trace import Trace


@dataclass(frozen=True)
class Held:
    """How long the sequence truly is, and what each decoder layer holds of it."""

    seen: int
    """Columns so far."""
    layers: tuple[Columns, ...]
    """The keys of each decoder layer; layers that hold the same share one object."""
    trace: Trace = field(default_factory=Trace)
    shift: Tensor | None = None
    """(batch, 1): how far later positions move down, where survivors were renumbered without gaps."""
    tail: int = 0
    """How many keys at the end are the same tokens in every layer, so that a crop may take them back."""

    @classmethod
    def by(cls, cache: Any, depth: int, batch: int, device: torch.device) -> Held:
        """What a cache holds (None: nothing). One that vtc has not seen yet holds all.

        Raises RuntimeError where it was cropped by more than the text at its end: layers differ before that.
        """
        if (state := getattr(cache, "vtc", None)) is not None:
            return state._as_long(length(cache))
        seen = 0 if cache is None else int(cache.get_seq_length())
        return cls(seen, (Columns.counted(0, None, (batch, seen), device),) * depth)

    def under(self, shown: Tensor | None) -> Held:
        """The same under the mask of a call, `shown` (batch, seen) bool, None: all. What rests is as the mask says; of
        a pruned cache what was hidden once stays hidden.

        Raises ValueError where it hides what was not hidden when it went into a pruned cache, which holds it still.
        That waits for the device.
        """
        if self.rests and self.seen:
            first = self.layers[0].place
            columns = Columns.counted(0, shown, (len(first), self.seen), first.device)
            return replace(self, layers=(columns,) * len(self.layers))
        if shown is not None and self.pruned and any(columns.hidden_by(shown) for columns in {*self.layers}):
            raise ValueError(
                "the attention mask hides tokens that it showed when they went into this pruned cache: start again "
                "from the prompt"
            )
        return self

    @property
    def rests(self) -> bool:
        """Whether every layer holds what it would without vtc."""
        return self.shift is None and all(columns.whole and columns.weight is None for columns in self.layers)

    def _as_long(self, held: int) -> Held:
        """After what was done to the cache behind our back: a crop, or compiled steps that left the hooks out."""
        place, count = self.layers[0].place, self.layers[0].length - held
        grown = count < 0 and self.rests
        if not self.rests and not 0 <= count <= self.tail:
            raise RuntimeError(
                f"the cache holds {held} keys in layer 0 where vtc left {self.layers[0].length}: a pruned cache can be "
                f"cropped by the {self.tail} tokens of text at its end only; start again from the prompt"
            )
        if grown:
            new = Columns.counted(self.seen, None, (len(place), -count), place.device)
            layers = self._each(lambda x: x.then(new))
        else:
            layers = self._each(lambda x: x.cropped(count))
        return replace(self, seen=self.seen - count, layers=layers, tail=max(0, self.tail - count))

    @property
    def pruned(self) -> bool:
        """Whether any token has left any layer."""
        return not all(columns.whole for columns in self.layers)

    def _each(self, change: Callable[[Columns], Columns]) -> tuple[Columns, ...]:
        changed = {id(columns): change(columns) for columns in self.layers}
        return tuple(changed[id(columns)] for columns in self.layers)

    def rows(self, index: Tensor) -> Held:
        """Of other rows of the batch."""
        shift = None if self.shift is None else self.shift[index.to(self.shift.device)]
        return replace(self, layers=self._each(lambda columns: columns.rows(index)), shift=shift)

    def positions(self, kwargs: dict[str, Any]) -> Tensor:
        """(..., batch or 1, length): where a text model that is called with `kwargs` would put its tokens."""
        if (positions := kwargs.get("position_ids")) is None:
            embeds = kwargs["inputs_embeds"]
            positions = torch.arange(embeds.shape[1], device=embeds.device)[None] + self.seen
        return positions if self.shift is None else positions - self.shift


def nbytes(cache: Any) -> int:
    """Bytes of the keys and values that all layers of a cache hold, and of what it takes to read packed ones."""
    layers = [layer for layer in cache.layers if layer.is_initialized]
    parts = ([layer] if isinstance(layer, OwnLayer) else [layer.keys, layer.values] for layer in layers)
    return sum(x.nbytes for part in parts for x in part)


def length(cache: Any) -> int:
    """How many keys layer 0 of a cache holds."""
    return int(held_length(cache))


def is_static(cache: Any) -> bool:
    return bool(getattr(cache, "is_compileable", False))


def sizes(cache: Any, layer: int, new: int) -> tuple[int, int]:
    """How many keys a layer's kernel is handed with `new` more of them, and the number of the first one."""
    held = parted(cache, layer)
    return (new, 0) if cache is None else (held.handed + new, 0) if held else cache.get_mask_sizes(new, layer)


def keys(cache: Any, layer: int, count: int) -> Tensor:
    """The first `count` keys of a layer: (batch, key_heads, count, head_dim). Raises ValueError where it has not."""
    held = cache.layers[layer]
    if isinstance(held, OwnLayer):
        return held.read()[0][:, :, :count]
    if held.keys.ndim != 4 or held.keys.shape[2] != held.get_seq_length():
        raise ValueError(
            f"{type(held).__name__} does not hold all past keys as they were, and this method looks at them: for a "
            "second image in a conversation begin with past_key_values=DynamicCache(), made without a config, or take "
            "a method that drops before the decoder"
        )
    return held.keys[:, :, :count]


def evictable(cache: Any, layer: int) -> Any:
    """A layer of a cache, which can give back what it has taken in: `keys` and `values`, (batch, key_heads, length,
    head_dim). Raises ValueError for those that cannot: none, or one of a fixed size, quantised, or with windows."""
    if cache is None:
        raise ValueError("this method drops from the cache, and this call has none: use_cache=True")
    if (kind := type(cache.layers[layer])) is not DynamicLayer:
        raise ValueError(f"tokens can leave a DynamicLayer of a cache, not this {kind.__name__}")
    return cache.layers[layer]


def packable(cache: Any, layer: int) -> Any:
    """The same, or one that holds packed tokens already."""
    return cache.layers[layer] if cache and isinstance(cache.layers[layer], PackedLayer) else evictable(cache, layer)


def pair(cache: Any, layer: int) -> tuple[Tensor, Tensor]:
    """All keys and values of a layer: (batch, key_heads, length, head_dim). Raises ValueError as `evictable`."""
    held = packable(cache, layer)
    return held.read() if isinstance(held, PackedLayer) else (held.keys, held.values)


def evict(cache: Any, layer: int, before: Columns, now: Columns, stays: Tensor, lengths: list[int]) -> Columns:
    """Take keys and values out of a layer of a cache that has just taken in a stream; what it holds after that.

    Args:
        before: what the layer held before this call; all of it stays.
        now: that, and the stream's.
        stays: (batch, [key_heads,] length) bool: what stays of the stream.
        lengths: how many that are in each row.
    """
    held = evictable(cache, layer)
    kept, index = now.staying(before, stays, lengths)
    held.keys, held.values = (compact.gather_heads(x, index) for x in (held.keys, held.values))
    return kept


def keep(cache: Any, layer: int, before: Columns, now: Columns, stream: Stream, choice: Choice, counts: list[Any],
         precision: Precision | None) -> Columns:  # fmt: skip
    """Leave of a `stream`, which a layer of a cache has just taken in, what was chosen; what it holds after that.

    `counts` visual tokens of each image are left, or all of them at fewer bits. The rest as in `evict`.
    """
    if choice.bits is None:
        return evict(cache, layer, before, now, stream.stays(choice.keep), stream.lengths_after(counts))
    if precision is None:
        raise ValueError("a choice of bits needs a stage that says how they are packed: Stage(..., precision=...)")
    held = packable(cache, layer)
    if cache.offloading:
        raise ValueError("a cache that is offloaded cannot be packed: keep it on the model's device")
    PackedLayer.made_of(held).take(now, stream, choice.bits, precision)
    return now


def part(
    cache: Any, layer: int, before: Columns, now: Columns, stream: Stream, counts: list[int], shared: Shared
) -> Columns:
    """Lay the visual tokens of a `stream`, which a layer of a cache has just taken in, apart, so that later steps read
    `counts` of each image's, all images of a row together; what it holds after that. The rest as in `evict`."""
    held = cache.layers[layer] if parted(cache, layer) else evictable(cache, layer)
    if cache.offloading:
        raise ValueError("a cache that is offloaded cannot be read in part: keep it on the model's device")
    return PartedLayer.made_of(held).part(before, now, stream, tuple(counts), shared)


def parted(cache: Any, layer: int) -> PartedLayer | None:
    """A layer whose visual tokens a step can read in part; None where it is no such layer."""
    held = cache.layers[layer] if cache is not None and layer < len(cache.layers) else None
    return held if isinstance(held, PartedLayer) else None
