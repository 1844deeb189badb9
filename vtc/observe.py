"""How attention and module outputs are seen without materialising attention, and without changing its kernel.

A score needs rows, not matrices. A `Need` names what it wants to see of one layer: the modules whose outputs a forward
hook keeps, and how they become one row over the visual tokens, in float32. Nothing else in vtc observes a module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import normalize

from vtc.adapter import Adapter
from vtc.attention import TowerStates, attention_rows
from vtc.core.compact import gather
from vtc.need import Need
from vtc.stage import Shape
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
class QueriesAndKeys(Need):
    """What is made of the queries and keys of block `layer`, of the tower or of the decoder."""

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        if self.tower:
            return adapter.tower_modules(adapter.tower_blocks()[self.layer])
        attention = adapter.decoder_attention(adapter.layers[self.layer])
        return {"query": attention.query, "key": attention.key}


@dataclass(frozen=True)
class ClsRow(QueriesAndKeys):
    """Post-softmax attention of the tower's CLS query: (crops, heads, patches), CLS column dropped."""

    tower: ClassVar[bool] = True

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        if not adapter.has_cls():
            raise ValueError("this method scores by CLS attention, and this vision tower has no CLS token")
        return super().modules(adapter)

    def row(self, record: dict[str, Tensor], tower: Tower) -> Tensor:
        states = tower.states(self.layer, record)
        return attention_rows(states.query[:, :, :1], states.key, states.scale)[:, :, 0, 1:]


@dataclass(frozen=True)
class ReceivedAttention(QueriesAndKeys):
    """Mean attention that each patch receives from all patches of its crop: (crops, 1, patches), heads averaged.

    The matrix is summed up in blocks of queries, never stored.
    """

    tower: ClassVar[bool] = True

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


def salience(shape: Shape, layer: int) -> Need:
    """How much a patch is looked at in block `layer` of the tower: by the CLS token, or by all patches without one."""
    return (ClsRow if shape.cls else ReceivedAttention)(layer)


@dataclass(frozen=True)
class PatchStates(Need):
    """The states of the patches after a tower's block: (crops, width, patches).

    A tower's last norm, where its projector reads one, comes later. A visual token of several patches has their mean.
    """

    tower: ClassVar[bool] = True

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        return {"states": adapter.tower_blocks()[self.layer]}

    def row(self, record: dict[str, Tensor], tower: Tower) -> Tensor:
        return tower.adapter.patches(record["states"], tower.call).float().transpose(1, 2)


@dataclass(frozen=True)
class PatchKeys(QueriesAndKeys):
    """The keys of the patches in a tower's block, after the rotary embedding where there is one, its heads one after
    the other: (crops, heads * head_dim, patches)."""

    tower: ClassVar[bool] = True

    def row(self, record: dict[str, Tensor], tower: Tower) -> Tensor:
        key = tower.states(self.layer, record).key[:, :, int(tower.adapter.has_cls()) :]
        return rearrange(key.float(), "crop head patch dim -> crop (head dim) patch")


@dataclass(frozen=True)
class TokenStates(Need):
    """The states of the visual tokens that enter decoder layer `layer`: (images, width, tokens).

    At layer 0, where stages before the decoder have them too, these are the projected features.
    """

    @property
    def before(self) -> int:
        return self.layer

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        return {}

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        return view.of_tokens(view.hidden.transpose(1, 2)).float()


@dataclass(frozen=True)
class Keys(Need):
    """The keys of the visual tokens in decoder layer `layer`, as its cache holds them, its heads one after the other:
    (images, key_heads * head_dim, tokens)."""

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        return {"key": adapter.decoder_attention(adapter.layers[self.layer]).key}

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        attention = view.adapter.decoder_attention(view.adapter.layers[self.layer])
        key = view.rotated(self.layer, attention.keys(record["key"]))
        return view.of_tokens(rearrange(key.float(), "batch head token dim -> batch (head dim) token"))


@dataclass(frozen=True)
class QuestionCosine(TokenStates):
    """Cosine of each visual token with the text after the image, both as they enter decoder layer `layer`:
    (images, 1, tokens). The "mean" over the text tokens or their "max"; 0 where there is no such text."""

    over: Literal["mean", "max"] = "mean"

    reads_text: ClassVar[bool] = True

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        positions, asks = view.text_after_images()
        text = gather(view.hidden, positions).float()[view.stream.row]
        cosines = normalize(super().row(record, view), dim=1).transpose(1, 2) @ normalize(text, dim=2).transpose(1, 2)
        if self.over == "mean":
            return ((cosines * asks[:, None]).sum(2) / asks.sum(1, keepdim=True).clamp(min=1))[:, None]
        highest = cosines.masked_fill(asks[:, None] == 0, -1).amax(2)
        return highest.where(asks.any(1, keepdim=True), 0)[:, None]


@dataclass(frozen=True)
class DecoderRow(QueriesAndKeys):
    """Attention that a few tokens of the prompt pay in decoder layer `layer`."""

    ahead: bool = False
    """Whether the row is that of a layer that has not run yet, on the states that are about to enter it."""

    reads_text: ClassVar[bool] = True

    @property
    def before(self) -> int:
        return self.layer if self.ahead else self.layer + 1

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        return {} if self.ahead else super().modules(adapter)

    def paid(self, record: dict[str, Tensor], view: View, positions: Tensor) -> Tensor:
        """What the tokens at `positions` (batch, queries) pay: (batch, heads, queries, length) float32."""
        if not self.ahead:
            return view.rows(self.layer, gather(record["query"], positions), record["key"], positions)
        layer = view.adapter.layers[self.layer]
        attention, hidden = view.adapter.decoder_attention(layer), layer.input_layernorm(view.hidden)
        return view.rows(self.layer, attention.query(gather(hidden, positions)), attention.key(hidden), positions)


@dataclass(frozen=True)
class LastTokenRow(DecoderRow):
    """Post-softmax attention of the last prompt token in decoder layer `layer`: (images, heads, tokens)."""

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        return view.of_tokens(self.paid(record, view, view.last_positions())[:, :, 0])


@dataclass(frozen=True)
class TextRow(DecoderRow):
    """Attention that the text after an image pays it in decoder layer `layer`: (images, 1, tokens).

    The mean over heads and over the image's later text tokens up to the prompt's end.
    """

    ahead: bool = True

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        positions, asks = view.text_after_images()
        rows = self.paid(record, view, positions)
        weights = asks / asks.sum(1, keepdim=True).clamp(min=1)
        return torch.einsum("iqn,iq->in", view.of_tokens(rows.mean(1)), weights)[:, None]
