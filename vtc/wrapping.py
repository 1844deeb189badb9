"""The one call: bind the method, hang the hooks; and take all of it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from vtc.core.compression import Compression
from vtc.core.force import changed
from vtc.core.hooks import Hooks
from vtc.methods.compose import with_budget
from vtc.stage import Budget, Method
from vtc.trace import Trace

Model = TypeVar("Model", bound=nn.Module)


def wrap(model: Model, method: str | Method, budget: Budget | None = None) -> Model:
    """Make `model` read fewer visual tokens, in place.

    Blocks of the vision tower after the last one that the projector reads are not run (LLaVA leaves out CLIP's last),
    so `get_image_features` has no `last_hidden_state` there, unless it is asked for hidden states.

    Args:
        model: a Hugging Face vision-language model of a family that `vtc` has an adapter for, bare or in a `PeftModel`.
        method: a name out of `vtc.list_methods()`, what else `vtc.find_method` takes, or a method object such as
            `FastV(layer=3, ratio=0.5)`.
        budget: visual tokens per image averaged over the decoder layers (int), or that as a fraction of the image's
            tokens (float in (0, 1]). None: what the method's JSON file says, or its own defaults. Tokens that
            `attention_mask` hides are none of the image's: they are not counted and not chosen from.

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
    compression = bound(model, method, budget)
    with changed:
        (_idle(model) or Hooks(_inner(model))).replace(compression)
    return model


def unwrap(model: Model) -> Model:
    """Take back all that `wrap` did: hooks, patched methods, the `vtc` attribute. Harmless on a bare model.

    Raises RuntimeError inside a generate() of the model; one of another thread is waited for.
    """
    with changed:
        if (hooks := _idle(model)) is not None:
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
    compression = bound(model, method, budget)
    with changed:
        hooks = hooks_of(model) or Hooks(_inner(model))
        hooks.enter(compression)
    try:
        yield LiveTrace(compression)
    finally:
        hooks.leave(compression)


def bound(model: nn.Module, method: str | Method, budget: Budget | None) -> Compression:
    """What `wrap` and `compressed` put in force, with nothing hung yet; takes and raises what they do."""
    found, own = with_budget(method)
    return Compression(_inner(model), found, own if budget is None else budget)


def hooks_of(model: nn.Module) -> Hooks | None:
    """What hangs on a model, or on the one inside what PEFT made of it.

    Raises ValueError where it hangs on a model that this one is a part of.
    """
    inner = _inner(model)
    hooks: Hooks | None = vars(inner).get("vtc")
    if hooks is not None and hooks.model is not inner:
        raise ValueError(f"this is a part of a {type(hooks.model).__name__} that is wrapped: unwrap that one first")
    return hooks


def _idle(model: nn.Module) -> Hooks | None:
    """What hangs on a model, when no other thread runs a call under what `wrap` put in force: that may be another one
    by then."""
    while (hooks := hooks_of(model)) is not None and hooks.busy() and not hooks.generates():
        changed.wait()
    return hooks


def _inner(model: nn.Module) -> Any:
    """The model itself, inside what PEFT made of it."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TypeError("this is what torch.compile returned: wrap the model itself, or compile it by model.compile()")
    peft: Any = model
    return peft.get_base_model() if hasattr(model, "get_base_model") else model


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
