"""Idefics3 and SmolVLM: SigLIP, pixel shuffle, tiles with text between them.

A visual token is a square of patches; its score is their mean. The model is given tiles, and which of them make up one
image is known to the processor only: each tile, and each frame of a video, counts as an image and has its own budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange, reduce
from torch import Tensor

from vtc.adapter import Adapter, HfModule, register
from vtc.attention import TowerStates
from vtc.grids import Grid


@register
class Idefics3(Adapter):
    model_types: ClassVar[tuple[str, ...]] = ("idefics3", "smolvlm")

    @property
    def decoder(self) -> HfModule:
        return self.backbone.text_model

    def encoder_blocks(self) -> Sequence[HfModule]:
        return self.backbone.vision_model.encoder.layers

    def tower_states(self, block: HfModule, record: dict[str, Any], call: dict[str, Any]) -> TowerStates:
        states = super().tower_states(block, record, call)
        if call.get("pixel_attention_mask") is None:
            return states
        mask, size = call["pixel_attention_mask"].flatten(0, 1)[self._real(call)], self.patch_size()
        valid = reduce(mask.bool(), "i (h p) (w q) -> i (h w)", torch.any, p=size, q=size)
        return TowerStates(states.query, states.key, states.scale, valid)

    def pack(self, patches: Tensor, call: dict[str, Any]) -> list[Tensor]:
        crops, connector = len(patches), self.backbone.connector
        maps = rearrange(patches, "i n c -> (i c) n 1")
        tokens = connector.pixel_shuffle(maps, connector.scale_factor).mean(-1)
        return list(rearrange(tokens, "(i c) n -> i n c", i=crops))

    def parts(self, call: dict[str, Any], sizes: list[int]) -> list[list[Grid]]:
        tokens = self.backbone.image_seq_len
        return [[self.grid(tokens)]] * (sum(sizes) // tokens)

    def pixels(self, call: dict[str, Any]) -> Tensor:
        return super().pixels({"pixel_values": call["pixel_values"].flatten(0, 1)[self._real(call)]})

    def _real(self, call: dict[str, Any]) -> Tensor:
        """(batch * tiles,) bool: the tiles that do not just fill up the batch; those are all 0."""
        return (call["pixel_values"].flatten(0, 1) != 0).flatten(1).any(1)
