"""Tiny random models of each family, built from config, and prompts for them."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

IMAGE = 99
PAD = 0
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's normalisation."""


def llava(
    seed: int = 0, attn: str = "sdpa", layers: int = 6, grid: int = 6, cls: bool = True
) -> LlavaForConditionalGeneration:
    """LLaVA-1.5 with `grid` x `grid` visual tokens, grouped-query attention, and attention that is far from uniform.

    Without `cls` the tower is a SigLIP, all of whose tokens are patches.
    """
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=(CLIPVisionConfig if cls else SiglipVisionConfig)(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=8 * grid,
            patch_size=8,
        ),
        vision_feature_select_strategy="default" if cls else "full",
        text_config=LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=100,
            initializer_range=0.2,
            eos_token_id=None,
            pad_token_id=PAD,
            bos_token_id=1,
        ),
        image_token_id=IMAGE,
        image_seq_length=grid * grid,
        attn_implementation=attn,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.suppress_tokens = [IMAGE]
    for name, weight in model.named_parameters():  # random weights of the default size give all but uniform attention
        if "vision_tower" in name and weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model


def prompt(model, images: tuple[int, ...] = (1,), length: int = 8, pad: str | None = "left", seed: int = 0) -> dict:
    """A batch: row b has images[b] images among random text. `pad` is the padding side (None: rows must be equal)."""
    generator = torch.Generator().manual_seed(seed)
    tokens, size = model.config.image_seq_length, model.config.vision_config.image_size

    def text(n: int) -> list[int]:
        return torch.randint(2, IMAGE, (n,), generator=generator).tolist()

    rows = []
    for row, count in enumerate(images):
        ids = [1, *text(2)]
        for _ in range(count):
            ids += [IMAGE] * tokens + text(2)
        rows.append(ids + text(length + (row if pad else 0)))
    longest = max(map(len, rows))
    left = pad == "left"
    ids = [[PAD] * ((longest - len(r)) * left) + r + [PAD] * ((longest - len(r)) * (not left)) for r in rows]
    real = [[0] * ((longest - len(r)) * left) + [1] * len(r) + [0] * ((longest - len(r)) * (not left)) for r in rows]
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real)}
    if sum(images):
        levels = torch.randint(0, 256, (sum(images), 3, size, size), generator=generator) / 255
        inputs["pixel_values"] = (levels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return inputs
