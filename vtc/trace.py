"""What happened in the last forward: kept indices, scores, tokens per layer, seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtc.observe import Part


@dataclass
class StageTrace:
    """One stage of one forward. All tensors are padded to the widest image."""

    layer: int
    """The decoder layer before which the tokens left; 0 is the encoder site."""
    entered: Tensor
    """(images, tokens): index within its image of each token that entered the stage."""
    valid: Tensor
    """(images, tokens) bool: which entries of `entered` are tokens."""
    kept: Tensor
    """(images, tokens) bool."""
    scores: Tensor | None
    """(images, tokens) float32; None where the stage had nothing to drop."""
    into: Tensor | None = None
    """(images, tokens): the entry that took each one in, -1 where it was dropped; None where nothing was merged."""
    gate: Tensor | None = None
    """(images, tokens): in training the soft gate of each token, with its gradient."""


@dataclass
class Trace:
    """The visual tokens of one forward. Indices count a row's visual tokens in prompt order, over all its images."""

    depth: int = 0
    """Decoder layers."""
    batch: int = 0
    rows: list[int] = field(default_factory=list)
    """The batch row of each image."""
    sizes: list[int] = field(default_factory=list)
    """Visual tokens of each image or video; one that the attention mask hides has a number, but is never listed."""
    parts: list[list[Part]] = field(default_factory=list)
    """The grids that they form, (height, width) each, in token order: a whole image, or tiles, or frames."""
    stages: list[StageTrace] = field(default_factory=list)
    clock: Clock = field(default_factory=lambda: Clock())

    def alive(self, layer: int) -> list[Tensor]:
        """For each batch row the sorted indices of the visual tokens that enter decoder layer `layer` (LongTensor)."""
        if not 0 <= layer < self.depth:
            raise IndexError(f"the decoder has layers 0 to {self.depth - 1}, not {layer}")
        past = [number for number, stage in enumerate(self.stages) if stage.layer <= layer]
        if past or not self.stages:
            return self.kept(past[-1] if past else -1)
        entered, valid = self.stages[0].entered.cpu(), self.stages[0].valid.cpu()
        return self._per_row([index[real] for index, real in zip(entered, valid, strict=True)], offset=True)

    def kept(self, stage: int = -1) -> list[Tensor]:
        """For each batch row the sorted indices of the visual tokens left after a stage."""
        if not self.sizes:
            return self._per_row([], offset=True)
        record = self.stages[stage]
        mask, entered = (record.kept & record.valid).cpu(), record.entered.cpu()
        return self._per_row([index[keep] for index, keep in zip(entered, mask, strict=True)], offset=True)

    def maps(self, stage: int = -1) -> list[list[Tensor]]:
        """For each image its grids (tiles, frames) as (height, width) bool: the tokens left after a stage."""
        record, result = self.stages[stage], []
        mask = (record.kept & record.valid).cpu()
        for parts, entered, kept in zip(self.parts, record.entered.cpu(), mask, strict=True):
            sizes = [height * width for height, width in parts]
            left = torch.zeros(sum(sizes), dtype=torch.bool)
            left[entered[kept]] = True
            result.append([part.view(shape) for part, shape in zip(left.split(sizes), parts, strict=True)])
        return result

    def scores(self, stage: int = -1) -> list[Tensor]:
        """For each batch row the scores of the tokens that entered a stage, 1-D float32.

        Raises ValueError where the budget left the stage nothing to drop, so that nothing was scored.
        """
        record = self.stages[stage]
        if record.scores is None:
            raise ValueError("this stage kept every token, so nothing was scored")
        valid, scores = record.valid.cpu(), record.scores.float().cpu()
        return self._per_row([score[is_token] for score, is_token in zip(scores, valid, strict=True)], offset=False)

    @property
    def tokens_per_layer(self) -> Tensor:
        """LongTensor (batch, decoder layers): visual tokens that entered each layer."""
        return torch.tensor(
            [[len(index) for index in self.alive(layer)] for layer in range(self.depth)], dtype=torch.long
        ).T.reshape(self.batch, self.depth)

    @property
    def average_tokens(self) -> Tensor:
        """FloatTensor (batch): visual tokens averaged over the decoder layers, all images of a row together."""
        return self.tokens_per_layer.float().mean(1)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by part: vision, score (rows and importances), select, compact, prefill (with all three inside the
        decoder), decode (all later steps)."""
        return self.clock.seconds()

    def _per_row(self, per_image: list[Tensor], offset: bool) -> list[Tensor]:
        rows: list[list[Tensor]] = [[] for _ in range(self.batch)]
        before = [0] * self.batch
        for row, size, values in zip(self.rows, self.sizes, per_image, strict=True):
            rows[row].append(values + before[row] if offset else values)
            before[row] += size
        empty = torch.empty(0, dtype=torch.long if offset else torch.float32)
        return [torch.cat(parts) if parts else empty for parts in rows]


class Clock:
    """Adds up seconds by name; on a GPU through events, so that nothing waits for the device until it is read."""

    def __init__(self):
        self.spans: list[tuple[str, object, object]] = []

    def __deepcopy__(self, memo: dict) -> Clock:
        """For a copied cache: what has passed is common to both, and events of a GPU cannot be copied."""
        clock = Clock()
        clock.spans = list(self.spans)
        return clock

    @staticmethod
    def now(device: torch.device) -> object:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, start: object, device: torch.device) -> None:
        self.spans.append((name, start, self.now(device)))

    @contextmanager
    def span(self, name: str, device: torch.device) -> Iterator[None]:
        start = self.now(device)
        yield
        self.add(name, start, device)

    def seconds(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        for name, start, end in self.spans:
            if isinstance(start, float):
                passed = end - start
            else:
                end.synchronize()
                passed = start.elapsed_time(end) / 1000
            totals[name] = totals.get(name, 0.0) + passed
        return totals
