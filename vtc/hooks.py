"""Hanging a compression on its model: which hook tells which part of a forward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from vtc.call import Call, answering
from vtc.clock import Clock
from vtc.compression import Compression
from vtc.features import Encoded, Encoding
from vtc.forward import Forward
from vtc.need import Record, recording
from vtc.observe import Tower
from vtc.patch import Patch
from vtc.skipping import skippable, skipped

running: ContextVar[Call | Forward | None] = ContextVar("vtc_running", default=None)
"""The call of the backbone that runs, and once its decoder runs, the forward."""
asked: ContextVar[int] = ContextVar("vtc_asked", default=0)
"""How many positions at the end the running call wants logits of: all but the first of them come after the prompt."""


def install(compression: Compression) -> None:
    """Hang `compression` on its model; `Compression.remove` takes it off."""
    adapter, bind = compression.adapter, functools.partial
    backbone, decoder = adapter.backbone, adapter.decoder
    compression.handles += [
        *(
            Patch(
                backbone, name := f"get_{modality}_features", _observed(compression, modality, getattr(backbone, name))
            )
            for modality in adapter.placeholders()
        ),
        adapter.model.register_forward_pre_hook(_ask, with_kwargs=True),
        backbone.register_forward_pre_hook(bind(_enter, compression), with_kwargs=True),
        backbone.register_forward_hook(_leave, always_call=True),
        decoder.register_forward_pre_hook(bind(_enter_decoder, compression), with_kwargs=True),
        decoder.register_forward_hook(_leave_decoder),
        *(
            handle
            for number, layer in enumerate(adapter.layers)
            for handle in (
                layer.register_forward_pre_hook(bind(_enter_layer, number), with_kwargs=True),
                layer.register_forward_hook(bind(_leave_layer, number)),
            )
        ),
        *(handle for need in compression.needs for handle in need.hooks(adapter)),
        *skippable(adapter),
    ]
    _tell_compiler(adapter.model)


# -- the vision tower -------------------------------------------------------------------------------------------------


def _observed(compression: Compression, modality: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """The encoder, which leaves on its output what the tower showed."""
    signature, adapter = inspect.signature(original), compression.adapter

    @functools.wraps(original)
    def get_features(*args: Any, **kwargs: Any) -> Any:
        if recording.get() is not None:  # one modality's encoder is made of the other's
            return original(*args, **kwargs)
        call = signature.bind(*args, **kwargs).arguments
        call = {**call, **call.pop("kwargs", {})}
        record: Record = {}
        token, start = recording.set(record), Clock.now(adapter.model.device)
        try:
            with skipped(adapter, call) as skips:
                outputs = original(*args, **kwargs)
        finally:
            recording.reset(token)
        if skips:  # what would stand there is not the tower's last state
            outputs = type(outputs)(**{name: x for name, x in outputs.items() if name != "last_hidden_state"})
        seen = Clock.now(adapter.model.device)
        images = _encoded(compression, record, call, outputs.pooler_output)
        passages = [("vision", start, seen), ("score", seen, Clock.now(adapter.model.device))]
        outputs["vtc"] = Encoding(images, len(outputs.pooler_output), passages)  # an entry outlives moves to a device
        if isinstance(call := running.get(), Call):
            call.encodings[modality] = (outputs["vtc"], len(outputs.pooler_output))
        return outputs

    return get_features


def _encoded(compression: Compression, record: Record, call: dict[str, Any], features: Any) -> list[Encoded]:
    """What the tower showed about each image."""
    adapter = compression.adapter
    tower = Tower(adapter, call)
    rows = {need: need.row(record.get(need, {}), tower) for need in compression.needs if need.tower}
    packed = {need: adapter.pack(row.transpose(1, 2), call) for need, row in rows.items()}
    return [
        Encoded({need: rows[image].T for need, rows in packed.items()}, grids)
        for image, grids in enumerate(adapter.parts(call, [len(feature) for feature in features]))
    ]


# -- the decoder ------------------------------------------------------------------------------------------------------


def _ask(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    keep = kwargs.get("logits_to_keep")
    asked.set(keep if isinstance(keep, int) else 0)


def _enter(compression: Compression, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    given = {**dict(zip(("input_ids", "pixel_values"), args, strict=False)), **kwargs}
    call = Call(given, _modalities(compression, given), ahead=max(asked.get() - 1, answering.get()))
    for modality, outputs in (given.get("mm_encoder_outputs") or {}).items():
        call.encodings[modality] = (outputs.get("vtc"), len(outputs.pooler_output))
    running.set(call)


def _modalities(compression: Compression, given: dict[str, Any]) -> dict[str, Tensor]:
    """(batch, length) bool for each modality: its placeholders, from ids or, without ids, from their embedding."""
    tokens, ids, embeds = compression.adapter.placeholders(), given.get("input_ids"), given.get("inputs_embeds")
    if ids is not None:
        return {modality: ids == token for modality, token in tokens.items()}
    embedding = compression.adapter.backbone.get_input_embeddings()
    return {
        modality: (embeds == embedding(torch.tensor(token, device=embeds.device))).all(-1)
        for modality, token in tokens.items()
    }


def _leave(backbone: nn.Module, args: tuple, outputs: Any) -> None:
    running.set(None)
    recording.set(None)
    asked.set(0)


def _enter_decoder(compression: Compression, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    if not isinstance(call := running.get(), Call):
        return None
    forward = Forward.of(compression, call, kwargs)
    running.set(forward)
    kwargs = forward.enter_decoder(kwargs)
    recording.set(call.record if forward.visibility is not None and forward.stream.images else None)
    return args, kwargs


def _leave_decoder(decoder: nn.Module, args: tuple, outputs: Any) -> None:
    if isinstance(forward := running.get(), Forward):
        recording.set(None)
        forward.leave_decoder(outputs)


def _enter_layer(number: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    if not isinstance(forward := running.get(), Forward) or forward.visibility is None:
        return None
    hidden, kwargs = forward.before_layer(number, args[0], kwargs)
    return (hidden, *args[1:]), kwargs


def _leave_layer(number: int, layer: nn.Module, args: tuple, output: Tensor) -> None:
    if isinstance(forward := running.get(), Forward) and forward.visibility is not None:
        forward.after_layer(number, output)


def _tell_compiler(model: nn.Module) -> None:
    """Make torch.compile guard on hooks, which come and go here, and look again at what it compiled before.

    Each time, also where the guards are on: hooks of many wrappings would use up its limit of recompilations.
    """
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    if any(part._compiled_call_impl or part.__dict__.get("_compiled_call") for part in model.modules()):
        torch.compiler.reset()
