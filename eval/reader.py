"""A model with its processor: images and questions in, short answers out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc.eval.reference import SHIPPED

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from vtc.eval.video import Video

Chat = list[dict[str, Any]]
"""Messages as chat templates take them: a role, and content parts of type "image" or "text"."""


@dataclass
class Reader:
    """Asks one model. `model` is the plain transformers object, so that `vtc.wrap` and `vtc.compressed` apply to it."""

    model: Any
    processor: Any
    max_new_tokens: int = 8

    @property
    def device(self) -> torch.device:
        return self.model.device

    def inputs(self, images: Sequence[Image.Image], questions: Sequence[str]) -> dict[str, Tensor]:
        """What the model reads: one image and one question a row, left-padded, on the model's device.

        Raises ValueError for a question that holds what stands for an image in the model's prompts.
        """
        stands_for_image = {self.model.config.image_token_id, getattr(self.model.config, "boi_token_index", None)}
        for question in questions:
            if found := stands_for_image.intersection(self.processor.tokenizer(question)["input_ids"]):
                token = self.processor.tokenizer.convert_ids_to_tokens(found.pop())
                raise ValueError(f"the question holds {token}, which stands for an image in this model's prompts")
        content = [[{"type": "image"}, {"type": "text", "text": question}] for question in questions]
        return self.chats([[{"role": "user", "content": parts}] for parts in content], [[image] for image in images])

    def chats(
        self, chats: Sequence[Chat], images: Sequence[Sequence[Image.Image]], videos: Sequence[Sequence[Video]] = ()
    ) -> dict[str, Tensor]:
        """The same for whole conversations with any number of images a row, listed in the order of their mention.

        Raises ValueError for videos where the processor reads none.
        """
        prompts = [self.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        flat = [image for row in images for image in row]
        # families that cut images into crops have to be told which rows hold several; the others read a flat list
        several = any(len(row) > 1 for row in images)
        given = [list(row) for row in images] if several else flat or None
        films = [video for row in videos for video in row]
        if films and getattr(self.processor, "video_processor", None) is None:
            raise ValueError(f"{type(self.processor).__name__} of this checkpoint reads no videos")
        about = {"video_metadata": [video.metadata for video in films], "do_sample_frames": False}
        shown = {"videos": [video.frames for video in films], **about} if films else {}
        batch = self.processor(images=given, text=prompts, return_tensors="pt", padding=True, **shown)
        return dict(batch.to(self.device, dtype=self.model.dtype))  # casts floating tensors only

    def continuation(self, chat: Chat, answer: str) -> list[int]:
        """The tokens of `answer` as they stand behind the prompt of `chat`."""
        tokenizer, prompt = (
            self.processor.tokenizer,
            self.processor.apply_chat_template(chat, add_generation_prompt=True),
        )
        before, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + answer))
        if whole[: len(before)] == before:
            return whole[len(before) :]
        return tokenizer(answer, add_special_tokens=False)["input_ids"]

    def visual_tokens(self, inputs: dict[str, Tensor]) -> Tensor:
        """Image placeholders of each prompt: (batch,) int64."""
        return (inputs["input_ids"] == self.model.config.image_token_id).sum(dim=1)

    def answers(self, inputs: dict[str, Any], max_new_tokens: int | None = None) -> list[str]:
        """The greedy answer to each prompt, without special tokens."""
        new = self.generate(inputs, max_new_tokens=max_new_tokens or self.max_new_tokens)
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def generate(self, inputs: dict[str, Any], until: Sequence[str] = (), **options: Any) -> Tensor:
        """(batch, new) token ids after the prompts, padded; greedy unless `options` of `generate` say otherwise.

        A row ends once its text holds one of `until`; with beams it does not, as that would change which of them wins.
        """
        import torch

        defaults = {"do_sample": False, "num_beams": 1, "pad_token_id": self.processor.tokenizer.pad_token_id}
        options, prompt = {**defaults, **options}, inputs["input_ids"].shape[1]

        def stopped(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            texts = self.processor.batch_decode(ids[:, prompt:], skip_special_tokens=True)
            return torch.tensor([any(stop in text for stop in until) for text in texts], device=ids.device)

        if until and options["num_beams"] == 1:
            options["stopping_criteria"] = [stopped]
        with torch.inference_mode():
            output = self.model.generate(**inputs, **options)
        return output[:, prompt:]


def model_path(name: str) -> str:
    """The folder of a shipped model ("reference", "reference-pages"); any other name is a path or a hub id as it is.

    Raises ValueError for what is no model folder, and OSError for a name that neither the hub's cache nor the hub has.
    """
    if (shipped := SHIPPED.get(name)) is not None:
        if not (shipped / "config.json").is_file():
            how = "`vtc train reference`, with `--preset both` for reference-pages"
            raise ValueError(f"the model {name} is not in {shipped}: make one like it with {how}")
        return str(shipped)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.exists(name)
    path = Path(name).expanduser()
    if looks_like_path and not (path / "config.json").is_file():
        raise ValueError(f"{path} is not a model folder: it has no config.json")
    if not looks_like_path:
        _find_on_hub(name)
    return str(path) if looks_like_path else name


def _find_on_hub(name: str) -> None:
    """One question and no retries, where transformers would ask for each file many times before it gives up."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    unknown = f"{name!r}: there is no such folder, those that ship are {', '.join(SHIPPED)}, and the Hugging Face hub"
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=5)
    except (HFValidationError, RepositoryNotFoundError):
        raise OSError(f"{unknown} shows no model of that name") from None
    except Exception as error:  # of whatever library asks for the hub: no network, a proxy, offline mode, a busy server
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(f"{unknown} cannot be asked ({reason})") from None


def pick_device(name: str) -> str:
    """The device to run on; "auto" is CUDA where there is one, otherwise the CPU."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return name


def load(
    path: str,
    device: str,
    max_new_tokens: int = 8,
    dtype: str = "auto",
    revision: str | None = None,
    pixels: dict[str, int] | None = None,
    **options: Any,
) -> Reader:
    """Load a checkpoint, in its own dtype unless another is asked for, ready to answer batches.

    That is: eval mode, left padding, a pad token.

    Args:
        device: a device, or a device map of transformers, such as "auto", which spreads the model over all GPUs.
        revision: of a hub id: a branch, a tag or a commit.
        pixels: "min_pixels" and "max_pixels" of an image, where the processor reads them (Qwen-VL).
        options: more that `from_pretrained` of the model takes, such as `attn_implementation`.

    Raises:
        OSError: (from transformers) `path` is neither a model folder nor a hub id that can be reached.
        ValueError: a damaged weights file; a dtype that is none; `pixels` for a processor that does not read them.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype {dtype!r}: use auto, float32, bfloat16 or float16")
    processor = AutoProcessor.from_pretrained(path, revision=revision, **(pixels or {}))
    if pixels and not {"shortest_edge", "longest_edge"} <= set(dict(processor.image_processor.size or {})):
        raise ValueError(f"{type(processor.image_processor).__name__} does not read {', '.join(pixels)}")
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, revision=revision, device_map=device, **options
        )
    except SafetensorError as error:
        raise ValueError(f"{_damaged(Path(path)) or path} is damaged: {error}") from None
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"  # answers are generated: every row has to end with its last prompt token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Reader(model.eval(), processor, max_new_tokens)


def _damaged(folder: Path) -> Path | None:
    """The first weights file of a model folder that cannot be opened."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError:
            return file
    return None


def pretrained(name: str = "reference", device: str = "auto") -> tuple[Any, Any]:
    """`vtc.eval.load`: the transformers model and its processor, ready to answer batches.

    `name` is "reference" (a small model that ships and knows only the scenes of `vtc scene`), "reference-pages" (which
    knows pages of text, too), a model folder, or a Hugging Face id. `device` is "auto" (CUDA where there is one),
    "cpu", "cuda:1", ... Raises ValueError and OSError as `model_path`, ValueError for a device that is not there.
    """
    reader = load(model_path(name), pick_device(device))
    return reader.model, reader.processor
