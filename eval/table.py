"""`vtc table`: all methods, benchmarks, budgets and models beside each other; in pieces that processes share.

A piece is one method on one benchmark with one model, at all budgets: a folder as `vtc eval` writes it, OUT/model/
benchmark/method. Whoever starts the command takes the pieces that nobody runs, so that two processes on two cores need
half the time, and a night's rest is done in the next one. The full, the blind and the swapped model are a piece of
their own, which the others build on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from rich.console import Console

import vtc
from vtc.eval import benchmarks, folder, memory, mis, report, run
from vtc.eval.folder import LOCK, BusyError, OtherRunError, alone
from vtc.eval.reader import Reader, load, model_path, pick_device
from vtc.eval.rows import Group, Line
from vtc.eval.run import Shared
from vtc.eval.store import DamagedError, Store
from vtc.methods.compose import with_budget
from vtc.methods.overview import overview
from vtc.stage import write_json

BASE = "always"
"""The folder of what every method is compared with: no method at all."""


@dataclass(frozen=True)
class Settings:
    """What is asked for. `methods` None: `comparable`; budgets as in `run.Settings`; `limit`: questions a benchmark."""

    models: tuple[str, ...] = ("reference",)
    benchmarks: tuple[str, ...] = ("scenes", "pages")
    methods: tuple[str, ...] | None = None
    budgets: tuple[vtc.Budget, ...] = (0.5, 0.25, 0.11, 0.05)
    limit: int = 1000
    seed: int = 0
    batch_size: int = 32
    device: str = "auto"

    def piece(self, model: str, benchmark: str, method: str | None) -> run.Settings:
        """What `vtc eval` is asked for one piece; without a method for what always runs."""
        return run.Settings(
            model, () if method is None else (method,), self.budgets, self.limit, self.seed, self.batch_size,
            device=self.device, benchmark=benchmark,
        )  # fmt: skip


@dataclass
class Answers:
    """What is there of one model on one benchmark."""

    model: str
    benchmark: str
    lines: dict[tuple[str, vtc.Budget], list[Line]]
    """Of each method at each budget, over the same questions in one order; full and blind among them."""
    refused: dict[str, str]
    """Why methods that cannot work on this model were left out."""


def comparable() -> list[str]:
    """The methods that a table of one-word answers says something of: those that drop before the answer begins.

    What leaves the cache after prefill has been read by the first token.
    """
    return [name for name, one in overview().items() if not one.where.startswith("the cache")]


def evaluate(settings: Settings, out: Path, bar: bool = False) -> tuple[list[Answers], int]:
    """Run the pieces in `out` that are not done and that no other process runs.

    Returns the answers of those that are done, and how many another process is at. Raises ValueError where a folder
    holds another run, for unknown methods and benchmarks.
    """
    methods = list(dict.fromkeys(comparable() if settings.methods is None else settings.methods))
    if len({type(budget) for budget in settings.budgets}) > 1:
        raise ValueError("budgets are all fractions or all numbers of tokens: else they cannot stand in one table")
    if own := [method for method in methods if with_budget(method)[1] is not None]:
        raise ValueError(
            f"{own[0]} names a budget, and all methods of a table run at the same: take it out of the file"
        )
    for benchmark in settings.benchmarks:
        benchmarks.check_one_word(benchmark)
    found, elsewhere = [], 0
    for model in dict.fromkeys(settings.models):
        reader = load(model_path(model), pick_device(settings.device))
        for benchmark in dict.fromkeys(settings.benchmarks):
            where = out / _named(model) / benchmark
            questions = _Questions(reader, settings, benchmark)
            with FileLock(_made(where / BASE) / LOCK):  # the others build on it: here one waits
                _run(questions, settings.piece(model, benchmark, None), where / BASE, {}, bar)
            base = Store[Line](where / BASE / "results.jsonl").lines
            refused: dict[str, str] = {}
            for method in methods:
                piece = settings.piece(model, benchmark, method)
                try:
                    with alone(where / _named(method)):
                        _run(questions, piece, where / _named(method), base, bar)
                except BusyError:
                    elsewhere += 1
                except (OtherRunError, DamagedError):
                    raise
                except ValueError as error:
                    refused[method] = str(error)
            found.append(_read(where, model, benchmark, methods, refused))
    return found, elsewhere


class _Questions:
    """A benchmark's questions, drawn when the first piece asks for them."""

    def __init__(self, reader: Reader, settings: Settings, benchmark: str):
        self.reader, self.settings, self.benchmark = reader, settings, benchmarks.find(benchmark)
        self.examples: list = []

    def shared(self, lines: Mapping[str, Line]) -> Shared:
        self.examples = self.examples or self.benchmark.load("test", self.settings.limit, self.settings.seed)
        return Shared(self.reader, self.examples, lines)


def _run(questions: _Questions, piece: run.Settings, where: Path, lines: Mapping[str, Line], bar: bool) -> None:
    config = run.configuration(piece, questions.reader)
    if folder.check(where, config, restart=False) and (where / "summary.json").exists():
        return
    if bar:
        Console(stderr=True).print(str(where), style="dim", markup=False, highlight=False)
    run.evaluate(piece, where, bar=bar, shared=questions.shared(lines))


def _read(where: Path, model: str, benchmark: str, methods: Sequence[str], refused: dict[str, str]) -> Answers:
    """The answers of the pieces that are done; a summary stands where one is."""
    lines: dict[tuple[str, vtc.Budget], dict[str, Line]] = {}
    for name in (BASE, *map(_named, methods)):
        if (where / name / "summary.json").exists():
            for line in Store[Line](where / name / "results.jsonl").lines.values():
                lines.setdefault((line["method"], line["budget"]), {})[line["question_id"]] = line
    asked = lines["full", 1.0]
    return Answers(model, benchmark, {arm: [found[name] for name in asked] for arm, found in lines.items()}, refused)


def write_curve(found: Answers, out: Path, seed: int) -> None:
    """summary.json and curve.png over all methods, as of one `vtc eval`, into OUT/model/benchmark."""
    where = out / _named(found.model) / found.benchmark
    groups: list[Group] = [
        (*arm, not any(line["at_floor"] for line in lines), lines)
        for arm, lines in found.lines.items()
        if arm[0] != mis.SWAPPED
    ]
    rows = report.summarise(groups, seed)
    memory.mark(rows)
    title = f"{found.model}: accuracy over {rows[0]['n']} questions of {found.benchmark}"
    report.picture(rows, where / "curve.png", title)
    write_json(where / "summary.json", rows)


def _named(name: str) -> str:
    """A model or a method as the name of a folder."""
    return name.strip("./~").replace("/", "--").replace(":", "--")


def _made(where: Path) -> Path:
    where.mkdir(parents=True, exist_ok=True)
    return where
