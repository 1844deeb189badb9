"""The one call: find the adapter, bind the method, install the hooks; and take all of it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

import vtc.hooks as hooks
from vtc.compression import Compression
from vtc.methods import find_method
from vtc.stage import Budget, Method
from vtc.trace import Trace

Model = TypeVar("Model", bound=nn.Module)


def wrap(model: Model, method: str | Method, budget: Budget | None = None) -> Model:
    """Make `model` read fewer visual tokens, in place.

    Blocks of the vision tower after the last one that the projector reads are not run (LLaVA leaves out CLIP's last),
    so `get_image_features` has no `last_hidden_state` there, unless it is asked for hidden states.

    Args:
        model: a Hugging Face vision-language model of a family that `vtc` has an adapter for.
        method: a name out of `vtc.list_methods()`, what else `vtc.find_method` takes, or a method object such as
            `FastV(layer=3, ratio=0.5)`.
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
    compression = Compression(model, find_method(method), budget)
    unwrap(model)
    hooks.install(compression)
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
            hooks.install(before)
            model.vtc = before


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
