"""What happened in the last forward: kept indices, scores, tokens per layer, seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtc.choice import Choice
from vtc.core.clock import Clock
from vtc.core.stream import Stream
from vtc.grids import Grid
from vtc.stage import Cache, Site, Stage


@dataclass
class StageTrace:
    """One stage of one forward. All tensors are padded to the widest image."""

    site: Site
    """Before which decoder layer the tokens left, 0 being the encoder site, or whose cache they left."""
    entered: Tensor
    """(images, tokens): index within its image of each token that entered the stage."""
    valid: Tensor
    """(images, tokens) bool: which entries of `entered` are tokens."""
    kept: Tensor
    """(images, tokens) bool; (images, key_heads, tokens) where the heads of a cache keep different ones."""
    scores: Tensor | None
    """As `kept`, float32; None where the stage had nothing to drop."""
    into: Tensor | None = None
    """(images, tokens): the entry that took each one in, -1 where it was dropped; None where nothing was merged."""
    gate: Tensor | None = None
    """(images, tokens): in training the soft gate of each token, with its gradient."""
    bits: Tensor | None = None
    """(images, tokens), or (images, key_heads, tokens): the bits a number that tokens are kept at."""
    size: Tensor | None = None
    """(images,) float32: of how many tokens that are kept as they are these have the size."""
    reads: Tensor | None = None
    """(images,): of a stage that chooses anew at each step, how many tokens the attention of a step reads."""


@dataclass
class Reads:
    """Which visual tokens the last step read, where each step chooses anew, and how often a choice was held."""

    columns: dict[int, Tensor] = field(default_factory=dict)
    """By decoder layer (batch, tokens): their columns in the unpruned prompt, over all turns; -1 where a row read
    fewer."""
    asked: int = 0
    held: Tensor | int = 0

    def note(self, layer: int, columns: Tensor, alike: Tensor | None) -> None:
        self.columns[layer] = columns
        self.asked += len(columns)
        self.held = self.held if alike is None else self.held + alike.sum()

    @property
    def reuse(self) -> float:
        """Of all steps, rows and layers, the share in which an earlier step's choice was read again."""
        return float(self.held) / max(1, self.asked)


@dataclass(repr=False)
class Trace:
    """The visual tokens of one forward. Indices count a row's visual tokens in prompt order, over all its images.

    Printed, it tells images, tokens before and after, the layers where they left, and seconds.
    """

    depth: int = 0
    """Decoder layers."""
    batch: int = 0
    rows: list[int] = field(default_factory=list)
    """The batch row of each image."""
    sizes: list[int] = field(default_factory=list)
    """Visual tokens of each image or video; one that the attention mask hides has a number, but is never listed."""
    parts: list[list[Grid]] = field(default_factory=list)
    """The grids that they form, (height, width) each, in token order: a whole image, or tiles, or frames."""
    stages: list[StageTrace] = field(default_factory=list)
    reads: Reads = field(default_factory=Reads)
    clock: Clock = field(default_factory=Clock)

    def note(
        self, stage: Stage, stream: Stream, choice: Choice, scores: Tensor | None = None, reads: Tensor | None = None
    ) -> None:
        """What a stage chose of a stream."""
        size = None if choice.bits is None or stage.precision is None else stage.precision.size(choice.bits)
        scores, what = None if scores is None else scores.detach(), (choice.into, choice.gate, choice.bits, size, reads)
        self.stages.append(StageTrace(stage.site, stream.index, stream.valid, choice.keep, scores, *what))

    def alive(self, layer: int) -> list[Tensor]:
        """For each batch row the sorted indices of the visual tokens that enter decoder layer `layer` (LongTensor)."""
        self._check(layer)
        past = [n for n, stage in enumerate(self.stages) if not isinstance(stage.site, Cache) and stage.site <= layer]
        if past or not self.stages:
            return self.kept(past[-1] if past else -1)
        entered, valid = self.stages[0].entered.cpu(), self.stages[0].valid.cpu()
        return self._per_row([index[real] for index, real in zip(entered, valid, strict=True)])

    def held(self, layer: int) -> list[Tensor]:
        """For each batch row the sorted indices of the visual tokens whose keys and values a layer's cache holds after
        the prefill: LongTensor (tokens,), or (key_heads, tokens) where its heads hold different ones."""
        self._check(layer)
        narrowed = [number for number, stage in enumerate(self.stages) if stage.site == Cache(layer)]
        return self.kept(narrowed[-1]) if narrowed else self.alive(layer)

    def _check(self, layer: int) -> None:
        if not 0 <= layer < self.depth:
            raise IndexError(f"the decoder has layers 0 to {self.depth - 1}, not {layer}")

    def kept(self, stage: int = -1) -> list[Tensor]:
        """For each batch row the sorted indices of the visual tokens left after a stage, for each head where they
        differ."""
        if not self.sizes:
            return self._per_row([])
        record = self.stages[stage]
        kept, entered = record.kept.cpu(), record.entered.cpu()
        masks = kept & (record.valid.cpu() if kept.ndim == 2 else record.valid.cpu()[:, None])
        return self._per_row(
            [
                index[mask] if mask.ndim == 1 else torch.stack([index[head] for head in mask])
                for index, mask in zip(entered, masks, strict=True)
            ]
        )

    def maps(self, stage: int = -1) -> list[list[Tensor]]:
        """For each image its grids (tiles, frames) as (height, width) bool: the tokens that a stage left any head."""
        record, result = self.stages[stage], []
        mask = ((record.kept.any(1) if record.kept.ndim == 3 else record.kept) & record.valid).cpu()
        for parts, entered, kept in zip(self.parts, record.entered.cpu(), mask, strict=True):
            sizes = [height * width for height, width in parts]
            left = torch.zeros(sum(sizes), dtype=torch.bool)
            left[entered[kept]] = True
            result.append([part.view(shape) for part, shape in zip(left.split(sizes), parts, strict=True)])
        return result

    def scores(self, stage: int = -1) -> list[Tensor]:
        """For each batch row the scores of the tokens that entered a stage, float32: (tokens,), or (key_heads, tokens)
        of a method of the cache whose heads keep different ones.

        Raises ValueError where the budget left the stage nothing to drop, so that nothing was scored.
        """
        record = self.stages[stage]
        if record.scores is None:
            raise ValueError("this stage kept every token, so nothing was scored")
        valid, scores = record.valid.cpu(), record.scores.float().cpu()
        return self._per_row(
            [score[..., is_token] for score, is_token in zip(scores, valid, strict=True)], offset=False
        )

    @property
    def tokens_per_layer(self) -> Tensor:
        """LongTensor (batch, decoder layers): visual tokens that entered each layer."""
        return self._counts(self.alive)

    @property
    def held_per_layer(self) -> Tensor:
        """LongTensor (batch, decoder layers): visual tokens that each layer's cache holds after the prefill."""
        return self._counts(self.held)

    @property
    def held_sizes(self) -> Tensor:
        """FloatTensor (batch, decoder layers): as `held_per_layer`, but that tokens at fewer bits count by their bytes,
        as parts of one that is as it is.
        """
        held = self.held_per_layer.float()
        for stage in self.stages:
            if stage.size is not None and isinstance(stage.site, Cache):
                rows = torch.tensor(self.rows, dtype=torch.long)
                held[:, stage.site.layer] = torch.zeros(self.batch).index_add(0, rows, stage.size.cpu())
        return held

    @property
    def read_sizes(self) -> Tensor:
        """As `held_sizes`, what a decoded token reads: of packed tokens also their dequantised copies; of those that
        are chosen anew at each step all keys, for their scores, and what is chosen and the copy that is made of it."""
        packed = [stage.site.layer for stage in self.stages if stage.size is not None and isinstance(stage.site, Cache)]
        copies = torch.zeros(self.batch, self.depth).index_fill(1, torch.tensor(packed, dtype=torch.long), 1)
        return self._with_reads(self.held_sizes + copies * self.held_per_layer, lambda held, read: held / 2 + 2 * read)

    def _with_reads(self, sizes: Tensor, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Sizes (batch, decoder layers), in the layers of which each step reads a part `of` what is held and read."""
        for stage in self.stages:
            if stage.reads is not None and isinstance(stage.site, Cache):
                rows, layer = torch.tensor(self.rows, dtype=torch.long), stage.site.layer
                read = torch.zeros(self.batch).index_add(0, rows, stage.reads.float().cpu())
                sizes[:, layer] = of(sizes[:, layer], read)
        return sizes

    @property
    def average_tokens(self) -> Tensor:
        """FloatTensor (batch): visual tokens held, averaged over the decoder layers, all images of a row together.

        Those at fewer bits count by their bytes. Where each step chooses anew, those that its attention reads count.
        """
        return self._with_reads(self.held_sizes, lambda held, read: read).mean(1)

    def _counts(self, of: Callable[[int], list[Tensor]]) -> Tensor:
        counts = [[index.shape[-1] for index in of(layer)] for layer in range(self.depth)]
        return torch.tensor(counts, dtype=torch.long).T.reshape(self.batch, self.depth)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by part: vision, score (rows and importances), select, compact, prefill (with all three inside the
        decoder), decode (all later steps)."""
        return self.clock.seconds()

    def __repr__(self) -> str:
        if not self.depth:
            return "<Trace: nothing has run>"
        counts = [f"{sum(self.sizes)} visual tokens"]
        for number, stage in enumerate(self.stages):
            if not isinstance(stage.site, Cache):
                counts.append(f"{sum(map(len, self.kept(number)))} from layer {stage.site} on")
        counts += [f"{float(self.average_tokens.sum()):g} averaged over {self.depth} layers"]
        seconds = [f"{part} {passed:.3f} s" for part, passed in self.seconds.items()]
        images = f"{len(self.sizes)} image{'s' * (len(self.sizes) != 1)}"
        return f"<Trace: {images}; {', '.join(counts)}; {', '.join(seconds)}>"

    def _per_row(self, per_image: list[Tensor], offset: bool = True) -> list[Tensor]:
        """What is known of each image, put together for each batch row; `offset`: it counts an image's tokens."""
        rows: list[list[Tensor]] = [[] for _ in range(self.batch)]
        before = [0] * self.batch
        for row, size, values in zip(self.rows, self.sizes, per_image, strict=True):
            rows[row].append(values + before[row] if offset else values)
            before[row] += size
        empty = torch.empty(0, dtype=torch.long if offset else torch.float32)
        return [torch.cat(parts, dim=-1) if parts else empty for parts in rows]
