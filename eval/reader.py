"""A model with its processor: images and questions in, short answers out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

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

    def chats(self, chats: Sequence[Chat], images: Sequence[Sequence[Image.Image]]) -> dict[str, Tensor]:
        """The same for whole conversations with any number of images a row, listed in the order of their mention."""
        prompts = [self.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        flat = [image for row in images for image in row]
        # families that cut images into crops have to be told which rows hold several; the others read a flat list
        several = any(len(row) > 1 for row in images)
        given = [list(row) for row in images] if several else flat or None
        batch = self.processor(images=given, text=prompts, return_tensors="pt", padding=True)
        return dict(batch.to(self.device, dtype=self.model.dtype))  # casts floating tensors only

    def visual_tokens(self, inputs: dict[str, Tensor]) -> Tensor:
        """Image placeholders of each prompt: (batch,) int64."""
        return (inputs["input_ids"] == self.model.config.image_token_id).sum(dim=1)

    def answers(self, inputs: dict[str, Any], max_new_tokens: int | None = None) -> list[str]:
        """The greedy answer to each prompt, without special tokens."""
        new = self.generate(inputs, max_new_tokens=max_new_tokens or self.max_new_tokens)
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def generate(self, inputs: dict[str, Any], **options: Any) -> Tensor:
        """(batch, new) token ids after the prompts, padded; greedy unless `options` of `generate` say otherwise."""
        import torch

        greedy = {"do_sample": False, "num_beams": 1, "pad_token_id": self.processor.tokenizer.pad_token_id}
        with torch.inference_mode():
            output = self.model.generate(**inputs, **{**greedy, **options})
        return output[:, inputs["input_ids"].shape[1] :]


def model_path(name: str) -> str:
    """The folder of the shipped reference model for "reference"; any other name is a path or a hub id as it stands.

    Raises ValueError for what is no model folder, and OSError for a name that neither the hub's cache nor the hub has.
    """
    if name == "reference":
        from vtc.eval import reference

        if not (Path(reference.PATH) / "config.json").is_file():
            raise ValueError(f"the reference model is not in {reference.PATH}: make it with `vtc train reference`")
        return str(reference.PATH)
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

    unknown = f"{name!r}: there is no such folder, the one model that ships is 'reference', and the Hugging Face hub"
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


def load(path: str, device: str, max_new_tokens: int = 8) -> Reader:
    """Load a checkpoint in its own dtype, ready to answer batches: eval mode, left padding, a pad token.

    `device` may be a device map of transformers, such as "auto", which spreads the model over all GPUs.
    Raises OSError (from transformers) when `path` is neither a model folder nor a hub id that can be reached.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto", device_map=device).eval()
    processor = AutoProcessor.from_pretrained(path)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"  # answers are generated: every row has to end with its last prompt token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Reader(model, processor, max_new_tokens)


def pretrained(name: str = "reference", device: str = "auto") -> tuple[Any, Any]:
    """`vtc.eval.load`: the transformers model and its processor, ready to answer batches.

    `name` is "reference" (the small model that ships, which knows only the scenes of `vtc scene`), a model folder, or a
    Hugging Face id. `device` is "auto" (CUDA where there is one), "cpu", "cuda:1", ... Raises ValueError and OSError as
    `model_path`, ValueError for a device that is not there.
    """
    reader = load(model_path(name), pick_device(device))
    return reader.model, reader.processor
