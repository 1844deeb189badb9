"""How attention and module outputs are seen without materialising attention, and without changing its kernel.

A score needs rows, not matrices. A `Need` names what it wants to see of one layer: the modules whose outputs a forward
hook keeps, and how they become one row over the visual tokens, in float32. Nothing else in vtc observes a module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtc.adapter import Adapter
from vtc.attention import TowerStates, attention_rows
from vtc.compact import gather
from vtc.need import Need
from vtc.view import View


@dataclass(frozen=True)
class Tower:
    """One run of the vision tower."""

    adapter: Adapter
    call: dict[str, Any]
    """The arguments of `get_image_features` or `get_video_features`."""

    def states(self, layer: int, record: dict[str, Any]) -> TowerStates:
        return self.adapter.tower_states(self.adapter.tower_blocks()[layer], record, self.call)


@dataclass(frozen=True)
class ClsRow(Need):
    """Post-softmax attention of the tower's CLS query: (crops, heads, patches), CLS column dropped."""

    tower: ClassVar[bool] = True

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        if not adapter.has_cls():
            raise ValueError("this method scores by CLS attention, and this vision tower has no CLS token")
        return adapter.tower_modules(adapter.tower_blocks()[self.layer])

    def row(self, record: dict[str, Tensor], tower: Tower) -> Tensor:
        states = tower.states(self.layer, record)
        return attention_rows(states.query[:, :, :1], states.key, states.scale)[:, :, 0, 1:]


@dataclass(frozen=True)
class ReceivedAttention(Need):
    """Mean attention that each patch receives from all patches of its crop: (crops, 1, patches), heads averaged.

    The matrix is summed up in blocks of queries, never stored.
    """

    tower: ClassVar[bool] = True

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        return adapter.tower_modules(adapter.tower_blocks()[self.layer])

    def row(self, record: dict[str, Tensor], tower: Tower) -> Tensor:
        return self.paid(tower.states(self.layer, record), tower)[:, None]

    def paid(self, states: TowerStates, tower: Tower, payers: Tensor | None = None) -> Tensor:
        """Mean attention paid to each patch by the `payers` (crops, patches) bool, or by all: (crops, patches)."""
        first = int(tower.adapter.has_cls())
        query, visible = states.query[:, :, first:], None
        weights = torch.ones_like(query[:, 0, :, 0], dtype=torch.float32) if payers is None else payers.float()
        if states.valid is not None:
            weights, visible = weights * states.valid[:, first:], states.valid[:, None]
        key = states.key.float().contiguous()
        blocks = zip(query.split(QUERY_BLOCK, dim=2), weights.split(QUERY_BLOCK, dim=1), strict=True)
        total = sum(
            (weight[:, None, None] @ attention_rows(part, key, states.scale, visible)).sum((1, 2))
            for part, weight in blocks
        )
        return total[:, first:] / (query.shape[1] * weights.sum(1, keepdim=True))


QUERY_BLOCK = 64
"""Queries whose attention rows are held at once."""


@dataclass(frozen=True)
class LastTokenRow(Need):
    """Post-softmax attention of the last prompt token in decoder layer `layer`: (images, heads, tokens)."""

    reads_text: ClassVar[bool] = True

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        attention = adapter.decoder_attention(adapter.layers[self.layer])
        return {"query": attention.query, "key": attention.key}

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        last = view.last_positions()
        rows = view.rows(self.layer, gather(record["query"], last), record["key"], last)
        return view.of_tokens(rows[:, :, 0])


@dataclass(frozen=True)
class TextRow(Need):
    """Attention that the text after an image pays it in decoder layer `layer`: (images, 1, tokens).

    The mean over heads and over the image's later text tokens up to the prompt's end.
    """

    ahead: bool = True
    """Whether the row is that of a layer that has not run yet, on the states that are about to enter it."""

    reads_text: ClassVar[bool] = True

    @property
    def before(self) -> int:
        return self.layer if self.ahead else self.layer + 1

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        attention = adapter.decoder_attention(adapter.layers[self.layer])
        return {} if self.ahead else {"query": attention.query, "key": attention.key}

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        positions, asks = view.text_after_images()
        if self.ahead:
            layer = view.adapter.layers[self.layer]
            attention = view.adapter.decoder_attention(layer)
            hidden = layer.input_layernorm(view.hidden)
            query, key = attention.query(gather(hidden, positions)), attention.key(hidden)
        else:
            query, key = gather(record["query"], positions), record["key"]
        rows = view.rows(self.layer, query, key, positions)
        weights = asks / asks.sum(1, keepdim=True).clamp(min=1)
        return torch.einsum("iqn,iq->in", view.of_tokens(rows.mean(1)), weights)[:, None]
