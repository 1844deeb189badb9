"""What hangs on a wrapped model: which hook tells which part of a forward. It hangs once, whoever compresses."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import vtc.adapter as adapters
import vtc.cache.held_cache as held_cache
from vtc.core.call import Call, Prompt, modalities
from vtc.core.clock import Clock
from vtc.core.compression import Compression
from vtc.core.features import Encoded, Encoding
from vtc.core.force import InForce, chosen
from vtc.core.patch import Patch, after, around, before, sees, tell_compiler
from vtc.core.running import enter_decoder, enter_layer, forget, leave_decoder, leave_layer, running
from vtc.core.skipping import skippable, skipped
from vtc.need import Need, Record, recording
from vtc.observe import Tower


class Hooks(InForce):
    """What `model.vtc` is: all that hangs on a model, and the compressions that are in force on it."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.adapter = model, adapters.find(model)
        if vars(self.adapter.backbone).get("vtc") is not None:
            raise ValueError(f"a part of this {type(model).__name__} is wrapped: unwrap that one first")
        self._handles: dict[Need | None, list[Any]] = {}
        """Of the hooks of each need, and of those that are always there (None)."""
        self._patches: list[Patch] = []
        self._modules: list[nn.Module] = []
        """All that the model was made of when its hooks were hung."""

    # -- hanging --------------------------------------------------------------------------------------------------

    def fits(self) -> bool:
        return list(self.model.modules()) == self._modules

    def update(self) -> None:
        """Bring the hooks in line with what is in force, and with the modules that run now."""
        in_force, modules = self.compressions, list(self.model.modules())
        needs = {need: None for compression in in_force for need in compression.needs}
        if not in_force or modules != self._modules:
            self._take_off(self._handles)
            while self._patches:
                self._patches.pop().remove()
        if not in_force:
            return
        if not self._patches:
            self._patch()
        self._take_off(self._handles.keys() - {None, *needs})
        if None not in self._handles:
            self._handles[None] = self._hang()
        for need in needs.keys() - self._handles.keys():
            self._handles[need] = need.hooks(self.adapter)
        self._modules = modules
        tell_compiler(self.model)

    def _take_off(self, needs: Iterable[Need | None]) -> None:
        for need in list(needs):
            for handle in self._handles.pop(need):
                handle.remove()

    def _patch(self) -> None:
        model, backbone = self.model, self.adapter.backbone
        self._patches += [Patch(owner, "vtc", self) for owner in dict.fromkeys((model, backbone))]
        self._patches.append(Patch(backbone, "forward", around(backbone.forward, self._forward)))
        if hasattr(model, "generate"):
            self._patches.append(Patch(model, "generate", around(model.generate, self._generate)))
        for modality in self.adapter.placeholders():
            name = f"get_{modality}_features"
            self._patches.append(Patch(backbone, name, around(getattr(backbone, name), self._features, modality)))
        self._patches += skippable(self.adapter)

    def _hang(self) -> list[Any]:
        pairs = [
            (self.adapter.backbone, self._enter, self._leave),
            (self.adapter.decoder, enter_decoder, leave_decoder),
        ]
        pairs += [
            (layer, functools.partial(enter_layer, number), functools.partial(leave_layer, number))
            for number, layer in enumerate(self.adapter.layers)
        ]
        return [
            handle
            for part, enter, leave in pairs
            for handle in (before(part, enter), after(part, leave, always=part is self.adapter.backbone))
        ]

    # -- a call ---------------------------------------------------------------------------------------------------

    def _ended(self) -> bool:
        """Whether nothing is in force any more, for what was taken from the model before and is called only now.

        Raises RuntimeError where that was to be compressed: in a copy of the context of a block that has ended.
        """
        if self.compressions:
            return False
        now = vars(self.model).get("vtc")
        over = {*chosen.get()} - {*([] if now is None else now.compressions)}
        if any(compression.adapter.model is self.model for compression in over):
            raise RuntimeError("the block of vtc.compressed that this context was copied from has ended")
        return True

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._ended():
            return original(*args, **kwargs)
        forget()
        given = kwargs.get("generation_config") or self.model.generation_config
        if sees(kwargs) and kwargs.get("prefill_chunk_size", given.prefill_chunk_size) is not None:
            raise ValueError("a wrapped model reads a prompt with images whole: leave prefill_chunk_size out")
        guesses = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
        if self.compression.selects and any(kwargs.get(name, getattr(given, name, None)) for name in guesses):
            raise ValueError(
                f"{self.compression.method.name} chooses for each token what it reads, and assisted generation reads "
                "several at once, which would give another answer: generate without it"
            )
        config = kwargs.get("compile_config") or getattr(given, "compile_config", None)
        if config is not None and config.fullgraph and not self._steps_rest(kwargs):
            warnings.warn("a pruned model is several graphs, as hooks run between them: fullgraph=False", stacklevel=3)
            kwargs["compile_config"] = copy.copy(config)
            kwargs["compile_config"].fullgraph = False
        with self.generating(Prompt.of(args, kwargs), sees(kwargs)):
            return original(*args, **kwargs)

    def _steps_rest(self, kwargs: dict[str, Any]) -> bool:
        """Whether no step behind the prompt of a generate() has anything for the hooks to do."""
        observed = any(need is not None and not need.tower for need in self._handles)
        past: Any = getattr(kwargs.get("past_key_values"), "vtc", None)
        everything = isinstance(budget := self.compression.budget, float) and budget == 1
        return not observed and (past is None or past.rests) and (everything or not sees(kwargs))

    def _enter(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        forget()
        held_cache.wake(kwargs.get("past_key_values"))
        given = {**dict(zip(_arguments(type(backbone).forward), args, strict=False)), **kwargs}
        compression = self.begin(sees(given))
        try:
            call = Call(compression, given, modalities(self.adapter, given), prompt=self.prompt())
            for modality, outputs in (given.get("mm_encoder_outputs") or {}).items():
                call.encodings[modality] = (outputs.get("vtc"), len(outputs.pooler_output))
        except BaseException:
            self.end(compression)
            raise
        running.set(call)

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The backbone, left also where Ctrl-C ends it: torch's hooks behind a module hear of an `Exception` only."""
        if torch.compiler.is_compiling():  # hooks run between graphs, and graphs cannot end within a try
            return original(*args, **kwargs)
        try:
            return original(*args, **kwargs)
        except BaseException:
            held_cache.rest(kwargs.get("past_key_values"))
            self._leave(self.adapter.backbone, args, None)
            raise

    def _leave(self, backbone: nn.Module, args: tuple, outputs: Any) -> None:
        if (call := running.get()) is not None:
            self.end(call.compression)
        forget()
        held_cache.rest(getattr(outputs, "past_key_values", None))

    # -- the vision tower -----------------------------------------------------------------------------------------

    def _features(self, modality: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The encoder, which leaves on its output what the tower showed."""
        if recording.get() is not None or self._ended():  # one modality's encoder is made of the other's
            return original(*args, **kwargs)
        call = running.get()
        compression = self.begin(sees=True) if call is None else call.compression
        try:
            outputs = self._observed(compression, original, args, kwargs)
        finally:
            if call is None:
                self.end(compression)
        if isinstance(call, Call):
            call.encodings[modality] = (outputs["vtc"], len(outputs.pooler_output))
        return outputs

    def _observed(self, compression: Compression, original: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        call = inspect.signature(original).bind(*args, **kwargs).arguments
        call = {**call, **call.pop("kwargs", {})}
        if call.get("return_dict", getattr(self.model.config, "return_dict", True)) is False:
            return original(*args, **kwargs)  # a tuple has no room for what was seen, and no gaps
        record: Record = {need: {} for need in compression.needs}
        # where parameters are offloaded they have no device to speak of
        device = next((x.device for x in call.values() if isinstance(x, Tensor)), self.model.device)
        token, start = recording.set(record), Clock.now(device)
        try:
            with skipped(self.adapter, call) as skips:
                outputs = original(*args, **kwargs)
        finally:
            recording.reset(token)
        if skips:  # what would stand there is not the tower's last state
            outputs = type(outputs)(**{name: x for name, x in outputs.items() if name != "last_hidden_state"})
        seen = Clock.now(device)
        with torch.autocast(outputs.pooler_output[0].device.type, enabled=False):
            images = self._encoded(compression, record, call, outputs.pooler_output)
        passages = [("vision", start, seen), ("score", seen, Clock.now(device))]
        outputs["vtc"] = Encoding(images, len(outputs.pooler_output), passages)  # an entry outlives moves to a device
        return outputs

    def _encoded(self, compression: Compression, record: Record, call: dict[str, Any], features: Any) -> list[Encoded]:
        """What the tower showed about each image."""
        tower = Tower(self.adapter, call)
        rows = {need: need.row(record[need], tower) for need in compression.needs if need.tower}
        packed = {need: self.adapter.pack(row.transpose(1, 2), call) for need, row in rows.items()}
        return [
            Encoded({need: rows[image].T for need, rows in packed.items()}, grids)
            for image, grids in enumerate(self.adapter.parts(call, [len(feature) for feature in features]))
        ]


@functools.cache
def _arguments(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of what a module's forward may be given by position."""
    _, *names = inspect.signature(forward).parameters
    return tuple(names)
