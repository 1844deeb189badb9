"""How attention and module outputs are seen without materialising attention, and without changing its kernel.

A score needs rows, not matrices. A `Need` names what it wants to see of one layer: the modules whose outputs a forward
hook keeps, and how they become one row over the visual tokens, in float32. Nothing else in vtc observes a module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from vtc import scores
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

    Grey is the rounded mean of the de-normalised channels, 256 bins (VFlowOpt, Eq. 4). What pixels were normalised by
    is known from the image processor beside the checkpoint; frames of a video are taken to be normalised alike.
    """

    tower: ClassVar[bool] = True

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        if not adapter.has_pixels:
            raise ValueError("this method looks at the pixels of patches, which this family packs: set its weight to 0")
        if adapter.image_processor is None:
            raise ValueError(
                "the entropy of patches needs the mean and deviation that pixels were normalised by, and beside this "
                f"model's checkpoint {adapter.model.config._name_or_path!r} is no image processor: save it there with "
                "processor.save_pretrained(folder), or set the weight of the entropy to 0"
            )
        return {}

    def row(self, record: dict[str, Tensor], tower: Tower) -> Tensor:
        pixels, processor = tower.adapter.pixels(tower.call).float(), tower.adapter.image_processor
        if processor.do_normalize:
            mean, std = (pixels.new_tensor(values)[:, None] for values in (processor.image_mean, processor.image_std))
            pixels = pixels * std + mean
        levels = pixels / processor.rescale_factor if processor.do_rescale else pixels
        grey = levels.mean(2).round().clamp(0, 255).long()
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


@dataclass(frozen=True)
class SelfLogits(Need):
    """Mean pre-softmax logit that each visual token receives from its image's tokens in decoder layer `layer`.

    (images, 1, tokens), heads averaged. Logits are linear in the query, so the mean query stands for all of them.
    """

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        attention = adapter.decoder_attention(adapter.layers[self.layer])
        return {"query": attention.query, "key": attention.key}

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        adapter, valid = view.adapter, view.alive
        attention = adapter.decoder_attention(adapter.layers[self.layer])

        def visual(x: Tensor) -> Tensor:
            rotated = view.rotated(self.layer, x).float()
            return rearrange(
                view.of_tokens(rearrange(rotated, "b h n d -> b (h d) n")), "i (h d) n -> i h n d", h=x.shape[1]
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

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        valid = view.alive
        change = 0
        for module in ("attention", "feed-forward"):
            ratio, cosine = scores.change(record[f"{module} in"], record[f"{module} out"])
            ratio, cosine = view.of_tokens(torch.stack((ratio, cosine), dim=1)).unbind(1)
            change = change + scores.token_transition(ratio, cosine, valid)
        return change[:, None]
