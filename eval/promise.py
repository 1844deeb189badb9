"""Does `vtc choose` keep its promise? Tried on image sets that are drawn from the answers of a run of `vtc eval`.

python -m vtc.eval.promise out/eval --agree 0.9 --images 300 --trials 200
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from vtc.cli.terminal import errors_in_a_line
from vtc.eval import choose, progress
from vtc.eval.album import FULL, Candidate
from vtc.eval.mis import SWAPPED
from vtc.eval.rows import Line
from vtc.eval.run import SMALLER
from vtc.eval.store import Store

Agreements = Mapping[Candidate, np.ndarray]
"""(questions,) bool of each candidate: whether it answers as the full model does."""


def agreements(*runs: Path) -> dict[Candidate, np.ndarray]:
    """Of folders that `vtc eval` wrote for one model and benchmark, over the questions that all arms have so far;
    without arms that ran at a method's floor. Nothing is written there.

    Raises ValueError for folders of several models or benchmarks, and where no arm is left.
    """
    arms: dict[Candidate, dict[str, Line]] = {}
    if len({_asked(run) for run in runs}) > 1:
        raise ValueError("these runs are of several models or benchmarks: the same name is another question in each")
    for run in runs:
        for line in Store[Line](run / "results.jsonl").lines.values():
            arms.setdefault(Candidate(line["method"], line["budget"]), {})[line["question_id"]] = line
    for arm in list(arms):
        if arm.method in ("full", "blind", SWAPPED, SMALLER) or any(x["at_floor"] for x in arms[arm].values()):
            del arms[arm]
    if not arms:
        raise ValueError("no method reached any of its budgets in these runs")
    asked = sorted(set.intersection(*map(set, arms.values())))
    return {arm: np.array([lines[name]["agrees"] for name in asked], bool) for arm, lines in arms.items()}


def _asked(run: Path) -> str:
    """What tells the model and the questions of a run apart."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    return json.dumps([config["model_digest"], *(config["settings"][name] for name in ("benchmark", "seed", "suffix"))])


def simulate(
    found: Agreements, promise: float, images: int, trials: int, seed: int = 0, bar: bool = False
) -> dict[str, float]:
    """What `choose` decides on `trials` sets of `images` questions, and how that does on others.

    Returns "pruned", the share of sets on which anything was promised; "kept", the share on which the agreement in the
    whole population, sets being drawn from it with replacement, is at least the promise; "kept_unseen", the same on the
    questions that were not drawn, sets being drawn without; "budget", the mean share of the tokens that was chosen. The
    full model, where nothing is promised, agrees with itself. Raises ValueError for budgets that are numbers of tokens.
    """
    if any(isinstance(candidate.budget, int) for candidate in found):
        raise ValueError("budgets have to be shares of the tokens, as in `vtc eval --budgets 0.5,0.25`")
    rng, total = np.random.default_rng(seed), len(next(iter(found.values())))
    if images >= total:
        raise ValueError(f"{images} of {total} questions leave none unseen")
    outcomes = []
    with progress.bar("sets", trials, shown=bar) as tick:
        for trial in range(trials):
            drawn, alone = rng.integers(0, total, images), rng.permutation(total)
            first, second = (decide(found, some, promise, trial) for some in (drawn, alone[:images]))
            unseen = alone[images:]
            outcomes.append(
                (
                    first != FULL,
                    first == FULL or found[first].mean() >= promise,
                    second == FULL or found[second][unseen].mean() >= promise,
                    float(first.budget),
                )
            )
            tick()
    names = ("pruned", "kept", "kept_unseen", "budget")
    return dict(zip(names, np.array(outcomes, float).mean(0).tolist(), strict=True))


def decide(found: Agreements, drawn: np.ndarray, promise: float, seed: int) -> Candidate:
    """What `choose` takes on these questions; the full model where it takes none."""

    verdict = choose.choose(
        lambda candidate, indices: found[candidate][drawn[indices]], list(found), len(drawn), promise, seed
    )
    return verdict.chosen.candidate if verdict.chosen else FULL


def main(
    runs: Annotated[list[Path], typer.Argument(exists=True, file_okay=False, help="The --out of runs of `vtc eval`.")],
    agree: Annotated[str, typer.Option(help="Promises, comma-separated.")] = "0.98,0.95,0.9,0.85",
    methods: Annotated[str, typer.Option(help="Comma-separated; unless given all that were run.")] = "",
    images: Annotated[int, typer.Option(min=1, help="In a set.")] = 300,
    trials: Annotated[int, typer.Option(min=1, help="Sets.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the sets.")] = 0,
) -> None:
    """Try the promise of `vtc choose`; prints JSON, a line a promise."""
    chosen = methods.split(",") if methods else None
    found = {arm: x for arm, x in agreements(*runs).items() if chosen is None or arm.method in chosen}
    if not found:
        raise ValueError(f"these runs have no answers of {methods} within its budgets")
    for promise in map(float, agree.split(",")):
        asked = {"agree": promise, "images": images, "of": len(next(iter(found.values()))), "trials": trials}
        print(json.dumps(asked | simulate(found, promise, images, trials, seed, bar=True)))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    with errors_in_a_line():
        app()
