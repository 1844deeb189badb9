"""A model with its processor: images and questions in, short answers out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor


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
        """What the model reads: one image and one question a row, left-padded, on the model's device."""
        prompts = [self._prompt(question) for question in questions]
        batch = self.processor(images=list(images), text=prompts, return_tensors="pt", padding=True)
        return dict(batch.to(self.device, dtype=self.model.dtype))  # casts floating tensors only

    def visual_tokens(self, inputs: dict[str, Tensor]) -> Tensor:
        """Image placeholders of each prompt: (batch,) int64."""
        return (inputs["input_ids"] == self.model.config.image_token_id).sum(dim=1)

    def answers(self, inputs: dict[str, Any], max_new_tokens: int | None = None) -> list[str]:
        """The greedy answer to each prompt, without special tokens."""
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_new_tokens or self.max_new_tokens,
                pad_token_id=self.processor.tokenizer.pad_token_id,
            )
        new = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def _prompt(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def model_path(name: str) -> str:
    """The folder of the shipped reference model for "reference"; any other name is a path or a hub id as it stands."""
    if name == "reference":
        from vtc.eval import reference

        if not (Path(reference.PATH) / "config.json").is_file():
            raise ValueError(f"the reference model is not in {reference.PATH}: make it with `vtc train reference`")
        return str(reference.PATH)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.exists(name)
    path = Path(name).expanduser()
    if looks_like_path and not (path / "config.json").is_file():
        raise ValueError(f"{path} is not a model folder: it has no config.json")
    return str(path) if looks_like_path else name


def pick_device(name: str) -> str:
    """The device to run on; "auto" is CUDA where there is one, otherwise the CPU."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return name


def load(path: str, device: str, max_new_tokens: int = 8) -> Reader:
    """Load a checkpoint in its own dtype, ready to answer batches: eval mode, left padding, a pad token.

    Raises OSError (from transformers) when `path` is neither a model folder nor a hub id that can be reached.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto").to(device).eval()
    processor = AutoProcessor.from_pretrained(path)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"  # answers are generated: every row has to end with its last prompt token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Reader(model, processor, max_new_tokens)
