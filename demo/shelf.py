"""What the server remembers of its visitors, bounded by bytes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch

from vtc.core.clock import Clock
from vtc.stage import Budget, Method
from vtc.trace import Reads, Trace

LIMIT = 64 * 2**20
"""Bytes of all that is remembered."""


@dataclass(frozen=True)
class Shown:
    """A visitor's last answer: files by path and scores, no pixels."""

    uploads: tuple[dict[str, Any], ...]
    question: str
    method: Method
    budget: Budget | None
    trace: Trace

    @property
    def bytes(self) -> int:
        """Of the tensors, and a little for the rest."""
        tensors = [x for stage in self.trace.stages for x in vars(stage).values() if isinstance(x, torch.Tensor)]
        return 4096 + sum(x.nbytes for x in tensors)


class Shelf:
    """The last answers by visitor; beyond `limit` bytes the one that nobody asked for the longest goes first."""

    def __init__(self, limit: int = LIMIT):
        self.limit, self.held = limit, 0
        self._shown: OrderedDict[str, Shown] = OrderedDict()
        self._lock = Lock()

    def put(self, visitor: str, shown: Shown) -> None:
        """Remember this in the place of what was there."""
        shown = replace(shown, trace=_light(shown.trace))
        with self._lock:
            self._drop(visitor)
            self._shown[visitor] = shown
            self.held += shown.bytes
            while self.held > self.limit:
                self._drop(next(iter(self._shown)))

    def get(self, visitor: str) -> Shown | None:
        """None where there was nothing, or nothing any more."""
        with self._lock:
            if visitor in self._shown:
                self._shown.move_to_end(visitor)
            return self._shown.get(visitor)

    def drop(self, visitor: str) -> None:
        """Forget it; harmless where there is nothing."""
        with self._lock:
            self._drop(visitor)

    def _drop(self, visitor: str) -> None:
        if (shown := self._shown.pop(visitor, None)) is not None:
            self.held -= shown.bytes


def _light(trace: Trace) -> Trace:
    """On the CPU, with no view that holds more than itself, and without the clock and what steps read."""
    stages = [
        replace(stage, **{k: x.cpu().clone() for k, x in vars(stage).items() if isinstance(x, torch.Tensor)})
        for stage in trace.stages
    ]
    return replace(trace, stages=stages, reads=Reads(), clock=Clock())
