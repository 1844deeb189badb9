"""`vtc compare`: one method against all others over the same questions, from what `vtc eval` wrote."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from vtc.eval import report
from vtc.eval.rows import Line
from vtc.eval.store import Store
from vtc.stage import Budget

if TYPE_CHECKING:
    from rich.table import Table

RESAMPLES = 10_000


class Difference(TypedDict):
    """A method's accuracy less that of another one at the same budget, or of the full model."""

    method: str
    budget: Budget
    other: str
    difference: float
    difference_low: float
    difference_high: float
    """The ends of a 95 % interval, from resampled questions."""
    p: float
    """Two-sided. Where answers are right or wrong that of the exact sign test: the chance of so uneven a split of the
    questions that differ, were each a fair coin. Else how often resampled questions turn the sign, twice; never less
    than 2 / (RESAMPLES + 1)."""
    n: int
    """Questions that both were asked."""
    at_floor: int
    """Of these, those that the method was asked at its floor, above the budget."""
    other_at_floor: int
    """The same of the other."""


def compare(folder: Path, method: str, seed: int = 0) -> list[Difference]:
    """`method` against the full model and each other one, budget by budget, in a folder of `vtc eval`.

    Raises ValueError where the folder holds no answers of `method`, or of no other, or no score of single questions.
    """
    arms: dict[tuple[str, str], dict[str, Line]] = defaultdict(dict)
    for line in Store[Line](folder / "results.jsonl").lines.values():
        arms[line["method"], repr(line["budget"])][line["question_id"]] = line
    names = list(dict.fromkeys(name for name, _ in arms))
    if method not in names or len(names) == 1:
        raise ValueError(f"{folder} holds answers of {', '.join(names) or 'nobody'}: nothing to compare {method} with")
    found = []
    for (own, budget), lines in arms.items():
        if own == method:
            others = [name for name in names if name != method and ((name, budget) in arms or name == "full")]
            found += [
                _difference(method, other, lines, arms[other, repr(1.0) if other == "full" else budget], seed)
                for other in others
            ]
    return sorted(found, key=lambda row: -row["budget"])


def _difference(method: str, other: str, ours: dict[str, Line], theirs: dict[str, Line], seed: int) -> Difference:
    pairs = [(line, theirs[question]) for question, line in ours.items() if question in theirs]
    marks = [(one["correct"], two["correct"]) for one, two in pairs]
    if not marks or any(mark is None for pair in marks for mark in pair):
        raise ValueError(f"{method} and {other} have no scores of the same single questions")
    values = np.array(marks, float) @ [[1], [-1]]
    draws = report.bootstrap(values, seed, RESAMPLES)
    low, high = report.interval(draws)
    return {
        "method": method,
        "budget": pairs[0][0]["budget"],
        "other": other,
        "difference": float(values.mean()),
        "difference_low": low,
        "difference_high": high,
        "p": _chance(values, draws),
        "n": len(pairs),
        "at_floor": sum(one["at_floor"] for one, _ in pairs),
        "other_at_floor": sum(two["at_floor"] for _, two in pairs),
    }


def _chance(values: np.ndarray, draws: np.ndarray) -> float:
    if np.isin(values, (-1, 0, 1)).all():
        return _sign_test(int((values > 0).sum()), int((values < 0).sum()))
    turned = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return min(1.0, 2 * (turned + 1) / (RESAMPLES + 1))


def _sign_test(more: int, less: int) -> float:
    """The chance that of more + less fair coins as many or fewer fall on the rarer side, twice."""
    coins, ways, tail = more + less, 1, 0
    for rarer in range(min(more, less) + 1):
        tail += ways
        ways = ways * (coins - rarer) // (rarer + 1)
    return min(1.0, 2 * tail / 2**coins)


def table(rows: list[Difference]) -> Table:
    """The differences for the terminal, in points of accuracy."""
    from rich.table import Table

    grid = Table(title=f"{rows[0]['method']} less another, points of accuracy over the same questions", caption=FLOOR)
    for name in ("budget", "other", "difference", "95 % interval", "p", "questions"):
        grid.add_column(name, justify="left" if name == "other" else "right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        low, high = (100 * row[end] for end in ("difference_low", "difference_high"))
        grid.add_row(
            report.written(row["budget"]) + " *" * bool(row["at_floor"]),
            row["other"] + " *" * bool(row["other_at_floor"]),
            f"{100 * row['difference']:+.1f}",
            f"{low:+.1f} to {high:+.1f}",
            f"{row['p']:.4f}",
            str(row["n"]),
            end_section=following is not None and following["budget"] != row["budget"],
        )
    return grid


FLOOR = "* asked above the budget, at its floor: at a budget the method, at a name the other"
