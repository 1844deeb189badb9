"""One number with one meaning: visual tokens per image, averaged over the decoder layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

from vtc.stage import Budget, Cache, Method, Shape, Site, Stage


class BudgetError(ValueError):
    """A budget that the method cannot reach on this model; `floor` is the lowest fraction that it can."""

    def __init__(self, message: str, floor: float):
        super().__init__(message)
        self.floor = floor


def check_budget(budget: Budget | None) -> None:
    """Raise for anything that is neither a count (int >= 0) nor a fraction (float in (0, 1])."""
    if budget is None:
        return
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise TypeError(f"budget must be a number of tokens (int) or a fraction (float), not {budget!r}")
    if isinstance(budget, int) and budget < 0:
        raise ValueError(f"budget must not be negative, got {budget}")
    if isinstance(budget, float) and not 0 < budget <= 1:
        raise ValueError(f"a fractional budget lies in (0, 1], got {budget}; for a number of tokens pass an int")


def is_full(budget: Budget | None, tokens: int | None) -> bool:
    """Whether a budget is all of an image's tokens, as far as their number is known."""
    if isinstance(budget, int):
        return tokens is not None and budget >= tokens
    return budget == 1.0


def average_tokens(tokens: float, kept: Sequence[float], sites: Sequence[Site], depth: int) -> float:
    """Visual tokens of one image averaged over `depth` decoder layers, when `kept[s]` are left by the stage at
    `sites[s]`.

    A stage before a decoder layer counts for that layer and all that follow, one at a layer's cache for this layer.
    """
    held = [float(tokens)] * depth
    for site, count in sorted(zip(sites, kept, strict=True), key=lambda stage: isinstance(stage[0], Cache)):
        layers = [site.layer] if isinstance(site, Cache) else range(site, depth)
        for layer in layers:
            held[layer] = min(held[layer], count)
    return sum(held) / depth


@lru_cache(maxsize=4096, typed=True)  # typed: a budget of 1 token is not a budget of 1.0
def counts(method: Method, tokens: int, budget: Budget | None, shape: Shape) -> tuple[float, ...]:
    """How many of an image's `tokens` stay after each stage, at least one of them: a fraction never means less.

    Whole numbers, but where a stage lowers precision: of how many tokens as they are all of them have the size.

    Of a method that decides for itself, the least that may stay. Raises `BudgetError` when the layer-averaged `budget`
    is out of the method's reach, and ValueError where there is none and the method has no default.
    """
    stages = method.stages(shape)
    if method.adaptive:
        return (tokens if is_full(budget, tokens) else min(1, tokens),) * len(stages)
    if budget is None:
        ratios = method.ratios()
        if ratios is None:
            raise ValueError(f"{method.name} has no default number of tokens: pass budget=, for example budget=0.25")
        return _rounded(_clamped(tokens, tuple(accumulate(ratios, min)), stages), stages)
    target = max(1, budget * tokens) if isinstance(budget, float) else budget
    if target >= tokens:
        return (tokens,) * len(stages)
    drops = [not stage.precision and (isinstance(stage.site, Cache) or stage.site == 0) for stage in stages]
    if target == 0 and all(drops):
        return (0,) * len(stages)
    return _rounded(_solved(method, tokens, target, stages, shape), stages)


def _solved(method: Method, tokens: int, target: float, stages: tuple[Stage, ...], shape: Shape) -> tuple[float, ...]:
    """The method's schedule at the strength that meets the target."""
    depth = shape.decoder_layers

    def kept(strength: float) -> tuple[float, ...]:
        return _clamped(tokens, method.schedule(strength, shape), stages)

    sites, least = tuple(stage.site for stage in stages), kept(math.inf)
    floor = average_tokens(tokens, least, sites, depth)
    if target < floor - 0.5:
        first = next((site for site, count in zip(sites, least, strict=True) if count < tokens), depth)
        why = "it drops none" if isinstance(first, Cache) else f"its first drop is before layer {first}"
        reach = math.ceil(1000 * floor / tokens) / 1000  # rounded up, so that it can be asked for
        raise BudgetError(
            f"{method.name} cannot reach {target:g} of {tokens} visual tokens averaged over {depth} decoder layers: "
            f"{why}, so its range is {floor:.1f} to {tokens} tokens "
            f"({reach:.3f} to 1.0 of the image)",
            floor=floor / tokens,
        )
    low, high = 0.0, math.inf
    for _ in range(100):  # the average falls with the strength: double it until it is too much, then bisect
        middle = 2 * low + 1 if high == math.inf else (low + high) / 2
        if average_tokens(tokens, kept(middle), sites, depth) > target:
            low = middle
        else:
            high = middle
    return kept(high)


def _clamped(tokens: int, ratios: tuple[float, ...], stages: tuple[Stage, ...]) -> tuple[float, ...]:
    kept, entering = [], float(tokens)
    for stage, ratio in zip(stages, ratios, strict=True):
        least = stage.precision.least(entering) if stage.precision else 1
        kept.append(min(tokens, max(least, ratio * tokens)))
        if not isinstance(stage.site, Cache):
            entering = kept[-1]
    return tuple(kept)


def _rounded(kept: tuple[float, ...], stages: tuple[Stage, ...]) -> tuple[float, ...]:
    return tuple(count if stage.precision else round(count) for count, stage in zip(kept, stages, strict=True))
