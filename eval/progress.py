"""The one progress bar of the commands: on stderr, moving on a terminal, one line in the end elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Tick(Protocol):
    """Told how many steps were done since, and what the bar is to say from now on."""

    def __call__(self, steps: int = 1, say: str | None = None) -> None: ...


@contextmanager
def bar(what: str, total: int, done: int = 0, shown: bool = True) -> Iterator[Tick]:
    """A bar of `total` steps, `done` of them before; what is printed meanwhile stands above it."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task(what, total=total, completed=done)

        def tick(steps: int = 1, say: str | None = None) -> None:
            progress.update(task, advance=steps, description=say)

        yield tick
