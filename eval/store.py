"""The lines of a run in a file, which a process that is killed may leave torn, and nothing leaves damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

import vtc
from vtc.eval.rows import Asked

Kept = TypeVar("Kept", bound=Asked)
START_OVER = "delete it to start over (--restart of `vtc eval` and `vtc choose` does so)"


class DamagedError(ValueError):
    """A file of results that cannot be read."""


class Store(Generic[Kept]):
    """The lines of one run in a file, by `key_of`: append-only, flushed a batch at a time."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: dict[str, Kept] = {}
        self._torn: int | None = None
        """Where the file ends once a torn last line is cut off; nothing is cut by reading."""
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        whole = self.path.read_bytes()
        complete = whole[: whole.rfind(b"\n") + 1]
        if complete != whole:  # killed while writing: the torn line is asked again
            self._torn = len(complete)
        for number, text in enumerate(complete.splitlines(), 1):
            try:
                line = json.loads(text)
                json.dumps(line, allow_nan=False)  # raises for NaN, which json.loads takes for a number
                self.lines[key_of(line)] = line
            except (ValueError, KeyError, TypeError, RecursionError):
                raise DamagedError(f"{self.path} is damaged at line {number}: {START_OVER}") from None

    def add(self, lines: Sequence[Kept]) -> None:
        """Append those that are new: all of them, or where that fails, as on a full disk, none.

        Raises ValueError for a line with NaN or infinity, and OSError as writing does.
        """
        new = [line for line in lines if key_of(line) not in self.lines]
        text = "".join(map(_written, new))
        if self._torn is not None:
            os.truncate(self.path, self._torn)
            self._torn = None
        with self.path.open("ab") as file:
            self._torn = file.tell()
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self._torn = None
        self.lines.update((key_of(line), line) for line in new)


def _written(line: Asked) -> str:
    try:
        return json.dumps(line, allow_nan=False) + "\n"
    except ValueError:
        raise ValueError(
            f"{line['method']} at {line['budget']} has no finite number for question {line['question_id']}, and it is "
            "not kept: try another dtype, such as float32"
        ) from None


def key(method: str, budget: vtc.Budget, question_id: str) -> str:
    """What a line is found by: JSON tells 1 token from 1.0 of the tokens."""
    return json.dumps([method, budget, question_id])


def key_of(line: Asked) -> str:
    return key(line["method"], line["budget"], line["question_id"])
