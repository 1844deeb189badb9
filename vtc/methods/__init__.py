"""One file a paper. A file here that defines a `Method` with a `name` is a method; nothing else registers it."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from vtc.stage import Method


@cache
def methods() -> dict[str, type[Method]]:
    """All methods by name, in alphabetical order."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        for thing in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(thing, type) and issubclass(thing, Method) and hasattr(thing, "name"):
                found[thing.name] = thing
    return dict(sorted(found.items()))
