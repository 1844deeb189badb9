"""InternVL: a tower with a CLS token, tiles, pixel shuffle.

Pixel shuffle makes one visual token of a square of patches: its score is their mean. The tiles of an image follow each
other in the prompt without text between them, and compete for the image's budget. A frame of a video has text before it
and counts as an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor

from vtc.adapter import Adapter, HfModule, register
from vtc.attention import Attention


@register
class InternVL(Adapter):
    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    joins_tiles = True

    def encoder_blocks(self) -> Sequence[HfModule]:
        return self.backbone.vision_tower.encoder.layer

    def tower_attention(self, block: HfModule) -> Attention:
        attention = block.attention  # its norms run over all heads at once, so their outputs are the queries and keys
        heads = attention.num_heads
        return Attention(attention.q_norm, attention.k_norm, heads, heads, attention.scale)

    def pack(self, patches: Tensor, call: dict[str, Any]) -> list[Tensor]:
        crops, side = len(patches), round(patches.shape[1] ** 0.5)
        maps = rearrange(patches, "i (h w) c -> (i c) h w 1", h=side)
        tokens = self.backbone.pixel_shuffle(maps, scale_factor=self.model.config.downsample_ratio).mean(-1)
        return list(rearrange(tokens, "(i c) h w -> i (h w) c", i=crops))

    def patch_size(self) -> int:
        return self.model.config.vision_config.patch_size[0]
