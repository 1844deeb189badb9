"""The `vtc` command.

Torch and transformers take seconds to load: the commands do so when their arguments are known to be good. Answers and
tables go to stdout, all that is said about them to stderr.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

import vtc
from vtc.cli import about, accuracy, choosing, pictures, serving, speed, training, tuning
from vtc.cli.terminal import errors_in_a_line

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Make a vision-language model read fewer visual tokens, and measure what that costs.\n\n"
    "Start with [bold]vtc ask scene 'what color is the word?' --compare[/]: the shipped model on a picture of the kind "
    "that it knows, nothing to download. Then [bold]vtc eval --limit 200 --out out/first[/]: accuracy against token "
    "budget.",
    epilog="VTC_DEBUG=1 in the environment shows warnings, and the stack trace of an error.",
)
train_app = typer.Typer(no_args_is_help=True, help="Train the models that vtc ships.")

COMMANDS: dict[str, Callable[..., None]] = {
    "eval": accuracy.evaluate,
    "compare": accuracy.compare,
    "faithfulness": accuracy.faithfulness,
    "tune": tuning.tune,
    "fit": tuning.fit,
    "choose": choosing.choose,
    "table": choosing.table,
    "layers": tuning.layers,
    "bench": speed.bench,
    "selection": speed.selection,
    "peers": speed.peers,
    "throughput": speed.throughput,
    "ask": pictures.ask,
    "scene": pictures.scene,
    "demo": pictures.demo,
    "serve": serving.serve,
    "load": serving.load,
    "methods": about.methods,
    "tasks": about.tasks,
    "env": about.env,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
train_app.command("reference")(training.reference)
train_app.command("atp")(training.atp)
train_app.command("tokenbutler")(training.tokenbutler)
app.add_typer(train_app, name="train")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(vtc.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What may stand before a command."""


def main() -> None:
    """The entry point: an error of the user's is one line on stderr and exit code 1 (2 for unusable arguments)."""
    with errors_in_a_line():
        app()
