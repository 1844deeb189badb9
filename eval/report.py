"""From result lines to figures: scoring, intervals, the summary, the table on the terminal and the picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from vtc.install import install_line

if TYPE_CHECKING:
    from rich.table import Table

    from vtc.eval.measure import Own
    from vtc.eval.rows import Group, Line, Row
    from vtc.stage import Budget

RESAMPLES = 2000
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")  # Okabe and Ito
MARKERS = "osD^vPX<"
ALWAYS = ("full", "blind")
MANY = 2 * len(COLOURS)
"""Curves in one picture, each colour with two markers; of more only the first are coloured."""
BASELINE = "random"
"""The method that a picture of many names beside the best."""


def bootstrap(values: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Means over resampled questions: `values` (questions, columns) -> (resamples, columns).

    Each resample draws the same questions for every column, so differences of columns are paired.
    """
    rng = np.random.default_rng(seed)
    n = len(values)
    draws = np.empty((resamples, values.shape[1]))
    for i in range(resamples):
        draws[i] = np.bincount(rng.integers(0, n, n), minlength=n) @ values / n
    return draws


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The central 95 % of bootstrap means."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def summarise(groups: Sequence[Group], seed: int, own: Own | None = None) -> list[Row]:
    """Summary rows; the lines of all groups are over the same questions in one order.

    With `own`, a benchmark's own metric, rows have that too, and "versus_random" is of it. Where lines have no score
    of single questions ("correct" is None) there is no accuracy.
    """
    correct = np.array([[line["correct"] for line in lines] for *_, lines in groups], dtype=float).T
    draws = bootstrap(correct, seed)
    values, compared = (correct.mean(0), draws) if own is None else (own.values, own.draws)
    # an int budget of 1 is one token and a float budget of 1.0 is all of them, yet 1 == 1.0: key by the written form
    random = {repr(budget): i for i, (method, budget, ok, _) in enumerate(groups) if method == "random" and ok}
    rows = []
    for i, (method, budget, reachable, lines) in enumerate(groups):
        low, high = interval(draws[:, i])
        row: Row = {
            "method": method,
            "budget": budget,
            "tokens": float(np.mean([line["tokens"] for line in lines])),
            "accuracy": _known(correct[:, i].mean()),
            "accuracy_low": _known(low),
            "accuracy_high": _known(high),
            "agreement": float(np.mean([line["agrees"] for line in lines])),
            "n": len(lines),
            "reachable": reachable,
            "at_floor": sum(line.get("at_floor", not reachable) for line in lines),
            "versus_random": None,
            "versus_random_low": None,
            "versus_random_high": None,
            "by_task": _by_task(lines),
        }
        j = random.get(repr(budget))
        if j is not None and j != i and reachable and method not in ALWAYS:
            # of single questions the mean of the differences: it is rounded once
            gain = (correct[:, i] - correct[:, j]).mean() if own is None else values[i] - values[j]
            row["versus_random"] = float(gain)
            row["versus_random_low"], row["versus_random_high"] = interval(compared[:, i] - compared[:, j])
        if own is not None:
            row["metric"], row["percent"], row["value"] = own.metric, own.percent, float(own.values[i])
            row["value_low"], row["value_high"] = interval(own.draws[:, i])
        rows.append(row)
    return rows


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


class Estimate(NamedTuple):
    """A figure with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def shown(row: Row) -> Estimate:
    """A row's figure to look at: by the benchmark's own metric where it has one, else the accuracy."""
    if "value" in row:
        return Estimate(row["value"], row["value_low"], row["value_high"])
    return _estimate(row["accuracy"], row["accuracy_low"], row["accuracy_high"])


def _above_random(row: Row) -> Estimate | None:
    if row["versus_random"] is None:
        return None
    return _estimate(row["versus_random"], row["versus_random_low"], row["versus_random_high"])


def _estimate(value: float | None, low: float | None, high: float | None) -> Estimate:
    assert value is not None  # rows without an accuracy have a metric
    assert low is not None
    assert high is not None
    return Estimate(value, low, high)


def factor(row: Row) -> int:
    """What that figure is multiplied by to be read: 100 for a share, 1 for points."""
    return 100 if row.get("percent", True) else 1


def _by_task(lines: list[Line]) -> dict[str, float]:
    tasks: dict[str, list[float]] = {}
    for line in lines:
        if line["correct"] is not None:
            tasks.setdefault(line["task"], []).append(line["correct"])
    return {task: float(np.mean(marks)) for task, marks in sorted(tasks.items())}


def distinct(budgets: Iterable[Budget]) -> list[Budget]:
    """Each once, in their order: 1 is a token, 1.0 all of them, and yet they are equal."""
    return list({repr(budget): budget for budget in budgets}.values())


def written(budget: Budget) -> str:
    """A budget as the command line takes it: a count for an int, a percentage for a fraction."""
    return str(budget) if isinstance(budget, int) else f"{100 * budget:g}%"


def named(row: Row, rows: Sequence[Row] = ()) -> str:
    """A row's method, marked where it saves nothing before the first token.

    Of a file its name alone, or with as many of its folders as tell it from the methods of the other `rows`.
    """
    mark = " †" if row.get("after_prefill") else " ‡" if row.get("holds_all") else ""
    return _short(row["method"], {other["method"] for other in rows} - {row["method"]}) + mark


def _short(method: str, others: Iterable[str]) -> str:
    if not method.endswith(".json"):
        return method
    parts, taken = _parts(method), [_parts(other) for other in others]
    counts = range(1, len(parts) + 1)
    alone = (n for n in counts if all(parts[-n:] != other[-n:] for other in taken))
    return str(Path(*parts[-count:])) if (count := next(alone, None)) else method


def _parts(method: str) -> tuple[str, ...]:
    return Path(method.removesuffix(".json")).parts


def footnote(rows: Sequence[Row]) -> list[str]:
    """What the marks mean, where there are any."""
    marks = legend(rows)
    return [*marks, "(that is the full model's: answers of one token say nothing about it)"] if marks else []


def legend(rows: Sequence[Row]) -> list[str]:
    """A line for each mark."""
    late, anew = (any(row.get(name) for row in rows) for name in ("after_prefill", "holds_all"))
    return [LATE] * late + [ANEW] * anew


LATE = "† saves memory and decoding, not the first token"
ANEW = "‡ saves bytes that a decoded token reads, neither memory nor the first token"


def table(rows: list[Row]) -> Table:
    """Accuracy or the benchmark's own metric, agreement and the gain over random, a line a row; for 80 columns."""
    from rich.table import Table

    unit = "percent" if factor(rows[0]) == 100 else "points"
    grid = Table(title=f"{unit} of {rows[0]['n']} questions, with half the width of the 95 % interval")
    for name in ("method", "budget", "tokens", rows[0].get("metric", "accuracy"), "as full", "above random"):
        first = name == "method"
        grid.add_column(name, justify="left" if first else "right", no_wrap=not first, overflow="fold")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        grid.add_row(
            named(row, rows),
            written(row["budget"]) + ("" if row["reachable"] else " *"),
            f"{row['tokens']:.1f}",
            spread(shown(row), factor(row), ".1f"),
            f"{100 * row['agreement']:.1f}",
            spread(_above_random(row), factor(row), "+.1f"),
            end_section=following is not None and following["method"] not in (row["method"], "blind"),
        )
    if not all(row["reachable"] for row in rows):
        some = [row for row in rows if 0 < row["at_floor"] < row["n"]]
        which = "".join(f"\n{row['method']} at {written(row['budget'])}: {row['at_floor']} images" for row in some)
        grid.caption = f"* below the method's floor on this model: run at the floor, see tokens{which}"
    grid.caption = "\n".join([*([str(grid.caption)] if grid.caption else []), *footnote(rows)]) or None
    return grid


def spread(found: Estimate | None, times: int, form: str) -> str:
    """A figure and half the width of its interval."""
    if found is None:
        return ""
    return f"{times * found.value:{form}} ± {times / 2 * (found.high - found.low):.1f}"


def task_tables(rows: list[Row], width: int) -> list[Table]:
    """Accuracy by task, a line a task: as many methods and budgets beside each other as fit into `width` columns."""
    from rich.table import Table

    tasks = list(rows[0]["by_task"])
    first = max(map(len, ("task", *tasks))) + EDGES + 1
    groups: list[list[Row]] = []
    left = 0
    for row in rows:
        taken = min(WIDEST, max(len("100.0"), *map(len, _head(row, rows).split("\n")))) + EDGES
        if not groups or taken > left:
            groups.append([])
            left = width - first
        groups[-1].append(row)
        left -= taken
    grids = []
    for group in groups:
        grids.append(grid := Table("task", title="accuracy by task, in percent"))
        for row in group:
            grid.add_column(_head(row, rows), justify="right", max_width=WIDEST, overflow="fold")
        for task in tasks:
            grid.add_row(task, *(f"{100 * row['by_task'][task]:.1f}" for row in group))
    return grids


def _head(row: Row, rows: list[Row]) -> str:
    return f"{named(row, rows)}\n{written(row['budget'])}{'' if row['reachable'] else ' *'}"


WIDEST = 24
"""Columns of the terminal for a method's name."""
EDGES = 3
"""Columns that a cell takes beside what stands in it."""


def metrics_table(rows: list[Row]) -> Table:
    """A benchmark's own metrics over all questions, a line a row."""
    from rich.table import Table

    grid = Table("method", "budget", "metrics", title="as the benchmark counts")
    for row in rows:
        budget = written(row["budget"]) + ("" if row["reachable"] else " *")
        values = [f"{name.removesuffix(',none')} {value:.4g}" for name, value in row["metrics"].items()]
        grid.add_row(row["method"], budget, ", ".join(values))
    return grid


Per = Literal["tokens", "bytes"]
"""What accuracy is drawn against: visual tokens, or the bytes that their keys and values hold after the prefill."""


def picture(
    rows: list[Row], path: Path, title: str, published: Sequence[tuple[str, float, float]] = (), per: Per = "tokens"
) -> None:
    """Draw accuracy, or the benchmark's own metric, against measured visual tokens or bytes, with 95 % bands and the
    lines of the full and the blind model.

    `published`: (method, tokens, the same figure) of papers, for crosses in the method's colour.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: no global state, no display
    except ImportError:
        raise ModuleNotFoundError(f"the curve needs matplotlib: {install_line('eval')}", name="matplotlib") from None

    if per == "bytes":  # all but the axis is the same
        rows = [{**row, "tokens": row["held"] / 1024} for row in rows]
    figure = Figure(figsize=(8, 4.8), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    always = {row["method"]: row for row in rows if row["method"] in ALWAYS}
    order = list(dict.fromkeys(row["method"] for row in rows if row["method"] not in ALWAYS))
    curves = _curves(rows)
    coloured = _coloured(curves)
    if len(coloured) < len(curves):
        order = [method for method in curves if method in coloured]
    for method, points in curves.items():
        if method not in coloured:
            _draw_grey(axes, points)
            continue
        i = order.index(method)  # a method's colour does not depend on how it did
        _draw_curve(
            axes,
            named(points[0], rows),
            points,
            always["full"],
            COLOURS[i % len(COLOURS)],
            MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
        )
    if others := len(curves) - len(coloured):
        axes.plot([], [], color="0.8", linewidth=0.9, label=f"{others} other methods")
    for name, row in always.items():
        above = name == "full"
        value, low, high = shown(row)
        axes.axhspan(low, high, color="0.5", alpha=0.12, linewidth=0)
        axes.axhline(value, color="0.3", linestyle="--" if above else ":", linewidth=1.2, zorder=1)
        label = f"full model, {row['tokens']:.0f} {'tokens' if per == 'tokens' else 'KiB'}: {value:.2f}"
        axes.annotate(
            label if above else f"blind, no visual token: {value:.2f}",
            (0.01, value), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", color="0.3", fontsize=9,
        )  # fmt: skip
    for method, tokens, accuracy in published:
        colour = COLOURS[order.index(method) % len(COLOURS)] if method in order else "0.6"
        axes.plot(tokens, accuracy, "x", color=colour, markersize=6, zorder=2)
    if published:
        axes.plot([], [], "x", color="0.3", label="published")
    for mark in legend(rows):
        axes.plot([], [], " ", label=mark.replace(", ", ",\n"))
    hollow = any(not row["reachable"] for row in rows if row["method"] in coloured)
    _dress(axes, rows, title, AXES[per], hollow)
    figure.savefig(path)


AXES: dict[Per, str] = {
    "tokens": "visual tokens per image, averaged over the decoder layers (measured, log scale)",
    "bytes": "KiB of visual keys and values that an image holds after the prefill (log scale)",
}


def _curves(rows: list[Row]) -> dict[str, list[Row]]:
    """Points by method, fewest tokens first; methods in the order of their accuracy at the fewest tokens."""
    curves: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        if row["method"] not in ALWAYS and row["tokens"] > 0:
            curves.setdefault(row["method"], []).append(row)
    return dict(sorted(curves.items(), key=lambda curve: -shown(curve[1][0]).value))


def _coloured(curves: dict[str, list[Row]]) -> set[str]:
    """All methods; of more than colours tell apart the first ones, and the baseline, in colours that are not grey."""
    if len(curves) <= MANY:
        return set(curves)
    first = [method for method in curves if method != BASELINE][: len(COLOURS) - 2]
    return {*first, BASELINE} & set(curves)


def _draw_grey(axes: Any, points: list[Row]) -> None:
    axes.plot(
        [row["tokens"] for row in points], [shown(row).value for row in points], color="0.8", linewidth=0.9, zorder=1
    )


def _draw_curve(axes: Any, name: str, points: list[Row], full: Row, colour: str, marker: str) -> None:
    # every method at a budget of 1 is the full model: the curve ends there
    ends = points if points[-1]["tokens"] >= full["tokens"] else [*points, full]
    x = [row["tokens"] for row in ends]
    value, low, high = zip(*map(shown, ends), strict=True)
    axes.plot(x, value, color=colour, linewidth=1.8, zorder=3)
    axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0, zorder=2)
    for row in points:
        axes.plot(
            row["tokens"], shown(row).value, marker, color=colour, markersize=7, markeredgewidth=1.6, zorder=4,
            markerfacecolor=colour if row["reachable"] else "white",
        )  # fmt: skip
    axes.plot([], [], marker=marker, color=colour, linewidth=1.8, label=name)


def _dress(axes: Any, rows: list[Row], title: str, axis: str, hollow: bool) -> None:
    from matplotlib.ticker import NullLocator

    if hollow:
        axes.plot([], [], "o", color="0.3", markerfacecolor="white", label="below its floor:\nrun at the floor")
    axes.set_xscale("log", base=2)
    ticks: list[int] = []
    counts = Counter(round(row["tokens"]) for row in rows if row["tokens"] >= 0.5)
    for tokens, _ in counts.most_common():
        if all(max(tokens, tick) > 1.15 * min(tokens, tick) for tick in ticks):  # closer labels would overlap
            ticks.append(tokens)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(axis)
    axes.set_ylabel(rows[0].get("metric", "accuracy"))
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
