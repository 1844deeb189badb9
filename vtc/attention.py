"""Attention rows without attention matrices: the parts of an attention module, and a few queries' softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class Attention:
    """The parts of one attention module that a row is recomputed from."""

    query: nn.Module
    """Module whose output is the queries before norm and rotary embedding: (batch, length, heads * head_dim)."""
    key: nn.Module
    heads: int
    key_heads: int
    scale: float
    query_norm: nn.Module | None = None
    """What normalises each head before the rotary embedding."""
    key_norm: nn.Module | None = None
    softcap: float | None = None
    """c where the logits become c tanh(logits / c)."""

    def queries(self, x: Tensor) -> Tensor:
        """The output of `query` as (batch, heads, length, head_dim), before the rotary embedding."""
        return _heads(x, self.heads, self.query_norm)

    def keys(self, x: Tensor) -> Tensor:
        """The output of `key` as (batch, key_heads, length, head_dim), before the rotary embedding."""
        return _heads(x, self.key_heads, self.key_norm)


def _heads(x: Tensor, heads: int, norm: nn.Module | None) -> Tensor:
    x = rearrange(x, "b n (h d) -> b n h d", h=heads)
    return (x if norm is None else norm(x)).transpose(1, 2)


@dataclass(frozen=True)
class TowerStates:
    """What the attention of one tower block runs on."""

    query: Tensor
    """(crops, heads, length, head_dim), after the rotary embedding where there is one."""
    key: Tensor
    scale: float
    valid: Tensor | None = None
    """(crops, length) bool, False where a crop has fewer patches than the largest one; None where all are patches."""


def attention_rows(
    query: Tensor,
    key: Tensor,
    scale: float,
    visible: Tensor | None = None,
    weight: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(q k^T * scale + log weight) of a few queries, in float32.

    Args:
        query: (batch, heads, queries, head_dim), after the rotary embedding.
        key: (batch, key_heads, length, head_dim), after the rotary embedding; heads are grouped over key heads.
        scale: factor on the logits, usually head_dim ** -0.5.
        visible: (batch, [key_heads,] queries or 1, length) bool, False where a query must not look; a query that may
            look nowhere, as filling, looks everywhere.
        weight: (batch, [key_heads,] length): how many times each key counts.
        softcap: see `Attention`.

    Returns:
        (batch, heads, queries, length) float32.
    """
    groups, queries = key.shape[1], query.shape[2]
    query = rearrange(query.float() * scale, "b (g r) q d -> b g (r q) d", g=groups)
    logits = query @ key.float().transpose(-1, -2)
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    logits = rearrange(logits, "b g (r q) n -> b g r q n", q=queries)
    if weight is not None:
        logits = logits + (weight if weight.ndim == 3 else weight[:, None])[:, :, None, None].log()
    if visible is not None:
        visible = visible if visible.ndim == 4 else visible[:, None]
        logits = logits.masked_fill(~visible[:, :, None], torch.finfo(torch.float32).min)
    return rearrange(logits.softmax(-1), "b g r q n -> b (g r) q n")
