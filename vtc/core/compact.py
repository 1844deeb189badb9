"""The one routine that carries a sequence over to a keep list. Nothing else in vtc gathers along the sequence.

A keep mask becomes a `Plan`; states, rotary tables, positions, columns, keys and values all go through `gather` with
its index. Original positions survive by construction: rotary tables are gathered, never recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """How a (batch, length) sequence shrinks to (batch, kept)."""

    index: Tensor
    """(batch, kept): the old position of each new one; rows that keep fewer are filled up at the start, so that a cache
    that holds a row's last keys only (a sliding window's) holds real ones."""
    real: Tensor | None
    """(batch, kept) bool, False at the filling; None when no row needs any."""
    source: Tensor
    """(batch, length): the new position that answers for each old one, its last survivor at or before it."""


def plan(keep: Tensor, lengths: Sequence[int]) -> Plan:
    """Plan for a (batch, length) bool mask whose rows keep `lengths` positions (known on the host: no device sync)."""
    longest = max(lengths)
    index = keep.long().argsort(dim=1, stable=True)[:, keep.shape[1] - longest :]
    real = None if min(lengths) == longest else keep.gather(1, index)
    order = keep.long().cumsum(1)
    return Plan(index, real, (order - 1 + longest - order[:, -1:]).clamp(min=0))


def gather(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """x[..., index, ...] along `dim`, with a (batch, kept) index and the batch right before `dim` (1 broadcasts)."""
    dim %= x.ndim
    index = index.to(x.device)
    shape = list(x.shape)
    shape[dim - 1], shape[dim] = index.shape
    x = x.expand(*shape[:dim], *x.shape[dim:])
    index = index.view(*(1,) * (dim - 1), *index.shape, *(1,) * (x.ndim - dim - 1))
    return x.gather(dim, index.expand(shape))


def gather_heads(x: Tensor, index: Tensor) -> Tensor:
    """The same of (batch, heads, length, ...), with a (batch, heads or 1, kept) index."""
    batch, heads, length = x.shape[:3]
    first = length * torch.arange(batch * heads, device=x.device).view(batch, heads, 1)
    index = index.to(x.device) + first  # copying whole rows is several times as fast as gathering elements
    return x.flatten(0, 2).index_select(0, index.flatten()).view(*index.shape, *x.shape[3:])


def unpruned(outputs: Any, source: Tensor, sources: Sequence[Tensor]) -> None:
    """Give the outputs of a text model the shape of the sequence that came in; `source` as in `Plan`, and of what each
    layer read, too."""
    outputs.last_hidden_state = gather(outputs.last_hidden_state, source)
    if outputs.get("hidden_states") is not None:
        # entry 0 is the input of layer 0, entry n the output of layer n - 1
        outputs["hidden_states"] = tuple(
            None if states is None else gather(states, sources[max(entry - 1, 0)])
            for entry, states in enumerate(outputs.hidden_states)
        )


def change(x: Tensor, row: Tensor, position: Tensor, valid: Tensor, new: Callable[[Tensor], Tensor]) -> Tensor:
    """x (batch, length, width) with new(features) in place of the features at `position` (images, tokens) of `row`."""
    row = row[:, None].expand_as(position)
    changed = new(x[row, position])
    return x.index_put((row[valid], position[valid]), changed[valid])
