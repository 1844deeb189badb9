"""Questions a second where work can be shared, with and without compression: `python -m vtc.eval.throughput`.

Two cases. One image asked many questions: each as a prompt of its own, or all on copies of one pruned cache
(`vtc.prefix`). And a batch whose rows keep different counts: together, or one after the other.
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import vtc
from vtc.choice import Choice, Seen
from vtc.eval import bench, shapes
from vtc.select import top_k
from vtc.stage import Method, Shape, Stage


@dataclass(frozen=True)
class Uneven(Method):
    """Image b of n keeps (b + 1) / n of twice the budget: what adaptive methods do to a batch, without their scores."""

    name: ClassVar[str] = "uneven"
    paper: ClassVar[str] = "for measurements only"
    adaptive: ClassVar[bool] = True

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        def select(scores: Tensor, seen: Seen, keep: Tensor) -> Choice:
            rank = torch.arange(1, len(keep) + 1, device=keep.device)
            return top_k(scores, seen, (2 * keep * rank // len(keep)).clamp(min=1))

        return (Stage(0, lambda seen: torch.zeros(seen.valid.shape, device=seen.valid.device), (), select),)


Work = dict[str, Callable[[], object]]


def questions(model: nn.Module, budget: float, count: int, new_tokens: int) -> Work:
    """`count` questions of 32 tokens about one image: full, pruned, and pruned on a shared cache."""
    prompt = shapes.prompt(model, 1, 40)
    ids = prompt["input_ids"]
    begin = {**prompt, "input_ids": ids[:, :-32]}
    options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}

    def separate() -> None:
        for _ in range(count):
            model.generate(**prompt, **options)

    def pruned() -> None:
        with vtc.compressed(model, "vtc-cls", budget):
            separate()

    def shared() -> None:
        with vtc.compressed(model, "vtc-cls", budget):
            cache = vtc.prefix(model, **begin)
            for _ in range(count):
                model.generate(input_ids=ids, past_key_values=copy.deepcopy(cache), **options)

    return {"full, each alone": separate, "pruned, each alone": pruned, "pruned, one shared image": shared}


def uneven(model: nn.Module, budget: float, count: int) -> Work:
    """`count` prompts to their first token, keeping from little to twice the budget: full, alone, and as a batch."""
    prompt = shapes.prompt(model, count, 40)
    rows = [{name: x[row : row + 1] for name, x in prompt.items()} for row in range(count)]
    shares = [2 * budget * (row + 1) / count for row in range(count)]

    def pruned() -> None:
        with vtc.compressed(model, Uneven(), budget):
            model(**prompt, logits_to_keep=1)

    def alone() -> None:
        for share, row in zip(shares, rows, strict=True):
            with vtc.compressed(model, "random", share):
                model(**row, logits_to_keep=1)

    return {
        "full, as a batch": lambda: model(**prompt, logits_to_keep=1),
        "pruned, each alone": alone,
        "pruned, as a batch": pruned,
    }


@torch.no_grad()
def measure(model: nn.Module, work: Work, rounds: int) -> dict[str, float]:
    """Median seconds of each, which take turns; the first round warms up."""
    runs = [{name: bench.timed(run, model)[0] for name, run in work.items()} for _ in range(rounds + 1)][1:]
    return {name: statistics.median(run[name] for run in runs) for name in work}


def main(
    model: Annotated[str, typer.Option(help="A shape of `vtc bench`, of the LLaVA-1.5 kind.")] = "llava-qwen2-0.5b",
    budget: float = 0.25,
    count: Annotated[int, typer.Option(min=2, help="Questions, and rows.")] = 8,
    new_tokens: Annotated[int, typer.Option(min=1)] = 4,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    dtype: str = "float32",
    device: str = "cpu",
    out: Annotated[Path | None, typer.Option(help="A JSON file for the seconds.")] = None,
) -> None:
    """Print questions a second."""
    loaded, found = shapes.load(model, getattr(torch, dtype), device), {}
    for title, work in (
        (f"{count} questions about one image, {new_tokens} tokens each", questions(loaded, budget, count, new_tokens)),
        (f"{count} images that keep different counts, first token", uneven(loaded, budget, count)),
    ):
        grid = Table(title=f"{title}\n{model}, {dtype}, {device}, budget {budget:g}")
        for column in ("", "seconds", "a second", "times the first"):
            grid.add_column(column, justify="right" if column else "left")
        found[title] = seconds = measure(loaded, work, rounds)
        first = next(iter(seconds.values()))
        for name, passed in seconds.items():
            grid.add_row(name, f"{passed:.2f}", f"{count / passed:.2f}", f"{first / passed:.2f}x")
        Console().print(grid)
    if out:
        settings = {"model": model, "budget": budget, "dtype": dtype, "device": device, "rounds": rounds}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**settings, "seconds": found}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
