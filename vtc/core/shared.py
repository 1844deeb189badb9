"""What several layers ask for is made once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Shared:
    """Makes a thing once of the very same things, or of equal numbers; they are kept beside it, so that no other gets
    their id."""

    def __init__(self) -> None:
        self._made: dict[tuple, tuple[tuple, Any]] = {}

    def __call__(self, make: Callable[..., Any], *of: Any) -> Any:
        """`make(*of)`, or what it was the last time."""
        key = (make, *(x if isinstance(x, int | tuple) else id(x) for x in of))
        if key not in self._made:
            self._made[key] = of, make(*of)
        return self._made[key][1]
