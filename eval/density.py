"""The picture of `vtc table`: what is lost over the density of images, and who loses least where."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtc.eval import report
from vtc.eval.standings import Arm, Scores

BINS = 6
"""Of the density of images, with as many questions each."""
SHOWN = 6
"""Methods that are coloured: those that win most bins."""


def picture(means: Sequence[Scores], methods: Sequence[str], against: str, path: Path) -> None:
    """Who wins where: what is lost against the full model over the density of images, a panel a budget.

    Coloured are the methods that win most bins of density, and dashed the one that all are compared with; the rest is
    grey.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    budgets = list(dict.fromkeys(budget for method, budget in means[0].arms if method in methods))
    density = np.concatenate([one.density for one in means])
    bins = binned(density)
    x = [float(np.median(density[inside])) for inside in bins]
    ticks: list[float] = []
    for value in x:
        if all(value > 1.15 * tick for tick in ticks):  # closer labels would overlap
            ticks.append(value)
    lost = {
        (name, budget): _lost(means, (name, budget), bins)
        for budget in budgets
        for name in methods
        if all(one.reached((name, budget)) for one in means)
    }
    coloured = winners(lost, [name for name in methods if name != against])
    columns = min(2, len(budgets))
    rows = math.ceil(len(budgets) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.4 * rows), dpi=160, layout="constrained")
    for number, budget in enumerate(budgets):
        axes = figure.add_subplot(rows, columns, number + 1)
        for name in methods:
            if (name, budget) not in lost:
                continue
            style: dict[str, Any] = {"color": "0.8", "linewidth": 0.9, "zorder": 1}
            if name in coloured:
                i = coloured.index(name)
                style = {"color": report.COLOURS[i], "marker": report.MARKERS[i], "linewidth": 1.8, "zorder": 3}
            elif name == against:
                style = {"color": "0.2", "linestyle": "--", "linewidth": 1.4, "zorder": 2}
            axes.plot(x, lost[name, budget], **style)
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.set_title(f"{report.written(budget)} of the tokens", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{value:.2g}" for value in ticks], fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
    figure.supxlabel("density of the image: bits a patch (bins of equally many questions)", fontsize=9)
    figure.supylabel("accuracy less the full model's, points", fontsize=9)
    labels = [(name, {"color": report.COLOURS[i], "marker": report.MARKERS[i]}) for i, name in enumerate(coloured)]
    if against in methods:
        labels.append((against, {"color": "0.2", "linestyle": "--"}))
    labels.append((f"{len(methods)} methods in all", {"color": "0.8"}))
    for name, style in labels:
        figure.axes[0].plot([], [], label=name, **style)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path)


def binned(density: np.ndarray) -> list[np.ndarray]:
    """Masks of at most `BINS` bins with as many questions each, none empty; in none where the density is not known."""
    edges = np.unique(np.nanquantile(density, np.linspace(0, 1, BINS + 1)))
    place = np.clip(np.searchsorted(edges, density, side="right") - 1, 0, max(0, len(edges) - 2))
    bins = [(place == n) & ~np.isnan(density) for n in range(max(1, len(edges) - 1))]
    return [inside for inside in bins if inside.any()]


def _lost(means: Sequence[Scores], arm: Arm, bins: Sequence[np.ndarray]) -> list[float]:
    """Points of accuracy against the full model in each bin."""
    gain = np.concatenate([one.correct[:, one.column(arm)] - one.full for one in means])
    return [100 * float(gain[inside].mean()) for inside in bins]


def winners(lost: Mapping[Arm, Sequence[float]], methods: Sequence[str]) -> list[str]:
    """The methods that lose least in most bins and budgets, at most `SHOWN`; ties by what they lose on average."""
    wins = dict.fromkeys(methods, 0)
    for budget in dict.fromkeys(budget for _, budget in lost):
        there = {name: lost[name, budget] for name in methods if (name, budget) in lost}
        for values in zip(*there.values(), strict=True):
            best = max(values)
            for name, value in zip(there, values, strict=True):
                wins[name] += value == best
    average = {
        name: float(np.mean([np.mean(x) for (other, _), x in lost.items() if other == name]))
        for name in methods
        if wins[name]
    }
    return sorted(average, key=lambda name: (-wins[name], -average[name]))[:SHOWN]
