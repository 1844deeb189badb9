"""Seconds by name, without waiting for a device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

Moment = float | torch.cuda.Event
"""A point in time: seconds of the host, or an event on a GPU."""
Passage = tuple[str, Moment, Moment]
"""What took from one moment to another."""


class Clock:
    """Adds up seconds by name; on a GPU through events, so that nothing waits for the device until it is read."""

    def __init__(self) -> None:
        self.passages: list[Passage] = []

    def __deepcopy__(self, memo: dict) -> Clock:
        """For a copied cache: what has passed is common to both, and events of a GPU cannot be copied."""
        clock = Clock()
        clock.passages = list(self.passages)
        return clock

    def __getstate__(self) -> dict[str, Any]:
        """For a cache that is written down: seconds alone. Waits for the device."""
        return {"passages": [(name, 0.0, _passed(start, end)) for name, start, end in self.passages]}

    @staticmethod
    def now(device: torch.device) -> Moment:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, start: Moment, device: torch.device) -> None:
        """What has passed since `start`."""
        self.passages.append((name, start, self.now(device)))

    @contextmanager
    def timed(self, name: str, device: torch.device) -> Iterator[None]:
        start = self.now(device)
        yield
        self.add(name, start, device)

    def seconds(self) -> dict[str, float]:
        """The sums so far; waits for the device."""
        totals: dict[str, float] = {}
        for name, start, end in self.passages:
            totals[name] = totals.get(name, 0.0) + _passed(start, end)
        return totals


def _passed(start: Moment, end: Moment) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1000
    return float(end) - float(start)  # type: ignore[arg-type]  # both are of one kind
