"""`vtc methods`, `vtc tasks` and `vtc env`: what there is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import vtc
from vtc.cli.terminal import quiet


def methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="As docs/methods.md has it, with figures.")] = False,
) -> None:
    """List the methods: where tokens leave in a model of 32 layers, whether they are trained, see the question, merge.

    Wherever a method is named, there may be several with + between them, one after the other on one budget, and behind
    each @sinks (patches of extreme norm come last) or @debias (attention in the decoder without its trend to favour
    what comes late), as in vtc-cls@sinks+fastv.
    """
    from rich.table import Table

    from vtc.methods import described
    from vtc.methods.overview import overview

    if markdown:
        typer.echo(methods_table(), nl=False)
        return
    table, lines = Table("method", "where", "trained", "question", "merges", "what it does", "paper"), described()
    for name, one in overview().items():
        table.add_row(name, one.where, *one.flags, *map(escape, lines[name]))
    Console().print(table)


BUDGETS = 0.5, 0.25, 0.11


def methods_table(best: int | None = None) -> str:
    """The table of methods in Markdown; first those with the best accuracy at a quarter of the tokens.

    Accuracy in percent at `BUDGETS`, with half of the 95 % interval, from the summary that ships. With `best` so many
    at most, and those that were measured only.
    """
    import vtc.eval
    from vtc.methods import described
    from vtc.methods.overview import overview

    summary = Path(vtc.eval.__file__).parent / "results/scenes/summary.json"
    rows = {(row["method"], row["budget"]): row for row in json.loads(summary.read_text())}
    full = rows["full", 1.0]["tokens"]

    def cell(method: str, budget: float) -> str:
        if (row := rows.get((method, budget))) is None:
            return ""
        half = (row["accuracy_high"] - row["accuracy_low"]) / 2
        figure = f"{100 * row['accuracy']:.1f} ± {100 * half:.1f}"
        return figure if row["reachable"] else f"{figure} at {row['tokens'] / full:.0%}"

    def rank(name: str) -> float:
        return -rows.get((name, BUDGETS[1]), {"accuracy": 0})["accuracy"]

    head = ("method", "where", "trained", "question", "merges", *(f"{budget:.0%}" for budget in BUDGETS), "paper")
    lines, found, papers = [head, ("---",) * len(head)], overview(), described()
    names = sorted(found, key=rank)
    for name in names if best is None else [name for name in names if rank(name)][:best]:
        cells = (cell(name, budget) for budget in BUDGETS)
        lines.append((f"`{name}`", found[name].where, *found[name].flags, *cells, papers[name][1]))
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |").replace("|  |", "| |") for line in lines)


def tasks() -> None:
    """Say which of the field's usual benchmarks run here, and print the folder of vtc's own task for lmms-eval.

    The folder alone is written to stdout, for lmms-eval's --include_path.

    Example:

      python -m lmms_eval --model vtc --model_args pretrained=reference,method=vtc-cls,budget=0.25 --tasks vtc_scenes
      --include_path $(vtc tasks) --batch_size 32 --output_path out/lmms --log_samples

    More of --model_args: the method's hyper-parameters (method=transprune,alpha=0.3,layers=[2,3,4],budget=25%), dtype,
    attn_implementation, revision, device_map, min_pixels, max_pixels.
    """
    from vtc.eval.tasks import PATH, field

    Console(stderr=True).print(field.table())
    typer.echo(PATH)


def env() -> None:
    """Print versions for a bug report."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    quiet()
    import torch

    lines = {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()}
    lines["vtc"] = vtc.__version__
    for package in (
        "torch",
        "transformers",
        "tokenizers",
        "accelerate",
        "pillow",
        "matplotlib",
        "scikit-learn",
        "lmms-eval",
    ):
        try:
            lines[package] = version(package)
        except PackageNotFoundError:
            lines[package] = "not installed"
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    for name, value in (lines | {"torch threads": torch.get_num_threads(), "cuda device": cuda}).items():
        typer.echo(f"{name}: {value}")
