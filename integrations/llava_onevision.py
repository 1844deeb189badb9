"""LLaVA-OneVision: SigLIP without CLS, anyres tiles as in LLaVA-NeXT, video frames pooled, one newline ends a video.

Newline tokens and tiles are scored as in `llava_next.py`. An image among several of one prompt may be a single tile.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.adapter import register
from vtc.grids import Grid
from vtc.integrations.llava_next import LlavaNext


@register
class LlavaOnevision(LlavaNext):
    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)

    def pool(self, patches: Tensor, call: dict[str, Any]) -> list[Tensor]:
        pooled = self.backbone.apply_pooling(patches)
        videos = pooled.reshape(len(call["pixel_values_videos"]), -1, pooled.shape[-1])
        return list(torch.nn.functional.pad(videos, (0, 0, 0, 1)))

    def pack_features(self, tiles: tuple[Tensor, ...], call: dict[str, Any], newline: Tensor) -> list[Tensor]:
        ratio = call.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio
        return self.backbone.pack_image_features(tiles, call["image_sizes"], newline, ratio)[0]

    def tiles(self, call: dict[str, Any]) -> list[int]:
        images = call.get("batch_num_images")
        alone = [True] * len(call["image_sizes"]) if images is None else [n == 1 for n in images for _ in range(n)]
        return [tiles if single else 1 for tiles, single in zip(super().tiles(call), alone, strict=True)]

    def frames(self, call: dict[str, Any], side: int) -> list[list[Grid]]:
        videos, frames = call["pixel_values_videos"].shape[:2]
        side = (side + 1) // 2
        return [[(side, side)] * frames + [(1, 1)]] * videos
