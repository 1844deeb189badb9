"""What may stand between a method and its scores, whichever method it is: "vtc-cls@sinks", "fastv@debias"."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from vtc.choice import Seen
from vtc.grids import cells
from vtc.need import Need
from vtc.observe import DecoderRow, PatchStates, Tower
from vtc.select import grid, preferring
from vtc.stage import Budget, Cache, Method, Shape, Stage


@dataclass(frozen=True)
class Modifier(Method):
    """Base: a method whose stages score by more than it says itself. All else is as in `method`.

    Raises ValueError for a method that decides by itself how many tokens stay.
    """

    method: Method
    key: ClassVar[str]
    """Its name behind an "@"."""
    own: ClassVar[dict[str, tuple[float, float]]]
    """What `vtc tune` may search of its own."""

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise ValueError(f"@{self.key} stands behind a method, not {self.method!r}: vtc.find_method('fastv@sinks')")
        if self.method.adaptive:
            raise ValueError(f"{self.method.name} decides by itself how many tokens stay: it takes no @{self.key}")
        said = {
            "name": f"{self.method.name}@{self.key}",
            "paper": f"{self.method.paper}; {self.paper}",
            "merges": self.method.merges,
            "space": self.own | {f"method.{name}": ends for name, ends in self.method.space.items()},
        }
        for name, value in said.items():  # what other methods say in their class, this one says of its method
            object.__setattr__(self, name, value)
        super().__post_init__()

    def modified(self, stage: Stage, shape: Shape) -> Stage:
        """What becomes of a stage."""
        raise NotImplementedError

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        return tuple(self.modified(stage, shape) for stage in self.method.stages(shape))

    def ratios(self) -> tuple[float, ...] | None:
        return self.method.ratios()

    def schedule(self, strength: float, shape: Shape) -> tuple[float, ...]:
        return self.method.schedule(strength, shape)

    def bind(self, model: nn.Module, budget: Budget | None, tokens: int | None) -> Self:
        return replace(self, method=self.method.bind(model, budget, tokens))

    def tuned(self, values: dict[str, Any]) -> Self:
        """With other values for names of `space`; "method.layer" is the method's own `layer`."""
        inner = {name.partition(".")[2]: value for name, value in values.items() if name.startswith("method.")}
        own = {name: value for name, value in values.items() if not name.startswith("method.")}
        return replace(self, method=self.method.tuned(inner), **own)

    def settings(self) -> dict[str, Any]:
        return {"modifier": self.key} | super().settings() | {"method": self.method.settings()}


# -- sinks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sinks(Modifier):
    """Patches of extreme norm never win by attention alone: they leave before all others of their image.

    "Vision Transformers Need Registers" (arXiv 2309.16588): large vision transformers use a few patches (2 %) of little
    content as memory; their states have about ten times the norm of the others', and attention goes to them. In DINOv2
    most norms lie between 0 and 100, and the paper counts as outliers what is above 150. That is three times the middle
    of the others, and so the same rule serves towers of another scale: a sink's norm, after the block that the
    projector reads, is more than `times` the median over the image's tokens that a stage has before it.

    A stage chooses among the others as if there were no sinks, which fill up by their scores where the others do not
    suffice, and are taken in by none. An even grid, which looks at no score, stays as it is. In a cache the scores of
    sinks are below those of all others.
    """

    times: Annotated[float, Field(gt=1)] = 3.0

    key: ClassVar[str] = "sinks"
    paper: ClassVar[str] = "registers, arXiv 2309.16588"
    own: ClassVar[dict[str, tuple[float, float]]] = {"times": (1.5, 10.0)}

    def modified(self, stage: Stage, shape: Shape) -> Stage:
        need = PatchNorm(shape.tower_layers - 1)

        def sinks(seen: Seen) -> Tensor:
            norm = seen[need][:, 0]
            return norm > self.times * norm.masked_fill(~seen.valid, math.nan).nanmedian(1, keepdim=True).values

        def score(seen: Seen) -> Tensor:
            scores, sink, valid = stage.score(seen), sinks(seen), seen.valid
            if scores.ndim == 3:
                sink, valid = sink[:, None], valid[:, None]
            highest = scores.masked_fill(~valid, -math.inf).amax(-1, keepdim=True)
            lowest = scores.masked_fill(~valid, math.inf).amin(-1, keepdim=True)
            return torch.where(sink, scores - (highest - lowest) - 1, scores)

        select = stage.select
        if select is not grid and not isinstance(stage.site, Cache):  # there a head chooses without the needs
            select = preferring(lambda seen: ~sinks(seen), select)
        return replace(stage, score=score, select=select, needs=(*stage.needs, need))


@dataclass(frozen=True)
class PatchNorm(PatchStates):
    """The Euclidean norm of each patch's state after a tower's block: (crops, 1, patches)."""

    def row(self, record: dict[str, Tensor], tower: Tower) -> Tensor:
        return super().row(record, tower).norm(dim=1, keepdim=True)


# -- recency ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Debias(Modifier):
    """Attention of the text in the decoder, divided by its trend to favour what comes last.

    "Attention Debiasing for Token Pruning in Vision-Language Models" (arXiv 2508.17807): the mean attention over many
    images follows mu e^(recency x), x = i / N for token i of an image's N, whatever they show; what is left after
    division by that is about content. `fit_recency` fits it by least squares; mu changes no ranking. The paper's fits
    for LLaVA-1.5-7B range from 0.70 to 1.52 by benchmark and method, FastV's being 0.91 (figures and formula from notes
    on the paper; the released code multiplies by weights that are stored for each benchmark).

    Divided are the rows of every `DecoderRow`, before a method scores by them, in all its stages; the released code
    debiases the first of PyramidDrop's only. Left out: the paper's second part, which drops the
    attention on padding around an image: here a processor's padding is not told from the image.
    """

    recency: Annotated[float, Field(ge=-10, le=10)] = 0.91

    key: ClassVar[str] = "debias"
    paper: ClassVar[str] = "attention debiasing, arXiv 2508.17807"
    own: ClassVar[dict[str, tuple[float, float]]] = {"recency": (0.0, 3.0)}

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        if not any(map(_rows, self.method.stages(shape))):
            raise ValueError(f"{self.method.name} does not score by the text's attention in the decoder: no @debias")
        return super().stages(shape)

    def modified(self, stage: Stage, shape: Shape) -> Stage:
        rows = _rows(stage)

        def level(seen: Seen) -> Seen:
            sizes = seen.index.new_tensor([cells(grids) for grids in seen.parts])
            trend = (self.recency * seen.index / sizes[:, None]).exp()[:, None]
            return replace(seen, rows=seen.rows | {need: seen[need] / trend for need in rows if need in seen.rows})

        return replace(
            stage,
            score=lambda seen: stage.score(level(seen)),
            select=lambda scores, seen, keep: stage.select(scores, level(seen), keep),
        )


def _rows(stage: Stage) -> list[Need]:
    return [need for need in stage.needs if isinstance(need, DecoderRow)]


def fit_recency(attention: Tensor) -> float:
    """The `recency` of mean attention (tokens,) over many images: least squares of mu e^(recency x), x = i / tokens.

    For each recency the best mu is known, so one number is searched, between -10 and 10.
    """
    attention = attention.double()
    place = torch.arange(len(attention)) / len(attention)
    low, high = -10.0, 10.0
    while high - low > 1e-9:
        steps = torch.linspace(low, high, 101, dtype=torch.float64)
        curves = (steps[:, None] * place).exp()
        mu = (curves * attention).sum(1) / curves.square().sum(1)
        best = int((mu[:, None] * curves - attention).square().sum(1).argmin())
        low, high = float(steps[max(0, best - 1)]), float(steps[min(100, best + 1)])
    return (low + high) / 2


MODIFIERS: dict[str, type[Modifier]] = {kind.key: kind for kind in (Sinks, Debias)}
