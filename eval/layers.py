"""`vtc layers`: which decoder layers read the image, by what is lost when it leaves before each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import vtc
import vtc.select as select
from vtc.eval import marking, report
from vtc.eval.reader import Reader
from vtc.eval.scenes import Example
from vtc.stage import Method, Shape, Share, Stage


@dataclass(frozen=True)
class Leaving(Method):
    """A probe: before decoder layer `layer` all visual tokens leave but a share, evenly spaced, or else one."""

    layer: int
    left: Share = 0.0

    name: ClassVar[str] = "leaving"
    paper: ClassVar[str] = "probe"

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        return (Stage(self.layer, lambda seen: seen.valid.float(), select=select.grid),)

    def ratios(self) -> tuple[float, ...]:
        return (self.left,)


def read(
    reader: Reader, examples: Sequence[Example], left: float = 0.0, batch_size: int = 32, seed: int = 0
) -> list[dict[str, Any]]:
    """One row a decoder layer before which the image leaves, and one, the last, for the full model.

    {"layer", "accuracy", "agreement", "n"} and the ends of their 95 % intervals, "accuracy_low" and so on; agreement
    is that with the full model's answers, and asks for no labels.
    """
    depth = vtc.adapter.find(reader.model).shape().decoder_layers
    right: dict[str, list[np.ndarray]] = {"accuracy": [], "agreement": []}
    starts = range(0, len(examples), batch_size)
    for start in track(starts, description="asking", console=Console(stderr=True)):
        batch = examples[start : start + batch_size]
        inputs = reader.inputs([example.image for example in batch], [example.question for example in batch])
        full = reader.answers(inputs)
        said = []
        for layer in range(depth):
            with vtc.compressed(reader.model, Leaving(layer, left)):
                said.append(reader.answers(inputs))
        for name, wanted in (("accuracy", [example.answer for example in batch]), ("agreement", full)):
            right[name].append(_same([*said, full], wanted))
    rows: list[dict[str, Any]] = [{"layer": layer, "n": len(examples)} for layer in range(depth + 1)]
    for name, parts in right.items():
        values = np.concatenate(parts)
        draws = report.bootstrap(values, seed)
        for row, mean, drawn in zip(rows, values.mean(0), draws.T, strict=True):
            row[name] = float(mean)
            row[f"{name}_low"], row[f"{name}_high"] = report.interval(drawn)
    return rows


def _same(said: list[list[str]], wanted: list[str]) -> np.ndarray:
    """Whether answers are the wanted ones: (questions, layers)."""
    return np.array([[marking.is_correct(*pair) for pair in zip(one, wanted, strict=True)] for one in said], float).T


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for the terminal."""
    result = Table(title="what is lost when the image leaves", caption="95 % intervals over the questions")
    for column in ("leaves before layer", "accuracy", "agreement"):
        result.add_column(column, justify="right")
    for row in rows:
        figures = [f"{row[x]:.3f} [{row[f'{x}_low']:.3f}, {row[f'{x}_high']:.3f}]" for x in ("accuracy", "agreement")]
        result.add_row("never" if row is rows[-1] else str(row["layer"]), *figures)
    return result


def picture(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Accuracy and agreement against the layer before which the image leaves, with 95 % bands."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    layers = [row["layer"] for row in rows]
    named = {"accuracy": "accuracy", "agreement": "agreement with the full model"}
    for (name, label), colour, marker in zip(named.items(), report.COLOURS, report.MARKERS, strict=False):
        low, high = ([row[f"{name}_{end}"] for row in rows] for end in ("low", "high"))
        axes.plot(layers, [row[name] for row in rows], marker=marker, color=colour, linewidth=1.8, label=label)
        axes.fill_between(layers, low, high, color=colour, alpha=0.13, linewidth=0)
    axes.set_xticks(layers, [*map(str, layers[:-1]), "never"])
    axes.set_xlabel("decoder layer before which the image leaves")
    axes.set_ylim(0, 1.02)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    figure.savefig(path)
