"""How fast a prefill is with and without compression, and one sentence that says why it is not faster."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median

from torch import Tensor

import vtc
from vtc import adapter
from vtc.eval import cost
from vtc.eval.reader import Reader
from vtc.stage import Budget, Method

ROUNDS = 7
"""Runs of either prefill, in turn, so that one hiccup of the machine does not make the figure."""
PATIENCE = 1.0
"""Seconds after which no further round is begun."""
NOISY = 0.25
"""Half of the runs spread over more than this share of their median: then nothing is concluded."""
CHOOSING = ("score", "select", "compact")


@dataclass
class Timing:
    """Seconds of single runs, from the prepared inputs to the first token, the vision tower included."""

    full: list[float] = field(default_factory=list)
    small: list[float] = field(default_factory=list)
    vision: list[float] = field(default_factory=list)
    """The share of the vision tower in each compressed run."""
    choosing: list[float] = field(default_factory=list)
    """The share of what the method itself does in each compressed run."""

    @property
    def noise(self) -> float | None:
        """The spread of the middle half of the runs over their median, the larger of both; None for too few runs."""
        return max(map(_spread, (self.full, self.small))) if len(self.full) > 2 else None


def _spread(seconds: list[float]) -> float:
    ordered, quarter = sorted(seconds), len(seconds) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / median(seconds)


def measure(reader: Reader, inputs: dict[str, Tensor], method: Method, budget: Budget | None) -> Timing:
    """Full and compressed prefills in turn, after one of each that pays for allocations."""
    timing, begun = Timing(), time.perf_counter()
    for number in range(ROUNDS + 1):
        full = _seconds(reader, inputs)
        with vtc.compressed(reader.model, method, budget) as live:
            small = _seconds(reader, inputs)
            parts = live.record.seconds
        if number:
            timing.full.append(full)
            timing.small.append(small)
            timing.vision.append(parts.get("vision", 0.0) / small)
            timing.choosing.append(sum(parts.get(part, 0.0) for part in CHOOSING) / small)
        if number and time.perf_counter() - begun > PATIENCE:
            break
    return timing


def _seconds(reader: Reader, inputs: dict[str, Tensor]) -> float:
    start = time.perf_counter()
    reader.generate(inputs, max_new_tokens=1).cpu()  # on the CPU, so that the device has finished
    return time.perf_counter() - start


def limit(reader: Reader, trace: vtc.Trace, total: int, text: int) -> float:
    """How much faster the decoder's arithmetic alone would make the prefill."""
    config = adapter.find(reader.model).decoder.config
    return cost.speed_up_limit(trace.tokens_per_layer[0].tolist(), total, text, config)


def sentence(timing: Timing, possible: float) -> str:
    """What was measured, and the one reason that weighs most where it falls short of what is `possible`."""
    if possible <= 1:
        return "Every visual token stays, so there is nothing to gain."
    if timing.noise is not None and timing.noise > NOISY:
        runs = max(timing.full, timing.small, key=_spread)
        return (
            f"Too noisy to tell: the same prefill took {1e3 * min(runs):.3g} to {1e3 * max(runs):.3g} ms, as this "
            f"machine does other work. The decoder's arithmetic alone would allow {possible:.1f} times."
        )
    gain = median(timing.full) / median(timing.small)
    runs = f"medians of {len(timing.full)} runs" if len(timing.full) > 1 else "one run"
    measured = f"Prefill {gain:.1f} times as fast ({runs}); the decoder's arithmetic alone would allow {possible:.1f}."
    return f"{measured} {_reason(gain, possible, median(timing.vision), median(timing.choosing))}"


def _reason(gain: float, possible: float, vision: float, choosing: float) -> str:
    if gain > 0.7 * possible:
        return "The clock follows the arithmetic here."
    if choosing > max(vision, 0.3):
        return f"Choosing the tokens takes {100 * min(choosing, 1):.0f} % of the compressed prefill."
    if vision > 0.4:
        return f"The vision tower takes {100 * min(vision, 1):.0f} % of the compressed prefill."
    return "A prompt this short leaves the processor idle between launches; larger models and images gain more."
