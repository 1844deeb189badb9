"""A prompt as the engine takes it: ids, virtual ones where a visual token stayed, and original positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.serve.memory import Kept


@dataclass(frozen=True, eq=False)
class Prompt:
    """What one request reads."""

    ids: list[int]
    """Of the vocabulary, and virtual ones: an image's first visual token has one that is the image's alone. Where these
    begin alike, so do keys and values."""
    read: Tensor
    """(length,) int32: those of the vocabulary, and beyond it the place in `Memory.rows`."""
    positions: Tensor
    """(length,) int32: in the unpruned prompt, unless the method renumbers."""
    shift: int
    """How much further than its number in the pruned sequence a decoded token is."""
    unpruned: int
    """Tokens before pruning."""
    images: Sequence[Kept] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, text: Sequence[int], placeholder: int, images: Sequence[Kept], vocabulary: int) -> Prompt:
        """From ids with one `placeholder` for each image; ids from `vocabulary` on are places in memory."""
        coming, whole = iter(images), list[tuple[int, int] | None]()
        for token in text:
            whole += _entries(next(coming), placeholder, vocabulary) if token == placeholder else [(token, token)]
        left = [(position, *entry) for position, entry in enumerate(whole) if entry is not None]
        positions, ids, read = (list(column) for column in zip(*left, strict=True))
        renumbered = any(kept.pruned.renumbered for kept in images)
        if renumbered:
            positions = list(range(len(ids)))
        shift = 0 if renumbered else len(whole) - len(ids)
        read_, positions_ = (torch.tensor(column, dtype=torch.int32) for column in (read, positions))
        return cls(ids, read_, positions_, shift, len(whole), images)


def _entries(kept: Kept, placeholder: int, vocabulary: int) -> Iterator[tuple[int, int] | None]:
    """Id and what is read for each entry of what stands for an image; None where a visual token has left."""
    number = {place: number for number, place in enumerate(kept.pruned.index)}
    slots, place = kept.slots.tolist(), -1
    for token in kept.pruned.expansion:
        place += token == placeholder
        if token != placeholder:
            yield token, token
        elif place in number:
            yield vocabulary if number[place] else kept.id, vocabulary + slots[number[place]]
        else:
            yield None
