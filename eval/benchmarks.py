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


def check_one_word(name: str) -> None:
    """Raise ValueError for a benchmark whose answers are not one word, right or wrong, and as `find`."""
    if hasattr(find(name), "MEASURE"):
        raise ValueError(
            f"answers of {name} are long, and not right or wrong: use scenes or pages, or `vtc eval --benchmark {name}`"
        )
