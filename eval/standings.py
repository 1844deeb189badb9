"""What `vtc table` found: intervals, ranks with a critical difference, and the table in Markdown.

Ranks after Demsar ("Statistical Comparisons of Classifiers over Multiple Data Sets", JMLR 7, 2006): on each task of
each benchmark methods are ranked by accuracy, averaged over the models. Friedman's test asks whether they differ at
all; two whose mean ranks are apart by the critical difference of Nemenyi's test differ at 5 %. A method that cannot
reach a budget is the last one there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from scipy.stats import friedmanchisquare, rankdata, studentized_range

import vtc
from vtc.eval import mis, report
from vtc.eval.table import Answers

ALL = "all"
FULL = "full"
OTHERS = (*report.ALWAYS, mis.SWAPPED)

Arm = tuple[str, vtc.Budget]


@dataclass
class Scores:
    """One model, or the mean of several, on one benchmark: arrays over (questions,) or (questions, arms)."""

    model: str
    benchmark: str
    arms: list[Arm]
    tasks: np.ndarray
    density: np.ndarray
    """Bits that the image shows a patch; NaN where nobody knows."""
    needs: np.ndarray
    """Whether the question needs the image: see `mis`."""
    correct: np.ndarray
    agrees: np.ndarray
    tokens: np.ndarray
    at_floor: np.ndarray

    @classmethod
    def of(cls, found: Answers) -> Scores:
        arms = list(found.lines)
        full, blind = found.lines["full", 1.0], found.lines["blind", 0]

        def by_arm(name: str) -> np.ndarray:
            return np.array([[line[name] for line in found.lines[arm]] for arm in arms], float).T  # type: ignore[literal-required]

        return cls(
            found.model,
            found.benchmark,
            arms,
            np.array([line["task"] for line in full]),
            np.array([line.get("density") or math.nan for line in full], float),
            np.array([mis.needs_image(*pair) for pair in zip(full, blind, strict=True)]),
            *map(by_arm, ("correct", "agrees", "tokens", "at_floor")),
        )

    def column(self, arm: Arm) -> int:
        return self.arms.index(arm)

    def reached(self, arm: Arm) -> bool:
        return not self.at_floor[:, self.column(arm)].any()

    @property
    def full(self) -> np.ndarray:
        """(questions,)"""
        return self.correct[:, self.column(("full", 1.0))]


def mean(scores: Sequence[Scores]) -> Scores:
    """Of several models on one benchmark: the arms that all have, question by question. A question needs the image
    where it does for all."""
    first, *rest = scores
    arms = [arm for arm in first.arms if all(arm in other.arms for other in rest)]

    def averaged(name: str) -> np.ndarray:
        return np.mean([getattr(one, name)[:, [one.column(arm) for arm in arms]] for one in scores], axis=0)

    needs = np.all([one.needs for one in scores], axis=0)
    figures = map(averaged, ("correct", "agrees", "tokens", "at_floor"))
    models = ", ".join(one.model for one in scores)
    return Scores(models, first.benchmark, arms, first.tasks, first.density, needs, *figures)


# -- figures --------------------------------------------------------------------------------------------------------


class Cell(TypedDict):
    """A method at a budget on a benchmark with a model. `_low` and `_high` end a 95 % interval."""

    model: str
    benchmark: str
    method: str
    budget: vtc.Budget
    tokens: float
    reached: bool
    """Whether no image was at the method's floor."""
    n: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    agreement: float
    versus: float | None
    """The gain over what all are compared with, where both are within this budget; paired."""
    versus_low: float | None
    versus_high: float | None
    needing: float | None
    """Accuracy on the questions that need the image."""
    needing_n: int


def cells(scores: Scores, against: str, seed: int) -> list[Cell]:
    """A cell an arm. `against` is a method at the same budget, or "full", the model with all tokens."""
    draws, found = report.bootstrap(scores.correct, seed), []
    for i, (method, budget) in enumerate(scores.arms):
        low, high = report.interval(draws[:, i])
        cell: Cell = {
            "model": scores.model,
            "benchmark": scores.benchmark,
            "method": method,
            "budget": budget,
            "tokens": float(scores.tokens[:, i].mean()),
            "reached": scores.reached((method, budget)),
            "n": len(scores.correct),
            "accuracy": float(scores.correct[:, i].mean()),
            "accuracy_low": low,
            "accuracy_high": high,
            "agreement": float(scores.agrees[:, i].mean()),
            "versus": None,
            "versus_low": None,
            "versus_high": None,
            "needing": float(scores.correct[scores.needs, i].mean()) if scores.needs.any() else None,
            "needing_n": int(scores.needs.sum()),
        }
        other = (against, 1.0 if against == FULL else budget)
        if method not in (*OTHERS, against) and other in scores.arms and cell["reached"] and scores.reached(other):
            j = scores.column(other)
            cell["versus"] = float((scores.correct[:, i] - scores.correct[:, j]).mean())
            cell["versus_low"], cell["versus_high"] = report.interval(draws[:, i] - draws[:, j])
        found.append(cell)
    return found


class Ranks(TypedDict):
    """Mean ranks, 1 is the best, over the tasks."""

    tasks: int
    p: float | None
    """Of Friedman's test that all methods are alike; None for fewer than three."""
    critical_difference: float | None
    mean_rank: dict[str, float]
    """The best first."""
    by_budget: dict[str, dict[str, float]]


def ranks(scores: Sequence[Scores], methods: Sequence[str], budgets: Sequence[vtc.Budget]) -> Ranks:
    """Over all tasks of these benchmarks. Over the budgets, a method's rank on a task is that of its mean rank."""
    by_budget = {report.written(budget): _ranked(_by_task(scores, methods, budget)) for budget in budgets}
    over = _ranked(-np.mean(list(by_budget.values()), axis=0))
    (tasks, count), p, difference = over.shape, None, None
    if count > 2:
        p = float(friedmanchisquare(*over.T).pvalue)
    if count > 1:
        difference = float(
            studentized_range.ppf(0.95, count, np.inf) / math.sqrt(2) * math.sqrt(count * (count + 1) / (6 * tasks))
        )

    def named(table: np.ndarray) -> dict[str, float]:
        return dict(sorted(zip(methods, table.mean(0).tolist(), strict=True), key=lambda pair: pair[1]))

    return {
        "tasks": tasks,
        "p": None if p is None or math.isnan(p) else p,
        "critical_difference": difference,
        "mean_rank": named(over),
        "by_budget": {budget: named(table) for budget, table in by_budget.items()},
    }


def _by_task(scores: Sequence[Scores], methods: Sequence[str], budget: vtc.Budget) -> np.ndarray:
    """(tasks, methods): accuracy, or minus infinity where the budget is out of reach."""
    rows = []
    for one in scores:
        columns = [one.column((method, budget)) for method in methods]
        reached = np.array([one.reached((method, budget)) for method in methods])
        for task in sorted(set(one.tasks)):
            accuracy = one.correct[one.tasks == task][:, columns].mean(0).round(9)  # equals of several models stay so
            rows.append(np.where(reached, accuracy, -np.inf))
    return np.array(rows)


def _ranked(values: np.ndarray) -> np.ndarray:
    """Within each row, the greatest is 1; equals share their mean rank."""
    return rankdata(-values, axis=1)


def shares(files: Sequence[Path]) -> dict[str, float]:
    """By method what choosing takes of the unpruned prefill, the largest of all rows of `vtc bench` or `selection`.

    Raises ValueError for a file that holds none.
    """
    found: dict[str, float] = {}
    for file in files:
        try:
            for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
                share = row["share"] if "share" in row else sum(row["own"].values()) / row["full"]["prefill"]
                found[row["method"]] = max(float(share), found.get(row["method"], 0.0))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{file} is not what `vtc bench` or `vtc selection` writes with --out") from None
    return found


# -- what is shown --------------------------------------------------------------------------------------------------


class Standing(TypedDict):
    """table.json."""

    against: str
    cells: list[Cell]
    """Of each model, and where there are several of their mean."""
    ranks: dict[str, Ranks]
    """Over all benchmarks and over each."""
    shares: dict[str, float]
    left_out: dict[str, str]
    """Methods that are not in all cells, and why."""


def stand(
    found: Sequence[Answers], methods: Sequence[str], against: str, seed: int, costs: Mapping[str, float]
) -> tuple[Standing, list[Scores]]:
    """All figures, and the scores of each benchmark, averaged over the models.

    Raises ValueError where no method was run everywhere.
    """
    single = [Scores.of(answers) for answers in found]
    names = list(dict.fromkeys(one.benchmark for one in single))
    means = [mean([one for one in single if one.benchmark == name]) for name in names]
    budgets = list(dict.fromkeys(budget for method, budget in means[0].arms if method not in OTHERS))
    whole = [name for name in methods if all((name, budget) in one.arms for one in means for budget in budgets)]
    if not whole:
        raise ValueError("no method is done on all benchmarks and models: run `vtc table` again")
    out = {name: "not done" for name in methods if name not in whole}
    out |= {name: reason for answers in found for name, reason in answers.refused.items()}
    several = len(single) > len(means)
    standing: Standing = {
        "against": against,
        "cells": [cell for one in (*single, *(means if several else ())) for cell in cells(one, against, seed)],
        "ranks": {ALL: ranks(means, whole, budgets)} | {one.benchmark: ranks([one], whole, budgets) for one in means},
        "shares": {name: costs[name] for name in whole if name in costs},
        "left_out": out,
    }
    return standing, means


def markdown(standing: Standing, means: Sequence[Scores], seed: int) -> str:
    """The table, the best mean rank first, and what has to be known to read it."""
    from vtc.methods.compose import find_method
    from vtc.methods.overview import of

    every = [cell for one in means for cell in cells(one, standing["against"], seed)]
    found = {(cell["benchmark"], cell["method"], cell["budget"]): cell for cell in every}
    order = list(standing["ranks"][ALL]["mean_rank"])
    columns = [(one.benchmark, budget) for one in means for method, budget in one.arms if method == order[0]]
    ranked = {"rank": ALL} | {f"rank on {one.benchmark}": one.benchmark for one in means if len(means) > 1}
    head = ["method", "where", "trained", "question", "merges"]
    head += [f"{benchmark} {report.written(budget)}" for benchmark, budget in columns]
    lines = [[*head, *ranked, "cost", "paper"]]
    lines.append(["---"] * len(lines[0]))
    for name in order:
        method, share = find_method(name), standing["shares"].get(name)
        about = of(method)
        row = [f"`{name}`", about.where, *about.flags]
        row += [_figure(found[where, name, budget], found[where, "full", 1.0]) for where, budget in columns]
        row += [f"{standing['ranks'][key]['mean_rank'][name]:.1f}" for key in ranked.values()]
        lines.append([*row, "" if share is None else f"{share:.1%}", method.paper])
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *_legend(standing, means, found)]) + "\n"


def _figure(cell: Cell, full: Cell) -> str:
    half = (cell["accuracy_high"] - cell["accuracy_low"]) / 2
    figure = f"{100 * cell['accuracy']:.1f} ± {100 * half:.1f} ({100 * cell['agreement']:.0f})"
    asked, share = cell["budget"], cell["tokens"] / full["tokens"]
    if isinstance(asked, int):
        asked /= full["tokens"]
    if not cell["reached"]:
        return f"floor: {figure} at {share:.0%}"
    return figure if math.isclose(share, asked, rel_tol=0.1) else f"{figure} at {share:.0%}"


def _legend(
    standing: Standing, means: Sequence[Scores], found: Mapping[tuple[str, str, vtc.Budget], Cell]
) -> Iterator[str]:
    for one in means:
        full, blind = found[one.benchmark, "full", 1.0], found[one.benchmark, "blind", 0]
        yield (
            f"{one.benchmark} ({one.model}): {full['n']} questions, full model {100 * full['accuracy']:.1f}, blind "
            f"{100 * blind['accuracy']:.1f}; {full['needing_n']} need the image."
        )
    yield "Accuracy in percent, ± half of the 95 % bootstrap interval; in brackets agreement with the full model."
    overall = standing["ranks"][ALL]
    if overall["critical_difference"] is not None:
        p = "" if overall["p"] is None else f"; Friedman's test that all are alike: p = {overall['p']:.2g}"
        yield (
            f"Mean rank over {overall['tasks']} tasks; ranks that are apart by {overall['critical_difference']:.1f} "
            f"differ at 5 % (Nemenyi){p}."
        )
    if standing["shares"]:
        yield "Cost: what choosing takes of the unpruned prefill."
    yield from (f"Left out: {name}: {reason}." for name, reason in standing["left_out"].items())
