"""`vtc fit`: when how many tokens leave, for a model and a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtc.cli.arguments import Model, check_methods, need, parse_budget, refuse
from vtc.cli.terminal import note_one, quiet


def fit(
    context: typer.Context,
    method: Annotated[str, typer.Option(help="One that prunes at several layers of the decoder.")] = "fitprune",
    budget: Annotated[str, typer.Option(help="0.25, 25% or 64 (tokens per image).")] = "0.25",
    model: Model = "reference",
    images: Annotated[
        str, typer.Option(help="A folder of images, or 'scenes' for the benchmark's training split with its questions.")
    ] = "scenes",
    question: Annotated[str, typer.Option(help="What is asked about the images of a folder.")] = "describe the image.",
    samples: Annotated[int, typer.Option(min=1, help="Images.")] = 65,
    seed: Annotated[int, typer.Option(help="Of the choice of images.")] = 0,
    out: Annotated[Path, typer.Option(help="The JSON file, to be named as a method.")] = Path("out/fitted.json"),
) -> None:
    """Fit how many tokens leave before which decoder layer to a model and a budget, without labels.

    Each layer drops what its scores can do without, up to a tolerance that meets the budget (FitPrune).

    Example:

      vtc fit --method pyramiddrop --budget 0.25 --out out/fitted.json
    """
    spend = parse_budget(budget)
    check_methods(method)
    if images == "scenes":
        refuse(context, "question", why="scenes bring their own; name a folder with --images")
        need("sklearn", extra="eval")
    note_one([spend])
    quiet()
    from vtc.eval import fit as fitting
    from vtc.eval.tune import Search

    out.parent.mkdir(parents=True, exist_ok=True)
    search = Search(model, method, spend, images, (question,), samples, seed=seed)
    typer.echo(f"{fitting.fit(search, out)}\nwritten to {out}")
