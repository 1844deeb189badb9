"""What choosing tokens costs: the seconds to score, select and compact beside those of the unpruned prefill."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from rich.table import Table

import vtc
from vtc.eval import shapes
from vtc.eval.bench import OWN, Case, Ends, Parts, Step, dress, stack, take_turns
from vtc.methods.compose import with_budget

BOUND = 0.03
"""The share of the unpruned prefill that a choice should stay below."""
COLOURS = {"score": "#999999", "select": "#0072B2", "compact": "#E69F00"}


class Row(TypedDict):
    """A method at a budget: medians over the rounds."""

    method: str
    budget: vtc.Budget
    tokens: float
    """Visual tokens of an image that a layer reads, averaged over the layers."""
    own: Parts
    prefill: float
    """Of the unpruned decoder."""
    share: float
    """Of that, what `own` takes together."""
    range: Ends
    """Of the share over the rounds."""


def arms(
    model: torch.nn.Module,
    methods: Sequence[str],
    budgets: Sequence[vtc.Budget],
    said: Callable[[str], None],
    named: bool = False,
) -> list[tuple[str, vtc.Budget]]:
    """(method, budget) of each; "all" stands for all methods that this model takes, the others are `said` with why.

    Where "all" has a method whose floor is above a budget, it runs at its floor, which is said, too. With `named` a
    file that names a budget is run at that one.
    """
    found: dict[tuple[str, vtc.Budget], None] = {}
    for method in methods:
        for name in vtc.list_methods() if method == "all" else [method]:
            own = with_budget(name)[1] if named else None
            for budget in budgets if own is None else (own,):
                try:
                    with vtc.compressed(model, name, budget):
                        found[name, budget] = None
                except ValueError as error:
                    if method != "all":
                        raise
                    if isinstance(error, vtc.BudgetError):
                        said(f"{name} runs at its floor, {error.floor:.3g} of the tokens, instead of {budget}")
                        found[name, error.floor] = None
                    else:
                        said(f"{name} is left out: {error}")
    return list(found)


@torch.inference_mode()
def measure(
    model: torch.nn.Module,
    arms: Sequence[tuple[str, vtc.Budget]],
    case: Case,
    step: Step = lambda text: None,
) -> list[Row]:
    """One row for each (method, budget), the dearest first, from rounds in which all prefills take turns."""
    step("preparing the prompts")
    inputs = shapes.prompt(model, case.batch, case.prompt_tokens, case.pixels)

    def full() -> Parts:
        with vtc.compressed(model, "random", 1.0) as trace:  # nothing leaves; it tells what the decoder takes
            model(**inputs, use_cache=True, logits_to_keep=1)
            return {"prefill": trace.seconds["prefill"]}

    def pruned(arm: tuple[str, vtc.Budget]) -> Parts:
        with vtc.compressed(model, *arm) as trace:
            model(**inputs, use_cache=True, logits_to_keep=1)
            own = {part: trace.seconds.get(part, 0.0) for part in OWN}
            return own | {"tokens": float(trace.average_tokens.mean())}

    works = {"full": full} | {arm: functools.partial(pruned, arm) for arm in arms}
    rounds = take_turns(works, case.rounds, step)
    rows = [_row(arm, rounds) for arm in arms]
    return sorted(rows, key=lambda row: -row["share"])


def _row(arm: tuple[str, vtc.Budget], rounds: Sequence[dict]) -> Row:
    shares = [sum(runs[arm][part] for part in OWN) / runs["full"]["prefill"] for runs in rounds]
    return {
        "method": arm[0],
        "budget": arm[1],
        "tokens": rounds[0][arm]["tokens"],
        "own": {part: statistics.median(runs[arm][part] for runs in rounds) for part in OWN},
        "prefill": statistics.median(runs["full"]["prefill"] for runs in rounds),
        "share": statistics.median(shares),
        "range": (min(shares), max(shares)),
    }


def table(rows: Sequence[Row], title: str) -> Table:
    caption = (
        f"of the prefill: of {1e3 * rows[0]['prefill']:.0f} ms, the unpruned decoder's; in brackets over the rounds"
    )
    grid = Table(title=title, caption=caption)
    for name in ("method", "tokens", *(f"{part}, ms" for part in OWN), "of the prefill"):
        grid.add_column(name, overflow="fold", no_wrap=name == "of the prefill")
    for row in rows:
        low, high = row["range"]
        own = (f"{1e3 * row['own'][part]:.2f}" for part in OWN)
        grid.add_row(row["method"], f"{row['tokens']:.0f}", *own, f"{row['share']:.2%} ({low:.2%}–{high:.2%})")
    return grid


def picture(rows: Sequence[Row], path: Path, title: str) -> None:
    """A bar for each method, in its parts, as a share of the unpruned prefill, and a line at `BOUND`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.4 + 0.24 * len(rows)), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    names = [f"{row['method']}, {row['tokens']:.0f} tokens" for row in rows]
    widths = {part: [100 * row["own"][part] / row["prefill"] for row in rows] for part in COLOURS}
    stack(axes, names, {part: (colour, widths[part]) for part, colour in COLOURS.items()})
    axes.axvline(100 * BOUND, color="0.3", linestyle="--", linewidth=1.2)
    dress(axes, title, "percent of the unpruned prefill (medians)")
    figure.savefig(path)
