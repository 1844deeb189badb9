"""What commands are given: options that several share, how they are read, and what is refused."""

from __future__ import annotations

import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from vtc.install import install_line

Model = Annotated[
    str,
    typer.Option(
        help="'reference' or 'reference-pages' (shipped), a model folder, or a Hugging Face id such as "
        "llava-hf/llava-1.5-7b-hf."
    ),
]
Questions = Annotated[
    Path | None,
    typer.Option(
        help='About the images of a folder. Text, a question a line, asked in turn; or .jsonl: {"image": "a.jpg", '
        '"question": "..."} a line. Without it four short ones that fit any picture.'
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Budgets = Annotated[
    str, typer.Option(help="Comma-separated: fractions (0.25), percentages (25%) or tokens per image (64).")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Questions a forward.")]


def parse_budget(text: str) -> int | float:
    """ "64" is tokens per image (int); "0.25" and "25%" are a fraction of the image's tokens (float in (0, 1])."""
    text = text.strip()
    try:
        if text.isdecimal():
            return int(text)
        fraction = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no budget: use tokens (64), a fraction (0.25) or a percentage (25%)"
        ) from None
    if not 0 < fraction <= 1:
        raise typer.BadParameter(f"{text!r}: a fraction lies above 0 and up to 1; no visual token at all is 0, a count")
    return fraction


def parse_budgets(text: str) -> tuple[int | float, ...]:
    return tuple(parse_budget(part) for part in split(text))


def split(text: str) -> tuple[str, ...]:
    """The parts of a list with commas."""
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if not parts:
        raise typer.BadParameter("the list is empty")
    return parts


def refuse(context: typer.Context, *names: str, why: str) -> None:
    """Refuse what the command would not read, by the names of its parameters, where it was typed all the same."""
    sources = {name: context.get_parameter_source(name) for name in names}
    typed = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    if typed:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in typed)
        raise typer.BadParameter(f"{options}: {why}")


def need(*modules: str, extra: str) -> None:
    """Refuse before any work is done when an optional dependency is missing."""
    if missing := [module for module in modules if find_spec(module) is None]:
        raise ModuleNotFoundError(f"this needs {', '.join(missing)}: {install_line(extra)}")


def check_address(host: str, port: int) -> str:
    """The host, without the brackets in which IPv6 may stand; refuses, before a model is loaded, an address that
    nothing can listen at."""
    host = host.strip("[]")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise OSError(f"{error.strerror}: choose another --port or --host") from None
    return host
