"""What the backbone was called with, and what of it a forward needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import find_packed_sequence_indices

import vtc.cache.held as held
from vtc.adapter import Adapter
from vtc.core.clock import Moment, Passage
from vtc.core.compression import Compression
from vtc.core.features import Encoding
from vtc.need import Need, Record

answering: ContextVar[int] = ContextVar("vtc_answering", default=0)
"""How many columns at the end of what the model is given hold an answer to be rated, which no method may look at."""


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
    prompt: int | None = None
    """The length of the prompt that generate() was given, cached positions included; None outside generate()."""
    record: Record = field(default_factory=dict)
    """What the hooks on the decoder have written."""
    late: list[Tensor] = field(default_factory=list)
    """(batch, length, width) that is still to be added after each of the first layers: see `Adapter.late_features`."""
    started: Moment = 0.0

    @property
    def generates(self) -> bool:
        """Whether generate() makes this call."""
        return self.prompt is not None

    def decodes(self, seen: int, length: int) -> bool:
        """Whether this is one of generate()'s own steps: `length` positions behind `seen` ones."""
        return self.prompt is not None and length == 1 and seen >= self.prompt

    def ahead(self, total: int) -> int:
        """Of `total` positions, how many at the end do not belong to the prompt: guesses in assisted generation, or an
        answer to be rated."""
        return max(0 if self.prompt is None else total - self.prompt, answering.get())

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

    def mask(self, kwargs: dict[str, Any], cache: Any) -> Tensor | None:
        """The (batch, cached + current) mask. A family that makes its own masks out of it got it one call earlier."""
        given = self.inputs.get("attention_mask")
        for mask in (kwargs.get("attention_mask"), given):
            if isinstance(mask, Tensor) and mask.ndim == 2:
                return mask
        if not held.is_static(cache) or cache.get_seq_length():
            return None
        # generate() prepares masks ahead for static caches: there what is real sees itself, whatever its window hides
        given = given.get("full_attention") if isinstance(given, dict) else given
        if given is None:
            return None
        own = given[:, 0].diagonal(dim1=1, dim2=2)[:, : kwargs["inputs_embeds"].shape[1]]
        return own if own.dtype == torch.bool else own == 0

    def blocks(self, seen: int, ahead: int, device: torch.device) -> Tensor | None:
        """(batch, length) int64: see `Adapter.blocks`; none after a prompt."""
        blocks = None if seen else self.compression.adapter.blocks(self.inputs)
        if blocks is not None:
            blocks = blocks.to(device, copy=True)
            if ahead:  # a guess is no part of the prompt's block, whatever the text model would make of it
                blocks[:, -ahead:] = -1
        return blocks

    def check(self, cache: Any, windows: bool) -> None:
        """Raise ValueError for what cannot be pruned exactly; `windows`: whether any layer's window hides anything."""
        given, static = self.inputs.get("attention_mask"), held.is_static(cache)
        if isinstance(given, Tensor) and given.ndim != 2 and not static:
            raise ValueError("vtc prunes under attention masks of shape (batch, length); this one is 4-D")
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
    """(batch, length) bool for each modality: its placeholders, from ids or, without ids, from their embedding."""
    tokens = adapter.placeholders()
    if (ids := inputs.get("input_ids")) is not None:
        return {modality: ids == token for modality, token in tokens.items()}
    embeds, embedding = inputs["inputs_embeds"], adapter.backbone.get_input_embeddings()
    return {
        modality: (embeds == embedding(torch.tensor(token, device=embeds.device))).all(-1)
        for modality, token in tokens.items()
    }


def prompt_length(args: tuple, kwargs: dict[str, Any]) -> int | None:
    """How many positions the prompt has that generate() is given, cached ones included; None where it does not tell."""
    names = ("attention_mask", "inputs_embeds", "input_ids", "inputs")
    given = [x for x in (*map(kwargs.get, names), *args[:1]) if isinstance(x, Tensor)]
    unknown = kwargs.get("attention_mask") is None and kwargs.get("past_key_values") is not None
    return None if unknown or not given or given[0].ndim > 3 else given[0].shape[1]
