"""Tiny random models of each family, built from config, and prompts for them."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IMAGE = 99
VIDEO = 98
PAD = 0
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's normalisation."""
GRID = 6
"""Patches on the side of an image or a tile."""
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "pad_token_id": PAD,
    "bos_token_id": 1,
}


def finished(model):
    """In evaluation, with attention far from uniform, unable to say a placeholder, and beside an image processor."""
    model.config._name_or_path = str(Path(__file__).parent / "processor")
    model.generation_config.suppress_tokens = [IMAGE, VIDEO]
    for name, weight in model.named_parameters():  # random weights of the default size give all but uniform attention
        if any(part in name for part in ("vision", "visual", "mm_input")) and weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)
    return model.eval()


# -- models -------------------------------------------------------------------------------------------------------


def llava(
    seed: int = 0, attn: str = "sdpa", layers: int = 6, grid: int = 6, cls: bool = True
) -> hf.LlavaForConditionalGeneration:
    """LLaVA-1.5 with `grid` x `grid` visual tokens, grouped-query attention, and attention that is far from uniform.

    Without `cls` the tower is a SigLIP, all of whose tokens are patches.
    """
    torch.manual_seed(seed)
    config = hf.LlavaConfig(
        vision_config=(hf.CLIPVisionConfig if cls else hf.SiglipVisionConfig)(
            **TOWER | {"num_hidden_layers": 5}, image_size=8 * grid, patch_size=8
        ),
        vision_feature_select_strategy="default" if cls else "full",
        text_config=hf.LlamaConfig(**TEXT | {"num_hidden_layers": layers}),
        image_token_id=IMAGE,
        image_seq_length=grid * grid,
        attn_implementation=attn,
    )
    return finished(hf.LlavaForConditionalGeneration(config))


def vipllava(attn: str = "sdpa"):
    torch.manual_seed(0)
    config = hf.VipLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER, image_size=8 * GRID, patch_size=8),
        text_config=hf.LlamaConfig(**TEXT),
        vision_feature_layer=[-2, 1],
        image_token_index=IMAGE,
        image_seq_length=GRID**2,
        attn_implementation=attn,
    )
    return finished(hf.VipLlavaForConditionalGeneration(config))


PINPOINTS = [[48, 96], [96, 48], [96, 96]]


def llava_next(attn: str = "sdpa", windows: bool = True):
    """With a Mistral decoder whose sliding window is shorter than most prompts, or a Llama without `windows`."""
    torch.manual_seed(0)
    text = hf.MistralConfig(**TEXT, sliding_window=90, head_dim=8) if windows else hf.LlamaConfig(**TEXT)
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER, image_size=8 * GRID, patch_size=8),
        text_config=text,
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        attn_implementation=attn,
    )
    return finished(hf.LlavaNextForConditionalGeneration(config))


def llava_next_video(attn: str = "sdpa"):
    torch.manual_seed(0)
    config = hf.LlavaNextVideoConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER, image_size=8 * GRID, patch_size=8),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        attn_implementation=attn,
    )
    return finished(hf.LlavaNextVideoForConditionalGeneration(config))


def llava_onevision(attn: str = "sdpa"):
    torch.manual_seed(0)
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER, image_size=8 * GRID, patch_size=8),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
        attn_implementation=attn,
    )
    return finished(hf.LlavaOnevisionForConditionalGeneration(config))


MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
QWEN_TOWER = {"depth": 3, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 96, "vision_end_token_id": 97}


def qwen2_vl(attn: str = "sdpa"):
    torch.manual_seed(0)
    config = hf.Qwen2VLConfig(
        vision_config={**QWEN_TOWER, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
        text_config={**TEXT, "rope_parameters": MROPE},
        **QWEN_IDS,
    )
    config._attn_implementation = attn
    return finished(hf.Qwen2VLForConditionalGeneration(config))


def qwen2_5_vl(attn: str = "sdpa"):
    """The tower's blocks 0 and 2 see windows of 2 x 2 merged squares, block 1 sees all."""
    torch.manual_seed(0)
    config = hf.Qwen2_5_VLConfig(
        vision_config={
            **QWEN_TOWER,
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        text_config={**TEXT, "rope_parameters": MROPE},
        **QWEN_IDS,
    )
    config._attn_implementation = attn
    return finished(hf.Qwen2_5_VLForConditionalGeneration(config))


def qwen3_vl(attn: str = "sdpa"):
    """With features for the first two decoder layers (deepstack), and normalised queries and keys."""
    torch.manual_seed(0)
    config = hf.Qwen3VLConfig(
        vision_config={
            **QWEN_TOWER,
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={**TEXT, "head_dim": 8, "rope_parameters": MROPE},
        **QWEN_IDS,
    )
    config._attn_implementation = attn
    return finished(hf.Qwen3VLForConditionalGeneration(config))


def internvl(attn: str = "sdpa"):
    torch.manual_seed(0)
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(
            **TOWER, image_size=[48, 48], patch_size=[4, 4], use_qk_norm=True, norm_type="rms_norm"
        ),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=36,
        attn_implementation=attn,
    )
    return finished(hf.InternVLForConditionalGeneration(config))


def idefics3(attn: str = "sdpa"):
    torch.manual_seed(0)
    config = hf.Idefics3Config(
        vision_config=hf.Idefics3VisionConfig(**TOWER, image_size=48, patch_size=4),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        attn_implementation=attn,
    )
    return finished(hf.Idefics3ForConditionalGeneration(config))


def smolvlm(attn: str = "sdpa"):
    torch.manual_seed(0)
    config = hf.SmolVLMConfig(
        vision_config=hf.SmolVLMVisionConfig(**TOWER, image_size=48, patch_size=4),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        attn_implementation=attn,
    )
    return finished(hf.SmolVLMForConditionalGeneration(config))


def gemma3(attn: str = "sdpa"):
    """Five layers in six have a sliding window, shorter than an image."""
    torch.manual_seed(0)
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**TOWER, image_size=48, patch_size=4, vision_use_head=False),
        text_config=hf.Gemma3TextConfig(**TEXT, head_dim=8, query_pre_attn_scalar=8, sliding_window=30),
        mm_tokens_per_image=36,
        image_token_index=IMAGE,
        attn_implementation=attn,
    )
    return finished(hf.Gemma3ForConditionalGeneration(config))


def paligemma(attn: str = "sdpa", second: bool = False):
    """PaliGemma, or with `second` PaliGemma 2, whose decoder caps its logits and has sliding windows."""
    torch.manual_seed(0)
    text = hf.GemmaConfig(**TEXT, head_dim=8)
    if second:
        text = hf.Gemma2Config(**TEXT, head_dim=8, query_pre_attn_scalar=8, sliding_window=30)
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER, image_size=8 * GRID, patch_size=8, vision_use_head=False),
        text_config=text,
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        vocab_size=100,
        attn_implementation=attn,
    )
    return finished(hf.PaliGemmaForConditionalGeneration(config))


def paligemma2(attn: str = "eager"):
    """transformers has eager attention only for its decoder."""
    return paligemma(attn, second=True)


# -- what they are given ------------------------------------------------------------------------------------------


@dataclass
class Item:
    """One image or video of a prompt, as the processor of its family would prepare it."""

    ids: list[int]
    """Placeholders, and any text that belongs between them."""
    tensors: dict[str, Tensor]


@dataclass
class Row:
    """One row of a batch."""

    ids: list[int]
    items: list[Item]

    def __add__(self, other: Row) -> Row:
        return Row(self.ids + other.ids, self.items + other.items)


def pixels(generator, *shape: int, size: int) -> Tensor:
    """Levels of grey and colour, normalised: (*shape, 3, size, size)."""
    levels = torch.randint(0, 256, (*shape, 3, size, size), generator=generator) / 255
    return (levels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def one_crop(model, generator, number: int) -> Item:
    """An image of a fixed size."""
    size = model.config.vision_config.image_size
    tensors = {"pixel_values": pixels(generator, 1, size=size if isinstance(size, int) else size[0])}
    return counted(model, tensors)


FEATURES: weakref.WeakKeyDictionary[Any, dict] = weakref.WeakKeyDictionary()
"""Of each model, what `counted` asked it."""


def counted(model, tensors: dict[str, Tensor]) -> Item:
    """With as many placeholders as the model makes features: their number hangs on shapes and sizes, not on pixels."""
    known = FEATURES.setdefault(model, {})
    key = tuple(
        (name, t.shape, None if t.is_floating_point() else tuple(t.flatten().tolist())) for name, t in tensors.items()
    )
    if key not in known:
        with torch.no_grad():
            features = model.base_model.get_image_features(**collated([Row([], [Item([], tensors)])])).pooler_output
        known[key] = sum(map(len, features))
    return Item([IMAGE] * known[key], tensors)


def anyres(model, generator, number: int) -> Item:
    """An image of one of three sizes: the overview and the tiles of the best resolution."""
    size = [(40, 90), (70, 48), (90, 96)][number % 3]
    tiles = [3, 3, 5][number % 3]
    tensors = {"tiles": pixels(generator, tiles, size=8 * GRID), "image_sizes": torch.tensor([size])}
    return counted(model, tensors)


def tiles(model, generator, number: int) -> Item:
    """An image of one or three tiles that follow each other."""
    return counted(model, {"pixel_values": pixels(generator, [1, 3][number % 2], size=48)})


def split_tiles(model, generator, number: int) -> Item:
    """An image of two tiles with text between them."""
    tensors = {"rows": pixels(generator, 2, size=48)}
    return Item([IMAGE] * 36 + [5] + [IMAGE] * 36, tensors)


def packed(model, generator, number: int, frames: int = 0) -> Item:
    """An image of one of three grids, or a video of `frames` frames, as packed patches."""
    vision = model.config.vision_config
    height, width = [(8, 12), (12, 6), (10, 10)][number % 3] if not frames else (8, 6)
    pixels = torch.randn(max(frames, 1) * height * width, 3 * 2 * vision.patch_size**2, generator=generator)
    name = "video" if frames else "image"
    tensors = {
        "pixel_values_videos" if frames else "pixel_values": pixels,
        f"{name}_grid_thw": torch.tensor([[max(frames, 1), height, width]]),
    }
    token, tokens = (VIDEO, frames * height * width // 4) if frames else (IMAGE, height * width // 4)
    return Item([token] * tokens, tensors)


def packed_video(model, generator, number: int) -> Item:
    return packed(model, generator, number, frames=2 + number % 2)


def dated_video(model, generator, number: int) -> Item:
    """A video with text before each frame."""
    item = packed(model, generator, number, frames=2 + number % 2)
    frames = 2 + number % 2
    tokens = len(item.ids) // frames
    return Item(([6] + [VIDEO] * tokens) * frames, item.tensors)


def pooled_video(model, generator, number: int) -> Item:
    """A video of three frames, each 3 x 3 after pooling."""
    newline = int(model.config.model_type == "llava_onevision")
    tensors = {"pixel_values_videos": pixels(generator, 3, size=8 * GRID)[None]}
    return Item([VIDEO] * (27 + newline), tensors)


def collated(rows: list[Row]) -> dict[str, Tensor]:
    """The tensors of all images and videos, in prompt order."""
    items = [item.tensors for row in rows for item in row.items]
    names = dict.fromkeys(name for tensors in items for name in tensors)
    found = {name: [tensors[name] for tensors in items if name in tensors] for name in names}
    if "tiles" in found:  # padded to the image with most tiles
        found["pixel_values"] = [pad_sequence(found.pop("tiles"), batch_first=True)]
    if found.pop("rows", None):  # padded to the row with most tiles
        blank = torch.zeros(0, 3, 48, 48)
        per_row = [torch.cat([blank, *(item.tensors["rows"] for item in row.items)]) for row in rows]
        found["pixel_values"] = [pad_sequence(per_row, batch_first=True)]
    return {name: torch.cat(tensors) for name, tensors in found.items()}


@dataclass(frozen=True)
class Family:
    """How to build a family, and what its prompts are made of."""

    build: Callable[..., Any]
    image: Callable[..., Item]
    video: Callable[..., Item] | None = None
    types: str | None = None
    """The keyword argument that tells the kind of each token, where the family has one."""
    kinds: tuple[int, int, int] = (0, 1, 2)
    """Its values for text, images and videos."""
    first_position: int | None = 0
    """Of a prompt; None where positions are not a line."""

    @functools.cached_property
    def model(self):
        """Built once; tests wrap it and unwrap it."""
        return self.build()


FAMILIES = {
    "llava": Family(llava, one_crop),
    "vipllava": Family(vipllava, one_crop),
    "llava_next": Family(llava_next, anyres),
    "llava_next_video": Family(llava_next_video, anyres, pooled_video),
    "llava_onevision": Family(llava_onevision, anyres, pooled_video),
    "qwen2_vl": Family(qwen2_vl, packed, packed_video, "mm_token_type_ids", first_position=None),
    "qwen2_5_vl": Family(qwen2_5_vl, packed, packed_video, "mm_token_type_ids", first_position=None),
    "qwen3_vl": Family(qwen3_vl, packed, dated_video, "mm_token_type_ids", first_position=None),
    "internvl": Family(internvl, tiles),
    "idefics3": Family(idefics3, split_tiles),
    "smolvlm": Family(smolvlm, split_tiles),
    "gemma3": Family(gemma3, one_crop, types="token_type_ids"),
    "paligemma": Family(paligemma, one_crop, types="token_type_ids", kinds=(0, 0, 0), first_position=1),
    "paligemma2": Family(paligemma2, one_crop, types="token_type_ids", kinds=(0, 0, 0), first_position=1),
}


def family(model) -> Family:
    """The family of a model."""
    name = model.config.model_type
    if name == "paligemma" and model.config.text_config.model_type == "gemma2":
        name = "paligemma2"
    return FAMILIES[name]


def visual(ids: Tensor) -> Tensor:
    """Which tokens of a prompt are placeholders."""
    return (ids == IMAGE) | (ids == VIDEO)


def rows(model, images=(1,), length: int = 8, vary: bool = True, seed: int = 0) -> list[Row]:
    """Row b has images[b] images among random text; instead of a number, "iv" stands for an image and a video."""
    generator, kind, result, number = torch.Generator().manual_seed(seed), family(model), [], seed

    def text(n: int) -> list[int]:
        return torch.randint(7, 90, (n,), generator=generator).tolist()

    for row, content in enumerate(images):
        ids, items = [1, *text(2)], []
        for letter in content if isinstance(content, str) else "i" * content:
            item = (kind.image if letter == "i" else kind.video)(model, generator, number)
            number += 1
            ids += item.ids + text(2)
            items.append(item)
        result.append(Row(ids + text(length + (row if vary else 0)), items))
    return result


def batch(model, rows: list[Row], pad: str | None = "left") -> dict[str, Tensor]:
    """What the processor makes of the rows. `pad` is the padding side (None: rows must be equally long)."""
    longest, left = max(len(row.ids) for row in rows), pad == "left"
    assert pad or all(len(row.ids) == longest for row in rows)

    def padded(values: list[int], filler: int) -> list[int]:
        gap = [filler] * (longest - len(values))
        return gap + values if left else values + gap

    ids = torch.tensor([padded(row.ids, PAD) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([padded([1] * len(row.ids), 0) for row in rows])}
    kind = family(model)
    if kind.types:
        text, image, video = kind.kinds
        inputs[kind.types] = (
            torch.full_like(ids, text).masked_fill(ids == IMAGE, image).masked_fill(ids == VIDEO, video)
        )
    return inputs | collated(rows)


def prompt(model, images=(1,), length: int = 8, pad: str | None = "left", seed: int = 0) -> dict[str, Tensor]:
    """A batch of `rows`."""
    return batch(model, rows(model, images, length, pad is not None, seed), pad)


def continued(model, inputs: dict[str, Tensor], new: Tensor) -> dict[str, Tensor]:
    """A prompt with decoded tokens (batch, length) after it, for one forward of the whole."""
    result = {**inputs, "input_ids": torch.cat((inputs["input_ids"], new), dim=1)}
    result["attention_mask"] = torch.cat((inputs["attention_mask"], torch.ones_like(new)), dim=1)
    kind = family(model)
    if kind.types:
        after = 1 if kind.kinds == (0, 0, 0) else 0  # what is decoded is no part of a prefix
        result[kind.types] = torch.cat((inputs[kind.types], torch.full_like(new, after)), dim=1)
    if kind.first_position is not None:
        mask = result["attention_mask"]
        result["position_ids"] = (mask.cumsum(1) - 1 + kind.first_position).masked_fill(mask == 0, kind.first_position)
    return result
