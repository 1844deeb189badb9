"""An attribute of one object, replaced until it is put back as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Patch:
    """Sets `owner.name`; `remove` gives the owner back what it had of its own, or nothing."""

    def __init__(self, owner: Any, name: str, value: Any):
        self.owner, self.name = owner, name
        self.own = {name: vars(owner)[name]} if name in vars(owner) else {}
        setattr(owner, name, value)

    def remove(self) -> None:
        delattr(self.owner, self.name)
        for name, value in self.own.items():
            setattr(self.owner, name, value)


def around(original: Callable[..., Any], function: Callable[..., Any], *first: Any) -> Callable[..., Any]:
    """`function(*first, original, ...)` in place of a method; unlike a closure it is copied along with its model."""
    replacement = functools.partial(function, *first, original)
    return functools.update_wrapper(replacement, original, ("__name__", "__doc__"), ())
