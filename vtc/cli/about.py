"""`vtc methods`, `vtc tasks` and `vtc env`: what there is."""

from __future__ import annotations

import os

import typer
from rich.console import Console
from rich.markup import escape

import vtc
from vtc.cli.terminal import quiet


def methods() -> None:
    """List the methods with one line and the paper each."""
    from rich.table import Table

    from vtc.methods import described

    table = Table("method", "what it does", "paper")
    for name, (line, paper) in described().items():
        table.add_row(name, escape(line), escape(paper))
    Console().print(table)


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
