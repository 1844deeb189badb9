"""The papers' own figures, to lie beside ours: `published.json`, a table of a paper an entry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtc.eval import report

if TYPE_CHECKING:
    from rich.table import Table

    from vtc.eval.rows import Row


@dataclass(frozen=True)
class Figure:
    """One number of one paper. `tokens` per image as the paper counts them; None where it only gives a rate."""

    benchmark: str
    """lmms-eval's name of the task where it has one."""
    model: str
    method: str
    tokens: float | None
    value: float
    unit: str
    full: float | None
    """The same table's value of the unpruned model."""
    source: str


@cache
def figures() -> tuple[Figure, ...]:
    """All of `published.json`."""
    tables = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return tuple(figure for table in tables for figure in _of(table))


def _of(table: dict[str, Any]) -> Iterator[Figure]:
    full = next((row["values"] for row in table["rows"] if row["method"] == "full"), None)
    for row in table["rows"]:
        for column, (benchmark, value) in enumerate(zip(table["benchmarks"], row["values"], strict=True)):
            if value is not None:
                yield Figure(
                    benchmark,
                    row.get("model", table["model"]),
                    row["method"],
                    row["tokens"],
                    value,
                    table["unit"],
                    full[column] if full else None,
                    table["source"],
                )


def points(benchmark: str, checkpoint: str, percent: bool = True) -> list[tuple[str, float, float]]:
    """(method, tokens, value) on a benchmark, where `checkpoint` is the model that the papers ran.

    `percent`: whether the benchmark counts shares, from 0 to 1; what it counts up to 100 or in points stays so.
    """
    same = [f for f in figures() if f.benchmark == benchmark and f.model.lower() in checkpoint.lower()]
    units, whole = (("percent",), 100) if percent else (("percent", "points"), 1)
    return [(f.method, f.tokens, f.value / whole) for f in same if f.unit in units and f.tokens]


def table(benchmark: str, rows: list[Row]) -> Table | None:
    """Summary rows of a run beside what papers say about its methods there; None where they say nothing.

    Both by the benchmark's own metric. Papers ran other checkpoints: compare "% of full".
    """
    from rich.table import Table

    values = [report.factor(row) * report.shown(row).value for row in rows]
    lines: list[tuple[str, str, str, float, float | None, str]] = [
        ("this run", row["method"], f"{row['tokens']:.1f}", value, values[0], "")
        for row, value in zip(rows, values, strict=True)
    ]
    run = {row["method"] for row in rows}
    found = [f for f in figures() if f.benchmark == benchmark and f.method in run and f.unit in ("percent", "points")]
    lines += [(f.model, f.method, f"{f.tokens or ''}", f.value, f.full, f.source) for f in found]
    if not found:
        return None
    grid = Table(title=f"{benchmark}: this run and published figures")
    for name in ("method", "model", "tokens", "value", "% of full", "source"):
        grid.add_column(name, justify="right" if name in ("tokens", "value", "% of full") else "left")
    order = list(dict.fromkeys(method for _, method, *_ in lines))
    for model, method, tokens, value, full, source in sorted(lines, key=lambda line: order.index(line[1])):
        grid.add_row(method, model, tokens, f"{value:.4g}", f"{100 * value / full:.1f}" if full else "", source)
    return grid
