"""`vtc fit`: how many visual tokens should leave before which decoder layer, without labels.

As FitPrune does it (arXiv 2409.10197), for any method that scores before every layer it is told to. With a tolerance
alpha each layer drops what leaves 1 - alpha of the mass that its scores have in the unpruned model; the least alpha
that meets the budget is found by bisection, image by image. What is left after each layer, averaged, is the schedule.

A method that decides by itself how many tokens of an image stay is fitted to all budgets at once: `measure`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import vtc
from vtc.choice import Choice, Seen
from vtc.eval import progress
from vtc.eval.reader import load, model_path
from vtc.eval.tune import Search, batches
from vtc.methods.progressive import Progressive
from vtc.methods.tally_adaptive import TallyAdaptive
from vtc.stage import Method, Shape, Stage

WIDTH = 0.01
"""Of the interval in which the bisection leaves alpha."""
HIDDEN = tuple(round(0.8 * 0.75**n, 4) for n in range(16))
"""What `measure` lets groups hide, one after the other."""


@dataclass(frozen=True)
class Walk(Method):
    """One walk through the layers, each dropping what it can do without."""

    method: Any
    """Of a stage before each layer but the first."""
    target: float
    """Share of an image's tokens, averaged over the layers, at which dropping ends."""
    alpha: Tensor | None = field(default=None, compare=False)
    """(images,): the share of a layer's mass that may be lost. None: nothing is dropped."""
    masses: list[Tensor] = field(default_factory=list, compare=False)
    """By stage the mass of each image in the unpruned model: (images, criteria). Filled where there is no alpha."""
    left: list[Tensor] = field(default_factory=list, compare=False)
    """How many tokens of each image entered each layer so far: (images,)."""

    name: ClassVar[str] = "walk"
    paper: ClassVar[str] = "FitPrune, arXiv 2409.10197"
    adaptive: ClassVar[bool] = True

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        stages = self.method.stages(shape)
        return tuple(
            replace(stage, select=partial(self._drop, number, stage, shape.decoder_layers))
            for number, stage in enumerate(stages)
        )

    def _drop(self, number: int, stage: Stage, depth: int, scores: Tensor, seen: Seen, keep: Tensor) -> Choice:
        mass, count = self.method.masses(stage, scores, seen), seen.valid.sum(1)
        if number == 0:
            self.left.append(count)
        if self.alpha is None:
            self.masses.append(mass.masked_fill(~seen.valid[:, None], 0).sum(2))
            self.left.append(count)
            return Choice(seen.valid)
        least = (1 - self.alpha[:, None]) * self.masses[number]
        going = seen.valid & spare(mass, seen.valid, least) & (self.average(depth) > self.target)[:, None]
        self.left.append((seen.valid & ~going).sum(1))
        return Choice(seen.valid & ~going)

    def average(self, depth: int) -> Tensor:
        """The share of each image's tokens averaged over `depth` layers, if no more of them leave: (images,)."""
        total = sum(self.left) + self.left[-1] * (depth - len(self.left))
        return total / (depth * self.left[0])


def spare(mass: Tensor, valid: Tensor, least: Tensor) -> Tensor:
    """Which tokens a layer can do without: (images, tokens) bool, by all criteria, and never all.

    By each criterion the tokens of least `mass` (images, criteria, tokens), as many as leave the others `least`
    (images, criteria), and then one fewer.
    """
    order = mass.masked_fill(~valid[:, None], torch.inf).argsort(dim=2, stable=True)
    ascending = mass.masked_fill(~valid[:, None], 0).gather(2, order)
    remaining = ascending.flip(2).cumsum(2).flip(2) - ascending
    place = torch.arange(order.shape[2], device=order.device).expand_as(order)
    enough = (remaining >= least[..., None]) & (place < valid.sum(1)[:, None, None])
    rank = torch.empty_like(order).scatter_(2, order, place)
    return (rank < enough.sum(2, keepdim=True) - 1).all(1)


def is_measured(method: str) -> bool:
    """Whether a method is fitted to all budgets at once."""
    return isinstance(vtc.find_method(method), TallyAdaptive)


def fit(search: Search, out: Path) -> Method:
    """Fit the method's schedule to the budget, or `measure` it, and write the method to the JSON file `out`.

    Raises ValueError for a method that has neither, BudgetError for a budget that is out of its reach.
    """
    start = vtc.find_method(search.method)
    if not isinstance(start, Progressive | TallyAdaptive):
        fitted = [name for name, kind in vtc.list_methods().items() if issubclass(kind, Progressive)]
        raise ValueError(
            f"{search.method} has no schedule to fit; {', '.join(fitted)} have, and {TallyAdaptive.name} is measured"
        )
    reader = load(model_path(search.model), "cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(start, TallyAdaptive):
        measured = measure(reader.model, batches(reader, search), start)
        measured.to_json(out)
        return measured
    adapter = vtc.adapter.find(reader.model)
    target, depth = _share(search.budget, adapter.tokens_per_image()), adapter.shape().decoder_layers
    method = replace(start, layers=tuple(range(1, depth)), keep_ratios=(1.0,) * (depth - 1))
    shares = torch.cat([schedules(reader.model, inputs, method, target) for inputs in batches(reader, search)]).mean(0)
    method = thinned(method, shares.tolist())
    with vtc.compressed(reader.model, method, search.budget):  # raises where the budget is out of reach
        method.to_json(out)
    return method


def measure(model: Any, asked: Sequence[dict[str, Tensor]], method: TallyAdaptive) -> TallyAdaptive:
    """The method with what stays of prompts, the share of their visual tokens, where each of `HIDDEN` is hidden.

    Raises ValueError where that hardly depends on how much is hidden, so that there is no curve.
    """
    found: dict[float, float] = {}
    with progress.bar("measuring", len(HIDDEN)) as tick:
        for hidden in HIDDEN:
            share = round(_mean_share(model, asked, replace(method, hidden=hidden)), 4)
            if max(found, default=0) < share < 1:
                found[share] = hidden
            tick()
    if len(found) < 2:
        raise ValueError(
            "these images leave as many tokens however much their groups may hide: measure on images like those that "
            "the model will read, not on plain ones"
        )
    return replace(method, shares=tuple(found), hides=tuple(found.values()))


@torch.inference_mode()
def _mean_share(model: Any, asked: Sequence[dict[str, Tensor]], method: Method) -> float:
    """Of the visual tokens of all prompts, averaged over the decoder layers, what the method leaves."""
    left = whole = 0.0
    for inputs in asked:
        with vtc.compressed(model, method, None) as trace:
            model.base_model(**inputs)
        left, whole = left + float(trace.average_tokens.sum()), whole + sum(trace.sizes)
    return left / whole


def _share(budget: int | float, tokens: int | None) -> float:
    if isinstance(budget, int) and tokens is None:
        raise ValueError(f"images of this model differ in size: give a fraction, not {budget} tokens")
    share = budget / tokens if isinstance(budget, int) and tokens else float(budget)
    if not 0 < share < 1:
        raise ValueError(f"a schedule is fitted to a part of the tokens, not to {budget}")
    return share


@torch.inference_mode()
def schedules(model: Any, inputs: dict[str, Tensor], method: Progressive, target: float) -> Tensor:
    """The share of each image's tokens that is left after each stage of `method`: (images, stages).

    Each by the least alpha at which the average over the layers is `target`, or at alpha 1 where none is.
    """
    depth = vtc.adapter.find(model).shape().decoder_layers

    def walked(walk: Walk) -> Walk:
        with vtc.compressed(model, walk, None):
            model.base_model(**inputs)
        return walk

    whole = walked(Walk(method, target))
    low, high = torch.zeros_like(whole.left[0], dtype=torch.float32), torch.ones_like(whole.left[0])
    best = _left(walked(Walk(method, target, high.float(), whole.masses)), depth)
    while float((high - low).max()) > WIDTH:
        middle = (low + high) / 2
        walk = walked(Walk(method, target, middle, whole.masses))
        reached = walk.average(depth) <= target
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
        best = torch.where(reached[:, None], _left(walk, depth), best)
    return best


def _left(walk: Walk, depth: int) -> Tensor:
    counts = walk.left + walk.left[-1:] * (depth - len(walk.left))
    return torch.stack(counts[1:], dim=1) / walk.left[0][:, None]


def thinned(method: Progressive, shares: list[float]) -> Progressive:
    """The method with those of its stages alone at which any token leaves, by shares of four digits."""
    rounded = [round(share, 4) for share in shares]
    at = [n for n, share in enumerate(rounded) if share < (rounded[n - 1] if n else 1.0)]
    layers = method.layers or ()
    return replace(method, layers=tuple(layers[n] for n in at), keep_ratios=tuple(rounded[n] for n in at))
