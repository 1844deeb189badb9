"""Measure: accuracy against visual-token budget, on questions that need no download."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtc.eval.reader import pretrained as load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name != "load":
        raise AttributeError(f"module 'vtc.eval' has no attribute {name!r}")
    from vtc.eval.reader import pretrained

    return pretrained
