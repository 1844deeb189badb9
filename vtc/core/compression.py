"""A method on a model: its stages and needs there, how many tokens it keeps, and what it last did."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable
from typing import Any

import vtc.adapter as adapters
from vtc.budget import check_budget, counts
from vtc.need import Need
from vtc.stage import Budget, Cache, Method, Stage
from vtc.trace import Trace


class Compression:
    """A method that is bound to a model and a budget, and the trace of its last forward."""

    def __init__(self, model: Any, method: Method, budget: Budget | None):
        check_budget(budget)
        self.adapter, self.budget = adapters.find(model), budget
        self.shape, tokens = self.adapter.shape(), self.adapter.tokens_per_image()
        self.method = method.bind(model, budget, tokens)
        self.needs = _needs(self.stages)
        self.step_needs = _needs(stage for stage in self.stages if stage.when == "decode")
        """What is asked for at each step behind a prompt."""
        self.prompt_needs = _needs(stage for stage in self.stages if stage.when == "prefill")
        """What is asked for of a prompt with images."""
        self.running: set[int] = set()
        """The threads in whose calls it is in force."""
        self._latest, self._last = Trace(), threading.local()
        if not self.shape.tower_layers and any(need.tower for need in self.needs):
            raise ValueError(
                f"{self.method.name} looks at blocks of the vision tower that see the whole image, and this one has "
                "none (fullatt_block_indexes of its config): take a method that looks at the decoder, such as fastv"
            )
        for need in self.needs:
            need.modules(self.adapter)  # raises where the model has no such thing
        self._check_sites()
        if tokens is not None:
            self.keep(tokens)  # raises where the budget is out of reach

    @property
    def selects(self) -> bool:
        """Whether each step chooses anew what it reads."""
        return any(stage.when == "decode" for stage in self.stages)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: stages are made anew, traces and running calls stay behind."""
        own = ("stages", "windows", "running", "_latest", "_last")
        return {name: x for name, x in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, running=set(), _latest=Trace(), _last=threading.local())

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        return self.method.stages(self.shape)

    @functools.cached_property
    def windows(self) -> tuple[int | None, ...]:
        """How many positions back each decoder layer sees; None where it sees all."""
        return tuple(map(self.adapter.window, self.adapter.layers))

    @property
    def reads_text(self) -> bool:
        """Whether what stays of an image depends on the text of its prompt."""
        return any(need.reads_text for need in self.needs)

    def _check_sites(self) -> None:
        if any(need.tower for need in self.step_needs):
            raise ValueError(
                f"{self.method.name} chooses anew at each decoded token, which the vision tower does not see: it takes "
                "no @sinks, nor any other score of the tower"
            )
        for stage in self.stages:
            if isinstance(stage.site, Cache) and self.windows[stage.site.layer] is not None:
                raise ValueError(
                    f"{self.method.name} works on the cache of decoder layer {stage.site.layer}, which has a "
                    "sliding window and forgets by itself: take a method that drops before the decoder or within it"
                )

    @property
    def trace(self) -> Trace:
        """Of this thread's last forward or generate that came to its end; of the latest anywhere if it has run none."""
        return getattr(self._last, "trace", self._latest)

    def publish(self, trace: Trace) -> None:
        self._last.trace = self._latest = trace

    def keep(self, tokens: int) -> tuple[float, ...]:
        """How many of an image's `tokens` stay after each stage: see `counts`."""
        return counts(self.method, tokens, self.budget, self.shape)


def _needs(stages: Iterable[Stage]) -> tuple[Need, ...]:
    """What they ask for, each once."""
    return tuple(dict.fromkeys(need for stage in stages for need in stage.needs))
