"""What the backbone was called with, and what of it a forward needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.masking_utils import find_packed_sequence_indices

import vtc.cache.held as held
from vtc.adapter import Adapter
from vtc.core.clock import Moment, Passage
from vtc.core.compression import Compression
from vtc.core.features import Encoding
from vtc.need import Need, Record

answering: ContextVar[int] = ContextVar("vtc_answering", default=0)
"""How many columns at the end of what the model is given hold an answer to be rated, which no method may look at."""


def by_column(mask: Any) -> bool:
    """Whether a mask is (batch, columns)."""
    return isinstance(mask, Tensor) and mask.ndim == 2


class Prompt(NamedTuple):
    """What generate() was given."""

    length: int | None
    """How many positions, cached ones included; None where it does not tell."""
    plain: bool
    """Whether its mask is (batch, columns), or left to it: what else the model gets as one, generate() has made."""
    mask: Tensor | None = None
    """The mask, if it is so."""

    @classmethod
    def of(cls, args: tuple, kwargs: dict[str, Any]) -> Prompt:
        mask = kwargs.get("attention_mask")
        given = [x for x in (mask, *map(kwargs.get, ("inputs_embeds", "input_ids", "inputs")), *args[:1])
                 if isinstance(x, Tensor)]  # fmt: skip
        unknown = mask is None and kwargs.get("past_key_values") is not None
        length = None if unknown or not given or given[0].ndim > 3 else given[0].shape[1]
        return cls(length, mask is None or by_column(mask), mask if by_column(mask) else None)


@dataclass(eq=False)
class Call:
    """One call of the backbone."""

    compression: Compression
    inputs: dict[str, Any]
    """Its keyword arguments."""
    modalities: dict[str, Tensor]
    """(batch, length) bool for each modality: its placeholders."""
    encodings: dict[str, tuple[Encoding | None, int]] = field(default_factory=dict)
    """By modality what the tower showed, and how many features the encoder's output holds."""
    prompt: Prompt | None = None
    """What generate() was given; None outside generate()."""
    record: Record = field(default_factory=dict)
    """What the hooks on the decoder have written."""
    late: list[Tensor] = field(default_factory=list)
    """(batch, length, width) that is still to be added after each of the first layers: see `Adapter.late_features`."""
    started: Moment = 0.0

    def decodes(self, seen: int, length: int) -> bool:
        """Whether this is one of generate()'s own steps: `length` positions behind `seen` ones."""
        return length == 1 and self._prompted is not None and seen >= self._prompted

    def ahead(self, total: int) -> int:
        """Of `total` positions, how many at the end do not belong to the prompt: guesses in assisted generation, or an
        answer to be rated."""
        return max(0 if self._prompted is None else total - self._prompted, answering.get())

    @property
    def _prompted(self) -> int | None:
        return None if self.prompt is None else self.prompt.length

    def watch(self, sees: bool, busy: bool) -> None:
        """Begin to record what is asked for of a prompt with images, or of a step behind one; nothing if not `busy`."""
        needs = self.compression.prompt_needs if sees else self.compression.step_needs
        self.record = {need: {} for need in needs} if busy else {}

    def recorded(self, need: Need, device: torch.device) -> dict[str, Tensor]:
        """What the hooks on the decoder wrote for a need, on the prompt's device."""
        record, self.record[need] = self.record[need], {}
        return {name: (x[0] if isinstance(x, tuple) else x).to(device) for name, x in record.items()}

    @property
    def passages(self) -> list[Passage]:
        """What the tower took."""
        return [passage for encoding, _ in self.encodings.values() if encoding for passage in encoding.passages]

    def encoded(self, device: torch.device) -> Iterator[tuple[Encoding | None, int, Tensor]]:
        """Encoding, features and places of each modality that there is."""
        for modality, (encoding, entries) in self.encodings.items():
            yield encoding, entries, self.modalities[modality].to(device)

    def masks(self, kwargs: dict[str, Any], cache: Any, seen: int) -> tuple[Tensor | None, Tensor | None]:
        """What the mask shows of the `seen` columns of earlier calls, and of this one's: (batch, columns) bool; None:
        all. As in transformers columns that it does not reach are hidden, and those beyond the sequence mean nothing.
        """
        (batch, length), device = kwargs["inputs_embeds"].shape[:2], kwargs["inputs_embeds"].device
        if (mask := self._mask(kwargs, None if self.decodes(seen, length) else cache, seen)) is None:
            return None, None
        mask = pad(mask.to(device, torch.bool).expand(batch, -1), (0, seen + length - mask.shape[1]))
        return mask[:, :seen], mask[:, seen:]

    def _mask(self, kwargs: dict[str, Any], cache: Any, seen: int) -> Tensor | None:
        """The (batch, columns) mask. A family that makes its own masks out of it got it one call earlier."""
        given = self.inputs.get("attention_mask")
        for mask in (kwargs.get("attention_mask"), given):
            if by_column(mask):
                return mask
        if given is None or self.prompt is None or not self._prepared(cache):
            return None
        if (mask := self.prompt.mask) is not None:  # of each prompt, of which beams and samples are copies
            return mask.repeat_interleave(len(kwargs["inputs_embeds"]) // len(mask), dim=0)
        # the last query sees all that is real, but for windows, beyond which nothing is pruned in a static cache
        last = (given["full_attention"] if isinstance(given, dict) else given)[:, 0, -1]
        real, before = last if last.dtype == torch.bool else last == 0, held.length(cache)
        return real if before == seen else pad(real[:, before:], (seen, 0), value=1)

    def _prepared(self, cache: Any) -> bool:
        """Whether generate() has made the masks of this call, from a (batch, columns) one, as it does ahead for caches
        of a fixed size."""
        return self.prompt is not None and self.prompt.plain and held.is_static(cache)

    def blocks(self, seen: int, length: int, ahead: int, device: torch.device) -> Tensor | None:
        """(batch, length) int64: see `Adapter.blocks`; none behind a prompt, unless images come there."""
        blocks = self.compression.adapter.blocks(self.inputs) if self.encodings or not seen else None
        if blocks is not None:  # as in transformers, they are those of all columns from the first one on
            blocks = pad(blocks.to(device), (0, max(0, seen + length - blocks.shape[1])), value=-1)
            blocks = blocks[:, seen : seen + length].clone()
            if ahead:  # a guess is no part of the prompt's block, whatever the text model would make of it
                blocks[:, -ahead:] = -1
        return blocks

    def check(self, cache: Any, windows: bool) -> None:
        """Raise ValueError for what cannot be pruned exactly; `windows`: whether any layer's window hides anything."""
        given, static = self.inputs.get("attention_mask"), held.is_static(cache)
        if given is not None and not by_column(given) and not self._prepared(cache):
            shape = f"{given.ndim}-D" if isinstance(given, Tensor) else f"a {type(given).__name__}"
            raise ValueError(f"vtc prunes under attention masks of shape (batch, length); this one is {shape}")
        positions = None if given is not None or cache is not None else self.inputs.get("position_ids")
        if positions is not None and positions.ndim == 3:  # of four axes the first one is the text's
            positions = positions[0] if len(positions) == 4 else None
        if positions is not None and find_packed_sequence_indices(positions) is not None:
            raise ValueError(
                "position_ids that start again, or leave gaps, pack several prompts into one row, which cannot be "
                "pruned: pad them to rows of their own, with an attention_mask"
            )
        if static and windows:
            raise ValueError("a static cache cannot hold a pruned prompt beyond a sliding window: use a DynamicCache")


def modalities(adapter: Adapter, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """(batch, length) bool for each modality: its placeholders, from ids or, without ids, from their embedding.

    Nothing without either: the model says itself what it lacks.
    """
    tokens = adapter.placeholders()
    if (ids := inputs.get("input_ids")) is not None:
        return {modality: ids == token for modality, token in tokens.items()}
    if (embeds := inputs.get("inputs_embeds")) is None:
        return {}
    embedding = adapter.backbone.get_input_embeddings()
    return {
        modality: (embeds == embedding(torch.tensor(token, device=embeds.device))).all(-1)
        for modality, token in tokens.items()
    }
