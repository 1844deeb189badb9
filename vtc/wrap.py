"""The one call: find the adapter, bind the method, install the hooks; and take all of it back."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vtc import adapter as adapters
from vtc.forward import Encoded, Encoding, Forward, current
from vtc.methods import methods
from vtc.observe import Tower, recording
from vtc.stage import Budget, Method, check_budget
from vtc.trace import Clock, Trace

Model = TypeVar("Model", bound=nn.Module)
asked: ContextVar[int] = ContextVar("vtc_asked", default=0)
"""How many positions at the end the running call wants logits of: all but the first of them come after the prompt."""
skipping: ContextVar[bool] = ContextVar("vtc_skipping", default=False)
"""Whether the running call of the tower leaves out the blocks that nobody reads."""


def wrap(model: Model, method: str | Method, budget: Budget | None = None) -> Model:
    """Make `model` read fewer visual tokens, in place.

    Blocks of the vision tower after the last one that the projector reads are not run (LLaVA leaves out CLIP's last),
    so `get_image_features` has no `last_hidden_state` there, unless it is asked for hidden states.

    Args:
        model: a Hugging Face vision-language model of a family that `vtc` has an adapter for.
        method: a name out of `vtc.methods()` or a method object such as `FastV(layer=3, ratio=0.5)`.
        budget: visual tokens per image averaged over the decoder layers (int), or that as a fraction of the image's
            tokens (float in (0, 1]). None: the method's own defaults.

    Returns:
        The same object. `model.vtc.trace` tells what happened in the last forward or generate. A model that was
        wrapped already is wrapped anew.

    Raises:
        ValueError: unknown method (the message lists the known), or a method that cannot work on this model.
        BudgetError: a budget out of the method's reach (the message names the range). Where the number of tokens
            is only known at run time, so is the error.
        TypeError: a model of an unknown family (the message lists the known), or what torch.compile returned.
    """
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TypeError("this is what torch.compile returned: wrap the model itself, or compile it by model.compile()")
    compression = Compression(model, _resolve(method), budget)
    unwrap(model)
    compression.install()
    model.vtc = compression
    return model


def unwrap(model: Model) -> Model:
    """Take back all that `wrap` did: hooks, the patched method, the `vtc` attribute. Harmless on a bare model."""
    if (compression := model.__dict__.get("vtc")) is not None:
        compression.remove()
        del model.vtc
    return model


@contextmanager
def compressed(model: nn.Module, method: str | Method, budget: Budget | None = None) -> Iterator[LiveTrace]:
    """`wrap` for the length of a `with` block; a wrapping that was there before comes back. Yields the latest trace."""
    before = model.__dict__.get("vtc")
    wrap(model, method, budget)
    try:
        yield LiveTrace(model.vtc)
    finally:
        unwrap(model)
        if before is not None:
            before.install()
            model.vtc = before


def _resolve(method: str | Method) -> Method:
    if isinstance(method, Method):
        return method
    known = methods()
    if method not in known:
        raise ValueError(f"unknown method {method!r}; vtc knows {', '.join(sorted(known))}")
    return known[method]()


class Compression:
    """What `model.vtc` is: the bound method, the hooks, and the trace of the last forward."""

    def __init__(self, model: nn.Module, method: Method, budget: Budget | None):
        check_budget(budget)
        self.adapter = adapters.find(model)
        self.shape, tokens = self.adapter.shape(), self.adapter.tokens_per_image()
        self.method, self.budget = method.bind(model, budget, tokens), budget
        self.stages = self.method.stages(self.shape)
        self.windows = any(self.adapter.window(layer) is not None for layer in self.adapter.layers)
        self._handles: list[Any] = []
        self._unread: list[tuple[nn.Module, Any]] = []
        self._last = threading.local()
        self._latest = Trace()
        self.needs = tuple(dict.fromkeys(need for stage in self.stages for need in stage.needs))
        for need in self.needs:
            need.modules(self.adapter)  # raises where the model has no such thing
        if tokens is not None:
            self.keep(tokens)  # raises where the budget is out of reach

    @property
    def trace(self) -> Trace:
        """Of this thread's last forward or generate; of the latest anywhere if this thread has run none."""
        return getattr(self._last, "trace", self._latest)

    def publish(self, trace: Trace) -> None:
        self._last.trace = self._latest = trace

    def keep(self, tokens: int) -> tuple[int, ...]:
        """How many of an image's `tokens` stay after each stage."""
        return self.method.keep(tokens, self.budget, self.shape)

    # -- hooks ----------------------------------------------------------------------------------------------------

    def install(self) -> None:
        backbone, decoder = self.adapter.backbone, self.adapter.decoder
        for modality in self.adapter.placeholders():
            name = f"get_{modality}_features"
            setattr(backbone, name, self._observed_features(modality, getattr(backbone, name)))
        self._handles = [
            self.adapter.model.register_forward_pre_hook(self._ask, with_kwargs=True),
            backbone.register_forward_pre_hook(self._enter, with_kwargs=True),
            backbone.register_forward_hook(self._leave, always_call=True),
            decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._leave_decoder),
            *(
                layer.register_forward_pre_hook(functools.partial(self._enter_layer, number), with_kwargs=True)
                for number, layer in enumerate(self.adapter.layers)
            ),
        ]
        for need in self.needs:
            self._handles += need.hooks(self.adapter)
        for block in self.adapter.unread_blocks({}):
            self._unread.append((block, block.__dict__.get("forward")))
            block.forward = _skippable(block.forward)
        _tell_compiler(self.adapter.model)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for block, own in self._unread:
            del block.forward
            if own is not None:
                block.forward = own
        self._handles, self._unread = [], []
        for modality in self.adapter.placeholders():
            delattr(self.adapter.backbone, f"get_{modality}_features")

    def _observed_features(self, modality: str, original):
        """The encoder, which leaves on its output what the tower showed."""
        signature = inspect.signature(original)

        @functools.wraps(original)
        def get_features(*args, **kwargs):
            if recording.get() is not None:  # one modality's encoder is made of the other's
                return original(*args, **kwargs)
            call = signature.bind(*args, **kwargs).arguments
            call = {**call, **call.pop("kwargs", {})}
            skips = len(self.adapter.unread_blocks(call)) > 0
            record, start = {}, Clock.now(self.adapter.model.device)
            tokens = recording.set(record), skipping.set(skips)
            try:
                outputs = original(*args, **kwargs)
            finally:
                recording.reset(tokens[0])
                skipping.reset(tokens[1])
            if skips:  # what would stand there is not the tower's last state
                outputs = type(outputs)(**{name: x for name, x in outputs.items() if name != "last_hidden_state"})
            seen = Clock.now(self.adapter.model.device)
            images = self._encoded(record, call, outputs.pooler_output)
            spans = [("vision", start, seen), ("score", seen, Clock.now(self.adapter.model.device))]
            outputs["vtc"] = Encoding(images, len(outputs.pooler_output), spans)  # an entry outlives moves to a device
            if (forward := current.get()) is not None:
                forward.encodings[modality] = (outputs["vtc"], len(outputs.pooler_output))
            return outputs

        return get_features

    def _encoded(self, record: dict, call: dict[str, Any], features: Any) -> list[Encoded]:
        """What the tower showed about each image."""
        adapter, tower = self.adapter, Tower(self.adapter, call)
        parts = adapter.parts(call, [len(feature) for feature in features])
        rows = {need: need.row(record.get(need, {}), tower) for need in self.needs if need.tower}
        packed = {need: adapter.pack(row.transpose(1, 2), call) for need, row in rows.items()}
        return [
            Encoded({need: rows[image].T for need, rows in packed.items()}, grids) for image, grids in enumerate(parts)
        ]

    def _ask(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        keep = kwargs.get("logits_to_keep")
        asked.set(keep if isinstance(keep, int) else 0)

    def _enter(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(("input_ids", "pixel_values"), args, strict=False)), **kwargs}
        modalities = self._modalities(given.get("input_ids"), given.get("inputs_embeds"))
        forward = Forward(self, given, modalities, ahead=max(asked.get() - 1, 0))
        for modality, outputs in (given.get("mm_encoder_outputs") or {}).items():
            forward.encodings[modality] = (outputs.get("vtc"), len(outputs.pooler_output))
        current.set(forward)

    def _modalities(self, ids: Tensor | None, embeds: Tensor | None) -> dict[str, Tensor]:
        """(batch, length) bool for each modality: its placeholders, from ids or, without ids, from their embedding."""
        tokens = self.adapter.placeholders()
        if ids is not None:
            return {modality: ids == token for modality, token in tokens.items()}
        embedding = self.adapter.backbone.get_input_embeddings()
        return {
            modality: (embeds == embedding(torch.tensor(token, device=embeds.device))).all(-1)
            for modality, token in tokens.items()
        }

    def _leave(self, backbone: nn.Module, args: tuple, outputs: Any) -> None:
        current.set(None)
        recording.set(None)
        asked.set(0)

    def _enter_decoder(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]):
        if (forward := current.get()) is None:
            return None
        kwargs = forward.enter_decoder(kwargs)
        recording.set(forward.record if forward.busy and forward.images else None)
        return args, kwargs

    def _leave_decoder(self, decoder: nn.Module, args: tuple, outputs: Any) -> None:
        if (forward := current.get()) is not None:
            recording.set(None)
            forward.leave_decoder(outputs)

    def _enter_layer(self, number: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]):
        if (forward := current.get()) is None or not forward.busy:
            return None
        hidden, kwargs = forward.enter_layer(number, args[0], kwargs)
        return (hidden, *args[1:]), kwargs


def _tell_compiler(model: nn.Module) -> None:
    """Make torch.compile guard on hooks, which come and go here, and look again at what it compiled before.

    Each time, also where the guards are on: hooks of many wrappings would use up its limit of recompilations.
    """
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    if any(part._compiled_call_impl or part.__dict__.get("_compiled_call") for part in model.modules()):
        torch.compiler.reset()


def _skippable(forward):
    """The forward of a tower block that hands its input on while `skipping`."""

    @functools.wraps(forward)
    def run(hidden: Tensor, *args, **kwargs):
        return hidden if skipping.get() else forward(hidden, *args, **kwargs)

    return run


class LiveTrace:
    """The latest trace of a wrapping, also after the wrapping was taken back."""

    def __init__(self, compression: Compression):
        self._compression = compression

    @property
    def record(self) -> Trace:
        """The trace as it is now: it does not change with the next forward."""
        return self._compression.trace

    def __getattr__(self, name: str) -> Any:
        return getattr(self.record, name)

    def __repr__(self) -> str:
        return repr(self.record)
