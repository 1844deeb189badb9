"""Does `vtc choose` keep its promise? Tried on image sets that are drawn from the answers of a run of `vtc eval`.

python -m vtc.eval.promise out/eval --agree 0.9 --images 300 --trials 200
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from vtc.eval import choose, folder, progress
from vtc.eval.choose import FULL, Candidate
from vtc.eval.mis import SWAPPED
from vtc.eval.rows import Line
from vtc.eval.run import SMALLER

Agreements = Mapping[Candidate, np.ndarray]
"""(questions,) bool of each candidate: whether it answers as the full model does."""


def agreements(where: Path) -> dict[Candidate, np.ndarray]:
    """Of a folder that `vtc eval` wrote; without arms that ran at a method's floor."""
    arms: dict[Candidate, dict[str, Line]] = {}
    store: folder.Store[Line] = folder.Store(where / "results.jsonl")
    for line in store.lines.values():
        arms.setdefault(Candidate(line["method"], line["budget"]), {})[line["question_id"]] = line
    for arm in list(arms):
        if arm.method in ("full", "blind", SWAPPED, SMALLER) or any(x["at_floor"] for x in arms[arm].values()):
            del arms[arm]
    asked = sorted(set.intersection(*(set(lines) for lines in arms.values())))
    return {arm: np.array([lines[name]["agrees"] for name in asked]) for arm, lines in arms.items()}


def simulate(
    found: Agreements, promise: float, images: int, trials: int, seed: int = 0, bar: bool = False
) -> dict[str, float]:
    """What `choose` decides on `trials` sets of `images` questions, and how that does on others.

    Returns "pruned", the share of sets on which anything was promised; "kept", the share on which the agreement in the
    whole population, sets being drawn from it with replacement, is at least the promise; "kept_unseen", the same on the
    questions that were not drawn, sets being drawn without; "budget", the mean share of the tokens that was chosen. The
    full model, where nothing is promised, agrees with itself.
    """
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
    where: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="The --out of `vtc eval`.")],
    agree: Annotated[str, typer.Option(help="Promises, comma-separated.")] = "0.98,0.95,0.9,0.85",
    images: Annotated[int, typer.Option(min=1, help="In a set.")] = 300,
    trials: Annotated[int, typer.Option(min=1, help="Sets.")] = 200,
    seed: int = 0,
) -> None:
    """Try the promise of `vtc choose`; writes promise.json beside what it reads."""
    found = agreements(where)
    rows = [
        {"agree": promise, "images": images, "trials": trials, **simulate(found, promise, images, trials, seed, True)}
        for promise in map(float, agree.split(","))
    ]
    folder.write_json(where / "promise.json", rows)
    for row in rows:
        print(", ".join(f"{name} {value:g}" for name, value in row.items()))


if __name__ == "__main__":
    typer.run(main)
