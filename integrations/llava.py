"""LLaVA-1.5: CLIP tower with a CLS token (or SigLIP), MLP projector, Llama-like decoder. The smallest adapter."""

from __future__ import annotations

from typing import ClassVar

from vtc.adapter import Adapter, register


@register
class Llava(Adapter):
    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    merges_patches = True

    def tokens_per_image(self) -> int:
        vision = self.model.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        return patches if self.has_cls() else self.model.config.image_seq_length
