"""The vocabulary: where visual tokens leave (`Stage`), how many may stay (`Budget`), and who decides (`Method`).

A method is a frozen dataclass whose hyper-parameters make a tuple of stages. What no method may get wrong (text is
never dropped, at least one token stays, keep lists are sorted, one compaction routine) lives outside the methods.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from vtc import select
from vtc.choice import Seen, Selection
from vtc.need import Need

Budget = int | float
"""Visual tokens per image averaged over the decoder layers (int), or the same as a fraction of all (float)."""


class BudgetError(ValueError):
    """A budget that the method cannot reach on this model; `floor` is the lowest fraction that it can."""

    def __init__(self, message: str, floor: float):
        super().__init__(message)
        self.floor = floor


@dataclass(frozen=True)
class Shape:
    """The depths of a model that layer numbers of a paper are scaled to."""

    decoder_layers: int
    tower_layers: int
    """Blocks of the vision tower up to and including the one whose output the projector reads."""
    cls: bool = True
    """Whether the vision tower has a CLS token beside the patches."""

    def scaled(self, *layers: int, of: int) -> tuple[int, ...]:
        """A paper's decoder layers of `of`, at the same relative depths here: never before layer 1, no two the same."""
        found = []
        for layer in layers:
            found.append(max(found[-1] + 1 if found else 1, round(layer * self.decoder_layers / of)))
        if found[-1] >= self.decoder_layers:
            raise ValueError(f"{len(layers)} stages do not fit into a decoder of {self.decoder_layers} layers")
        return tuple(found)


@dataclass(frozen=True)
class Stage:
    """One place where visual tokens leave: before decoder layer `layer` runs; 0 is the encoder site.

    `score` maps what was seen to importances, shape (images, tokens), float32, higher stays. `needs` says what has to
    be observed for it. `select` turns scores, what was seen, and the number to keep of each image into a `Selection`.
    """

    layer: int
    score: Callable[[Seen], Tensor]
    needs: tuple[Need, ...] = ()
    select: Callable[[Tensor, Seen, Tensor], Selection] = field(default=select.top_k)
    contiguous: bool = False
    """Whether survivors are renumbered without gaps, at the encoder site only; some papers do it and lose grounding."""


class Method:
    """Base of all methods: a subclass is a frozen dataclass with `stages`, and `ratios` if its paper has knobs."""

    name: ClassVar[str]
    paper: ClassVar[str]
    adaptive: ClassVar[bool] = False
    """Whether the method decides by itself how many tokens stay; `keep` then gives the least."""
    space: ClassVar[dict[str, tuple[float, float]]] = {}
    """What `vtc tune` may search: (low, high) by field name, or "field.index" for an entry of a tuple."""

    @classmethod
    def tuned(cls, values: dict[str, float]) -> Method:
        """The method with values for names of `space`, the defaults for all else."""
        method = cls()
        for name, value in values.items():
            field_name, _, index = name.partition(".")
            if index:
                entries = list(getattr(method, field_name))
                entries[int(index)] = value
                value = tuple(entries)
            method = replace(method, **{field_name: value})
        return method

    def to_json(self, path: str | Path) -> None:
        """Write name and hyper-parameters to a JSON file, for `from_json`."""
        Path(path).write_text(json.dumps({"method": self.name, **asdict(self)}, indent=2) + "\n")

    @staticmethod
    def from_json(path: str | Path) -> Method:
        """The method that `to_json` or `vtc tune` wrote. Raises ValueError for a method that vtc does not know."""
        from vtc.methods import methods

        settings = json.loads(Path(path).read_text())
        name = settings.pop("method", None)
        if name not in methods():
            raise ValueError(f"{path} is of method {name!r}; vtc knows {', '.join(methods())}")
        return methods()[name](**{key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()})

    def bind(self, model: nn.Module, budget: Budget | None, tokens: int | None) -> Method:
        """The method with its trained parts for this model; `tokens` is those of an image, where that is fixed."""
        return self

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        """The stages for a model of this shape, by ascending layer."""
        raise NotImplementedError

    def ratios(self) -> tuple[float, ...] | None:
        """The paper's native knobs: the share of the image's tokens kept after each stage. None: a budget is needed."""
        return None

    def schedule(self, strength: float, stages: int) -> tuple[float, ...]:
        """The share of the image's tokens kept after each stage: `ratios` to the power of `strength` >= 0.

        0 keeps all, 1 is the paper's own schedule, infinity the method's floor. Without knobs all stages keep the same.
        """
        ratios = self.ratios()
        if ratios is None or not 0 < min(ratios) < 1:
            ratios = (1 / math.e,) * stages
        return tuple(accumulate((ratio**strength for ratio in ratios), min))  # what has left does not come back

    def keep(self, tokens: int, budget: Budget | None, shape: Shape) -> tuple[int, ...]:
        """How many of an image's `tokens` stay after each stage.

        Raises `BudgetError` when the layer-averaged `budget` is out of this method's reach.
        """
        return _keep(self, tokens, budget, shape)


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


def average_tokens(tokens: int, kept: tuple[float, ...], layers: tuple[int, ...], depth: int) -> float:
    """Visual tokens of one image averaged over `depth` decoder layers, when `kept[s]` are left from `layers[s]` on."""
    counts, starts = (tokens, *kept), (0, *layers, depth)
    return sum(n * (end - start) for n, (start, end) in zip(counts, pairwise(starts), strict=True)) / depth


@lru_cache(maxsize=4096, typed=True)  # typed: a budget of 1 token is not a budget of 1.0
def _keep(method: Method, tokens: int, budget: Budget | None, shape: Shape) -> tuple[int, ...]:
    layers = tuple(stage.layer for stage in method.stages(shape))
    depth = shape.decoder_layers

    def counts(ratios: tuple[float, ...]) -> tuple[int, ...]:
        return tuple(min(tokens, max(1, round(ratio * tokens))) for ratio in ratios)

    def average(kept: tuple[float, ...]) -> float:
        return average_tokens(tokens, kept, layers, depth)

    if budget is None:
        ratios = method.ratios()
        if ratios is None:
            raise ValueError(f"{method.name} has no default number of tokens: pass budget=, for example budget=0.25")
        return counts(tuple(accumulate(ratios, min)))
    target = budget * tokens if isinstance(budget, float) else budget
    if target >= tokens or not tokens:
        return (tokens,) * len(layers)
    if target == 0 and set(layers) == {0}:
        return (0,) * len(layers)
    least = counts(method.schedule(math.inf, len(layers)))
    floor = average(least)
    if target < floor - 0.5:
        first = next(layer for layer, kept in zip(layers, least, strict=True) if kept < tokens)
        raise BudgetError(
            f"{method.name} cannot reach {target:g} of {tokens} visual tokens averaged over {depth} decoder layers: "
            f"its first drop is before layer {first}, so its range is {floor:.1f} to {tokens} tokens "
            f"({floor / tokens:.3f} to 1.0 of the image)",
            floor=floor / tokens,
        )
    low, high = 0.0, math.inf
    for _ in range(100):  # the average falls with the strength: double it until it is too much, then bisect
        middle = 2 * low + 1 if high == math.inf else (low + high) / 2
        shares = method.schedule(middle, len(layers))
        if average(tuple(share * tokens for share in shares)) > target:
            low = middle
        else:
            high = middle
    return counts(method.schedule(high, len(layers)))
