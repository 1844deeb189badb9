"""How attention is seen without materialising it, and without changing the attention kernel.

A score needs rows, not matrices. Forward hooks on the query and key projections of the few layers that a stage asks
for keep those two outputs; the row is recomputed from them in float32. Nothing else in vtc observes a module.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class ClsRow:
    """Post-softmax attention of the tower's CLS query at block `layer`: (images, heads, tokens), CLS column dropped."""

    layer: int


@dataclass(frozen=True)
class LastTokenRow:
    """Post-softmax attention of the last prompt token at decoder layer `layer`: (images, heads, tokens)."""

    layer: int


Need = ClsRow | LastTokenRow


@dataclass
class Seen:
    """What a score function gets: the rows that its stage asked for, and which entries are tokens at all."""

    rows: dict[Need, Tensor]
    valid: Tensor
    """(images, tokens) bool."""

    def __getitem__(self, need: Need) -> Tensor:
        return self.rows[need]


@dataclass(frozen=True)
class Attention:
    """The parts of one attention module that a row is recomputed from."""

    query: nn.Module
    """Module whose output is the queries before the rotary embedding: (batch, length, heads * head_dim)."""
    key: nn.Module
    heads: int
    key_heads: int
    scale: float


Record = dict[tuple[Need, str], Tensor]
recording: ContextVar[Record | None] = ContextVar("vtc_recording", default=None)
"""Where the hooks write. It belongs to the running call: another thread on the same model has its own."""


def watch(attention: Attention, need: Need) -> list[torch.utils.hooks.RemovableHandle]:
    """Hook both projections, so that `recording` gets their outputs under `(need, "query")` and `(need, "key")`."""

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            record = recording.get()
            if record is not None:
                record[need, name] = output

        return hook

    return [
        attention.query.register_forward_hook(keep("query")),
        attention.key.register_forward_hook(keep("key")),
    ]


def attention_row(query: Tensor, key: Tensor, scale: float, visible: Tensor | None = None) -> Tensor:
    """softmax(q k^T * scale) of one query an item, in float32.

    Args:
        query: (batch, heads, head_dim), after the rotary embedding.
        key: (batch, key_heads, length, head_dim), after the rotary embedding; heads are grouped over key heads.
        scale: factor on the logits, usually head_dim ** -0.5.
        visible: (batch, length) bool, False where the query must not look.

    Returns:
        (batch, heads, length) float32.
    """
    query = rearrange(query.float(), "b (g r) d -> b g r d", g=key.shape[1])
    logits = rearrange(query @ key.float().transpose(-1, -2), "b g r n -> b (g r) n") * scale
    if visible is not None:
        logits = logits.masked_fill(~visible[:, None], -torch.inf)
    return logits.softmax(-1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, length, heads * head_dim) -> (batch, heads, length, head_dim)."""
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


def cls_row(record: Record, need: ClsRow, attention: Attention) -> Tensor:
    """Attention of token 0 of the tower's sequence to the others: (images, heads, length - 1) float32."""
    query = split_heads(record[need, "query"][:, :1], attention.heads)[:, :, 0]
    key = split_heads(record[need, "key"], attention.key_heads)
    return attention_row(query, key, attention.scale)[..., 1:]
