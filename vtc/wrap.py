"""The one call: find the adapter, bind the method, install the hooks; and take all of it back."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vtc import adapter as adapters
from vtc.forward import Encoded, Encoding, Forward, current
from vtc.methods import methods
from vtc.observe import Need, Tower, recording
from vtc.stage import Budget, Method, Stage, check_budget
from vtc.trace import Clock, Trace

Model = TypeVar("Model", bound=nn.Module)
chosen: ContextVar[tuple[Compression, ...]] = ContextVar("vtc_chosen", default=())
"""What `compressed` and running generate() calls put in force in this context, on any model; the last one counts."""
prompted: ContextVar[tuple[Hooks, int | None] | None] = ContextVar("vtc_prompted", default=None)
"""The model whose generate() is running, and the length of its prompt: what is longer was guessed."""
changed = threading.Condition()
"""Held where what is in force on a model changes, and where a call begins or ends."""
skipping: ContextVar[bool] = ContextVar("vtc_skipping", default=False)
"""Whether the running call of the tower leaves out the blocks that nobody reads."""


def wrap(model: Model, method: str | Method, budget: Budget | None = None) -> Model:
    """Make `model` read fewer visual tokens, in place.

    Blocks of the vision tower after the last one that the projector reads are not run (LLaVA leaves out CLIP's last),
    so `get_image_features` has no `last_hidden_state` there, unless it is asked for hidden states.

    Args:
        model: a Hugging Face vision-language model of a family that `vtc` has an adapter for, bare or in a `PeftModel`.
        method: a name out of `vtc.methods()` or a method object such as `FastV(layer=3, ratio=0.5)`.
        budget: visual tokens per image averaged over the decoder layers (int), or that as a fraction of the image's
            tokens (float in (0, 1]). None: the method's own defaults. Tokens that `attention_mask` hides
            are none of the image's: they are not counted and not chosen from.

    Returns:
        The same object. `model.vtc.trace` tells what happened in the last forward or generate that came to its end.
        A model that was wrapped already is wrapped anew. Copies of it (`copy.deepcopy`, `pickle`, `torch.save`) are
        wrapped, too.

    Raises:
        ValueError: unknown method (the message lists the known), a method that cannot work on this model, or a model
            that is part of a wrapped one or has such a part.
        BudgetError: a budget out of the method's reach (the message names the range). Where the number of tokens
            is only known at run time, so is the error.
        TypeError: a model of an unknown family (the message lists the known), or what torch.compile returned.
        RuntimeError: the model was wrapped, and this is called inside its generate(); another thread's is waited for.
    """
    compression = Compression(_inner(model), _resolve(method), budget)
    with changed:
        (hooks_of(model) or Hooks(_inner(model))).replace(compression)
    return model


def unwrap(model: Model) -> Model:
    """Take back all that `wrap` did: hooks, patched methods, the `vtc` attribute. Harmless on a bare model.

    Raises RuntimeError inside a generate() of the model; one of another thread is waited for.
    """
    with changed:
        if (hooks := hooks_of(model)) is not None:
            hooks.replace(None)
    return model


@contextmanager
def compressed(model: nn.Module, method: str | Method, budget: Budget | None = None) -> Iterator[LiveTrace]:
    """`wrap` for the length of a `with` block, in its own thread. Yields the latest trace.

    Threads can compress one model in different ways at the same time; for those that chose nothing what `wrap` did
    stays in force. Where it did nothing, their images are refused with a RuntimeError while a block is open, rather
    than read in a way that is not their own: a thread that is started inside a block opens one itself, or runs in a
    copy of the context (`contextvars.copy_context().run`).
    """
    compression = Compression(_inner(model), _resolve(method), budget)
    with changed:
        hooks = hooks_of(model) or Hooks(_inner(model))
        hooks.enter(compression)
    chosen.set((*chosen.get(), compression))
    try:
        yield LiveTrace(compression)
    finally:
        chosen.set(tuple(other for other in chosen.get() if other is not compression))
        hooks.leave(compression)


def hooks_of(model: nn.Module) -> Hooks | None:
    """What hangs on a model, or on the one inside what PEFT made of it.

    Raises ValueError where it hangs on a model that this one is a part of.
    """
    inner = _inner(model)
    hooks = inner.__dict__.get("vtc")
    if hooks is not None and hooks.model is not inner:
        raise ValueError(f"this is a part of a {type(hooks.model).__name__} that is wrapped: unwrap that one first")
    return hooks


def _inner(model: nn.Module) -> nn.Module:
    """The model itself, inside what PEFT made of it."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TypeError("this is what torch.compile returned: wrap the model itself, or compile it by model.compile()")
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _resolve(method: str | Method) -> Method:
    if isinstance(method, Method):
        return method
    known = methods()
    if method not in known:
        raise ValueError(f"unknown method {method!r}; vtc knows {', '.join(sorted(known))}")
    return known[method]()


class Compression:
    """A method that is bound to a model and a budget, and the trace of its last forward."""

    def __init__(self, model: nn.Module, method: Method, budget: Budget | None):
        check_budget(budget)
        self.adapter, self.budget = adapters.find(model), budget
        adapter = self.adapter
        self.shape, tokens = adapter.shape(), adapter.tokens_per_image()
        self.method = method.bind(model, budget, tokens)
        self.windows = any(adapter.window(layer) is not None for layer in adapter.layers)
        self.needs = tuple(dict.fromkeys(need for stage in self.stages for need in stage.needs))
        self.running: set[int] = set()
        """The threads in whose calls it is in force."""
        self._latest, self._last = Trace(), threading.local()
        for need in self.needs:
            need.modules(adapter)  # raises where the model has no such thing
        if tokens is not None:
            self.keep(tokens)  # raises where the budget is out of reach

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: stages are made anew, traces and running calls stay behind."""
        return {k: v for k, v in vars(self).items() if k not in ("stages", "running", "_latest", "_last")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, running=set(), _latest=Trace(), _last=threading.local())

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        return self.method.stages(self.shape)

    @property
    def trace(self) -> Trace:
        """Of this thread's last forward or generate; of the latest anywhere if this thread has run none."""
        return getattr(self._last, "trace", self._latest)

    def publish(self, trace: Trace) -> None:
        self._last.trace = self._latest = trace

    def keep(self, tokens: int) -> tuple[int, ...]:
        """How many of an image's `tokens` stay after each stage."""
        return self.method.keep(tokens, self.budget, self.shape)


class Hooks:
    """What `model.vtc` is: all that hangs on a model, and the compressions that are in force on it.

    The hooks hang once, whoever compresses; each call finds the compression that is its own.
    """

    def __init__(self, model: nn.Module):
        self.model, self.adapter = model, adapters.find(model)
        if self.adapter.backbone.__dict__.get("vtc") is not None:
            raise ValueError(f"a part of this {type(model).__name__} is wrapped: unwrap that one first")
        self._lasting: Compression | None = None
        """What `wrap` put in force: for every thread that has not chosen itself."""
        self._passing: list[Compression] = []
        """What `compressed` put in force: each for its own context."""
        self._handles: dict[Need | None, list[Any]] = {}
        """Of the hooks of each need, and of those that are always there (None)."""
        self._patched: list[tuple[nn.Module, str, Any]] = []
        """(owner, name, the owner's own before, if any) of each method that is replaced."""
        self._modules: list[nn.Module] = []
        """All that the model was made of when its hooks were hung."""

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: what is in force here and now is in force there for good."""
        return {**vars(self), "_lasting": self.compression, "_passing": []}

    @property
    def compression(self) -> Compression:
        """What is in force in this context."""
        own = [one for one in chosen.get() if one is self._lasting or one in self._passing]
        return own[-1] if own else self._lasting or self._passing[-1]

    @property
    def method(self) -> Method:
        return self.compression.method

    @property
    def needs(self) -> tuple[Need, ...]:
        return self.compression.needs

    @property
    def trace(self) -> Trace:
        return self.compression.trace

    # -- who is in force ------------------------------------------------------------------------------------------

    def replace(self, compression: Compression | None) -> None:
        """Put in force what `wrap` made; None: nothing."""
        if self._generates():
            raise RuntimeError("this model's generate() is running: wrap or unwrap the model when it has returned")
        with changed:
            self._finish(self._lasting)
            self._lasting = compression
            self._update()

    def enter(self, compression: Compression) -> None:
        with changed:
            self._passing.append(compression)
            self._update()

    def leave(self, compression: Compression) -> None:
        with changed:
            self._finish(compression)
            self._passing.remove(compression)
            self._update()

    def _finish(self, compression: Compression | None) -> None:
        """Wait until no other thread runs a call under a compression."""
        if compression is not None:
            changed.wait_for(lambda: compression.running <= {threading.get_ident()})

    def _begin(self, sees: bool) -> Compression:
        """The compression of a call that begins; with `sees` it brings images."""
        with changed:
            compression = self.compression
            if sees and compression in self._passing and compression not in chosen.get():
                raise RuntimeError(
                    "another thread has this model in vtc.compressed, and this one has chosen nothing: open "
                    "vtc.compressed in the thread that calls the model, or run it in a copy of the context "
                    "(contextvars.copy_context().run)"
                )
            if sees and list(self.model.modules()) != self._modules:
                self._update()
            compression.running.add(threading.get_ident())
        return compression

    def _generates(self) -> bool:
        """Whether this is called inside generate()."""
        return (running := prompted.get()) is not None and running[0] is self

    def _end(self, compression: Compression) -> None:
        """The end of a call; one inside generate() is a part of that."""
        if self._generates():
            return
        with changed:
            compression.running.discard(threading.get_ident())
            changed.notify_all()

    # -- hooks ----------------------------------------------------------------------------------------------------

    def _update(self) -> None:
        """Bring the hooks in line with what is in force, and with the modules that run now: PEFT replaces some."""
        in_force = [*self._passing, *([] if self._lasting is None else [self._lasting])]
        needs = {need: None for compression in in_force for need in compression.needs}
        modules = list(self.model.modules())
        if not in_force or modules != self._modules:
            self._take_off(self._handles)
            self._restore()
        if not in_force:
            return
        if not self._patched:
            self._patch()
        self._take_off(self._handles.keys() - {None, *needs})
        if None not in self._handles:
            self._handles[None] = self._hang()
        for need in needs.keys() - self._handles.keys():
            self._handles[need] = need.hooks(self.adapter)
        self._modules = modules
        _tell_compiler(self.model)

    def _hang(self) -> list[Any]:
        backbone, decoder = self.adapter.backbone, self.adapter.decoder
        return [
            backbone.register_forward_pre_hook(self._enter, with_kwargs=True),
            backbone.register_forward_hook(self._leave, always_call=True),
            decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._leave_decoder),
            *(
                layer.register_forward_pre_hook(functools.partial(self._enter_layer, number), with_kwargs=True)
                for number, layer in enumerate(self.adapter.layers)
            ),
        ]

    def _take_off(self, needs: Iterable[Need | None]) -> None:
        for need in list(needs):
            for handle in self._handles.pop(need):
                handle.remove()

    def _patch(self) -> None:
        model, backbone = self.model, self.adapter.backbone
        for owner in dict.fromkeys((model, backbone)):
            self._replace(owner, "vtc", self)
        if hasattr(model, "generate"):
            self._replace(model, "generate", _around(model.generate, self._generate))
        for modality in self.adapter.placeholders():
            name = f"get_{modality}_features"
            original = getattr(backbone, name)
            self._replace(backbone, name, _around(original, self._features, modality))
        for block in self.adapter.unread_blocks({}):
            self._replace(block, "forward", _around(block.forward, _skippable))

    def _replace(self, owner: nn.Module, name: str, value: Any) -> None:
        self._patched.append((owner, name, owner.__dict__.get(name)))
        setattr(owner, name, value)

    def _restore(self) -> None:
        for owner, name, own in self._patched:
            delattr(owner, name)
            if own is not None:
                setattr(owner, name, own)
        self._patched = []

    def _generate(self, original: Callable, *args, **kwargs):
        """generate(): what is in force when it begins is so to its end, and it knows where the prompt ends."""
        compression = self._begin(sees=True)
        length = _prompt_length(args, kwargs)
        tokens = chosen.set((*chosen.get(), compression)), prompted.set((self, length))
        try:
            return original(*args, **kwargs)
        finally:
            chosen.reset(tokens[0])
            prompted.reset(tokens[1])
            self._end(compression)

    def _features(self, modality: str, original: Callable, *args, **kwargs):
        """The encoder, which leaves on its output what the tower showed."""
        if recording.get() is not None:  # one modality's encoder is made of the other's
            return original(*args, **kwargs)
        forward = current.get()
        compression = self._begin(sees=True) if forward is None else forward.compression
        try:
            outputs = self._observed(compression, modality, original, args, kwargs)
        finally:
            if forward is None:
                self._end(compression)
        if forward is not None:
            forward.encodings[modality] = (outputs["vtc"], len(outputs.pooler_output))
        return outputs

    def _observed(self, compression: Compression, modality: str, original: Callable, args: tuple, kwargs: dict):
        call = inspect.signature(original).bind(*args, **kwargs).arguments
        call = {**call, **call.pop("kwargs", {})}
        if call.get("return_dict", getattr(self.model.config, "return_dict", True)) is False:
            return original(*args, **kwargs)  # a tuple has no room for what was seen, and no gaps
        skips = len(self.adapter.unread_blocks(call)) > 0
        record, start = {need: {} for need in compression.needs}, Clock.now(self.model.device)
        tokens = recording.set(record), skipping.set(skips)
        try:
            outputs = original(*args, **kwargs)
        finally:
            recording.reset(tokens[0])
            skipping.reset(tokens[1])
        if skips:  # what would stand there is not the tower's last state
            outputs = type(outputs)(**{name: x for name, x in outputs.items() if name != "last_hidden_state"})
        seen = Clock.now(self.model.device)
        images = self._encoded(compression, record, call, outputs.pooler_output)
        spans = [("vision", start, seen), ("score", seen, Clock.now(self.model.device))]
        outputs["vtc"] = Encoding(images, len(outputs.pooler_output), spans)  # an entry outlives moves to a device
        return outputs

    def _encoded(self, compression: Compression, record: dict, call: dict[str, Any], features: Any) -> list[Encoded]:
        """What the tower showed about each image."""
        adapter, tower = self.adapter, Tower(self.adapter, call)
        parts = adapter.parts(call, [len(feature) for feature in features])
        rows = {need: need.row(record[need], tower) for need in compression.needs if need.tower}
        packed = {need: adapter.pack(row.transpose(1, 2), call) for need, row in rows.items()}
        return [
            Encoded({need: rows[image].T for need, rows in packed.items()}, grids) for image, grids in enumerate(parts)
        ]

    def _enter(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        current.set(None)
        given = {**dict(zip(("input_ids", "pixel_values"), args, strict=False)), **kwargs}
        compression = self._begin(
            sees=bool(given.get("mm_encoder_outputs"))
            or any(given.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))
        )
        forward = Forward(compression, given, self.modalities(given))
        if self._generates():
            forward.prompt = prompted.get()[1]
        for modality, outputs in (given.get("mm_encoder_outputs") or {}).items():
            forward.encodings[modality] = (outputs.get("vtc"), len(outputs.pooler_output))
        current.set(forward)

    def modalities(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """(batch, length) bool for each modality: its placeholders, from ids or, without ids, from their embedding."""
        tokens, ids, embeds = self.adapter.placeholders(), inputs.get("input_ids"), inputs.get("inputs_embeds")
        if ids is not None:
            return {modality: ids == token for modality, token in tokens.items()}
        embedding = self.adapter.backbone.get_input_embeddings()
        return {
            modality: (embeds == embedding(torch.tensor(token, device=embeds.device))).all(-1)
            for modality, token in tokens.items()
        }

    def _leave(self, backbone: nn.Module, args: tuple, outputs: Any) -> None:
        if (forward := current.get()) is not None:
            self._end(forward.compression)
        current.set(None)
        recording.set(None)

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


def _around(original: Callable, function: Callable, *first: Any) -> Callable:
    """`function(*first, original, ...)` in place of a method; unlike a closure it is copied along with its model."""
    replacement = functools.partial(function, *first, original)
    return functools.update_wrapper(replacement, original, ("__name__", "__doc__"), ())


def _prompt_length(args: tuple, kwargs: dict[str, Any]) -> int | None:
    """How many positions the prompt has that generate() is given, cached ones included; None where it does not tell."""
    names = ("attention_mask", "inputs_embeds", "input_ids", "inputs")
    given = [kwargs[name] for name in names if isinstance(kwargs.get(name), Tensor)] + [
        x for x in args[:1] if isinstance(x, Tensor)
    ]
    if (
        not given
        or given[0].ndim > 3
        or (kwargs.get("attention_mask") is None and kwargs.get("past_key_values") is not None)
    ):
        return None
    return given[0].shape[1]


def _tell_compiler(model: nn.Module) -> None:
    """Make torch.compile guard on hooks, which come and go here, and look again at what it compiled before.

    Each time, also where the guards are on: hooks of many wrappings would use up its limit of recompilations.
    """
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    if any(part._compiled_call_impl or part.__dict__.get("_compiled_call") for part in model.modules()):
        torch.compiler.reset()


def _skippable(forward: Callable, hidden: Tensor, *args, **kwargs):
    """The forward of a tower block that hands its input on while `skipping`."""
    return hidden if skipping.get() else forward(hidden, *args, **kwargs)


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
