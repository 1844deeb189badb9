"""What the budget slider offers for a method on this model, and what it says."""

from __future__ import annotations

from vtc.adapter import Adapter
from vtc.budget import BudgetError, average_tokens, counts
from vtc.stage import Method

TYPICAL = 576
"""Visual tokens that a floor is told by where images of a model differ in size."""


def reachable(adapter: Adapter, method: Method) -> list[int]:
    """The percents, 1 to 100, that the method can work at on this model: from its floor on, or what it is trained for.

    Raises ValueError where its settings allow none at all.
    """
    tokens, reason, found = adapter.tokens_per_image() or TYPICAL, None, []
    for percent in range(1, 101):
        try:
            counts(method.bind(adapter.model, percent / 100, tokens), tokens, percent / 100, adapter.shape())
        except BudgetError as error:
            reason = reason or error
        except ValueError as error:
            reason = error
        else:
            found.append(percent)
    if not found:
        raise reason
    return found


def nearest(offered: list[int], percent: float) -> int:
    """The offered percent next to this one, the larger of two."""
    return min(offered, key=lambda other: (abs(other - percent), -other))


def note(adapter: Adapter, method: Method, percent: int, offered: list[int]) -> str:
    """What a percentage means in tokens, and what bounds it."""
    tokens = adapter.tokens_per_image()
    if tokens is None:
        said = "Of the image's visual tokens, averaged over the decoder layers."
    else:
        said = f"{spent(adapter, method, percent):.0f} of {tokens} visual tokens, averaged over the decoder layers."
    if offered != list(range(offered[0], 101)):
        return f"{said} {method.name} is trained for {', '.join(map(str, offered[:-1]))} %."
    if offered[0] > 1:
        packs = any(stage.precision for stage in method.stages(adapter.shape()))
        why = "it drops no token, and keeps some at fewer bits" if packs else "its first layers read everything"
        why = "it was measured no further" if method.adaptive else why
        return f"{said} {method.name} reaches down to {offered[0]} %: {why}."
    return said


def spent(adapter: Adapter, method: Method, percent: int) -> float:
    """Visual tokens of an image, averaged over the decoder layers, at a percentage that is offered."""
    tokens, budget, shape = adapter.tokens_per_image() or TYPICAL, percent / 100, adapter.shape()
    bound = method.bind(adapter.model, budget, tokens)
    if bound.adaptive:
        return budget * tokens
    layers = tuple(stage.site for stage in bound.stages(shape))
    return average_tokens(tokens, counts(bound, tokens, budget, shape), layers, shape.decoder_layers)
