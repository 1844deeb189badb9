"""CAOTE: after the prefill, each head keeps the visual tokens whose loss would change its output most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.methods.window import AfterPrefill, Window, WindowRow
from vtc.stage import Cache, Shape, Stage


@dataclass(frozen=True)
class CAOTE(AfterPrefill):
    """In each layer's cache keep, for each key head, the visual tokens whose eviction alone would change it most.

    "CAOTE: KV Cache Selection for LLMs via Attention Output Error-Based Token Eviction" (arXiv 2504.14051): without
    token j the others' attention is A_i / (1 - A_j), and the output is off by A_j / (1 - A_j) |o - v_j|. Here that is
    computed for each query of the question and each of its heads, over all keys, then averaged; the paper puts it on
    top of another method's scores, and evicts while it reads the prompt in blocks. A budget is what a layer holds after
    the prefill. It saves memory and decoding, never the first token.
    """

    window: Window = "question"
    fast: bool = False
    """FastCAOTE: the plain mean of the values that a query sees in place of its output o."""

    name: ClassVar[str] = "caote"
    paper: ClassVar[str] = "CAOTE, arXiv 2504.14051"

    def stage(self, layer: int, shape: Shape) -> Stage:
        need = WindowRow(layer, self.window, fast_error if self.fast else error)
        return Stage(Cache(layer), lambda seen: seen[need], (need,))


def error(rows: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """An `Entry`: how far off the output of an attention head is without a key."""
    output = rows.flatten(2, 3) @ values
    return rows / (1 - rows).clamp(min=1e-4) * torch.cdist(output, values).view_as(rows)


def fast_error(rows: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """An `Entry`: the same, were the output the mean of the values that are seen."""
    seen = seen[:, :, 0].float()
    output = seen @ values / seen.sum(-1, keepdim=True).clamp(min=1)
    return rows / (1 - rows).clamp(min=1e-4) * torch.cdist(output, values)[:, :, None]
