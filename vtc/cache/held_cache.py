"""A cache between calls: what it holds lies on it, so that generations interleave, copies of a cache go their own ways,
and beams, selected rows, crops and resets take it along.
"""

from __future__ import annotations

from functools import cache as memoised
from typing import Any

import torch
import transformers
from torch import Tensor


class HeldCache(transformers.Cache):
    """What a cache learns when it holds a pruned prompt: mixed into its own class.

    generate() slices the next turn by the length of layer 0: once tokens left before it, that must still be the true
    length, while masks are sized by what the layer holds.
    """

    vtc: Any
    """The `Held` of the calls so far."""
    rests: bool
    """Whether the next call has nothing to do unless it brings images. Not while a call runs."""
    awake: bool
    """Whether a call runs that is looked at."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raises RuntimeError for a pruned prompt in the hands of a model that does not know of it."""
        if not (self.awake or self.rests or self.vtc.rests):
            raise RuntimeError(
                "this cache holds a pruned prompt, which only a wrapped model that is called as a whole can read: "
                "wrap the model again, or start anew from the prompt"
            )
        return super().update(*args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        held = held_length(self, layer_idx)
        return held if layer_idx else self.vtc.seen - (self.vtc.layers[0].length - int(held))

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return held_length(self, layer_idx)

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.vtc = self.vtc.rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.vtc = self.vtc.rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        rows = torch.arange(len(self.vtc.layers[0].place))
        self.vtc = self.vtc.rows(rows.repeat_interleave(repeats))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """The class is made on the way, and nowhere to be found by name."""
        return _empty, (type(self).__bases__[1],), vars(self)

    def reset(self) -> None:
        super().reset()
        del self.vtc, self.rests, self.awake
        self.__class__ = type(self).__bases__[1]


@memoised
def _held(kind: Any) -> Any:
    return type(kind.__name__, (HeldCache, kind), {})


def _empty(kind: Any) -> Any:
    return object.__new__(_held(kind))


def attach(cache: Any, state: Any) -> None:
    """Leave on a cache what it holds, for the next call."""
    if not isinstance(cache, HeldCache):
        kind: Any = type(cache)
        cache.__class__ = _held(kind)
    cache.vtc, cache.rests, cache.awake = state, False, False


def wake(cache: Any) -> None:
    """Before a call that is looked at: until it has ended, none of its parts may go by."""
    if isinstance(cache, HeldCache):
        cache.rests, cache.awake = False, True


def rest(cache: Any) -> None:
    """After a call."""
    if isinstance(cache, HeldCache):
        cache.rests, cache.awake = cache.vtc.rests, False


def held_length(cache: Any, layer: int = 0) -> int:
    """How many keys a layer of a cache has taken in and not lost by a crop; also those beyond a sliding window."""
    return cache.layers[layer].get_seq_length() if layer < len(cache.layers) else 0
