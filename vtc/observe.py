"""How attention and module outputs are seen without materialising attention, and without changing its kernel.

A score needs rows, not matrices. A `Need` names what it wants to see of one layer: the modules whose outputs a forward
hook keeps, and how they become one row over the visual tokens, in float32. Nothing else in vtc observes a module.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from vtc import scores
from vtc.compact import gather

if TYPE_CHECKING:
    from vtc.adapter import Adapter
    from vtc.forward import Forward


@dataclass(frozen=True)
class Attention:
    """The parts of one attention module that a row is recomputed from."""

    query: nn.Module
    """Module whose output is the queries before the rotary embedding: (batch, length, heads * head_dim)."""
    key: nn.Module
    heads: int
    key_heads: int
    scale: float


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

    def row(self, record: dict[str, Tensor], context) -> Tensor:

        raise NotImplementedError


@dataclass(frozen=True)
class ClsRow(Need):
    """Post-softmax attention of the tower's CLS query: (images, heads, tokens), CLS column dropped."""

    tower: ClassVar[bool] = True

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        if not adapter.has_cls():
            raise ValueError("this method scores by CLS attention, and this vision tower has no CLS token")
        attention = adapter.tower_attention(adapter.tower_blocks()[self.layer])
        return {"query": attention.query, "key": attention.key}

    def row(self, record: dict[str, Tensor], adapter: Adapter) -> Tensor:
        attention = adapter.tower_attention(adapter.tower_blocks()[self.layer])
        query = split_heads(record["query"][:, :1], attention.heads)
        key = split_heads(record["key"], attention.key_heads)
        return attention_rows(query, key, attention.scale)[:, :, 0, 1:]


@dataclass(frozen=True)
class ReceivedAttention(Need):
    """Mean attention that each patch receives from all patches in a tower block: (images, 1, tokens), heads averaged.

    The matrix is summed up in blocks of queries, never stored.
    """

    tower: ClassVar[bool] = True

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        attention = adapter.tower_attention(adapter.tower_blocks()[self.layer])
        return {"query": attention.query, "key": attention.key}

    def row(self, record: dict[str, Tensor], adapter: Adapter) -> Tensor:
        return self.paid(record, adapter)[:, None]

    def paid(self, record: dict[str, Tensor], adapter: Adapter, payers: Tensor | None = None) -> Tensor:
        """Mean attention paid to each patch by the `payers` (images, patches) bool, or by all: (images, patches)."""
        attention = adapter.tower_attention(adapter.tower_blocks()[self.layer])
        first = int(adapter.has_cls())
        query = split_heads(record["query"], attention.heads)[:, :, first:]
        key = split_heads(record["key"], attention.key_heads)
        weights = torch.ones_like(query[:, 0, :, 0], dtype=torch.float32) if payers is None else payers.float()
        blocks = zip(query.split(QUERY_BLOCK, dim=2), weights.split(QUERY_BLOCK, dim=1), strict=True)
        total = sum(
            torch.einsum("ihqn,iq->in", attention_rows(part, key, attention.scale), weight) for part, weight in blocks
        )
        return total[:, first:] / (attention.heads * weights.sum(1, keepdim=True))


QUERY_BLOCK = 64
"""Queries whose attention rows are held at once."""


@dataclass(frozen=True)
class RelevantAttention(ReceivedAttention):
    """Mean attention that a tower block's relatively important patches pay to each patch: (images, 1, tokens).

    Those are the patches that receive more than `threshold` times the mean, or all where none does (VFlowOpt, Eq. 1-3).
    """

    threshold: float

    def row(self, record: dict[str, Tensor], adapter: Adapter) -> Tensor:
        received = self.paid(record, adapter)
        important = received > self.threshold * received.mean(1, keepdim=True)
        important = important | ~important.any(1, keepdim=True)
        return self.paid(record, adapter, important)[:, None]


@dataclass(frozen=True)
class PatchEntropy(Need):
    """Softmax over patches of the Shannon entropy, in bits, of a patch's grey values: (images, 1, tokens).

    Grey is the rounded mean of the de-normalised channels, 256 bins (VFlowOpt, Eq. 4).
    """

    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    """What the image processor normalised by; CLIP's."""

    tower: ClassVar[bool] = True

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        return {}

    def row(self, record: dict[str, Tensor], adapter: Adapter) -> Tensor:
        pixels = record["pixels"].float()
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        grey = ((pixels * std + mean) * 255).mean(1).round().clamp(0, 255).long()
        size = adapter.patch_size()
        patches = rearrange(grey, "i (h p) (w q) -> i (h w) (p q)", p=size, q=size)
        counts = torch.zeros(*patches.shape[:2], 256, device=grey.device).scatter_add_(
            2, patches, torch.ones_like(patches, dtype=torch.float32)
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

        def visual(x: Tensor, heads: int) -> Tensor:
            rotated = adapter.rotate(split_heads(x, heads), *forward.rotary).float()
            return rearrange(
                forward.columns(rearrange(rotated, "b h n d -> b (h d) n")), "i (h d) n -> i h n d", h=heads
            )

        query, key = visual(record["query"], attention.heads), visual(record["key"], attention.key_heads)
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
        layer = adapter.layers[self.layer]
        return {
            "attention in": layer.input_layernorm,
            "attention out": layer.self_attn,
            "feed-forward in": layer.post_attention_layernorm,
            "feed-forward out": layer.mlp,
        }

    def row(self, record: dict[str, Tensor], forward: Forward) -> Tensor:
        valid = forward.alive
        change = 0
        for module in ("attention", "feed-forward"):
            ratio, cosine = scores.change(record[f"{module} in"], record[f"{module} out"])
            ratio, cosine = forward.columns(torch.stack((ratio, cosine), dim=1)).unbind(1)
            change = change + scores.token_transition(ratio, cosine, valid)
        return change[:, None]


Record = dict[Need, dict[str, Tensor]]
recording: ContextVar[Record | None] = ContextVar("vtc_recording", default=None)
"""Where the hooks write. It belongs to the running call: another thread on the same model has its own."""


def watch(need: Need, adapter: Adapter) -> list[torch.utils.hooks.RemovableHandle]:
    """Hook the modules of `need`, so that `recording` gets their outputs."""

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            if (record := recording.get()) is not None:
                record.setdefault(need, {})[name] = output[0] if isinstance(output, tuple) else output

        return hook

    return [module.register_forward_hook(keep(name)) for name, module in need.modules(adapter).items()]


@dataclass
class Seen:
    """What score and select functions get: the rows that the stage asked for, and which entries are tokens at all."""

    rows: dict[Need, Tensor]
    valid: Tensor
    """(images, tokens) bool, False where an image has fewer tokens than the widest one."""
    index: Tensor
    """(images, tokens) int64: which patch of its image each token is, in raster order."""
    grids: list[tuple[int, int]]
    """(height, width) of each image's patch grid, before any token left."""

    def __getitem__(self, need: Need) -> Tensor:
        """(images, channels, tokens) float32, over the tokens that are left."""
        return self.rows[need]


def attention_rows(
    query: Tensor, key: Tensor, scale: float, visible: Tensor | None = None, bias: Tensor | float = 0.0
) -> Tensor:
    """softmax(q k^T * scale) of a few queries, in float32.

    Args:
        query: (batch, heads, queries, head_dim), after the rotary embedding.
        key: (batch, key_heads, length, head_dim), after the rotary embedding; heads are grouped over key heads.
        scale: factor on the logits, usually head_dim ** -0.5.
        visible: (batch, queries or 1, length) bool, False where a query must not look.
        bias: (batch, 1, 1, length), added to the logits of each key.

    Returns:
        (batch, heads, queries, length) float32.
    """
    queries = query.shape[2]
    query = rearrange(query.float(), "b (g r) q d -> b g (r q) d", g=key.shape[1])
    logits = query @ key.float().transpose(-1, -2) * scale
    logits = rearrange(logits, "b g (r q) n -> b (g r) q n", q=queries) + bias
    if visible is not None:
        logits = logits.masked_fill(~visible[:, None], -torch.inf)
    return logits.softmax(-1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, length, heads * head_dim) -> (batch, heads, length, head_dim)."""
    return rearrange(x, "b n (h d) -> b h n d", h=heads)
