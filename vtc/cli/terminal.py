"""What commands say on stderr, and what they keep others from saying there."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import typer
from rich.console import Console
from rich.markup import escape


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """An error of the user's is one line on stderr and exit code 1; with VTC_DEBUG its stack trace."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        full = type(error).__name__ == "OutOfMemoryError"  # torch's, which need not be loaded here
        if os.environ.get("VTC_DEBUG") or (isinstance(error, RuntimeError) and not full):
            raise
        more = ": a smaller batch needs less" if full else ""
        typer.echo(f"error: {' '.join(str(error).split())}{more}", err=True)
        sys.exit(1)


def note(text: str) -> None:
    typer.echo(f"note: {text}", err=True)


def note_one(budgets: Sequence[int | float]) -> None:
    if any(isinstance(budget, int) and budget == 1 for budget in budgets):
        note("a budget of 1 is one visual token; 1.0 and 100% are all of them")


def note_above(budgets: Sequence[int | float], tokens: float) -> None:
    if above := [budget for budget in budgets if isinstance(budget, int) and budget > tokens]:
        asked = ", ".join(map(str, above))
        note(f"a budget of {asked} is above the image's {tokens:g} visual tokens: none are dropped")


def note_questions(asked: Sequence[str]) -> None:
    note(f"no --questions: asking in turn {'; '.join(asked)}")


def note_rounds(rounds: int) -> None:
    if rounds == 1:
        note("one round has no range, so nothing tells a gain from chance")


def say(text: str) -> None:
    """A line for somebody who waits at a terminal."""
    console = Console(stderr=True)
    if console.is_terminal:
        console.print(text, style="dim", markup=False, highlight=False)


def status(text: str) -> AbstractContextManager:
    """What goes on, with something that moves, at the bottom of a terminal; nothing elsewhere."""
    return Console(stderr=True).status(escape(text))


@contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """Yields what shows the step that begins: `status` on a terminal, a line elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: typer.echo(text, err=True)
        return
    with console.status("") as moving:
        yield lambda text: moving.update(escape(text))


def quiet() -> None:
    """Load torch and transformers, and keep their notes, bars and warnings, and those of others, out of the output."""
    import logging
    import warnings

    with status("loading torch and transformers"):
        import torch  # it sets its loggers' levels when it is imported
        from transformers.utils import logging as transformers_logging

    if not os.environ.get("VTC_DEBUG"):
        warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("torchao", torch.utils._pytree.__name__):  # transformers imports torchao wherever it is installed
        logging.getLogger(name).setLevel(logging.ERROR)
