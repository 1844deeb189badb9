"""`vtc tune`, `choose` and `table`: which hyper-parameters, which method and budget, and how all of them compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtc.cli.arguments import Model, check_methods, need, parse_budget, refuse
from vtc.cli.terminal import note_one, quiet


def tune(
    context: typer.Context,
    method: Annotated[str, typer.Option(help="One that declares what can be tuned.")] = "vflowopt",
    budget: Annotated[str, typer.Option(help="0.25, 25% or 64 (tokens per image); it stays fixed.")] = "0.25",
    model: Model = "reference",
    images: Annotated[
        str, typer.Option(help="A folder of images, or 'scenes' for the benchmark's training split with its questions.")
    ] = "scenes",
    question: Annotated[str, typer.Option(help="What is asked about the images of a folder.")] = "describe the image.",
    samples: Annotated[int, typer.Option(min=1, help="Images.")] = 30,
    trials: Annotated[int, typer.Option(min=1, help="Combinations to try.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the search and of the choice of images.")] = 0,
    out: Annotated[Path, typer.Option(help="The JSON file, to be named as a method.")] = Path("out/tuned.json"),
) -> None:
    """Find a method's hyper-parameters for a model and a budget, without labels.

    Bayesian optimisation of how little the last prompt token's final state changes when tokens leave.

    Example:

      vtc tune --method vflowopt --budget 0.11 --samples 60 --out out/vflowopt.json
    """
    spend = parse_budget(budget)
    check_methods(method)
    need("optuna", "scipy", extra="tune")
    if images == "scenes":
        refuse(context, "question", why="scenes bring their own; name a folder with --images")
        need("sklearn", extra="eval")
    note_one([spend])
    quiet()
    from vtc.eval import tune as tuning

    out.parent.mkdir(parents=True, exist_ok=True)
    search = tuning.Search(model, method, spend, images, (question,), samples, trials, seed)
    best, similarity, defaults = tuning.tune(search, out)
    typer.echo(f"{best}\nsimilarity {similarity:.4f}, with the defaults {defaults:.4f}; written to {out}")
