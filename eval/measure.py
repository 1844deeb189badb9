"""A benchmark's own metric over all questions, with its interval: the task's aggregation, on resampled questions."""

from __future__ import annotations

import inspect
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np

from vtc.eval import report

if TYPE_CHECKING:
    from lmms_eval.api.task import Task

OWN = {
    "pope": "pope_f1_score",
    "mme": "mme_perception_score",
    "seedbench": "seed_all",
    "refcoco_bbox_rec": "refcoco_ACC@0.5",
    "refcoco": "refcoco_CIDEr",
}
"""The metric that papers print, by the beginning of a task's name; of other tasks the first that their file names."""
RESAMPLES = 200
"""Of an aggregate that is no mean over questions: each is one more run of the task's own code."""
PROBE = 16
"""Units on which it is tried whether an aggregate is a mean."""

Item = Any
"""What a task's process_results gave one question for one metric."""


@dataclass(frozen=True)
class Own:
    """The benchmark's own metric of every arm."""

    metric: str
    values: np.ndarray
    """(arms,), as the benchmark counts."""
    draws: np.ndarray
    """(resamples, arms), of the same questions in each arm."""
    percent: bool
    """Whether 1 is the best that a question can get."""
    singles: np.ndarray | None
    """(arms, questions), where the metric is a mean over them."""


def own_metric(task: Task, samples: Sequence[Sequence[dict[str, Any]]], seed: int) -> Own:
    """Of each arm's samples, over the same questions in one order. Raises ValueError where a task counts nothing."""
    for metric in _candidates(task):
        arms = [[sample[metric] for sample in arm if metric in sample] for arm in samples]
        aggregate = _quietly(task.aggregation()[metric])
        values = [aggregate(items) if items else None for items in arms]
        if all(isinstance(value, int | float | np.number) for value in values):
            return _own(task, metric, aggregate, arms, np.array(values, float), seed)
    raise ValueError("its metrics are no numbers, so that there is no curve to draw")


def metrics(task: Task, samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """All of the task's metrics over some of its questions, by name."""
    found = {name: [sample[name] for sample in samples if name in sample] for name in task.aggregation()}
    values = {name: _quietly(task.aggregation()[name])(items) for name, items in found.items() if items}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float | np.number)}


def _candidates(task: Task) -> list[str]:
    name, known = task.config.task, list(task.aggregation())
    printed = [metric for start, metric in OWN.items() if name.startswith(start) and metric in known]
    return [*printed[:1], *(metric for metric in known if metric not in printed[:1])]


def _own(task: Task, metric: str, aggregate: Callable, arms: list[list[Item]], values: np.ndarray, seed: int) -> Own:
    units = [_units(task.config.task, items) for items in arms]
    probed = np.array([[aggregate(unit) for unit in arm[:PROBE]] for arm in units], float)
    percent = bool((np.abs(probed) <= 1).all() and (np.abs(values) <= 1).all())
    singles = _singles(aggregate, units, probed, values)
    if singles is not None:
        return Own(metric, values, report.bootstrap(singles.T, seed), percent, singles)
    rng, draws = np.random.default_rng(seed), np.empty((RESAMPLES, len(arms)))
    for row in draws:
        chosen = rng.integers(0, len(units[0]), len(units[0]))
        row[:] = [aggregate([item for n, i in enumerate(chosen) for item in _copy(arm[i], n)]) for arm in units]
    return Own(metric, values, draws, percent, None)


def _singles(aggregate: Callable, units: list[Any], probed: np.ndarray, values: np.ndarray) -> np.ndarray | None:
    """(arms, questions): the aggregate of each question alone, if that of all is their mean; else None."""
    if any(len(unit) > 1 for arm in units for unit in arm):
        return None
    firsts = [aggregate([unit[0] for unit in arm[:PROBE]]) for arm in units]
    if not np.allclose(probed.mean(1), firsts):
        return None
    singles = np.array([[aggregate(unit) for unit in arm] for arm in units], float)
    return singles if np.allclose(singles.mean(1), values) else None


def _units(name: str, items: list[Item]) -> list[list[Item]]:
    """What is drawn together: MME's two questions about an image; MMBench's, where it turns the options around."""
    together: dict[Any, list[Item]] = {}
    for number, item in enumerate(items):
        key: Any = number
        if name == "mme":
            key = item["category"], item["question_id"]
        elif name.startswith("mmbench") and isinstance(item, dict) and "index" in item:
            key = int(item["index"]) % 1_000_000
        together.setdefault(key, []).append(item)
    return list(together.values())


def _copy(unit: list[Item], number: int) -> list[Item]:
    """A unit under another name, as MME counts the questions of each image and finds two."""
    if len(unit) == 1 or not isinstance(unit[0], dict) or "question_id" not in unit[0]:
        return unit
    return [{**item, "question_id": f"{item['question_id']}#{number}"} for item in unit]


def _quietly(aggregation: Callable) -> Callable[[list[Item]], Any]:
    """A task's aggregation without what it prints, and with a folder of its own for files that it writes."""

    def aggregate(items: list[Item]) -> Any:
        with redirect_stdout(StringIO()), tempfile.TemporaryDirectory() as folder:
            if "args" in inspect.signature(aggregation).parameters:
                return aggregation(items, args=Namespace(output_path=folder))
            return aggregation(items)

    return aggregate
