"""What a run writes, a type a line: replies, result lines and summary rows, as they stand in its JSON files."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from vtc.stage import Budget


class Asked(TypedDict):
    """What a line of a store is found by: a method at a budget, and a question."""

    method: str
    budget: Budget
    """As it was asked for: tokens per image (int) or a fraction of them (float)."""
    question_id: str


class Reply(Asked):
    """A line of replies-*.jsonl: what the model said to a question of lmms-eval, and what that took."""

    prediction: Any
    """The text; of several rounds a list of them; of choices rated by likelihood a pair."""
    measured: dict[str, Any]
    """The fields of `suite_model.Measured`."""


class Line(Asked):
    """A line of results.jsonl: one question in one arm."""

    task: str
    tokens: float
    """Visual tokens of the image, averaged over the decoder layers, measured."""
    at_floor: bool
    """Whether the budget was out of the method's reach for this image, so that it was asked at the floor."""
    prediction: str
    answer: str
    correct: float | None
    """False or true, or what a benchmark gave the question, 0 to 1; None where it gives single questions nothing."""
    agrees: bool
    """Whether the full model says the same."""
    held: NotRequired[float]
    """Bytes of the image's keys and values that all layers hold after the prefill, on benchmarks of vtc's own."""
    read: NotRequired[float]
    """Bytes of them that a decoded token reads: those held, and of packed ones also what they are unpacked to."""
    peak: NotRequired[float]
    """The most bytes of them at once, during the prefill."""
    density: NotRequired[float]
    """Bits that the image shows a patch, where a benchmark of vtc's own knows it."""


class Row(TypedDict):
    """A row of summary.json: one arm over all questions. `_low` and `_high` end a 95 % interval."""

    method: str
    budget: Budget
    tokens: float
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    agreement: float
    n: int
    """Questions."""
    reachable: bool
    at_floor: int
    """Questions that were asked at the floor."""
    versus_random: float | None
    """The gain over `random` at the same budget."""
    versus_random_low: float | None
    versus_random_high: float | None
    by_task: dict[str, float]
    after_prefill: NotRequired[bool]
    """True where the method saves memory and decoding, and not the first token."""
    holds_all: NotRequired[bool]
    """Instead of that: True where it saves bytes that a decoded token reads, neither memory nor the first token."""
    held: NotRequired[float]
    """This and the next two: means of the bytes in `Line`, in bytes.json."""
    read: NotRequired[float]
    peak: NotRequired[float]
    metric: NotRequired[str]
    """This and what follows: a benchmark's own metric, of rows of lmms-eval."""
    percent: NotRequired[bool]
    """Whether it counts shares, from 0 to 1."""
    value: NotRequired[float]
    value_low: NotRequired[float]
    value_high: NotRequired[float]
    metrics: NotRequired[dict[str, float]]
    """All of the task's figures, by "metric,filter"."""


Group = tuple[str, Budget, bool, list[Line]]
"""An arm's method, its budget, whether that was in reach of all images, and its lines."""
