"""What vtc has to know about a model family, and the registry that finds it.

A family is one file in `integrations/`: a subclass of `Adapter` under `@register`. Nothing in `vtc` names a family.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from vtc.observe import Attention
from vtc.stage import Shape

ADAPTERS: dict[str, type[Adapter]] = {}


class Adapter:
    """Where one family keeps its parts. Attributes are looked up on the live model, never copied."""

    model_types: ClassVar[tuple[str, ...]]
    """Values of `config.model_type` that this adapter serves."""

    def __init__(self, model: nn.Module):
        self.model = model

    @property
    def backbone(self) -> nn.Module:
        """The module that has `get_image_features` and merges image features into the text sequence."""
        return self.model.base_model

    @property
    def decoder(self) -> nn.Module:
        """The text model: takes `inputs_embeds` and runs `layers`."""
        return self.backbone.language_model

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder layers."""
        return self.decoder.layers

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    def tower_blocks(self) -> Sequence[nn.Module]:
        """The vision tower's blocks, up to and including the one whose output the projector reads."""
        raise NotImplementedError

    def has_cls(self) -> bool:
        """Whether token 0 of the tower's sequence is a CLS token that the projector does not read."""
        raise NotImplementedError

    def tower_attention(self, block: nn.Module) -> Attention:
        """The attention parts of one tower block."""
        raise NotImplementedError

    def decoder_attention(self, layer: nn.Module) -> Attention:
        """The attention parts of one decoder layer; right for every Llama-like layer."""
        attention, config = layer.self_attn, self.decoder.config
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        return Attention(attention.q_proj, attention.k_proj, heads, key_heads, attention.scaling)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding of (batch, heads, length, head_dim) by (batch, length, head_dim), half-split convention."""
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]

    def patch_size(self) -> int:
        """Pixels on the side of the square that becomes one visual token."""
        return self.model.config.vision_config.patch_size

    def tokens_per_image(self) -> int | None:
        """Visual tokens of an image where the family fixes that number, else None."""
        return None

    def grid(self, tokens: int) -> tuple[int, int]:
        """(height, width) of the patch grid of an image with this many tokens."""
        side = round(tokens**0.5)
        if side * side != tokens:
            raise ValueError(
                f"{tokens} visual tokens are not a square grid; {type(self).__name__} must say what they are"
            )
        return side, side

    def shape(self) -> Shape:
        return Shape(len(self.layers), len(self.tower_blocks()), self.has_cls())


def register(adapter: type[Adapter]) -> type[Adapter]:
    """Class decorator: serve `adapter.model_types`."""
    for model_type in adapter.model_types:
        ADAPTERS[model_type] = adapter
    return adapter


def find(model: nn.Module) -> Adapter:
    """The adapter for `model`, by `config.model_type`. Raises a TypeError that names the known families."""
    import vtc.integrations

    for module in pkgutil.iter_modules(vtc.integrations.__path__):
        importlib.import_module(f"vtc.integrations.{module.name}")
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in ADAPTERS:
        raise TypeError(
            f"vtc has no adapter for {type(model).__name__} (model_type {model_type!r}). Families it knows: "
            f"{', '.join(sorted(ADAPTERS))}. To add one, write a file like integrations/llava.py"
        )
    return ADAPTERS[model_type](model)
