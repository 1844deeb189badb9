"""Tiny random models of other families saved to disk with their processors, as `vtc demo --model` loads them."""

from __future__ import annotations

import json
from pathlib import Path

import models
import transformers as hf
from eval_fixtures import ANSWERS, TEMPLATE, WORDS
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vtc.eval.reader import Reader

SPECIAL = {
    models.IMAGE: "<image>",
    models.VIDEO: "<video>",
    96: "<|vision_start|>",
    97: "<|vision_end|>",
}
"""What stands at the ids that `models` builds its families with."""


def tokenizer(image: str = "<image>", video: str = "<video>"):
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    rest = [word for word in (*WORDS, *ANSWERS) if word != "<image>"]
    words = {word: number for number, word in enumerate(rest)}
    words |= {f"filler{number}": number for number in range(len(rest), 100) if number not in SPECIAL}
    names = SPECIAL | {models.IMAGE: image, models.VIDEO: video}
    words |= {name: number for number, name in names.items()}
    raw = Tokenizer(kinds.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, **special, additional_special_tokens=list(names.values()))


def llava_next_processor() -> hf.LlavaNextProcessor:
    """Tiles of 48 pixels with 6 x 6 patches, newlines, an overview."""
    return hf.LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}, image_grid_pinpoints=models.PINPOINTS
        ),
        tokenizer=tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def llava_onevision_processor() -> hf.LlavaOnevisionProcessor:
    """Tiles as above, of an image that is alone in its prompt; without its video processor, which needs torchvision."""
    processor = object.__new__(hf.LlavaOnevisionProcessor)
    processor.image_processor = LlavaOnevisionImageProcessorPil(
        size={"height": 48, "width": 48}, image_grid_pinpoints=models.PINPOINTS
    )
    processor.tokenizer, processor.video_processor, processor.chat_template = tokenizer(), None, TEMPLATE
    processor.image_token, processor.video_token = "<image>", "<video>"
    processor.image_token_id, processor.video_token_id = models.IMAGE, models.VIDEO
    processor.num_image_tokens, processor.vision_feature_select_strategy = 36, "full"
    processor.vision_aspect_ratio = "anyres_max_2"
    return processor


def save_llava_next(folder: Path) -> None:
    models.llava_next().save_pretrained(folder)
    llava_next_processor().save_pretrained(folder)


def save_qwen2_vl(folder: Path) -> None:
    """Patches of 4 pixels, merged two by two; without its video processor, which needs torchvision."""
    models.qwen2_vl().save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    ).save_pretrained(folder)
    tokenizer("<|image_pad|>", "<|video_pad|>").save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2VLProcessor"}))


def load_qwen2_vl(folder: Path) -> Reader:
    """As `reader.load` does where torchvision is installed: transformers builds this processor with it only."""
    processor = object.__new__(hf.Qwen2VLProcessor)
    processor.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    processor.tokenizer = hf.AutoTokenizer.from_pretrained(folder, padding_side="left")
    processor.video_processor = None
    processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
    processor.image_token_id, processor.video_token_id = models.IMAGE, models.VIDEO
    processor.chat_template = TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    return Reader(hf.AutoModelForImageTextToText.from_pretrained(folder).eval(), processor, 8)
