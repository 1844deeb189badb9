"""How attention and module outputs are seen without materialising attention, and without changing its kernel.

A score needs rows, not matrices. A `Need` names what it wants to see of one layer: the modules whose outputs a forward
hook keeps, and how they become one row over the visual tokens, in float32. Nothing else in vtc observes a module.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from vtc import scores
from vtc.compact import gather

if TYPE_CHECKING:
    from vtc.adapter import Adapter
    from vtc.forward import Forward


Part = tuple[int, int]
"""(height, width) of a grid of visual tokens: a whole image, a tile, or a frame."""


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


@dataclass(frozen=True)
class Tower:
    """One run of the vision tower."""

    adapter: Adapter
    call: dict[str, Any]
    """The arguments of `get_image_features` or `get_video_features`."""

    def states(self, layer: int, record: dict[str, Any]) -> TowerStates:
        return self.adapter.tower_states(self.adapter.tower_blocks()[layer], record, self.call)


@dataclass(frozen=True)
class Need:
    """Something to be seen of block `layer`, of the vision tower or of the decoder."""

    layer: int

    tower: ClassVar[bool] = False

    @property
    def before(self) -> int:
        """The decoder layer before which the row is made; the tokens must not have changed since it was observed."""
        return self.layer + 1

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        """The modules to hook, by the names under which `record` will hold their outputs.

        Raises ValueError where the model has no such thing.
        """
        raise NotImplementedError

    def hooks(self, adapter: Adapter) -> list[torch.utils.hooks.RemovableHandle]:
        """Hook the modules, so that `recording` gets their outputs."""

        return [
            module.register_forward_hook(partial(self._keep, name)) for name, module in self.modules(adapter).items()
        ]

    def _keep(self, name: str, module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        if (record := self.record()) is not None:
            record[name] = output

    def record(self) -> dict[str, Any] | None:
        """Where the running call keeps what is seen for this need; None where it has not asked for it."""
        return (recording.get() or {}).get(self)

    def row(self, record: dict[str, Tensor], context: Tower | Forward) -> Tensor:
        """What was seen, float32: (crops, channels, patches) of a tower, (images, channels, tokens) of a decoder."""
        raise NotImplementedError


Record = dict[Need, dict[str, Any]]
recording: ContextVar[Record | None] = ContextVar("vtc_recording", default=None)
"""Where the hooks write: an entry for each need of the running call. Another thread on the same model has its own."""


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
class RelevantAttention(ReceivedAttention):
    """Mean attention that a tower block's relatively important patches pay to each patch: (images, 1, tokens).

    Those are the patches that receive more than `threshold` times the mean, or all where none does (VFlowOpt, Eq. 1-3).
    """

    threshold: float

    def row(self, record: dict[str, Tensor], tower: Tower) -> Tensor:
        states = tower.states(self.layer, record)
        received = self.paid(states, tower)
        valid = torch.ones_like(received, dtype=torch.bool)
        if states.valid is not None:
            valid = states.valid[:, int(tower.adapter.has_cls()) :]
        important = (received > self.threshold * scores.mean(received, valid)[:, None]) & valid
        important = important | ~important.any(1, keepdim=True)
        return self.paid(states, tower, important)[:, None]


@dataclass(frozen=True)
class PatchEntropy(Need):
    """Softmax over patches of the Shannon entropy, in bits, of a patch's grey values: (crops, 1, patches).

    Grey is the rounded mean of the de-normalised channels, 256 bins (VFlowOpt, Eq. 4).
    """

    tower: ClassVar[bool] = True

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        if not adapter.has_pixels:
            raise ValueError("this method looks at the pixels of patches, which this family packs: set its weight to 0")
        return {}

    def row(self, record: dict[str, Tensor], tower: Tower) -> Tensor:
        adapter = tower.adapter
        pixels = adapter.pixels(tower.call).float()
        mean, std = (pixels.new_tensor(values)[:, None] for values in (adapter.pixel_mean, adapter.pixel_std))
        grey = ((pixels * std + mean) * 255).mean(2).round().clamp(0, 255).long()
        counts = torch.zeros(*grey.shape[:2], 256, device=grey.device).scatter_add_(
            2, grey, torch.ones_like(grey, dtype=torch.float32)
        )
        entropy = torch.special.entr(counts / counts.sum(-1, keepdim=True)).sum(-1) / math.log(2)
        return entropy.softmax(1)[:, None]


@dataclass(frozen=True)
class LastTokenRow(Need):
    """Post-softmax attention of the last prompt token in decoder layer `layer`: (images, heads, tokens)."""

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        attention = adapter.decoder_attention(adapter.layers[self.layer])
        return {"query": attention.query, "key": attention.key}

    def row(self, record: dict[str, Tensor], forward: Forward) -> Tensor:
        last = forward.last_positions()
        rows = forward.rows_of(self.layer, gather(record["query"], last), record["key"], last)
        return forward.columns(rows[:, :, 0])


@dataclass(frozen=True)
class TextRow(Need):
    """Attention that the text after an image pays it in decoder layer `layer`: (images, 1, tokens).

    The mean over heads and over the image's later text tokens up to the prompt's end.
    """

    ahead: bool = True
    """Whether the row is that of a layer that has not run yet, on the states that are about to enter it."""

    @property
    def before(self) -> int:
        return self.layer if self.ahead else self.layer + 1

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        attention = adapter.decoder_attention(adapter.layers[self.layer])
        return {} if self.ahead else {"query": attention.query, "key": attention.key}

    def row(self, record: dict[str, Tensor], forward: Forward) -> Tensor:
        positions, asks = forward.text_after_images()
        if self.ahead:
            layer = forward.compression.adapter.layers[self.layer]
            attention = forward.compression.adapter.decoder_attention(layer)
            hidden = layer.input_layernorm(record["hidden"])
            query, key = attention.query(gather(hidden, positions)), attention.key(hidden)
        else:
            query, key = gather(record["query"], positions), record["key"]
        rows = forward.rows_of(self.layer, query, key, positions)
        weights = asks / asks.sum(1, keepdim=True).clamp(min=1)
        return torch.einsum("iqn,iq->in", forward.columns(rows.mean(1)), weights)[:, None]


@dataclass(frozen=True)
class SelfLogits(Need):
    """Mean pre-softmax logit that each visual token receives from its image's tokens in decoder layer `layer`.

    (images, 1, tokens), heads averaged. Logits are linear in the query, so the mean query stands for all of them.
    """

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        attention = adapter.decoder_attention(adapter.layers[self.layer])
        return {"query": attention.query, "key": attention.key}

    def row(self, record: dict[str, Tensor], forward: Forward) -> Tensor:
        adapter, valid = forward.compression.adapter, forward.alive
        attention = adapter.decoder_attention(adapter.layers[self.layer])

        def visual(x: Tensor) -> Tensor:
            rotated = adapter.rotate(x, *forward.rotary[self.layer]).float()
            return rearrange(
                forward.columns(rearrange(rotated, "b h n d -> b (h d) n")), "i (h d) n -> i h n d", h=x.shape[1]
            )

        query, key = visual(attention.queries(record["query"])), visual(attention.keys(record["key"]))
        mean = (query * valid[:, None, :, None]).sum(2) / valid.sum(1).clamp(min=1)[:, None, None]
        mean = rearrange(mean, "i (g r) d -> i g r d", g=attention.key_heads).mean(2)
        return (torch.einsum("igd,ignd->in", mean, key) / attention.key_heads * attention.scale)[:, None]


@dataclass(frozen=True)
class TokenTransition(Need):
    """How strongly the two modules of decoder layer `layer` change each token: (images, 1, tokens).

    `scores.token_transition` of the attention and of the feed-forward module, summed; each from its normed input and
    its output before the residual addition.
    """

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        return adapter.branches(adapter.layers[self.layer])

    def row(self, record: dict[str, Tensor], forward: Forward) -> Tensor:
        valid = forward.alive
        change = 0
        for module in ("attention", "feed-forward"):
            ratio, cosine = scores.change(record[f"{module} in"], record[f"{module} out"])
            ratio, cosine = forward.columns(torch.stack((ratio, cosine), dim=1)).unbind(1)
            change = change + scores.token_transition(ratio, cosine, valid)
        return change[:, None]


@dataclass
class Seen:
    """What score and select functions get: the rows that the stage asked for, and which entries are tokens at all."""

    rows: dict[Need, Tensor]
    valid: Tensor
    """(images, tokens) bool, False where an image has fewer tokens than the widest one."""
    index: Tensor
    """(images, tokens) int64: which patch of its image each token is, in raster order."""
    parts: list[list[Part]]
    """The grids of each image's tokens, in token order, before any token left: tiles, frames."""

    def __getitem__(self, need: Need) -> Tensor:
        """(images, channels, tokens) float32, over the tokens that are left."""
        return self.rows[need]

    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of each token in its own grid, both (images, tokens)."""
        longest = max(sum(height * width for height, width in parts) for parts in self.parts)
        table = torch.stack([_places(tuple(parts), longest) for parts in self.parts]).to(self.index.device)
        row, column = table.gather(2, self.index[:, None].expand(-1, 2, -1)).unbind(1)
        return row, column


@lru_cache(maxsize=256)
def _places(parts: tuple[Part, ...], length: int) -> Tensor:
    """Row and column of each token of `parts`, (2, length), filled up with 0."""
    grids = [torch.cartesian_prod(torch.arange(height), torch.arange(width)) for height, width in parts]
    places = torch.cat(grids).T
    return torch.nn.functional.pad(places, (0, length - places.shape[1]))


def attention_rows(
    query: Tensor,
    key: Tensor,
    scale: float,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(q k^T * scale) of a few queries, in float32.

    Args:
        query: (batch, heads, queries, head_dim), after the rotary embedding.
        key: (batch, key_heads, length, head_dim), after the rotary embedding; heads are grouped over key heads.
        scale: factor on the logits, usually head_dim ** -0.5.
        visible: (batch, queries or 1, length) bool, False where a query must not look.
        bias: (batch, 1, 1, length), added to the logits of each key.
        softcap: see `Attention`.

    Returns:
        (batch, heads, queries, length) float32.
    """
    queries = query.shape[2]
    query = rearrange(query.float() * scale, "b (g r) q d -> b g (r q) d", g=key.shape[1])
    logits = query @ key.float().transpose(-1, -2)
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    logits = rearrange(logits, "b g (r q) n -> b (g r) q n", q=queries)
    if bias is not None:
        logits = logits + bias
    if visible is not None:
        logits = logits.masked_fill(~visible[:, None], -torch.inf)
    return logits.softmax(-1)
