"""Questions a second where work can be shared, with and without compression: `vtc throughput`.

Two cases. One image asked many questions: each as a prompt of its own, or all on copies of one pruned cache
(`vtc.prefix`). And a batch whose rows keep different counts: together, or one after the other.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
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
    share: float = 1.0
    """The budget: adaptive methods are not told how many tokens to keep."""

    def bind(self, model: nn.Module, budget: vtc.Budget | None, tokens: int | None) -> Uneven:
        return replace(self, share=budget)

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        def select(scores: Tensor, seen: Seen, keep: Tensor) -> Choice:
            rank = torch.arange(1, len(keep) + 1, device=keep.device)
            uneven = 2 * self.share * seen.valid.sum(1) * rank / len(keep)
            return top_k(scores, seen, uneven.long().clamp(min=1))

        return (Stage(0, lambda seen: torch.zeros(seen.valid.shape, device=seen.valid.device), (), select),)


Work = dict[str, Callable[[], object]]
Seconds = dict[str, float]
"""By the names of a `Work`."""


def questions(model: nn.Module, budget: float, count: int, new_tokens: int) -> Work:
    """`count` questions of 32 tokens about one image: full, pruned, and pruned on a shared cache."""
    prompt = shapes.prompt(model, 1, 40)
    ids = prompt["input_ids"]
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}  # else generate() takes the model's pad for one
    prompt |= whole
    begin = prompt | {name: x[:, :-32] for name, x in whole.items()}
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
                model.generate(**whole, past_key_values=copy.deepcopy(cache), **options)

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
def measure(model: nn.Module, work: Work, rounds: int, step: bench.Step = lambda text: None) -> Seconds:
    """Median seconds of each, which take turns; the first round warms up."""
    runs = []
    for number in range(rounds + 1):
        step(f"round {number} of {rounds}" if number else "warming up")
        runs.append({name: bench.timed(run, model)[0] for name, run in work.items()})
    return {name: statistics.median(run[name] for run in runs[1:]) for name in work}


def compare(
    model: nn.Module,
    budget: float,
    count: int,
    new_tokens: int,
    rounds: int,
    step: bench.Step = lambda text: None,
) -> dict[str, Seconds]:
    """Seconds of both cases, by what the case is, for `count` questions and as many rows.

    Raises ValueError for a `budget` that is no fraction of which a row can keep twice as much.
    """
    if not isinstance(budget, float) or not 0 < budget <= 0.5:
        raise ValueError(f"a budget of {budget}: use a fraction up to 0.5, as the last row keeps twice as much")
    cases = {
        f"{count} questions about one image, {new_tokens} tokens each": questions(model, budget, count, new_tokens),
        f"{count} images that keep different counts, first token": uneven(model, budget, count),
    }
    found = {}
    for case, work in cases.items():
        step(case)
        found[case] = measure(model, work, rounds, step)
    return found


def table(case: str, seconds: Seconds, count: int, title: str) -> Table:
    """The seconds of one case, and how many of its `count` questions pass in a second."""
    grid = Table(title=f"{case}\n{title}")
    for column in ("", "seconds", "a second", "times the first"):
        grid.add_column(column, justify="right" if column else "left")
    first = next(iter(seconds.values()))
    for name, passed in seconds.items():
        grid.add_row(name, f"{passed:.2f}", f"{count / passed:.2f}", f"{first / passed:.2f}x")
    return grid
