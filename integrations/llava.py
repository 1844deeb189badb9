"""LLaVA-1.5: CLIP tower with a CLS token, MLP projector, Llama-like decoder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from vtc.adapter import Adapter, register
from vtc.observe import Attention


@register
class Llava(Adapter):
    model_types = ("llava",)

    def tower_blocks(self) -> Sequence[nn.Module]:
        blocks = self.backbone.vision_tower.encoder.layers
        read = self.model.config.vision_feature_layer
        # hidden_states[i] is the output of block i - 1; several layers may be read and concatenated
        last = max(layer % (len(blocks) + 1) for layer in ([read] if isinstance(read, int) else read))
        return blocks[:last]

    def has_cls(self) -> bool:
        return self.model.config.vision_feature_select_strategy == "default"

    def tower_attention(self, block: nn.Module) -> Attention:
        attention = block.self_attn
        heads = attention.num_heads
        return Attention(attention.q_proj, attention.k_proj, heads, heads, attention.scale)

    def tokens_per_image(self) -> int:
        vision = self.model.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        return patches if self.has_cls() else self.model.config.image_seq_length
