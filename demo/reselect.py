"""What a method would have kept at another budget, from the scores of a run that was: no model runs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtc.budget import counts
from vtc.choice import Choice, Seen
from vtc.stage import Budget, Method, Shape, Stage
from vtc.trace import StageTrace, Trace


def reselect(trace: Trace, method: Method, budget: Budget | None, other: Budget | None, shape: Shape) -> Trace:
    """The trace that a run of `method` at `budget` would have left at the budget `other`, as far as selection goes.

    Only where every score would have been the same: one stage, or stages that all score by one function of what the
    vision tower showed. `method` is unbound or bound, as `wrap` takes it.

    Raises:
        ValueError: the scores would have been others, or there are none, as the budget left nothing to drop.
        BudgetError: the method cannot reach `other`.
    """
    stages = _same_scores(method, budget, other, shape)
    if len(trace.stages) != len(stages) or trace.stages[0].scores is None:
        raise ValueError("nothing was scored: at this budget every visual token stayed")
    first = trace.stages[0]
    kept = [counts(method, size, other, shape) for size in trace.sizes]
    entered, valid, scores, records = first.entered.cpu(), first.valid.cpu(), first.scores.float().cpu(), []
    for number, stage in enumerate(stages):
        keep = torch.tensor([count[number] for count in kept])
        try:
            chosen = _choose(stage, scores, Seen({}, valid, entered, trace.parts), keep)
        except KeyError:  # a trace holds the scores, but not the rows that they were made of
            raise ValueError(f"{method.name} compares what it sees of tokens, so only a new run can tell") from None
        records.append(StageTrace(stage.site, entered, valid, chosen.keep, scores, chosen.into))
        entered, scores = _left(entered, chosen.keep), _left(scores, chosen.keep)
        valid = _left(valid, chosen.keep)
    return replace(trace, stages=records)


def _same_scores(method: Method, budget: Budget | None, other: Budget | None, shape: Shape) -> tuple[Stage, ...]:
    """The stages at either budget. Raises ValueError where the two would not score alike."""
    if method.adaptive:
        raise ValueError(f"{method.name} decides by what it sees, so only a new run can tell")
    if "bind" in vars(type(method)) and budget != other:
        raise ValueError(f"{method.name} works differently at each budget, so only a new run can tell")
    stages = method.stages(shape)
    first = stages[0]
    for stage in stages[1:]:
        if stage.score is not first.score or not all(need.tower for need in stage.needs):
            raise ValueError(f"{method.name} scores anew after each drop, so only a new run can tell")
    return stages


def _choose(stage: Stage, scores: Tensor, seen: Seen, keep: Tensor) -> Choice:
    """As in a forward: what leaves nothing to drop is not asked."""
    if keep.tolist() == seen.valid.sum(1).tolist():
        return Choice(seen.valid)
    return stage.select(scores, seen, keep)


def _left(values: Tensor, keep: Tensor) -> Tensor:
    """(images, tokens) of what stays, padded to the widest image."""
    return pad_sequence([row[stays] for row, stays in zip(values, keep, strict=True)], batch_first=True)
