"""The story of one forward of a wrapped model: from embeddings, through the stages, to outputs of the usual shape.

What happens belongs to the call (`Forward`, found through a context variable) and, between prefill and decoding, to the
cache (`Held`); never to the module. So threads may share a model, and generations interleave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import vtc.compact as compact
import vtc.held as held
from vtc.call import Call
from vtc.choice import Choice, by_head
from vtc.clock import Clock
from vtc.columns import Columns
from vtc.compression import Compression
from vtc.features import locate
from vtc.held import Held
from vtc.need import Need
from vtc.stage import Cache, Site, Stage
from vtc.stream import Stream
from vtc.trace import StageTrace, Trace
from vtc.view import Tables, View
from vtc.visibility import Visibility

current: ContextVar[Forward | None] = ContextVar("vtc_forward", default=None)
answering: ContextVar[int] = ContextVar("vtc_answering", default=0)
"""How many columns at the end of what the model is given hold an answer to be rated, which no method may look at."""


class Shared:
    """What several layers ask for, made once of the very same things; they are kept, so that no other gets an id."""

    def __init__(self) -> None:
        self._made: dict[tuple, tuple[tuple, Any]] = {}

    def __call__(self, make: Callable[..., Any], *of: Any) -> Any:
        key = (make, *map(id, of))
        if key not in self._made:
            self._made[key] = of, make(*of)
        return self._made[key][1]


@dataclass(eq=False)
class Forward:
    """One call of the model, from the decoder's entry to its exit."""

    compression: Compression
    call: Call
    cache: Any
    past: Held
    """What the cache held of earlier calls."""
    stream: Stream
    keep: list[tuple[int, ...]] = field(default_factory=list)
    """For each image how many tokens stay after each stage."""
    visibility: Visibility | None = None
    """None where this call has nothing to do at all; then nothing is touched."""
    entry: Stream | None = None
    """What layer 0 reads, over which the text model makes its rotary tables."""
    tables: dict[int, Tables] = field(default_factory=dict)
    """The rotary tables of each decoder layer so far, over the running stream."""
    layers: list[tuple[Columns, Tensor]] = field(default_factory=list)
    """For each decoder layer so far the keys that it sees, and `Stream.source`."""
    shared: Shared = field(default_factory=Shared)
    tail: int = 0
    """See `Held.tail`."""

    # -- entry ----------------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, compression: Compression, call: Call, kwargs: dict[str, Any]) -> Forward:
        """The forward of a call whose text model is about to run with `kwargs`: where its images are, what the cache
        holds, how much of it stays."""
        embeds, cache = kwargs["inputs_embeds"], kwargs.get("past_key_values")
        (batch, length), device = embeds.shape[:2], embeds.device
        call.started = Clock.now(device)
        adapter, mask = compression.adapter, call.mask(kwargs, cache)
        before, real = (None, None) if mask is None else mask.to(device, torch.bool).tensor_split([-length], dim=1)
        past = Held.by(cache, len(adapter.layers), batch, before, device)
        images, lengths, tail = locate(call.encoded(device), length, adapter.joins_tiles), [], past.tail + length
        if images:  # at prefill only: decoding never waits for the device
            lengths, padded_right = _measured(real, batch, length)
            real = None if min(lengths) == length else real
            tail = 0 if padded_right else length - 1 - max(image.last % length for image in images)
        columns = Columns.counted(past.seen, real, (batch, length), device)
        forward = cls(compression, call, cache, past, Stream.entering(columns, images, lengths), tail=tail)
        forward._plan(batch)
        return forward

    def _plan(self, batch: int) -> None:
        """How many tokens of each image stay at each stage, and whether that means any work."""
        compression, stream = self.compression, self.stream
        self.keep = [compression.keep(count) for count in stream.counts]
        drops = any(kept and min(kept) < count for kept, count in zip(self.keep, stream.counts, strict=True))
        if stream.images or self.past.trace.depth == 0:
            trace = Trace(compression.depth, batch, stream.batch_rows, stream.counts, stream.grids)
            for encoding, _, _ in self.call.encoded(stream.columns.place.device):
                trace.clock.passages += encoding.passages
            self.past = replace(self.past, trace=trace)
            compression.publish(trace)
        if drops or not all(columns.whole for columns in self.past.layers):
            self.visibility = Visibility(compression.adapter, self.past.seen, self.past.seen + stream.length)
        elif stream.images:
            for stage in compression.stages:
                self._note(stage, Choice(stream.valid))

    def enter_decoder(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Before the text model runs: the encoder-site stages, and masks and positions of what they leave."""
        if self.visibility is None:
            return kwargs
        adapter, stream = self.compression.adapter, self.stream
        self.call.check(self.cache, any(map(self.visibility.window, range(len(adapter.layers)))))
        if stream.images:
            self.stream = stream.observed(self._tower_rows())
        kwargs, self.call.late = adapter.late_features(kwargs)
        self.visibility.blocks = self._blocks()
        embeds = kwargs["inputs_embeds"]
        for number, stage in self._stages(0):
            embeds = self._run(number, stage, embeds)
        self.entry = self.stream
        positions, columns = self._positions(kwargs, stream), self._held(0)
        if columns.whole and self.past.shift is None:
            return kwargs
        mask = kwargs.get("attention_mask")
        if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
            place = columns.place if columns.place.ndim == 2 else columns.place[:, 0]
            # gapped positions with neither mask nor cache would be taken for packed sequences
            mask = place >= 0 if columns.ragged or self.cache is None else None
        return {**kwargs, "inputs_embeds": embeds, "position_ids": positions, "attention_mask": mask}

    def _tower_rows(self) -> dict[Need, Tensor]:
        """What the tower showed about each image: (images, channels, tokens) each."""
        device = self.stream.columns.place.device

        def padded(need: Need) -> Tensor:
            rows = [image.image.rows[need].to(device).T for image in self.stream.images]
            return pad_sequence(rows, batch_first=True).transpose(1, 2)

        return {need: padded(need) for need in self.compression.needs if need.tower}

    def _blocks(self) -> Tensor | None:
        blocks = None if self.past.seen else self.compression.adapter.blocks(self.call.inputs)
        if blocks is not None:
            blocks = blocks.to(self.stream.columns.place.device, copy=True)
            if self.call.ahead:  # a guess is no part of the prompt's block, whatever the text model would make of it
                blocks[:, -self.call.ahead :] = -1
        return blocks

    def _positions(self, kwargs: dict[str, Any], entered: Stream) -> Tensor:
        """(..., batch, length): the positions of what is left; the original ones, unless a stage renumbers."""
        positions, shift = kwargs.get("position_ids"), self.past.shift
        if positions is None:
            positions = torch.arange(entered.length, device=kwargs["inputs_embeds"].device)[None] + self.past.seen
        if shift is not None:
            positions = positions - shift
        if any(stage.contiguous for _, stage in self._stages(0)):
            if positions.ndim == 3:
                raise ValueError("positions in time, height and width cannot be renumbered: keep the original ones")
            gone = self.stream.gone(entered).long().cumsum(1)
            positions, shift = positions - gone, gone[:, -1:] if shift is None else gone[:, -1:] + shift
            self.past = replace(self.past, shift=shift)
        return compact.gather(positions, self.stream.entered(self.past.seen), dim=-1)

    # -- stages ---------------------------------------------------------------------------------------------------

    def _stages(self, site: Site) -> list[tuple[int, Stage]]:
        return [(number, stage) for number, stage in enumerate(self.compression.stages) if stage.site == site]

    def _run(self, number: int, stage: Stage, hidden: Tensor) -> Tensor:
        """Score, select, compact: the states of what is left."""
        if (choice := self._chosen(number, stage, hidden)) is None:
            return hidden
        if choice.gate is not None:
            self.stream = self.stream.gated(choice.gate)
            return hidden
        with self.past.trace.clock.timed("compact", hidden.device):
            counts = [keep[number] for keep in self.keep]
            if self.compression.method.adaptive:
                counts = choice.keep.sum(1).tolist()
            self.stream, hidden = self.stream.apply(choice, counts, self.past.trace.stages[-1].scores, hidden)
        return hidden

    def _chosen(self, number: int, stage: Stage, hidden: Tensor) -> Choice | None:
        """What a stage chooses; None where there is nothing to choose."""
        stream, counts = self.stream, [keep[number] for keep in self.keep]
        if not stream.images:
            return None
        if all(count >= left for count, left in zip(counts, stream.counts, strict=True)):
            self._note(stage, Choice(stream.valid))
            return None
        timed, device, seen = self.past.trace.clock.timed, hidden.device, stream.seen(stage.needs)
        with timed("score", device):
            scores = stage.score(seen)
        with timed("select", device):
            choice = by_head(stage.select, scores, seen, torch.tensor(counts, device=device))
        self._note(stage, choice, scores)
        return choice

    def _note(self, stage: Stage, choice: Choice, scores: Tensor | None = None) -> None:
        scores, stream = None if scores is None else scores.detach(), self.stream
        self.past.trace.stages.append(
            StageTrace(stage.site, stream.index, stream.valid, choice.keep, scores, choice.into, choice.gate)
        )

    # -- between the decoder's layers -----------------------------------------------------------------------------

    @torch.compiler.disable  # compiled layers compute; what happens between them is no part of their graphs
    def before_layer(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The whole story of a decoder layer: observe, let the stages choose, and hand on what the layer reads."""
        tables, late = kwargs["position_embeddings"], self.call.late
        self.cache = kwargs.get("past_key_values", self.cache)  # the text model makes one where it was given none
        if 0 < layer <= len(late):
            hidden = hidden + compact.gather(late[layer - 1], self.stream.entered(self.past.seen)).to(hidden)
        self.tables[layer] = self._carried(tables)
        self._observe([need for need in self.compression.needs if need.before == layer], hidden)
        for number, stage in self._stages(layer) if layer else ():
            hidden = self._run(number, stage, hidden)
        self.tables[layer] = self._carried(tables)
        columns = self._held(layer)
        self.layers.append((columns, self.stream.source))
        if not self._own(columns):
            return hidden, kwargs
        mask = self.visibility.mask(layer, columns, self.stream.length, hidden, self.cache)
        # without position_ids no kernel can mistake their gaps for packed sequences
        own = {"attention_mask": mask, "position_embeddings": self.tables[layer], "position_ids": None}
        return hidden, {**kwargs, **own}

    def _own(self, columns: Columns) -> bool:
        """Whether a layer gets mask and rotary tables from here instead of the text model's own."""
        guesses = self.call.ahead and self.visibility.blocks is not None
        return bool(guesses or columns.weight is not None or not (columns.whole and self._held(0).whole))

    @torch.compiler.disable
    def after_layer(self, layer: int, hidden: Tensor) -> None:
        """What the stages at its cache leave of a layer's keys and values; the stream goes on as it is."""
        for number, stage in self._stages(Cache(layer)):
            self._observe(stage.needs, hidden)
            if (choice := self._chosen(number, stage, hidden)) is not None:
                self._narrow(layer, choice, [keep[number] for keep in self.keep])

    def _narrow(self, layer: int, choice: Choice, counts: list[int]) -> None:
        """Leave a layer's cache what it held before, the text, and the tokens of a choice, `counts` of each image."""
        if self.cache is None:
            raise ValueError(
                f"{self.compression.method.name} drops from the cache, and this call has none: use_cache=True"
            )
        (columns, source), stays = self.layers[layer], self.stream.stays(choice.keep)
        columns = columns if stays.ndim == 2 else columns.by_head(stays.shape[1])
        before = self.past.layers[layer]
        all_stays = columns.place >= 0
        all_stays[..., before.length :] = stays if stays.ndim == all_stays.ndim else stays[:, None]
        plan = compact.plan(all_stays.flatten(0, -2), self._lengths(layer, columns, counts))
        held.narrow(self.cache, layer, plan)
        self.layers[layer] = columns.kept(plan), source

    def _lengths(self, layer: int, columns: Columns, counts: list[int]) -> list[int]:
        """How many keys are left in each row, or in each head of each row."""
        before, heads = self.past.layers[layer], columns.place.flatten(0, -2).shape[0] // len(columns.place)
        left = [length for length in self.stream.lengths_after(counts) for _ in range(heads)]
        if not before.ragged:
            return [before.length + length for length in left]
        held_before = before.by_head(heads) if columns.place.ndim == 3 else before  # only this asks the device
        return [a + b for a, b in zip((held_before.place >= 0).sum(-1).flatten().tolist(), left, strict=True)]

    def _observe(self, needs: Sequence[Need], hidden: Tensor) -> None:
        """Make those rows of the decoder that are not made yet; `hidden` has come out of its last layer."""
        due = [need for need in needs if not need.tower and need not in self.stream.rows]
        if due and self.stream.images:
            view = self._view(hidden)
            with self.past.trace.clock.timed("score", hidden.device):
                rows = {need: need.row(self._recorded(need, hidden.device), view) for need in due}
            self.stream = self.stream.observed(rows)

    def _view(self, hidden: Tensor) -> View:
        return View(
            self.compression.adapter, self.stream, hidden, self.call.ahead, self.tables, self.past.layers,
            self.visibility, self.cache,
        )  # fmt: skip

    def _recorded(self, need: Need, device: torch.device) -> dict[str, Tensor]:
        """What the hooks wrote for a need, on the prompt's device."""
        record = self.call.record.pop(need, {})
        return {name: (x[0] if isinstance(x, tuple) else x).to(device) for name, x in record.items()}

    def _held(self, layer: int) -> Columns:
        """The keys of a decoder layer: those of the cache, and the running stream."""
        return self.shared(Columns.then, self.past.layers[layer], self.stream.columns)

    def _carried(self, tables: Tables) -> Tables:
        """The text model's rotary tables over the running stream."""
        if self.stream.columns.place is self.entry.columns.place:
            return tables
        return self.shared(_gathered, tables, self.shared(_between, self.entry, self.stream.columns, self.past))

    # -- exit -----------------------------------------------------------------------------------------------------

    def leave_decoder(self, outputs: Any) -> None:
        """After the text model: outputs in the shape of the unpruned sequence, and the state on to the cache."""
        if not self.stream.columns.whole:
            outputs.last_hidden_state = compact.gather(outputs.last_hidden_state, self.stream.source)
            if outputs.get("hidden_states") is not None:
                # entry 0 is the input of layer 0, entry n the output of layer n - 1
                outputs["hidden_states"] = tuple(
                    compact.gather(states, self.layers[max(entry - 1, 0)][1])
                    for entry, states in enumerate(outputs.hidden_states)
                )
        if (cache := outputs.past_key_values) is not None:
            layers = [self._held(layer) for layer in range(len(self.past.layers))]
            if self.layers:
                layers = [columns for columns, _ in self.layers]
            entered = self.stream.source.shape[1]
            replace(self.past, seen=self.past.seen + entered, layers=tuple(layers), tail=self.tail).attach(cache)
        device = self.stream.columns.place.device
        self.past.trace.clock.add("prefill" if self.stream.images else "decode", self.call.started, device)


def _measured(real: Tensor | None, batch: int, length: int) -> tuple[list[int], bool]:
    """Real positions of each row, and whether any row ends with filling: the one time that the host asks the device."""
    if real is None:
        return [length] * batch, False
    *lengths, filled = torch.cat((real.sum(1), real[:, -1:].all(0))).tolist()
    return lengths, not filled


def _between(entry: Stream, columns: Columns, past: Held) -> Tensor:
    """Where the tokens of the running stream were when the decoder began: (batch, length)."""
    return compact.gather(entry.source, (columns.place - past.seen).clamp(min=0))


def _gathered(tables: Tables, index: Tensor) -> Tables:
    cos, sin = (compact.gather(table, index) for table in tables)
    return cos, sin
