"""What the reference model is made of: sizes, tokenizer, processor, network. All plain Hugging Face classes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vtc.eval import pages, scenes
from vtc.eval.pages import content

SYSTEM = "answer the question about the picture with one word."
BOS, EOS, PAD, IMAGE, USER, ASSISTANT = SPECIAL = ("<s>", "</s>", "<pad>", "<image>", "<user>", "<assistant>")
TEMPLATE = (
    # the system prompt stands ahead of the image: a resting place for attention that no pruning takes away
    "{{ bos_token }}" + SYSTEM + "{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + USER + "{% else %}" + ASSISTANT + " {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE + "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


@dataclass(frozen=True)
class Preset:
    """Sizes of a model and of its training: optimiser steps of each phase and images a step."""

    size: int = 96
    patch: int = 8
    vision: tuple[int, int, int, int] = (128, 7, 4, 384)
    """Width, layers, heads, MLP width. LLaVA reads the last layer but one, so the last layer is never used."""
    text: tuple[int, int, int, int] = (128, 8, 4, 320)
    tower_steps: int = 1700
    tower_batch: int = 48
    read_steps: int = 2700
    rest_steps: int = 0
    read_batch: int = 24
    """Images a step when reading, whether the tower learns or rests."""
    learning_rate: float = 1e-3
    muon: bool = False
    """Whether Muon trains the matrices of the layers; AdamW trained the model that ships as `reference`."""
    images: tuple[str, ...] = ("scenes",)
    """The benchmarks that it learns to read; their images come in this turn, over and over."""

    @property
    def benchmarks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.images))

    def image(self, number: int) -> tuple[str, int]:
        """The benchmark that image `number` of the training is of, and which of its images it is."""
        rounds, turn = divmod(number, len(self.images))
        name = self.images[turn]
        return name, rounds * self.images.count(name) + self.images[:turn].count(name)

    @property
    def steps(self) -> int:
        return self.tower_steps + self.read_steps + self.rest_steps

    def phase(self, step: int) -> tuple[str, int, int]:
        """The phase that a step is in (tower, read or rest), how many steps of it came before, and its length."""
        for name, steps in (("tower", self.tower_steps), ("read", self.read_steps)):
            if step < steps:
                return name, step, steps
            step -= steps
        return "rest", step, self.rest_steps

    def span(self, step: int) -> tuple[int, int]:
        """The first image of this step, and how many."""
        if step < self.tower_steps:
            return step * self.tower_batch, self.tower_batch
        return self.tower_steps * self.tower_batch + (step - self.tower_steps) * self.read_batch, self.read_batch

    @property
    def grid(self) -> int:
        return self.size // self.patch


PRESETS = {
    "small": Preset(),
    "both": Preset(
        size=120,
        vision=(160, 8, 5, 480),
        text=(160, 8, 5, 400),
        tower_steps=4000,
        tower_batch=24,
        read_steps=4000,
        rest_steps=4000,
        read_batch=16,
        muon=True,
        images=("pages", "pages", "scenes", "pages"),
    ),
    "large": Preset(
        size=336,
        patch=14,
        vision=(320, 9, 5, 832),
        text=(320, 10, 5, 640),
        tower_steps=20_000,
        tower_batch=128,
        read_steps=60_000,
        read_batch=64,
        learning_rate=5e-4,
    ),
    "tiny": Preset(
        vision=(16, 3, 2, 32),
        text=(16, 2, 2, 32),
        tower_steps=2,
        tower_batch=4,
        read_steps=1,
        rest_steps=1,
        read_batch=4,
    ),
}
"""small: what ships as `reference`, for 2 CPU cores. both: scenes and pages at 225 visual tokens, as `reference-pages`
(docs/suites.md says how its training differed). large: 576 visual tokens, for a GPU. tiny: for tests."""


def benchmark_text(benchmarks: tuple[str, ...] = ("scenes",)) -> list[str]:
    """Every sentence of the benchmarks' languages, near enough: what the tokenizer is trained on."""
    return _scenes_text() + (_pages_text() if "pages" in benchmarks else [])


def _pages_text() -> list[str]:
    forms = ("which word comes after {0}?", "how many times is the word {0} there?", "what is the {0} of {0}?")
    forms += ("which row has the most {0}?", "what does the {0} cost?", "what color is the bar of {0}?")
    forms += ("which is further north, {0} or {0}?", " {0} {0} digit", " {0} word")
    asked = [form.format(word) for form, word in product(forms, pages.WORDS)]
    asked += [f"which item costs {digit}?" for digit in scenes.DIGITS]
    asked += [f"what is at the {color} {shape}?" for color, shape in product(scenes.COLORS, content.MARKERS)]
    asked += [f"is the {shape} on the left or right?" for shape in scenes.SHAPES]
    asked += ["which bar is the longest?", "which shape is there only once?", " bar", " place", " shape", " once"]
    return asked + [f" {times}" for times in content.TIMES.values()]


def _scenes_text() -> list[str]:
    nouns = (*scenes.SHAPES, "digit", "word", "dot")
    things = [f" {color} {noun}" for color, noun in product(scenes.COLORS, nouns)]
    asked = [f"what color is the {noun}?" for noun in nouns]
    asked += [f"which shape is {color}?" for color in scenes.COLORS]
    asked += [f"is there a {color} {name}?" for color, name in product(scenes.COLORS, scenes.SHAPES)]
    asked += [f"is the {noun} on the {ends}?" for noun, ends in product(nouns, ("left or right", "top or bottom"))]
    asked += [f"is the {one} left or right of the {other}?" for one, other in product(nouns, nouns)]
    asked += ["how many shapes are there?", "what digit is it?", "what word is it?", scenes.CAPTION, SYSTEM]
    answers = ("yes", "no", "left", "right", "top", "bottom", "nothing", *scenes.COUNTS.values())
    return asked + things + [f" {word}" for word in (*answers, *scenes.WORDS, *scenes.DIGITS)] + [", "]


def build_tokenizer(benchmarks: tuple[str, ...] = ("scenes",)) -> PreTrainedTokenizerFast:
    """Byte-level BPE: each word of the benchmarks is one token and any other text falls back to bytes, never to UNK."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(benchmark_text(benchmarks) * 2, trainer)  # twice, because a merge has to occur twice
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": IMAGE},
        additional_special_tokens=[USER, ASSISTANT],
    )


def build_processor(preset: Preset) -> LlavaProcessor:
    """Squeezes any image to size x size (no crop) and writes one placeholder for each patch."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(
        size={"height": preset.size, "width": preset.size},
        do_center_crop=False,
        image_mean=[0.25] * 3,
        image_std=[0.25] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(preset.benchmarks),
        patch_size=preset.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token=IMAGE,
    )


def build_model(preset: Preset, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The untrained network."""
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    special["pad_token_id"] = tokenizer.pad_token_id
    vision = CLIPVisionConfig(
        **dict(zip(keys, preset.vision, strict=True)),
        image_size=preset.size,
        patch_size=preset.patch,
        projection_dim=preset.vision[0],
    )
    text = LlamaConfig(
        **dict(zip(keys, preset.text, strict=True)),
        **special,
        vocab_size=-(-len(tokenizer) // 8) * 8,
        max_position_embeddings=2048,
        initializer_range=0.05,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=preset.grid**2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    generation = model.generation_config
    generation.do_sample = False
    for name, token in special.items():
        setattr(generation, name, token)
    return model


@cache
def shared_tokenizer(benchmarks: tuple[str, ...] = ("scenes",)) -> PreTrainedTokenizerFast:
    """The tokenizer, made once a process."""
    return build_tokenizer(benchmarks)
