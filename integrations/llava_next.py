"""LLaVA-NeXT and LLaVA-NeXT-Video: anyres tiles, unpadded, with a newline token after each row.

An image is the overview tile and the unpadded mosaic of the others; the budget is the image's, and tiles compete for
it by their scores. Score maps go through the model's own `pack_image_features`. A newline token shows nothing of the
image and survivors keep their positions anyway, so the tower's score of a newline is 0: it leaves first. Scores from
within the decoder treat newlines as what they are there, visual tokens among others. Frames of a video are pooled: a
visual token gets the mean score of its patches, whatever `spatial_pool_mode` does with the features.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from vtc.adapter import Adapter, register
from vtc.grids import Grid


@register
class LlavaNext(Adapter):
    model_types: ClassVar[tuple[str, ...]] = ("llava_next", "llava_next_video")
    merges_patches = True

    def pack(self, patches: Tensor, call: dict[str, Any]) -> list[Tensor]:
        if "pixel_values_videos" in call:
            return self.pool(patches, call)
        return self._mosaic(patches, call, newline=0.0)

    def pool(self, patches: Tensor, call: dict[str, Any]) -> list[Tensor]:
        """Score maps of a video's frames, pooled as the model pools its features."""
        side = round(patches.shape[1] ** 0.5)
        maps = rearrange(patches, "f (h w) c -> f c h w", h=side)
        pooled = torch.nn.functional.avg_pool2d(maps, self.model.config.spatial_pool_stride)
        return list(rearrange(pooled, "(v f) c h w -> v (f h w) c", v=len(call["pixel_values_videos"])))

    def _mosaic(self, patches: Tensor, call: dict[str, Any], newline: float) -> list[Tensor]:
        tiles = patches.split(self.tiles(call))
        return self.pack_features(tiles, call, patches.new_full((patches.shape[-1],), newline))

    def pack_features(self, tiles: tuple[Tensor, ...], call: dict[str, Any], newline: Tensor) -> list[Tensor]:
        strategy = self.model.config.vision_feature_select_strategy
        return self.backbone.pack_image_features(tiles, call["image_sizes"], strategy, newline)[0]

    def tiles(self, call: dict[str, Any]) -> list[int]:
        """The number of tiles of each image."""
        config = self.model.config
        side = config.vision_config.image_size
        return [image_size_to_num_patches(size, config.image_grid_pinpoints, side) for size in call["image_sizes"]]

    def parts(self, call: dict[str, Any], sizes: list[int]) -> list[list[Grid]]:
        side = self.model.config.vision_config.image_size // self.patch_size()
        if "pixel_values_videos" in call:
            return self.frames(call, side)
        # the newlines' places in the packed image tell its width
        marks = self._mosaic(torch.zeros(sum(self.tiles(call)), side**2, 1), call, newline=1.0)
        return [[(side, side), *_mosaic_grid(mark[side**2 :, 0])] for mark in marks]

    def frames(self, call: dict[str, Any], side: int) -> list[list[Grid]]:
        videos, frames = call["pixel_values_videos"].shape[:2]
        side //= self.model.config.spatial_pool_stride
        return [[(side, side)] * frames] * videos

    def pixels(self, call: dict[str, Any]) -> Tensor:
        if "pixel_values_videos" in call:
            pixels = call["pixel_values_videos"].flatten(0, 1)
        else:
            pixels = call["pixel_values"]
            if pixels.ndim == 5:
                pixels = torch.cat([image[:tiles] for image, tiles in zip(pixels, self.tiles(call), strict=True)])
        return super().pixels({"pixel_values": pixels})


def _mosaic_grid(newlines: Tensor) -> list[Grid]:
    """Of a mosaic with 1 at its newlines; none where a strip is so narrow that unpadding leaves no row of it."""
    if not len(newlines):
        return []
    width = int(newlines.argmax()) + 1
    return [(len(newlines) // width, width)]
