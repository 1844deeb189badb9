"""PaliGemma: SigLIP, linear projector; image and prompt are a prefix whose tokens see each other both ways.

Text before the answer belongs to the prefix (`token_type_ids` 0), so it reads dropped tokens in the layers before the
drop only. A sliding window (PaliGemma 2) limits what lies outside the prefix, and counts original positions.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.adapter import Adapter, register


@register
class PaliGemma(Adapter):
    model_types: ClassVar[tuple[str, ...]] = ("paligemma",)
    merges_patches = True
    window_cuts_blocks = False

    def blocks(self, inputs: dict[str, Any]) -> Tensor | None:
        types = inputs.get("token_type_ids")
        return None if types is None else torch.where(types == 0, 0, -1)

    def tokens_per_image(self) -> int:
        vision = self.model.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2
