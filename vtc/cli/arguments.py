"""What commands are given: options that several share, how they are read, and what is refused."""

from __future__ import annotations

import os
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


def parse_counts(text: str) -> tuple[int, ...]:
    """Whole numbers from 1 on."""
    parts = split(text)
    if bad := [part for part in parts if not part.isdecimal() or int(part) < 1]:
        raise typer.BadParameter(f"{bad[0]!r} is no count: use whole numbers from 1 on, with commas between")
    return tuple(map(int, parts))


def parse_rates(text: str) -> tuple[float, ...]:
    """Numbers a second, above 0."""
    try:
        rates = tuple(map(float, split(text)))
    except ValueError:
        rates = (0.0,)
    if not all(0 < rate < float("inf") for rate in rates):
        raise typer.BadParameter(f"{text!r} are no rates: use numbers above 0, with commas between")
    return rates


def split(text: str) -> tuple[str, ...]:
    """The parts of a list with commas."""
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if not parts:
        raise typer.BadParameter("the list is empty")
    return parts


def typed(context: typer.Context, *names: str) -> list[str]:
    """Those of the parameters of a command that were typed, not left at what they are by default."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]


def refuse(context: typer.Context, *names: str, why: str) -> None:
    """Refuse what the command would not read, by the names of its parameters, where it was typed all the same."""
    if found := typed(context, *names):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in found)
        raise typer.BadParameter(f"{options}: {why}")


def need(*modules: str, extra: str) -> None:
    """Refuse before any work is done when an optional dependency is missing."""
    if missing := [module for module in modules if find_spec(module) is None]:
        raise ModuleNotFoundError(f"this needs {', '.join(missing)}: {install_line(extra)}")


def check_folder(out: Path) -> None:
    """Refuse, before any work is done, a folder that cannot be made or written to; it is not made here."""
    there = next(place for place in (out, *out.parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file where a folder is to be: choose another --out")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{there} cannot be written to: choose another --out")


def check_file(out: Path) -> None:
    """The same of a file."""
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder: name a file in it with --out")
    check_folder(out.parent)


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
