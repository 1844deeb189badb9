"""What is put on other people's objects, and taken off again: attributes, and hooks on modules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Patch:
    """Sets `owner.name`; `remove` gives the owner back what it had of its own, or nothing.

    What others have put there since stays, around ours, which is nothing when no compression is in force.
    """

    def __init__(self, owner: Any, name: str, value: Any):
        self.owner, self.name, self.value = owner, name, value
        self.own = {name: vars(owner)[name]} if name in vars(owner) else {}
        setattr(owner, name, value)

    def remove(self) -> None:
        if vars(self.owner).get(self.name) is not self.value:
            return
        delattr(self.owner, self.name)
        for name, value in self.own.items():
            setattr(self.owner, name, value)


def around(original: Callable[..., Any], function: Callable[..., Any], *first: Any) -> Callable[..., Any]:
    """`function(*first, original, ...)` in place of a method; unlike a closure it is copied along with its model."""
    replacement = functools.partial(function, *first, original)
    return functools.update_wrapper(replacement, original, ("__name__", "__doc__"), ())


def before(part: nn.Module, hook: Callable[[nn.Module, tuple, dict[str, Any]], Any]) -> RemovableHandle:
    """Register a hook before a module's forward, with keyword arguments; it is no part of compiled graphs.

    torch puts such a hook on, and takes it off, in two steps. A call of another thread that comes between them hands on
    no keyword arguments: it began before the hook was whole, or after it was taken off, and is none of its business.
    """
    return part.register_forward_pre_hook(functools.partial(_before, hook), with_kwargs=True)


def after(part: nn.Module, hook: Callable[[nn.Module, tuple, Any], Any], always: bool = False) -> RemovableHandle:
    """Register a hook after a module's forward, with `always` also where that raises; no part of compiled graphs."""
    return part.register_forward_hook(functools.partial(_after, hook), with_kwargs=True, always_call=always)


def _before(hook: Callable[..., Any], part: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> Any:
    return None if kwargs is None or compiled_out(args, kwargs) else _apart(hook, part, args, kwargs)


def _after(hook: Callable[..., Any], part: nn.Module, args: tuple, kwargs: Any, *output: Any) -> Any:
    if not output:  # of such a call of another thread: what is here called kwargs is its output
        return _apart(hook, part, args, kwargs)
    return None if compiled_out(args, kwargs) else _apart(hook, part, args, *output)


def compiled_out(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether hooks are left out of the graph of a call of a wrapped model, or of a part of it, which the graph guards:
    it brings no image (of which pixels may be a second positional argument), and its cache rests."""
    if not torch.compiler.is_compiling() or len(args) > 1 or sees(kwargs):
        return False
    return getattr(kwargs.get("past_key_values"), "rests", False)


def sees(given: dict[str, Any]) -> bool:
    """Whether a call is given an image or a video."""
    pixels = (given.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))
    return any(pixels) or len(given.get("mm_encoder_outputs") or ()) > 0  # dynamo guards a length, not bool(dict)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _apart(hook: Callable[..., Any], *args: Any) -> Any:
    """A hook between two graphs."""
    return hook(*args)


def tell_compiler(model: nn.Module) -> None:
    """Make torch.compile guard on hooks, which come and go here, and look again at what it compiled before.

    Each time, also where the guards are on: hooks of many wrappings would use up its limit of recompilations.
    """
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    if any(part._compiled_call_impl or part.__dict__.get("_compiled_call") for part in model.modules()):
        torch.compiler.reset()
