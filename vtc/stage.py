"""The vocabulary: where visual tokens leave (`Stage`), how many may stay (`Budget`), and who decides (`Method`).

A method is a frozen dataclass whose hyper-parameters make a tuple of stages. What no method may get wrong (text is
never dropped, at least one token stays, keep lists are sorted, one compaction routine) lives outside the methods.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from vtc import select
from vtc.choice import Seen, Selection
from vtc.need import Need

Budget = int | float
"""Visual tokens per image averaged over the decoder layers (int), or the same as a fraction of all (float)."""
Layer = Annotated[int, Field(ge=1)]
"""The number of a decoder layer that tokens leave before; its score is seen in the one before."""
Share = Annotated[float, Field(ge=0, le=1)]
"""A part of the whole."""


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

    def layers(self, chosen: tuple[int, ...] | None, *paper: int, of: int) -> tuple[int, ...]:
        """The decoder layers that a method prunes before: `chosen`, or without a choice its paper's.

        Those are layers of `of`, taken at the same relative depths here: never before layer 1, no two the same. Raises
        ValueError where this decoder has no such layers.
        """
        last = self.decoder_layers - 1
        if chosen is not None:
            if list(chosen) != sorted({*chosen}) or not chosen or not 1 <= chosen[0] <= chosen[-1] <= last:
                raise ValueError(
                    f"layers {chosen} must ascend within 1 to {last}: a score is seen in the layer before its own"
                )
            return chosen
        found = []
        for layer in paper:
            found.append(max(found[-1] + 1 if found else 1, round(layer * self.decoder_layers / of)))
        if found[-1] > last:
            raise ValueError(f"{len(paper)} stages do not fit into a decoder of {self.decoder_layers} layers")
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
    """Base of all methods: a subclass is a frozen dataclass with `stages`, and `ratios` if its paper has knobs.

    Making one checks each hyper-parameter by its annotation, and raises ValueError with the name of what does not fit.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    adaptive: ClassVar[bool] = False
    """Whether the method decides by itself how many tokens stay; `keep` then gives the least."""
    space: ClassVar[dict[str, tuple[float, float]]] = {}
    """What `vtc tune` may search: (low, high) by field name, or "field.index" for an entry of a tuple."""

    def __post_init__(self) -> None:
        for name, kind in _kinds(type(self)).items():
            try:
                kind.validate_python(getattr(self, name))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                place = ".".join(map(str, (name, *first["loc"])))
                raise ValueError(f"{self.name}: {place}: {first['msg']}, not {reprlib.repr(first['input'])}") from None

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
        """The method that `to_json` or `vtc tune` wrote.

        Raises ValueError for what describes no method that vtc knows, with the file and the field; OSError where the
        file cannot be read.
        """
        from vtc.methods import methods

        settings = read_json(path)
        name = settings.pop("method", None)
        if not isinstance(name, str) or name not in methods():
            raise ValueError(f"{path}: method is {reprlib.repr(name)}; vtc knows {', '.join(methods())}")
        return methods()[name].described(settings, path)

    @classmethod
    def described(cls, settings: dict[str, Any], source: str | Path) -> Method:
        """The method with hyper-parameters out of JSON; errors name their `source`."""
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in settings if name not in known]:
            raise ValueError(f"{source}: {cls.name} has no {unknown[0]!r}, but {', '.join(known)}")
        try:
            return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()})
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

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
        """How many of an image's `tokens` stay after each stage, at least one of them: a fraction never means less.

        Raises `BudgetError` when the layer-averaged `budget` is out of this method's reach.
        """
        return _keep(self, tokens, budget, shape)


@cache
def _kinds(method: type[Method]) -> dict[str, TypeAdapter]:
    """What each hyper-parameter of a method may be, by its annotation: nothing is converted, and NaN is no number."""
    strict = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    hints = get_type_hints(method, include_extras=True)
    return {field.name: TypeAdapter(hints[field.name], config=strict) for field in fields(method)}


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError with the file's name where it holds anything else."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {reprlib.repr(found)} where a JSON object describes a method")
    return found


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

    def clamped(ratios: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(min(tokens, max(1, ratio * tokens)) for ratio in ratios)

    def average(kept: tuple[float, ...]) -> float:
        return average_tokens(tokens, kept, layers, depth)

    if budget is None:
        ratios = method.ratios()
        if ratios is None:
            raise ValueError(f"{method.name} has no default number of tokens: pass budget=, for example budget=0.25")
        return _rounded(clamped(tuple(accumulate(ratios, min))))
    target = max(1, budget * tokens) if isinstance(budget, float) else budget
    if target >= tokens:
        return (tokens,) * len(layers)
    if target == 0 and set(layers) == {0}:
        return (0,) * len(layers)
    least = clamped(method.schedule(math.inf, len(layers)))
    floor = average(least)
    if target < floor - 0.5:
        first = next((layer for layer, kept in zip(layers, least, strict=True) if kept < tokens), depth)
        reach = math.ceil(1000 * floor / tokens) / 1000  # rounded up, so that it can be asked for
        raise BudgetError(
            f"{method.name} cannot reach {target:g} of {tokens} visual tokens averaged over {depth} decoder layers: "
            f"its first drop is before layer {first}, so its range is {floor:.1f} to {tokens} tokens "
            f"({reach:.3f} to 1.0 of the image)",
            floor=floor / tokens,
        )
    low, high = 0.0, math.inf
    for _ in range(100):  # the average falls with the strength: double it until it is too much, then bisect
        middle = 2 * low + 1 if high == math.inf else (low + high) / 2
        if average(clamped(method.schedule(middle, len(layers)))) > target:
            low = middle
        else:
            high = middle
    return _rounded(clamped(method.schedule(high, len(layers))))


def _rounded(kept: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(round(count) for count in kept)
