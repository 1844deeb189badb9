"""Gemma 3: SigLIP, average-pooled to a fixed number of tokens; an image's tokens see each other both ways.

A visual token is a pooled square of patches; its score is their mean. Most decoder layers have a sliding window: it
goes on counting original positions, so that a dropped token does not widen it.
"""

from __future__ import annotations

from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

from vtc.adapter import Adapter, register


@register
class Gemma3(Adapter):
    model_types: ClassVar[tuple[str, ...]] = ("gemma3",)

    def blocks(self, inputs: dict[str, Any]) -> Tensor | None:
        types = inputs.get("token_type_ids")
        return None if types is None else get_block_sequence_ids_for_mask(types)

    def rotary_tables(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.decoder.rotary_emb(hidden, positions, self.decoder.config.layer_types[0])

    def pack(self, patches: Tensor, call: dict[str, Any]) -> list[Tensor]:
        projector = self.backbone.multi_modal_projector
        maps = rearrange(patches, "i (h w) c -> i c h w", h=projector.patches_per_image)
        return list(rearrange(projector.avg_pool(maps), "i c h w -> i (h w) c"))

    def tokens_per_image(self) -> int:
        return self.model.config.mm_tokens_per_image
