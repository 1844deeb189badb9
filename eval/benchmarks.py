"""The procedural benchmarks by name: modules with `load(split, limit, seed)`, `example(split, seed, index)`, TASKS.

One may name what it measures (MEASURE, else accuracy) and how long its answers are (LONGEST tokens, else 8).
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

NAMES = ("scenes", "pages", "captions")


def find(name: str) -> ModuleType:
    """The benchmark of this name. Raises ValueError for one that is not there."""
    if name not in NAMES:
        raise ValueError(f"unknown benchmark {name!r}; choose from {', '.join(NAMES)}")
    return import_module(f"vtc.eval.{name}")
