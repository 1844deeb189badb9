"""The text model's rotary tables, over the running stream: gathered by column, never made anew."""

from __future__ import annotations

from torch import Tensor

import vtc.core.compact as compact
from vtc.core.shared import Shared
from vtc.core.stream import Stream

Tables = tuple[Tensor, Tensor]
"""Cosines and sines, (batch or 1, length, head_dim) each."""


def carried(tables: Tables, entry: Stream, stream: Stream, shared: Shared) -> Tables:
    """The tables over `stream` of those that the text model made over what entered the decoder."""
    if stream.columns.place is entry.columns.place:
        return tables
    return shared(_gathered, tables, shared(_places, entry, stream))


def _places(entry: Stream, stream: Stream) -> Tensor:
    """Where the tokens of the running stream were when the decoder began: (batch, length)."""
    return compact.gather(entry.source, stream.entered)


def _gathered(tables: Tables, index: Tensor) -> Tables:
    cos, sin = (compact.gather(table, index) for table in tables)
    return cos, sin
