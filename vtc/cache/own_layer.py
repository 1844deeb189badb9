"""What the layers of our own have in common: a `DynamicLayer` that becomes one in place, and holds more beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class OwnLayer(DynamicLayer):
    """A layer that holds `OWN` beside its keys and values; `reset` makes it a `DynamicLayer` again."""

    keys: Tensor
    values: Tensor
    OWN: tuple[str, ...] = ()
    """The attributes that a `DynamicLayer` has not."""

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys and values: (batch, key_heads, length, head_dim)."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes that it holds in all."""
        raise NotImplementedError

    def rows(self, index: Tensor) -> None:
        """Take other rows of the batch of what is in `OWN`."""
        raise NotImplementedError

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        before = torch.arange(len(self.keys))
        super().batch_repeat_interleave(repeats)
        self.rows(before.repeat_interleave(repeats))

    def reset(self) -> None:
        super().reset()
        for name in self.OWN:
            delattr(self, name)
        self.__class__ = DynamicLayer  # type: ignore[assignment]
