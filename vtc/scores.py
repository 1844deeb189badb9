"""Importance of visual tokens: pure functions, tensors in, (images, tokens) float32 out."""

from __future__ import annotations

from collections.abc import Iterable

from einops import reduce
from torch import Tensor


def attention_sum(rows: Iterable[Tensor]) -> Tensor:
    """Head-mean of attention rows (images, heads, tokens), summed over the rows."""
    return sum(reduce(row, "image head token -> image token", "mean") for row in rows)
