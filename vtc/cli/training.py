"""`vtc train`: the models that vtc ships."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtc.cli.arguments import Model, need, split
from vtc.cli.terminal import quiet

Benchmarks = Annotated[str, typer.Option(help="What teaches, comma-separated: scenes, pages; a step each in turn.")]


def taught(names: str) -> tuple[str, ...]:
    """Raises ValueError for a benchmark that is not there, before any work is done."""
    from vtc.eval.benchmarks import find

    return tuple(name for name in split(names) if find(name))


def reference(
    out: Annotated[Path, typer.Option(help="Folder of checkpoints; the same command resumes.")] = Path("out/reference"),
    preset: Annotated[
        str, typer.Option(help="small: what ships, 2 CPU cores; both: reads pages, too; large: 336 pixels, for a GPU.")
    ] = "small",
    seed: Annotated[int, typer.Option(help="Of weights, images and subsets.")] = 0,
) -> None:
    """Train the reference model from nothing; model and processor end up in OUT/model.

    Example:

      vtc train reference --out out/reference && vtc eval --model out/reference/model

      ACCELERATE_USE_CPU=1 torchrun --standalone --nproc_per_node 2 -m vtc train reference --preset both --out out/both
    """
    need("matplotlib", "sklearn", extra="eval")
    quiet()
    from vtc.eval.reference.train import train

    train(out, preset=preset, seed=seed)


def atp(
    model: Model = "reference",
    budget: Annotated[float, typer.Option(min=0.0, max=1.0, help="Fraction of the image's tokens.")] = 0.25,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 300,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions a step.")] = 32,
    seed: Annotated[int, typer.Option(help="Of weights and questions.")] = 0,
    benchmarks: Benchmarks = "scenes",
    out: Annotated[Path | None, typer.Option(help="Default: beside the checkpoint, where vtc.wrap looks.")] = None,
) -> None:
    """Train ATP-LLaVA's thresholds for a frozen model and a budget, on training questions.

    Beside them lies report.json: how many tokens stay on unseen questions, how much that varies, and where they leave.

    Example:

      vtc train atp --budget 0.25 && vtc eval --methods atp,random --budgets 0.25 --out out/atp
    """
    need("sklearn", extra="eval")
    quiet()
    from vtc.eval import atp as trainer

    recipe = trainer.Recipe(model, steps, batch_size, seed=seed, benchmarks=taught(benchmarks), budget=budget)
    trainer.train(recipe, out)


def tokenbutler(
    model: Model = "reference",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 600,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions a step.")] = 16,
    seed: Annotated[int, typer.Option(help="Of weights and questions.")] = 0,
    benchmarks: Benchmarks = "scenes",
    out: Annotated[Path | None, typer.Option(help="Default: beside the checkpoint, where vtc.wrap looks.")] = None,
) -> None:
    """Train TokenButler's predictor for a frozen model and every budget, on training questions.

    Beside it lies report.json: how much of what each layer attends to is predicted, on unseen questions.

    Example:

      vtc train tokenbutler && vtc eval --methods tokenbutler,fastv --budgets 0.25 --out out/tokenbutler
    """
    need("sklearn", extra="eval")
    quiet()
    from vtc.eval import tokenbutler as trainer

    trainer.train(trainer.Recipe(model, steps, batch_size, seed=seed, benchmarks=taught(benchmarks)), out)
