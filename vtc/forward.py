"""One forward of a wrapped model: from merged embeddings, through the stages, to outputs of the usual shape.

The state of a pass belongs to the call (`Forward`, found through a context variable) and, between prefill and decoding,
to the cache object (`CacheState`); never to the module. So threads may share a model, and generations interleave.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import create_causal_mask

from vtc import compact, merge
from vtc.observe import Need, Part, Record, Seen, attention_rows
from vtc.select import Selection
from vtc.stage import Stage
from vtc.trace import Clock, StageTrace, Trace

if TYPE_CHECKING:
    from vtc.wrap import Compression

current: ContextVar[Forward | None] = ContextVar("vtc_forward", default=None)


@dataclass
class Encoded:
    """What the vision tower showed about one image or video."""

    rows: dict[Need, Tensor]
    """(channels, tokens) of each need."""
    parts: list[Part]
    """The grids that its tokens form, in token order."""

    @property
    def tokens(self) -> int:
        return sum(height * width for height, width in self.parts)

    def __add__(self, other: Encoded) -> Encoded:
        """Both as one image."""
        rows = {need: torch.cat((row, other.rows[need]), dim=1) for need, row in self.rows.items()}
        return Encoded(rows, self.parts + other.parts)


@dataclass
class Encoding:
    """What one run of the tower showed. It travels as an entry of the encoder's output, which generate() hands from
    encoding to prefill; for beams it repeats the features there, row by row of the batch."""

    images: list[Encoded]
    entries: int
    """Features of the output object, before any were repeated."""
    spans: list[tuple[str, object, object]]
    """What the tower and the projector took, and what those rows took, as `Clock` holds it."""

    def shows(self, needs: tuple[Need, ...]) -> bool:
        """Whether the tower was observed for all that these needs ask of it."""
        return all(need in image.rows for image in self.images for need in needs if need.tower)

    def repeated(self, copies: int, tokens_per_row: list[int]) -> list[Encoded]:
        """The images in prompt order of a batch whose rows, with so many visual tokens, come in runs of `copies`."""
        images, result = iter(self.images), []
        for tokens in tokens_per_row[::copies]:
            row = []
            while tokens > 0:
                row.append(next(images))
                tokens -= row[-1].tokens
            result += row * copies
        return result


@dataclass
class Span:
    """Decoder layers from `start` on, up to the next span, whose cache holds the same keys."""

    start: int
    length: int = 0
    mask: Tensor | None = None
    """(batch, length) bool: which cached keys are real; None when all are."""
    origins: Tensor | None = None
    """(batch, length): the column of each key in the unpruned prompt; None where none has left."""

    def cropped(self, count: int) -> Span:
        """Without its last `count` keys."""
        length = self.length - count
        mask, origins = (None if x is None else x[:, :length] for x in (self.mask, self.origins))
        return Span(self.start, length, mask, origins)

    def reordered(self, change: Callable[[Tensor], Tensor]) -> Span:
        """With `change` made to the rows of the batch."""
        mask, origins = (None if x is None else change(x) for x in (self.mask, self.origins))
        return Span(self.start, self.length, mask, origins)


@dataclass
class CacheState:
    """What a pruned cache has to remember: how long the sequence truly is, and what each layer holds of it."""

    seen: int
    spans: list[Span]
    trace: Trace
    shift: Tensor | None = None
    """(batch, 1): how far later positions move down, where survivors were renumbered without gaps."""
    tail: int = 0
    """How many keys at the end are the same tokens in every layer, so that a crop may take them back."""

    def span(self, layer: int) -> Span:
        return [span for span in self.spans if span.start <= layer][-1]

    def cropped(self, held: int) -> CacheState:
        """The state of the cache when layer 0 holds `held` keys: what was cropped since is taken back.

        Raises RuntimeError for more than the text at its end: layers hold different tokens before that.
        """
        count = self.span(0).length - held
        if not 0 <= count <= self.tail:
            raise RuntimeError(
                f"the cache holds {held} keys in layer 0 where vtc left {self.span(0).length}: a pruned cache can be "
                f"cropped by the {self.tail} tokens of text at its end only; start again from the prompt"
            )
        spans = [span.cropped(count) for span in self.spans]
        return replace(self, seen=self.seen - count, spans=spans, tail=self.tail - count)

    def reordered(self, change: Callable[[Tensor], Tensor]) -> CacheState:
        """With `change` made to the rows of the batch."""
        shift = None if self.shift is None else change(self.shift)
        return replace(self, spans=[span.reordered(change) for span in self.spans], shift=shift)

    def attach(self, cache: Any) -> None:
        """Let the cache carry this along through all that is done to its rows, and forget it when it is reset.

        generate() slices the next turn by `cache.get_seq_length()`, the length of layer 0: once tokens left before
        layer 0 that must still be the true length, while masks are sized by what the layer holds.
        """
        cache.vtc = self
        for name, method in CARRYING.items():
            setattr(cache, name, MethodType(method, cache))
        if self.span(0).length != self.seen:
            cache.get_seq_length = MethodType(_true_length, cache)
            cache.get_query_offset = MethodType(_held_length, cache)


def _reorder(cache: Any, beam_idx: Tensor) -> None:
    type(cache).reorder_cache(cache, beam_idx)
    cache.vtc = cache.vtc.reordered(lambda x: x.index_select(0, beam_idx.to(x.device)))


def _repeat(cache: Any, repeats: int) -> None:
    type(cache).batch_repeat_interleave(cache, repeats)
    cache.vtc = cache.vtc.reordered(lambda x: x.repeat_interleave(repeats, dim=0))


def _pick(cache: Any, indices: Tensor) -> None:
    type(cache).batch_select_indices(cache, indices)
    cache.vtc = cache.vtc.reordered(lambda x: x[indices.to(x.device) if isinstance(indices, Tensor) else indices])


def _reset(cache: Any) -> None:
    for name in ("vtc", "get_seq_length", "get_query_offset", *CARRYING):
        vars(cache).pop(name, None)
    cache.reset()


CARRYING = {
    "reorder_cache": _reorder,
    "batch_repeat_interleave": _repeat,
    "batch_select_indices": _pick,
    "reset": _reset,
}


def _true_length(cache: Any, layer_idx: int = 0) -> int:
    held = _held_length(cache, layer_idx)
    return held if layer_idx else cache.vtc.seen - (cache.vtc.span(0).length - int(held))


def _held_length(cache: Any, layer_idx: int = 0) -> int:
    return cache.layers[layer_idx].get_seq_length() if layer_idx < len(cache.layers) else 0


@dataclass
class Tokens:
    """The visual tokens that are left, padded to the widest image: all tensors (images, tokens)."""

    position: Tensor
    """Where the token sits in its row of the current sequence."""
    index: Tensor
    """Which token of its image it is."""
    valid: Tensor
    """False at the filling, and where the attention mask hides a token: that is none."""
    row: Tensor
    """(images,): the batch row."""
    counts: list[int]

    @classmethod
    def locate(cls, places: list[Tensor], mask: Tensor | None, length: int, rows: list[int]) -> Tokens:
        """From each image's places in the flattened (batch, length) prompt, and its attention mask."""
        sizes, device = [len(part) for part in places], places[0].device
        position = pad_sequence([part % length for part in places], batch_first=True)
        index = torch.arange(position.shape[1], device=device).expand_as(position)
        valid, row = index < torch.tensor(sizes, device=device)[:, None], torch.tensor(rows, device=device)
        if mask is not None:
            valid = valid & mask[row[:, None], position]
            sizes = valid.sum(1).tolist()
        return cls(position, index, valid, row, sizes)


@dataclass
class Forward:
    """One call of the model, from the backbone's entry to its exit."""

    compression: Compression
    inputs: dict[str, Any]
    """The backbone's keyword arguments."""
    modalities: dict[str, Tensor]
    """(batch, length) bool for each modality: its placeholders."""
    encodings: dict[str, tuple[Encoding | None, int]] = field(default_factory=dict)
    """By modality what the tower showed, and how many features the encoder's output holds."""
    images: list[Encoded] = field(default_factory=list)
    """The images and videos in prompt order."""
    last_visual: int = -1
    """The last column that holds a visual token in any row."""
    padded_right: bool = False
    prompt: int | None = None
    """The length of the prompt that generate() was given, cached positions included; None outside generate()."""
    ahead: int = 0
    """Tokens at the end that do not belong to the prompt: guesses in assisted generation."""
    record: Record = field(default_factory=dict)
    """What the hooks on the decoder have written."""
    rows: dict[Need, Tensor] = field(default_factory=dict)
    """What was seen, over the visual tokens that are left: (images, channels, tokens)."""
    tokens: Tokens | None = None
    keep: list[tuple[int, ...]] = field(default_factory=list)
    """For each image how many tokens stay after each stage."""
    busy: bool = False
    """Whether this call has anything to do at all; otherwise nothing is touched."""
    cache: Any = None
    state: CacheState | None = None
    spans: list[Span] = field(default_factory=list)
    mask: Tensor | None = None
    """(batch, length) bool of the current sequence; None when all of it is real."""
    lengths: list[int] = field(default_factory=list)
    """Real positions of each row of the current sequence."""
    batch: int = 0
    length: int = 0
    """Of the current sequence."""
    entered: int = 0
    """Length of the sequence as it came in."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    started: object = None
    sources: list[tuple[int, Tensor]] = field(default_factory=list)
    """(layer, (batch, original length)): from this layer on, which position answers for each original one."""
    changes: int = 0
    """How many stages have changed something so far."""
    gate: Tensor | None = None
    """(images, tokens): the product of the soft gates so far, in training."""
    bias: Tensor | None = None
    """(batch, length): what those gates add to the logits of each key."""
    shift: Tensor | None = None
    """(batch, 1): see `CacheState.shift`."""
    rotary: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """The rotary tables of each decoder layer, over the sequence that it runs on."""
    index: Tensor | None = None
    """(batch, length): which position each one of the current sequence had when the decoder began; None: the same."""
    origins: Tensor | None = None
    """(batch, length): the column of each position in the unpruned prompt; None where no token has left."""
    blocks: Tensor | None = None
    """(batch, length): see `Adapter.blocks`."""
    late: list[Tensor] = field(default_factory=list)
    """(batch, length, width) that is still to be added after each of the first layers: see `Adapter.late_features`."""
    own: bool = False
    """Whether layers get masks, positions and rotary tables from here instead of the text model's own."""
    made: dict[Any, Any] = field(default_factory=dict)
    """The masks and rotary tables of the current span."""

    # -- entry ----------------------------------------------------------------------------------------------------

    def enter_decoder(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Before the text model runs: locate the tokens, run the encoder-site stages, align masks and positions."""
        embeds = kwargs["inputs_embeds"]
        self.batch, self.entered = embeds.shape[:2]
        self.length, self.device = self.entered, embeds.device
        self.started = Clock.now(self.device)
        self.cache = kwargs.get("past_key_values")
        attention_mask = self._two_dimensional(kwargs)
        if attention_mask is not None:
            self.mask = attention_mask[:, -self.length :].to(self.device, torch.bool).expand(self.batch, -1)
        self.state = self._past(attention_mask)
        self.shift = self.state.shift
        if self.prompt is not None:
            self.ahead = max(0, self.state.seen + self.entered - self.prompt)
        self.record = {need: {} for need in self.compression.needs}
        self._plan()
        if self.images:
            self._measure()
        if self.busy:
            self._check(kwargs)
            if self.tokens is not None:
                self._observe_tower()
            kwargs, self.late = self.compression.adapter.late_features(kwargs)
            self._find_blocks()
            kwargs = self._encoder_site(embeds, kwargs)
        self._begin_span(0)
        return kwargs

    def _measure(self) -> None:
        """Tell the host how long the rows are: at prefill only, so that decoding never waits for the device."""
        self.lengths = [self.length] * self.batch
        if self.mask is not None:
            *self.lengths, filled = torch.cat((self.mask.sum(1), self.mask[:, -1:].all(0))).tolist()
            self.padded_right = not filled

    def _two_dimensional(self, kwargs: dict[str, Any]) -> Tensor | None:
        """The (batch, cached + current) mask. A family that makes its own masks out of it got it one call earlier."""
        masks = (kwargs.get("attention_mask"), self.inputs.get("attention_mask"))
        for mask in masks:
            if isinstance(mask, Tensor) and mask.ndim == 2:
                return mask
        if not getattr(self.cache, "is_compileable", False) or self.cache.get_seq_length():
            return None
        # generate() prepares masks ahead for static caches: the last token of a prompt sees all that is real
        mask = masks[1].get("full_attention") if isinstance(masks[1], dict) else masks[1]
        if mask is None:
            return None
        row = mask[:, 0, -1, : self.entered]
        return row if row.dtype == torch.bool else row == 0

    def _find_blocks(self) -> None:
        blocks = self.compression.adapter.blocks(self.inputs) if not self.state.seen else None
        if blocks is not None:
            self.blocks = blocks.to(self.device)
            if self.ahead:  # a guess is no part of the prompt's block, whatever the text model would make of it
                self.blocks[:, -self.ahead :], self.own = -1, True

    def _check(self, kwargs: dict[str, Any]) -> None:
        """Raise for what cannot be pruned exactly."""
        given, static = self.inputs.get("attention_mask"), getattr(self.cache, "is_compileable", False)
        if isinstance(given, Tensor) and given.ndim != 2 and not static:
            raise ValueError("vtc prunes under attention masks of shape (batch, length); this one is 4-D")
        if static and any(self._window(layer) is not None for layer in range(len(self.compression.adapter.layers))):
            raise ValueError("a static cache cannot hold a pruned prompt beyond a sliding window: use a DynamicCache")

    def _encoder_site(self, embeds: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(self.length, device=self.device)[None] + self.state.seen
        if self.shift is not None:
            positions = positions - self.shift
        for number, stage in enumerate(self.compression.stages):
            if stage.layer == 0:
                embeds, positions = self.run_stage(number, embeds, positions)
        self.index = None  # the text model makes its rotary tables out of these positions
        if not self.sources and self.state.span(0).length == self.state.seen and self.shift is None:
            return kwargs
        self.own = True
        mask = kwargs.get("attention_mask")
        if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
            mask = self._visible(0)
            if mask is None and self.cache is None:
                # gapped positions with neither mask nor cache would be taken for packed sequences
                mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=self.device)
        return {**kwargs, "inputs_embeds": embeds, "position_ids": positions, "attention_mask": mask}

    def _past(self, attention_mask: Tensor | None) -> CacheState:
        """What the cache holds. Without a state of ours it holds every layer's keys in full."""
        if (state := getattr(self.cache, "vtc", None)) is not None:
            held = int(self.cache.layers[0].get_seq_length())
            return state if held == state.span(0).length else state.cropped(held)
        seen = int(self.cache.get_seq_length()) if self.cache is not None else 0
        past = attention_mask[:, : -self.length].bool() if seen and attention_mask is not None else None
        return CacheState(seen, [Span(0, seen, past)], Trace())

    def _plan(self) -> None:
        """How many tokens of each image stay at each stage, and whether that means any work."""
        compression = self.compression
        rows = self._locate()
        sizes = [image.tokens for image in self.images]
        counts = self.tokens.counts if self.tokens is not None else []
        self.keep = [compression.keep(count) for count in counts]
        drops = any(kept and min(kept) < count for kept, count in zip(self.keep, counts, strict=True))
        self.busy = drops or len(self.state.spans) > 1 or self.state.span(0).length != self.state.seen
        if sizes or self.state.trace.depth == 0:
            parts = [image.parts for image in self.images]
            self.state.trace = Trace(compression.shape.decoder_layers, self.batch, rows, sizes, parts)
            for encoding, _ in self.encodings.values():
                self.state.trace.clock.spans += encoding.spans
        if sizes and not self.busy:
            for number in range(len(compression.stages)):
                self._note(number, Selection(self.tokens.valid))

    def _locate(self) -> list[int]:
        """Find the images in the prompt: `images` and `tokens` in prompt order. Returns the batch row of each."""
        found = []
        for modality, (encoding, entries) in self.encodings.items():
            if encoding is None or not encoding.shows(self.compression.needs):
                raise RuntimeError(
                    "these image features were encoded before vtc.wrap, or for another method: the tower was not "
                    "observed as this one needs it; encode them anew"
                )
            mask, images = self.modalities[modality].to(self.device), encoding.images
            if entries != encoding.entries:
                images = encoding.repeated(entries // encoding.entries, mask.sum(1).tolist())
            sizes = [image.tokens for image in images]
            places = torch.nonzero_static(mask.flatten(), size=sum(sizes))[:, 0].split(sizes)
            found += zip(images, places, strict=True)
        if not found:
            return []
        ends = torch.stack([place[[0, -1]] for _, place in found]).tolist()
        found = [(*image, *end) for image, end in sorted(zip(found, ends, strict=True), key=lambda pair: pair[1])]
        if self.compression.adapter.joins_tiles:
            found = _joined(found, self.length)
        rows = [first // self.length for *_, first, _ in found]
        self.images = [image for image, *_ in found]
        self.last_visual = max(last % self.length for *_, last in found)
        self.tokens = Tokens.locate([place for _, place, *_ in found], self.mask, self.length, rows)
        return rows

    # -- stages ---------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # compiled layers compute; what happens between them is no part of their graphs
    def enter_layer(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Before decoder layer `layer` runs: its stage, if it has one, and then the arguments of its span."""
        tables = kwargs["position_embeddings"]
        self.rotary[layer] = self._carried(tables)
        if 0 < layer <= len(self.late):
            hidden = hidden + self.late[layer - 1].to(hidden)
        if self.tokens is not None:
            self._observe_layer(layer, hidden)
        changes = self.changes
        for number, stage in enumerate(self.compression.stages):
            if stage.layer == layer and layer:
                hidden, _ = self.run_stage(number, hidden, None)
        past_starts = any(span.start == layer for span in self.state.spans)
        if layer and (self.changes > changes or past_starts):
            self._begin_span(layer)
            self.own, self.made = True, {}
            self.rotary[layer] = self._carried(tables)
        if not self.own:
            return hidden, kwargs
        # without position_ids no kernel can mistake their gaps for packed sequences
        own = {"attention_mask": self._mask(layer, hidden), "position_embeddings": self.rotary[layer]}
        return hidden, {**kwargs, **own, "position_ids": None}

    def _carried(self, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The text model's rotary tables over the current sequence."""
        if self.index is None:
            return tables
        if id(tables) not in self.made:  # they are kept beside the result, so that no other object gets their id
            self.made[id(tables)] = tables, tuple(compact.gather(table, self.index) for table in tables)
        return self.made[id(tables)][1]

    def _mask(self, layer: int, hidden: Tensor) -> Any:
        """The mask for the attention kernel of decoder layer `layer`; layers of one span and window share it."""
        window = self._window(layer)
        if ("mask", window) not in self.made:
            self.made["mask", window] = self._attention_mask(layer, hidden, window)
        return self.made["mask", window]

    def _window(self, layer: int) -> int | None:
        """The sliding window of a decoder layer, where it hides anything."""
        adapter = self.compression.adapter
        window = adapter.window(adapter.layers[layer])
        return window if window is not None and window < self.state.seen + self.entered else None

    def _attention_mask(self, layer: int, hidden: Tensor, window: int | None) -> Any:
        """As transformers makes it, from the original columns where they matter; gates on top."""
        adapter, past = self.compression.adapter, self.state.span(layer)
        config, blocks, overlay = adapter.decoder.config, None, None
        if self.blocks is not None:
            held = past.length + self.length
            room = 0 if self.cache is None else sum(self.cache.get_mask_sizes(self.length, layer)) - held
            blocks = torch.nn.functional.pad(self.blocks, (past.length, room), value=-1)
        if window is not None:
            if config._attn_implementation not in ("eager", "sdpa", "flex_attention"):
                raise ValueError(
                    f"{config._attn_implementation} counts its sliding window of {window} tokens over the tokens that "
                    "are left: use sdpa, eager or flex attention, or a prompt within the window"
                )
            overlay = _window_overlay(self._origins(layer), window, None if adapter.window_cuts_blocks else blocks)
        mask = create_causal_mask(
            config=config,
            inputs_embeds=hidden,
            attention_mask=self._visible(layer),
            past_key_values=self.cache,
            layer_idx=layer,
            or_mask_function=None if blocks is None else _block_overlay(blocks),
            and_mask_function=overlay,
            allow_is_causal_skip=self.bias is None,
        )
        if self.bias is None:
            return mask
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            raise ValueError("soft gates need an attention kernel with a 4-D mask: train with sdpa or eager attention")
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
        others = 1 - torch.eye(self.length, device=self.device)  # a token always sees itself
        bias = (self.bias[:, None] * others).to(hidden.dtype)
        return mask + torch.nn.functional.pad(bias, (mask.shape[-1] - self.length, 0))[:, None]

    def _origins(self, layer: int) -> Tensor:
        """(batch, cached + current): the columns in the unpruned prompt of the keys of decoder layer `layer`."""
        past = self.state.span(layer)
        before = torch.arange(past.length, device=self.device)[None] if past.origins is None else past.origins
        now = self.origins
        if now is None:
            now = torch.arange(self.state.seen, self.state.seen + self.length, device=self.device)[None]
        return torch.cat((before.expand(self.batch, -1).to(self.device), now.expand(self.batch, -1)), dim=1)

    def run_stage(self, number: int, hidden: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Score, select, compact: hidden (batch, length, width) and positions (..., batch, length) of what is left."""
        tokens, counts = self.tokens, [keep[number] for keep in self.keep]
        if tokens is None:
            return hidden, positions
        if counts == tokens.counts:
            self._note(number, Selection(tokens.valid))
            return hidden, positions
        stage, span = self.compression.stages[number], self.state.trace.clock.span
        parts = [image.parts for image in self.images]
        seen = Seen({need: self.rows[need] for need in stage.needs}, self.alive, tokens.index, parts)
        with span("score", hidden.device):
            scores = stage.score(seen)
        with span("select", hidden.device):
            selection = stage.select(scores, seen, torch.tensor(counts, device=hidden.device))
        self._note(number, selection, scores)
        self.changes += 1
        if selection.gate is not None:
            self._soften(selection.gate)
            return hidden, positions
        with span("compact", hidden.device):
            if self.compression.method.adaptive:
                counts = selection.keep.sum(1).tolist()
            if (into := selection.into) is not None:
                absorb = functools.partial(merge.absorb, into=into, weights=scores)
                hidden = compact.change(hidden, tokens.row, tokens.position, tokens.valid, absorb)
            return self._carry(stage, selection.keep, counts, hidden, positions)

    def _carry(
        self, stage: Stage, keep: Tensor, counts: list[int], hidden: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """States, positions and rotary tables of what stays."""
        origins = self._origins(stage.layer)[:, -self.length :]
        plan, dropped = self._compact(keep, counts)
        hidden = compact.gather(hidden, plan.index)
        if positions is not None:
            if stage.contiguous:
                if positions.ndim == 3:
                    raise ValueError("positions in time, height and width cannot be renumbered: keep the original ones")
                before = dropped.long().cumsum(1)
                positions = positions - before
                self.shift = before[:, -1:] + (0 if self.shift is None else self.shift)
            positions = compact.gather(positions, plan.index, dim=-1)
        if self.compression.windows:
            self.origins = compact.gather(origins, plan.index)
        self.index = plan.index if self.index is None else compact.gather(self.index, plan.index)
        self.late = [compact.gather(states, plan.index) for states in self.late]
        if self.blocks is not None:
            self.blocks = compact.gather(self.blocks, plan.index)
        source = compact.gather(plan.source, self.sources[-1][1]) if self.sources else plan.source
        self.sources.append((stage.layer, source))
        return hidden, positions

    def _compact(self, keep: Tensor, counts: list[int]) -> tuple[compact.Plan, Tensor]:
        """The plan for the whole sequence: text stays, padding goes, visual tokens as `keep` says.

        Also the visual tokens that leave: (batch, length) bool.
        """
        tokens = self.tokens
        for row, before, after in zip(self.state.trace.rows, tokens.counts, counts, strict=True):
            self.lengths[row] -= before - after
            if before > after and not self.lengths[row]:
                raise ValueError("a prompt of images alone has nothing left at budget 0: add text or raise the budget")
        real = self.mask
        if real is None:
            real = torch.ones(self.batch, self.length, dtype=torch.bool, device=self.device)
        spare = torch.cat((real, real[:, :1]), dim=1)  # the last column takes the writes of the tokens that stay
        spare[tokens.row[:, None], torch.where(tokens.valid & ~keep, tokens.position, self.length)] = False
        stays = spare[:, :-1]
        plan = compact.plan(stays, self.lengths)
        order = (~keep).long().argsort(dim=1, stable=True)[:, : max(counts)]
        self.tokens = Tokens(
            plan.source[tokens.row[:, None], tokens.position.gather(1, order)],
            tokens.index.gather(1, order),
            keep.gather(1, order),
            tokens.row,
            counts,
        )
        self.rows = {
            need: row.gather(2, order[:, None].expand(-1, row.shape[1], -1)) for need, row in self.rows.items()
        }
        self.mask, self.length = plan.mask, plan.index.shape[1]
        return plan, real & ~stays

    def _soften(self, gate: Tensor) -> None:
        """Bias the visual tokens as keys by log(gate), on top of what earlier stages left of them."""
        tokens = self.tokens
        row = tokens.row[:, None].expand_as(tokens.position)[tokens.valid]
        bias = torch.zeros(self.batch, self.length, device=self.device) if self.bias is None else self.bias
        logs = (gate + 1e-6).log()[tokens.valid]
        self.gate = gate if self.gate is None else self.gate * gate
        self.bias = bias.index_put((row, tokens.position[tokens.valid]), logs, accumulate=True)

    def _note(self, number: int, selection: Selection, scores: Tensor | None = None) -> None:
        layer, tokens = self.compression.stages[number].layer, self.tokens
        scores = None if scores is None else scores.detach()
        self.state.trace.stages.append(
            StageTrace(layer, tokens.index, tokens.valid, selection.keep, scores, selection.into, selection.gate)
        )

    @property
    def alive(self) -> Tensor:
        """(images, tokens) bool: the tokens that are left; under soft gates those that a hard drop would have left."""
        return self.tokens.valid if self.gate is None else self.tokens.valid & (self.gate > 0.5)

    # -- observation ----------------------------------------------------------------------------------------------

    def _observe_tower(self) -> None:
        """Take over what the tower showed about each image."""
        for need in self.compression.needs:
            if need.tower:
                rows = pad_sequence([image.rows[need].to(self.device).T for image in self.images], batch_first=True)
                self.rows[need] = rows.transpose(1, 2)

    def _observe_layer(self, layer: int, hidden: Tensor) -> None:
        """Make the rows that are due before decoder layer `layer`, which `hidden` is about to enter."""
        due = [need for need in self.compression.needs if not need.tower and need.before == layer]
        if due:
            with self.state.trace.clock.span("score", hidden.device):
                self.rows |= {need: need.row(self._seen(need, hidden), self) for need in due}

    def _seen(self, need: Need, hidden: Tensor) -> dict[str, Any]:
        """What the hooks wrote for a need, and the states about to enter the next layer, on the prompt's device."""
        record = {**self.record.pop(need, {}), "hidden": hidden}
        return {name: (x[0] if isinstance(x, tuple) else x).to(self.device) for name, x in record.items()}

    def columns(self, x: Tensor) -> Tensor:
        """The visual tokens' entries of a (batch, channels, length) tensor: (images, channels, tokens)."""
        x = x[self.tokens.row]
        return x.gather(2, self.tokens.position[:, None].expand(-1, x.shape[1], -1))

    def last_positions(self) -> Tensor:
        """Where the last token of each row's prompt sits in the current sequence: (batch, 1)."""
        last = torch.full((self.batch, 1), self.length - 1 - self.ahead, device=self.device)
        return last if self.mask is None else last - self.mask.flip(1).long().argmax(1, keepdim=True)

    def text_after_images(self) -> tuple[Tensor, Tensor]:
        """The real text that follows a row's first image: positions (batch, queries), and whether each of them comes
        after an image: (images, queries) float32."""
        tokens = self.tokens
        places = torch.arange(self.length, device=self.device)
        end = tokens.position.masked_fill(~tokens.valid, -1).amax(1)
        start = torch.full((self.batch,), self.length, device=self.device).scatter_reduce(0, tokens.row, end, "amin")
        text = (places > start[:, None]) & (places < self.length - self.ahead)
        text[tokens.row[:, None].expand_as(tokens.position)[tokens.valid], tokens.position[tokens.valid]] = False
        if self.mask is not None:
            text = text & self.mask
        positions = (~text).long().argsort(dim=1, stable=True)[:, : max(1, int(text.sum(1).max()))]
        asks = text.gather(1, positions)[tokens.row] & (positions[tokens.row] > end[:, None])
        return positions, asks.float()

    def rows_of(self, layer: int, query: Tensor, key: Tensor, positions: Tensor) -> Tensor:
        """Attention that the tokens at `positions` (batch, queries) pay in decoder layer `layer`.

        `query` (batch, queries, heads * head_dim) and `key` (batch, length, key_heads * head_dim) come before the
        rotary embedding. The softmax runs over the cached keys too. Returns (batch, heads, queries, length) float32.
        """
        adapter, past = self.compression.adapter, self.state.span(layer)
        attention = adapter.decoder_attention(adapter.layers[layer])
        cos, sin = (compact.gather(table, positions) for table in self.rotary[layer])
        query = adapter.rotate(attention.queries(query), cos, sin)
        key = adapter.rotate(attention.keys(key), *self.rotary[layer])
        if past.length:
            key = torch.cat((self._cached_keys(layer), key), dim=2)
        bias = None if self.bias is None else torch.nn.functional.pad(self.bias, (past.length, 0))[:, None, None]
        rows = attention_rows(query, key, attention.scale, self._sees(layer, positions), bias, attention.softcap)
        return rows[..., past.length :]

    def _cached_keys(self, layer: int) -> Tensor:
        """The keys that decoder layer `layer` had in the cache before this call."""
        cached = self.cache.layers[layer]
        if cached.keys.ndim != 4 or cached.keys.shape[2] != cached.get_seq_length():
            raise ValueError(
                f"{type(cached).__name__} does not hold all past keys as they were, and this method looks at them: "
                "for a second image in a conversation use a DynamicCache or a method that drops before the decoder"
            )
        return cached.keys[:, :, : self.state.span(layer).length]

    def _sees(self, layer: int, positions: Tensor) -> Tensor:
        """What the tokens at `positions` (batch, queries) see in decoder layer `layer`: (batch, queries, keys) bool."""
        past, window = self.state.span(layer), self._window(layer)
        places = torch.arange(-past.length, self.length, device=self.device)
        visible = places <= positions[..., None]
        same = None
        if self.blocks is not None:
            keys = torch.nn.functional.pad(self.blocks, (past.length, 0), value=-1)
            own = self.blocks.gather(1, positions)[..., None]
            same = (own == keys[:, None]) & (own >= 0)
            visible = visible | same
        if window is not None:
            origins = self._origins(layer)
            near = origins.gather(1, positions + past.length)[..., None] - origins[:, None] < window
            if same is not None and not self.compression.adapter.window_cuts_blocks:
                near = near | same
            visible = visible & near
        if (real := self._visible(layer)) is not None:
            # padding sees itself, so that the rows of queries that only fill up are no NaN
            visible = visible & real[:, None] | (places == positions[..., None])
        return visible

    # -- spans and exit -------------------------------------------------------------------------------------------

    def _visible(self, layer: int) -> Tensor | None:
        """(batch, cached + current) bool mask of the keys that layer `layer` sees; None when it sees all."""
        past = self.state.span(layer)
        return compact.join(past.mask, past.length, self.mask, (self.batch, self.length), self.device)

    def _begin_span(self, layer: int) -> None:
        past, visible = self.state.span(layer), self._visible(layer)
        pruned = self.origins is not None or past.origins is not None
        self.spans.append(Span(layer, past.length + self.length, visible, self._origins(layer) if pruned else None))

    def leave_decoder(self, outputs: Any) -> None:
        """After the text model: outputs in the shape of the unpruned sequence, and the state on to the cache."""
        if self.sources:
            outputs.last_hidden_state = compact.gather(outputs.last_hidden_state, self.sources[-1][1])
            if outputs.get("hidden_states") is not None:
                # entry 0 is the input of layer 0, entry n the output of layer n - 1
                outputs["hidden_states"] = tuple(
                    None if states is None else self._restored(max(entry - 1, 0), states)
                    for entry, states in enumerate(outputs.hidden_states)
                )
        cache = outputs.past_key_values
        if cache is not None:
            seen, trace = self.state.seen + self.entered, self.state.trace
            CacheState(seen, self.spans, trace, self.shift, self._tail()).attach(cache)
        self.state.trace.clock.add("prefill" if self.images else "decode", self.started, self.device)
        self.compression.publish(self.state.trace)

    def _tail(self) -> int:
        """See `CacheState.tail`: text after the last image of any row; none where padding follows it."""
        if not self.images:
            return self.state.tail + self.entered
        return 0 if self.padded_right else self.entered - 1 - self.last_visual

    def _restored(self, layer: int, states: Tensor) -> Tensor:
        sources = [source for start, source in self.sources if start <= layer]
        return compact.gather(states, sources[-1]) if sources else states


def _joined(found: list[tuple[Encoded, Tensor, int, int]], length: int) -> list[tuple[Encoded, Tensor, int, int]]:
    """Tiles (image, places, first place, last place) whose places touch within a row of `length`, as one image."""
    result = found[:1]
    for image, places, first, last in found[1:]:
        before, earlier, start, end = result[-1]
        if first == end + 1 and first % length:
            result[-1] = (before + image, torch.cat((earlier, places)), start, last)
        else:
            result.append((image, places, first, last))
    return result


def _block_overlay(blocks: Tensor) -> Callable[..., Tensor]:
    """A mask function: query and key are in the same block; `blocks` (batch, keys)."""

    def same(batch, head, query, key):
        return (blocks[batch, query] == blocks[batch, key]) & (blocks[batch, query] >= 0)

    return same


def _window_overlay(origins: Tensor, window: int, blocks: Tensor | None) -> Callable[..., Tensor]:
    """A mask function: the key is less than `window` columns back, or in the same one of `blocks`."""

    def near(batch, head, query, key):
        return origins[batch, query] - origins[batch, key] < window

    if blocks is None:
        return near
    same = _block_overlay(blocks)
    return lambda *place: near(*place) | same(*place)
