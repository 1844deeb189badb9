"""The story of one forward of a wrapped model: from embeddings, through the stages, to outputs of the usual shape.

What happens belongs to the call (`Forward`, found through a context variable) and, between prefill and decoding, to the
cache (`Held`); never to the module. So threads may share a model, and generations interleave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vtc.cache.held as held
import vtc.cache.steps as steps
import vtc.core.compact as compact
from vtc.cache.held import Held
from vtc.cache.held_cache import attach
from vtc.choice import Choice, by_head
from vtc.core.call import Call, by_column
from vtc.core.clock import Clock
from vtc.core.columns import Columns
from vtc.core.compression import Compression
from vtc.core.features import locate, tower_rows
from vtc.core.rotary import Tables, carried
from vtc.core.shared import Shared
from vtc.core.stream import Stream
from vtc.core.visibility import Visibility
from vtc.need import Need
from vtc.stage import Cache, Site, Stage
from vtc.trace import Trace
from vtc.view import View


@dataclass(eq=False)
class Forward:
    """One call of the model, from the decoder's entry to its exit."""

    call: Call
    cache: Any
    past: Held
    """What the cache held of earlier calls."""
    stream: Stream
    visibility: Visibility
    entry: Stream
    """What layer 0 reads, over which the text model makes its rotary tables."""
    busy: bool = False
    """Whether this call has anything to do at all; else nothing is touched."""
    ahead: int = 0
    """Tokens at the end that do not belong to the prompt."""
    tables: dict[int, Tables] = field(default_factory=dict)
    """The rotary tables of each decoder layer so far, over the running stream."""
    layers: list[tuple[Columns, Tensor]] = field(default_factory=list)
    """For each decoder layer so far the keys that it holds, and `Stream.source`."""
    shared: Shared = field(default_factory=Shared)

    @property
    def compression(self) -> Compression:
        return self.call.compression

    # -- entry ----------------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, call: Call, kwargs: dict[str, Any]) -> Forward:
        """The forward of a call whose text model is about to run with `kwargs`."""
        embeds, cache, compression = kwargs["inputs_embeds"], kwargs.get("past_key_values"), call.compression
        (batch, length), device, adapter = embeds.shape[:2], embeds.device, compression.adapter
        call.started, past = Clock.now(device), Held.by(cache, len(adapter.layers), batch, device)
        before, real = call.masks(kwargs, cache, past.seen)
        if not call.decodes(past.seen, length):  # generate() makes the masks of its steps
            past = past.under(before)
        images = locate(call.encoded(device), compression.needs, length, adapter.joins_tiles)
        stream = Stream.entering(past.seen, real, embeds, images)
        visibility = Visibility(adapter, compression.windows, past.seen, past.seen + length)
        forward = cls(call, cache, past, stream, visibility, stream, ahead=call.ahead(visibility.reach))
        forward._plan(batch)
        return forward

    def _plan(self, batch: int) -> None:
        """Whether what the method keeps of each image means any work."""
        compression, stream = self.compression, self.stream
        kept = [compression.keep(count) for count in stream.counts]
        drops = any(counts and min(counts) < count for counts, count in zip(kept, stream.counts, strict=True))
        self.busy = drops or self.past.pruned
        if stream.images or self.past.trace.depth == 0:
            sizes = [image.image.tokens for image in stream.images]
            trace = Trace(compression.shape.decoder_layers, batch, stream.batch_rows, sizes, stream.grids)
            trace.clock.passages += self.call.passages
            self.past = replace(self.past, trace=trace)
        self.call.watch(bool(stream.images), self.busy)
        if stream.images and not self.busy:
            for stage in compression.stages:
                self.past.trace.note(stage, stream, Choice(stream.valid))

    def enter_decoder(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Before the text model runs: the encoder-site stages, and masks and positions of what they leave."""
        if not self.busy:
            return kwargs
        adapter, entered = self.compression.adapter, self.stream
        self.call.check(self.cache, any(map(self.visibility.window, range(len(adapter.layers)))))
        if entered.images:
            self.stream = entered.observed(tower_rows(entered.images, self.compression.needs, entered.device))
        kwargs, self.call.late = adapter.late_features(kwargs)
        self.visibility.blocks = self.call.blocks(self.past.seen, entered.columns.length, self.ahead, entered.device)
        embeds = kwargs["inputs_embeds"]
        needs = [need for _, stage in self._stages(0) for need in stage.needs]
        if not all(need.tower for need in needs):
            self.tables[0] = adapter.rotary_tables(embeds, self.past.positions(kwargs))
            self._observe(needs, embeds)
        for number, stage in self._stages(0):
            embeds = self._run(number, stage, embeds)
        self.entry = self.stream
        positions, columns = self._positions(kwargs, entered), self._keys(0)
        if columns.whole and self.past.shift is None:
            return kwargs
        mask = kwargs.get("attention_mask")
        if mask is None or by_column(mask):
            place = columns.place if columns.place.ndim == 2 else columns.place[:, 0]
            # gapped positions with neither mask nor cache would be taken for packed sequences
            mask = place >= 0 if columns.ragged or self.cache is None else None
        return {**kwargs, "inputs_embeds": embeds, "position_ids": positions, "attention_mask": mask}

    def _positions(self, kwargs: dict[str, Any], entered: Stream) -> Tensor:
        """(..., batch, length): the positions of what is left; the original ones, unless a stage renumbers."""
        positions, shift = self.past.positions(kwargs), self.past.shift
        if any(stage.contiguous for _, stage in self._stages(0)):
            if positions.ndim == 3:
                raise ValueError("positions in time, height and width cannot be renumbered: keep the original ones")
            gone = self.stream.gone(entered).long().cumsum(1)
            positions, shift = positions - gone, gone[:, -1:] if shift is None else gone[:, -1:] + shift
            self.past = replace(self.past, shift=shift)
        return compact.gather(positions, self.stream.entered, dim=-1)

    # -- stages ---------------------------------------------------------------------------------------------------

    def _stages(self, site: Site) -> list[tuple[int, Stage]]:
        stages = self.compression.stages if self.stream.images else ()  # decoding has nothing to look for
        return [(number, stage) for number, stage in enumerate(stages) if stage.due == site]

    def _counts(self, number: int) -> list[Any]:
        """How many tokens of each image a stage leaves, of those that came in; whole numbers but for a `Precision`."""
        return [self.compression.keep(image.shown)[number] for image in self.stream.images]

    def _run(self, number: int, stage: Stage, hidden: Tensor) -> Tensor:
        """Score, select, compact: the states of what is left."""
        if (chosen := self._choose(number, stage, hidden)) is None:
            return hidden
        choice, scores = chosen
        if choice.gate is not None:
            self.stream = self.stream.gated(choice.gate)
            return hidden
        with self.past.trace.clock.timed("compact", hidden.device):
            adaptive = self.compression.method.adaptive
            counts = choice.keep.sum(1).tolist() if adaptive else self._counts(number)
            self.stream, hidden = self.stream.apply(choice, counts, scores, hidden)
        return hidden

    def _choose(self, number: int, stage: Stage, hidden: Tensor) -> tuple[Choice, Tensor] | None:
        """What a stage chooses, and by which scores, in float32 also under autocast; None where it has no choice."""
        stream, counts = self.stream, self._counts(number)
        if all(count >= left for count, left in zip(counts, stream.counts, strict=True)):
            self.past.trace.note(stage, stream, Choice(stream.valid))
            return None
        clock, device, seen = self.past.trace.clock, hidden.device, stream.seen(stage.needs)
        with clock.timed("score", device), torch.autocast(device.type, enabled=False):
            scores = stage.score(seen)
        with clock.timed("select", device), torch.autocast(device.type, enabled=False):
            choice = by_head(stage.select, scores, seen, torch.tensor(counts).to(device, non_blocking=True))
        self.past.trace.note(stage, stream, choice, scores)
        return choice, scores

    # -- between the decoder's layers -----------------------------------------------------------------------------

    def before_layer(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The whole story of a decoder layer: observe, let the stages choose, and hand on what the layer reads."""
        tables, late = kwargs["position_embeddings"], self.call.late
        self.cache = kwargs.get("past_key_values", self.cache)  # the text model makes one where it was given none
        if 0 < layer <= len(late):
            hidden = hidden + compact.gather(late[layer - 1], self.stream.entered).to(hidden)
        self.tables[layer] = carried(tables, self.entry, self.stream, self.shared)
        self._observe([need for need in self.call.record if need.before == layer], hidden)
        for number, stage in self._stages(layer) if layer else ():
            hidden = self._run(number, stage, hidden)
        self.tables[layer] = carried(tables, self.entry, self.stream, self.shared)
        columns = self._keys(layer)
        self.layers.append((columns, self.stream.source))
        if not self.stream.images:
            stages, reads = self.compression.stages, self.past.trace.reads
            columns = steps.handed(stages, layer, self.cache, columns, partial(self._row, hidden), reads, self.shared)
        if not self._own(columns):
            return hidden, kwargs
        mask = self.visibility.mask(layer, columns, self.stream.length, hidden, self.cache)
        # without position_ids no kernel can mistake their gaps for packed sequences
        own = {"attention_mask": mask, "position_embeddings": self.tables[layer], "position_ids": None}
        return hidden, {**kwargs, **own}

    def after_layer(self, layer: int, hidden: Tensor) -> None:
        """What the stages that are due behind a layer leave of keys and values; the stream goes on as it is."""
        for number, stage in self._stages(Cache(layer)):
            of, counts = stage.site.layer if isinstance(stage.site, Cache) else layer, self._counts(number)
            (now, source), before = self.layers[of], self.past.layers[of]
            if stage.when == "decode":
                self.layers[of] = held.part(self.cache, of, before, now, self.stream, counts, self.shared), source
                self.past.trace.note(stage, self.stream, Choice(self.stream.valid), reads=torch.tensor(counts))
                continue
            self._observe(stage.needs, hidden)
            if (chosen := self._choose(number, stage, hidden)) is not None:
                kept = self.stream, chosen[0], counts, stage.precision
                self.layers[of] = held.keep(self.cache, of, before, now, *kept), source

    def _row(self, hidden: Tensor, need: Need) -> Tensor:
        """What is seen for a need; `hidden` has come out of the decoder's last layer so far."""
        view = View(self.compression.adapter, self.stream, hidden, self.ahead, self.tables, self.past.layers,
                    self.visibility, self.cache)  # fmt: skip
        return need.row(self.call.recorded(need, hidden.device), view)

    def _observe(self, needs: Sequence[Need], hidden: Tensor) -> None:
        """Make those rows of the decoder that are not made yet; `hidden` has come out of its last layer."""
        due = [need for need in needs if not need.tower and need not in self.stream.rows]
        if due and self.stream.images:
            with self.past.trace.clock.timed("score", hidden.device), torch.autocast(hidden.device.type, enabled=False):
                rows = {need: self._row(hidden, need) for need in due}
            self.stream = self.stream.observed(rows)

    def _keys(self, layer: int) -> Columns:
        """The keys that a decoder layer sees: those of the cache, and the running stream."""
        return self.shared(Columns.then, self.past.layers[layer], self.stream.columns)

    def _own(self, columns: Columns) -> bool:
        """Whether a layer gets mask and rotary tables from here instead of the text model's own."""
        guesses = self.ahead and self.visibility.blocks is not None
        return bool(guesses or columns.weight is not None or not (columns.whole and self._keys(0).whole))

    # -- exit -----------------------------------------------------------------------------------------------------

    def leave_decoder(self, outputs: Any) -> None:
        """After the text model: outputs in the shape of the unpruned sequence, and the state on to the cache."""
        if not self.stream.columns.whole:
            compact.unpruned(outputs, self.stream.source, [source for _, source in self.layers])
        if outputs.past_key_values is not None:
            layers = [columns for columns, _ in self.layers] or list(map(self._keys, range(len(self.past.layers))))
            seen, tail = self.visibility.reach, self.stream.tail + (0 if self.stream.images else self.past.tail)
            attach(outputs.past_key_values, replace(self.past, seen=seen, layers=tuple(layers), tail=tail))
        self.past.trace.clock.add("prefill" if self.stream.images else "decode", self.call.started, self.stream.device)
        self.compression.publish(self.past.trace)
