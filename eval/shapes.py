"""True shapes of public models, built with random weights, and prompts for them: nothing is downloaded.

The numbers are those of the checkpoints' config.json, written down by hand: they were not compared with the hub.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
SO400M_384 = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
QWEN_TOWER = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}


def _text(kind: type, vocabulary: int, width: int, inner: int, layers: int, heads: int, key_heads: int, **more: Any):
    return kind(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        **more,
    )


def _vicuna(width: int, inner: int, layers: int, heads: int) -> hf.LlamaConfig:
    return _text(hf.LlamaConfig, 32064, width, inner, layers, heads, heads)


def _llava(text: hf.PreTrainedConfig) -> hf.LlavaConfig:
    return hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP_L_336),
        text_config=text,
        image_token_index=text.vocab_size - 1,
        image_seq_length=576,
    )


def _llava_next(text: hf.PreTrainedConfig) -> hf.LlavaNextConfig:
    vision = hf.CLIPVisionConfig(**CLIP_L_336)
    return hf.LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=32000)


def _onevision(text: hf.PreTrainedConfig) -> hf.LlavaOnevisionConfig:
    """With its 36 resolutions and 9 tiles at most, which are the class's defaults."""
    return hf.LlavaOnevisionConfig(vision_config=hf.SiglipVisionConfig(**SO400M_384), text_config=text)


def _qwen(**text: Any) -> hf.Qwen2_5_VLConfig:
    return hf.Qwen2_5_VLConfig(
        vision_config=QWEN_TOWER, text_config={**text, "rope_parameters": QWEN_ROPE}, tie_word_embeddings=True
    )


SHAPES: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "llava-1.5-7b": lambda: _llava(_vicuna(4096, 11008, 32, 32)),
    "llava-1.5-13b": lambda: _llava(_vicuna(5120, 13824, 40, 40)),
    "llava-next-7b": lambda: _llava_next(_vicuna(4096, 11008, 32, 32)),
    "onevision-0.5b": lambda: _onevision(_text(hf.Qwen2Config, 152000, 896, 4864, 24, 14, 2, tie_word_embeddings=True)),
    "onevision-7b": lambda: _onevision(_text(hf.Qwen2Config, 152128, 3584, 18944, 28, 28, 4)),
    "qwen2.5-vl-3b": lambda: _qwen(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
    ),
    "llava-qwen2-0.5b": lambda: _llava(_text(hf.Qwen2Config, 151936, 896, 4864, 24, 14, 2)),
}
"""`llava-qwen2-0.5b` is LLaVA-1.5's tower before the 0.5B decoder of OneVision; the others are public models."""


def load(name: str, dtype: torch.dtype, device: str, attention: str | None = None) -> torch.nn.Module:
    """A model with random weights: of a named shape, or of the shape of a folder's config.json.

    `attention` is what transformers calls attn_implementation. Raises ValueError that lists the shapes.
    """
    if name in SHAPES:
        config = SHAPES[name]()
    elif (Path(name) / "config.json").is_file():
        config = hf.AutoConfig.from_pretrained(name)
    else:
        raise ValueError(f"unknown shape {name!r}; known are {', '.join(SHAPES)}, and folders with a config.json")
    torch.manual_seed(0)
    with torch.device(device):
        return hf.AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention).eval()


@torch.no_grad()
def prompt(model: torch.nn.Module, batch: int, text: int, pixels: int | None = None) -> dict[str, Tensor]:
    """What a processor makes of `batch` prompts of `text` tokens, with a square random image after the first 8.

    `pixels` is the side of the image for families that read it in tiles or in its own resolution. None: 2 x 2 tiles and
    the overview, or 672. Raises ValueError for a family whose prompts are not known here, and for `pixels` where the
    family has one size of image.
    """
    generator, token = torch.Generator().manual_seed(0), model.config.image_token_id
    images = [_image(model.config, pixels, generator) for _ in range(batch)]
    seen = {name: torch.cat([image[name] for image in images]).to(model.device) for name in images[0]}
    seen = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in seen.items()}
    one = {name: x[: len(images[0][name])] for name, x in seen.items()}
    tokens = sum(map(len, model.base_model.get_image_features(**one).pooler_output))
    ids = torch.full((batch, text + tokens), 2, device=model.device)
    ids[:, 8 : 8 + tokens] = token
    kinds = {"mm_token_type_ids": (ids == token).long()} if "image_grid_thw" in seen else {}
    return {"input_ids": ids, **kinds, **seen}


def _image(config: hf.PreTrainedConfig, pixels: int | None, generator: torch.Generator) -> dict[str, Tensor]:
    vision, kind = config.vision_config, config.model_type
    if kind in ("llava", "vipllava"):
        if pixels is not None:
            raise ValueError(f"{kind} sees every image at {vision.image_size} pixels: leave --pixels out")
        return {"pixel_values": torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator)}
    if kind in ("llava_next", "llava_onevision"):
        size = [pixels or 2 * vision.image_size] * 2
        tiles = image_size_to_num_patches(size, config.image_grid_pinpoints, vision.image_size)
        crops = torch.randn(1, tiles, 3, vision.image_size, vision.image_size, generator=generator)
        return {"pixel_values": crops, "image_sizes": torch.tensor([size])}
    if kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        unit = vision.patch_size * vision.spatial_merge_size
        side = max(1, (pixels or 672) // unit) * vision.spatial_merge_size
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {
            "pixel_values": torch.randn(side * side, patch, generator=generator),
            "image_grid_thw": torch.tensor([[1, side, side]]),
        }
    raise ValueError(f"the benchmark does not know the prompts of {kind!r}: use a LLaVA, OneVision or Qwen-VL model")
