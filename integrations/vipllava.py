"""ViP-LLaVA: as LLaVA-1.5, but the projector reads several CLIP layers, and never the CLS token."""

from __future__ import annotations

from typing import ClassVar

from vtc.adapter import Adapter, register


@register
class VipLlava(Adapter):
    model_types: ClassVar[tuple[str, ...]] = ("vipllava",)

    def has_cls(self) -> bool:
        return True

    def tokens_per_image(self) -> int:
        vision = self.model.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2
