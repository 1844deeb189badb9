"""What visual tokens cost in bytes: of the cache after a prefill, at its peak, and for each decoded token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vtc.eval import report
from vtc.methods.compose import find_method
from vtc.stage import Cache, Shape, Stage

if TYPE_CHECKING:
    from rich.table import Table

    from vtc.eval.rows import Group, Row
    from vtc.stage import Method
    from vtc.trace import Trace


class Spent(NamedTuple):
    """Of one image: tokens averaged over the layers, and bytes. See `Line`."""

    tokens: float
    held: float
    read: float
    peak: float

    @classmethod
    def alike(cls, tokens: float, token_bytes: int) -> Spent:
        """Where all layers read and hold as many; `token_bytes` are those of a token in all layers."""
        return cls(tokens, *(tokens * token_bytes,) * 3)

    @classmethod
    def of(cls, trace: Trace, token_bytes: int) -> list[Spent]:
        """Of each row of a batch."""
        unit = token_bytes / trace.depth
        sizes = trace.held_sizes.sum(1), trace.read_sizes.sum(1), peak_size(trace)
        return [cls(tokens, *(unit * size for size in row)) for tokens, *row in
                zip(trace.average_tokens.tolist(), *(size.tolist() for size in sizes), strict=True)]  # fmt: skip


def peak_size(trace: Trace) -> Tensor:
    """FloatTensor (batch): the most that the caches of all layers hold at once in the prefill, as `Trace.held_sizes`.

    A layer takes in all that enters it, and gives back before the next one runs, or behind the layer that its stage
    waits for. What a method copies besides is not in it.
    """
    held, entered, peak = trace.held_sizes, trace.tokens_per_layer.float(), torch.zeros(trace.batch)
    waits = {stage.site.layer: stage.site.after for stage in trace.stages if isinstance(stage.site, Cache)}
    for now in range(trace.depth):
        done = torch.tensor([layer < now and (waits.get(layer) or 0) < now for layer in range(now + 1)])
        peak = peak.maximum(held[:, : now + 1].where(done, entered[:, : now + 1]).sum(1))
    return peak


def mark(rows: Sequence[Row], named: Mapping[str, str | Method] = MappingProxyType({})) -> None:
    """Say of rows which methods save nothing before the first token; `named` has those that are no names, by theirs."""
    names = {row["method"] for row in rows}.difference(UNMARKED)
    sites = {name: _stages(named.get(name, name)) for name in names}
    for row in rows:
        stages = sites.get(row["method"], ())
        if stages and all(isinstance(stage.site, Cache) for stage in stages):
            row["holds_all" if all(stage.when == "decode" for stage in stages) else "after_prefill"] = True


UNMARKED = (*report.ALWAYS, "smaller-image")


def _stages(method: str | Method) -> tuple[Stage, ...]:
    return find_method(method).stages(Shape(decoder_layers=1024, tower_layers=1024, key_heads=8))


def priced(rows: Sequence[Row], groups: Sequence[Group]) -> list[Row]:
    """The rows with their bytes, each the mean over the lines of its group."""
    lines = {(method, repr(budget)): lines for method, budget, _, lines in groups}
    found: list[Row] = []
    for row in rows:
        own = lines[row["method"], repr(row["budget"])]
        held, read, peak = (float(np.mean([line[name] for line in own])) for name in ("held", "read", "peak"))
        found.append({**row, "held": held, "read": read, "peak": peak})
    return found


def table(rows: list[Row]) -> Table:
    """KiB an image and accuracy, a line a row; for 80 columns."""
    from rich.table import Table

    grid = Table(title=f"KiB of visual keys and values an image, {rows[0]['n']} questions; accuracy in percent")
    for name in ("method", "budget", "held", "read a token", "peak", "accuracy"):
        grid.add_column(
            name, justify="left" if name == "method" else "right", no_wrap=name != "method", overflow="fold"
        )
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        grid.add_row(
            report.named(row, rows),
            report.written(row["budget"]) + ("" if row["reachable"] else " *"),
            *(f"{row[name] / 1024:.1f}" for name in ("held", "read", "peak")),
            report.spread(report.shown(row), report.factor(row), ".1f"),
            end_section=following is not None and following["method"] not in (row["method"], "blind"),
        )
    notes = [] if all(row["reachable"] for row in rows) else ["* below the method's floor: run at the floor"]
    grid.caption = "\n".join([*notes, *report.footnote(rows)]) or None
    return grid
