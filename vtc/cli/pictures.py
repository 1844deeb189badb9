"""`vtc ask`, `vtc scene` and `vtc demo`: one picture at a time."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from vtc.cli.arguments import Device, Model, check_address, need, parse_budget
from vtc.cli.terminal import note, note_above, note_one, quiet, status
from vtc.methods import check_names

if TYPE_CHECKING:
    from PIL.Image import Image

    from vtc.eval.ask import Answer

EMPTY = "(no answer)"
KNOWN = {"reference": (96,), "reference-pages": (96, 120)}
"""Pixels of a side of the pictures that a shipped model has seen."""
SCENE = 0
"""The question of the test split whose picture `vtc ask scene` is about."""


def ask(
    image: Annotated[
        Path, typer.Argument(help="Any image file, up to 20 MB and 50 megapixels; or 'scene', for one that ships.")
    ],
    question: Annotated[str, typer.Argument(help="In the model's language; quote it.")],
    model: Model = "reference",
    method: Annotated[str, typer.Option(help="`vtc methods` lists them.")] = "vtc-cls",
    budget: Annotated[
        str | None,
        typer.Option(help="0.25, 25% or 64 (tokens per image); unless given what a JSON file says, or 0.25."),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also ask the full model.")] = False,
    save_overlay: Annotated[Path | None, typer.Option(help="Write the image with dropped patches dark.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    device: Device = "auto",
) -> None:
    """Ask a model about an image with fewer visual tokens.

    Examples:

      vtc ask scene 'what color is the word?' --compare

      vtc scene --out scene.png && vtc ask scene.png 'what word is it?' --save-overlay kept.png

      vtc ask photo.jpg 'What is this?' --model llava-hf/llava-1.5-7b-hf --budget 64
    """
    spend = parse_budget(budget) if budget else None
    if not question.strip():
        raise typer.BadParameter("the question is empty")
    check_names(method)
    from vtc.eval import ask as asking
    from vtc.eval.images import check_picture_path
    from vtc.eval.reader import load, model_path, pick_device

    picture, path = _picture(image), model_path(model)
    if save_overlay:
        check_picture_path(save_overlay)
    quiet()
    with status(f"loading {model}"):
        reader = load(path, pick_device(device), max_new_tokens)
    from vtc.methods.compose import with_budget

    if spend is None:
        own = with_budget(method)[1]
        spend = 0.25 if own is None else own
    with status("asking"):
        answers = {f"{method}, {budget or spend}": asking.ask(reader, picture, question, method, spend)}
        if compare:
            answers["full model"] = asking.ask(reader, picture, question, None, 1.0)
    _print_answers(answers)
    pruned = next(iter(answers.values()))
    if save_overlay:
        asking.save_overlay(reader, picture, pruned, save_overlay)
        typer.echo(f"{save_overlay}: written, dropped patches are dark", err=True)
    note_one([spend])
    note_above([spend], pruned.total)
    if model in KNOWN and picture.size not in {(side, side) for side in KNOWN[model]}:
        note(
            "a shipped model knows only its own pictures (scenes of 96 x 96 pixels, and reference-pages pages of 120 x "
            "120), so this answer means nothing: try `vtc ask scene 'what color is the word?'`, or another --model"
        )


def _picture(image: Path) -> Image:
    from vtc.eval.images import open_image

    if str(image) != "scene" or image.exists():
        return open_image(image)
    need("sklearn", extra="eval")
    from vtc.eval import scenes

    return scenes.example("test", 0, SCENE).image


def scene(
    out: Annotated[Path, typer.Option(help="An image file, for example scene.png.")],
    number: Annotated[int, typer.Option(min=0, help="Which question of the test split.")] = SCENE,
) -> None:
    """Write a picture of the kind that the shipped model knows, and print a question about it with the answer.

    Example:

      vtc scene --out scene.png --number 4
    """
    from vtc.eval.images import check_picture_path

    check_picture_path(out)
    need("sklearn", extra="eval")
    from vtc.eval import scenes

    example = scenes.example("test", 0, number)
    example.image.save(out)
    typer.echo(f"{out}: written\nquestion: {example.question}\nanswer: {example.answer}")
    typer.echo(f"now try: vtc ask {shlex.quote(str(out))} {shlex.quote(example.question)} --compare", err=True)


def _print_answers(answers: dict[str, Answer]) -> None:
    from rich.table import Table

    if len(answers) == 1:
        (answer,) = answers.values()
        typer.echo(answer.text or EMPTY)
        typer.echo(f"{_tokens(answer)} visual tokens, {answer.seconds:.3f} s", err=True)
        return
    table = Table("", "answer", "visual tokens", "seconds")
    for name, answer in answers.items():
        table.add_row(name, escape(answer.text or EMPTY), _tokens(answer), f"{answer.seconds:.3f}")
    Console().print(table)


def _tokens(answer: Answer) -> str:
    text = f"{answer.tokens:g} of {answer.total}"
    return text if answer.tokens == len(answer.kept) else f"{text} (layer average; {len(answer.kept)} in the last)"


def demo(
    model: Model = "reference",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where the page is served.")] = 7860,
    host: Annotated[
        str, typer.Option(help="127.0.0.1 serves this machine alone; 0.0.0.0 everyone who can reach it.")
    ] = "127.0.0.1",
    method: Annotated[
        str, typer.Option(help="What the page opens with; also the choice.json of `vtc choose`.")
    ] = "vtc-cls",
    max_new_tokens: Annotated[int, typer.Option(min=1, max=512, help="Longest answer.")] = 64,
    device: Device = "auto",
) -> None:
    """Look at it: a page with both answers, the patches that stayed and those that left, and what was measured.

    Examples:

      vtc demo

      vtc demo --model llava-hf/llava-1.5-7b-hf --port 8000
    """
    need("gradio", "sklearn", extra="demo")
    check_names(method)
    host = check_address(host, port)
    from vtc.eval.reader import load, model_path, pick_device

    path = model_path(model)
    typer.echo(f"loading gradio, torch and {model}; the page's address follows", err=True)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    quiet()
    from vtc.demo.app import launch

    launch(load(path, pick_device(device), max_new_tokens), model, host, port, method)
