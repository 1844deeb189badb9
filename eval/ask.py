"""`vtc ask`: one question about one image, with what it took."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import vtc
from vtc.eval.images import overlay, seen_box

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from vtc.eval.reader import Reader


@dataclass(frozen=True)
class Answer:
    text: str
    total: int
    """Visual tokens of the image."""
    tokens: float
    """Of these, the ones that a decoder layer read, averaged over the layers."""
    kept: Tensor
    """Raster indices of the tokens that the last layer still had, 1-D int64."""
    seconds: float
    """From the prepared inputs to the text."""


def ask(reader: Reader, image: Image.Image, question: str, method: str | None, budget: int | float) -> Answer:
    """Answer `question` with `method` at `budget`, or with the untouched model where `method` is None."""
    import torch

    inputs = reader.inputs([image], [question])
    total = int(reader.visual_tokens(inputs)[0])
    with vtc.compressed(reader.model, method, budget) if method else nullcontext() as trace:
        reader.answers(inputs, max_new_tokens=1)  # the first pass pays for allocations; it is not the one to time
        start = time.perf_counter()
        text = reader.answers(inputs)[0]
        seconds = time.perf_counter() - start
        if trace is None:
            return Answer(text, total, float(total), torch.arange(total), seconds)
        return Answer(text, total, float(trace.average_tokens[0]), trace.kept()[0], seconds)


def save_overlay(reader: Reader, image: Image.Image, answer: Answer, path: Path) -> None:
    """Write `image` with the patches dark that the last decoder layer did not have."""
    box = seen_box(image.size, reader.processor.image_processor)
    overlay(image, answer.kept, answer.total, box).save(path)
