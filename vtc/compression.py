"""A method on a model: its stages and needs there, how many tokens it keeps, and what it last did."""

from __future__ import annotations

import threading
from typing import Any

from torch import nn

import vtc.adapter as adapters
from vtc.budget import check_budget, counts
from vtc.stage import Budget, Cache, Method
from vtc.trace import Trace


class Compression:
    """What `model.vtc` is: the bound method, and the trace of the last forward."""

    def __init__(self, model: nn.Module, method: Method, budget: Budget | None):
        check_budget(budget)
        self.adapter = adapters.find(model)
        self.shape, tokens = self.adapter.shape(), self.adapter.tokens_per_image()
        self.method, self.budget = method.bind(model, budget, tokens), budget
        self.stages = self.method.stages(self.shape)
        self.needs = tuple(dict.fromkeys(need for stage in self.stages for need in stage.needs))
        self.handles: list[Any] = []
        """What `remove` takes off the model."""
        self._last = threading.local()
        self._latest = Trace()
        for need in self.needs:
            need.modules(self.adapter)  # raises where the model has no such thing
        for stage in self.stages:
            if isinstance(stage.site, Cache) and self.adapter.window(self.adapter.layers[stage.site.layer]) is not None:
                raise ValueError(
                    f"{method.name} drops from the cache of decoder layer {stage.site.layer}, which has a sliding "
                    "window and forgets by itself: take a method that drops before the decoder or within it"
                )
        if tokens is not None:
            self.keep(tokens)  # raises where the budget is out of reach

    @property
    def depth(self) -> int:
        """Decoder layers."""
        return self.shape.decoder_layers

    @property
    def trace(self) -> Trace:
        """Of this thread's last forward or generate; of the latest anywhere if this thread has run none."""
        return getattr(self._last, "trace", self._latest)

    def publish(self, trace: Trace) -> None:
        self._last.trace = self._latest = trace

    def keep(self, tokens: int) -> tuple[int, ...]:
        """How many of an image's `tokens` stay after each stage."""
        return counts(self.method, tokens, self.budget, self.shape)

    def remove(self) -> None:
        """Take all hooks off the model."""
        while self.handles:
            self.handles.pop().remove()
