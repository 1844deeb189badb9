"""The vocabulary: where visual tokens leave (`Stage`), how many may stay (`Budget`), and who decides (`Method`).

A method is a frozen dataclass whose hyper-parameters make a tuple of stages. What no method may get wrong (text is
never dropped, at least one token stays, keep lists are sorted, one compaction routine) lives outside the methods.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor, nn

import vtc.select as select
from vtc.cache.precision import Precision
from vtc.choice import Choice, Seen
from vtc.need import Need

Budget = int | float
"""Visual tokens per image averaged over the decoder layers (int), or the same as a fraction of all (float)."""
Layer = Annotated[int, Field(ge=1)]
"""The number of a decoder layer that tokens leave before; its score is seen in the one before."""
Share = Annotated[float, Field(ge=0, le=1)]
"""A part of the whole."""
EVIDENCE = "evidence"
"""The entry of a method's JSON file that nobody reads but people."""


@dataclass(frozen=True)
class Shape:
    """The depths of a model that layer numbers of a paper are scaled to."""

    decoder_layers: int
    tower_layers: int
    """Blocks of the vision tower up to and including the one whose output the projector reads."""
    cls: bool = True
    """Whether the vision tower has a CLS token beside the patches."""
    key_heads: int = 1
    """Heads of keys and values in a decoder layer."""
    head_dim: int = 128
    """Channels of each."""
    bits: int = 16
    """Of a number that the model computes with."""

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in the caches of all decoder layers."""
        return self.decoder_layers * 2 * self.key_heads * self.head_dim * self.bits // 8

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
        found: list[int] = []
        for layer in paper:
            found.append(max(found[-1] + 1 if found else 1, round(layer * self.decoder_layers / of)))
        if found[-1] > last:
            raise ValueError(f"{len(paper)} stages do not fit into a decoder of {self.decoder_layers} layers")
        return tuple(found)


@dataclass(frozen=True)
class Cache:
    """The site behind a prefill: decoder layer `layer` has run, and its cache gives keys and values back.

    So what is saved is memory and decoding, or decoding alone, and never the first token.
    """

    layer: int
    after: int | None = field(default=None, compare=False)
    """The later decoder layer that has to have run, too, before this one's cache is looked at."""


Site = int | Cache
"""Where visual tokens leave: before decoder layer k runs (0: before the decoder), or from the cache of one layer."""


Select = Callable[[Tensor, Seen, Tensor], Choice]
"""Scores, what was seen, and how many of each image are to stay: what becomes of them."""


@dataclass(frozen=True)
class Stage:
    """One place where visual tokens leave.

    `score` maps what was seen to importances, float32, higher stays: (images, tokens), or at a cache (images,
    key_heads, tokens) where each head chooses for itself. `needs` says what has to be observed for it. `select` turns
    scores, what was seen, and the number to keep of each image into a `Choice`.
    """

    site: Site
    score: Callable[[Seen], Tensor]
    needs: tuple[Need, ...] = ()
    select: Select = field(default=select.top_k)
    contiguous: bool = False
    """Whether survivors are renumbered without gaps, before the decoder only; some papers do it and lose grounding."""
    precision: Precision | None = None
    """At a cache: its tokens stay, at fewer bits, and `select` is asked for what is worth as much as `keep` tokens."""
    when: Literal["prefill", "decode"] = "prefill"
    """At a cache, "decode": nothing leaves. Each later step without images chooses anew which visual tokens it reads in
    the layer, out of all that a row has, as many as `keep` of its images together; its needs see the step."""
    reuse: tuple[Need, float] | None = None
    """At "decode": a row of the step, (rows, channels, 1). While its cosine with that of the step which chose is at
    least so high, that choice holds."""

    @property
    def due(self) -> Site:
        """Where it is run: at its site, or behind a later decoder layer."""
        if isinstance(self.site, Cache) and self.site.after is not None:
            return Cache(self.site.after)
        return self.site


@dataclass(frozen=True)
class Method:
    """Base of all methods: a subclass is a frozen dataclass with `stages`, and `ratios` if its paper has knobs.

    Making one checks each hyper-parameter by its annotation, and raises ValueError with the name of what does not fit.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    adaptive: ClassVar[bool] = False
    """Whether the method decides by itself how many tokens stay."""
    merges: ClassVar[bool] = False
    """Whether tokens that leave are taken in by others, rather than dropped."""
    space: ClassVar[dict[str, tuple[float, float]]] = {}
    """What `vtc tune` may search: (low, high) by field name, or "field.index" for an entry of a tuple."""

    def __post_init__(self) -> None:
        for name, kind in _kinds(cast(Any, type(self))).items():
            try:
                kind.validate_python(getattr(self, name))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                place = ".".join(map(str, (name, *first["loc"])))
                raise ValueError(f"{self.name}: {place}: {first['msg']}, not {reprlib.repr(first['input'])}") from None

    def tuned(self, values: dict[str, Any]) -> Self:
        """The method with other values for names of `space`, or for whole fields."""
        method = self
        for name, value in values.items():
            field_name, _, index = name.partition(".")
            if index:
                entries = list(getattr(method, field_name))
                entries[int(index)] = value
                value = tuple(entries)
            method = replace(method, **{field_name: value})
        return method

    def settings(self) -> dict[str, Any]:
        """Name and hyper-parameters, as a JSON file has them."""
        return {"method": self.name, **{field.name: getattr(self, field.name) for field in fields(self)}}

    def to_json(self, path: str | Path, budget: Budget | None = None, evidence: Any = None) -> None:
        """Write `settings` to a JSON file, which stands for the method wherever one is named.

        A `budget` that is written, too, holds where no other is given. `evidence` is what speaks for the choice, for
        people to read.
        """
        more = {name: x for name, x in (("budget", budget), (EVIDENCE, evidence)) if x is not None}
        write_json(path, self.settings() | more)

    @classmethod
    def described(cls, settings: dict[str, Any], source: str | Path) -> Self:
        """The method with hyper-parameters out of JSON; errors name their `source`."""
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in settings if name not in known]:
            raise ValueError(f"{source}: {cls.name} has no {unknown[0]!r}, but {', '.join(known)}")
        try:
            return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()})
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def bind(self, model: nn.Module, budget: Budget | None, tokens: int | None) -> Self:
        """The method with its trained parts for this model; `tokens` is those of an image, where that is fixed."""
        return self

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        """The stages for a model of this shape, by ascending layer."""
        raise NotImplementedError

    def ratios(self) -> tuple[float, ...] | None:
        """The paper's native knobs: the share of the image's tokens kept after each stage. None: a budget is needed."""
        return None

    def schedule(self, strength: float, shape: Shape) -> tuple[float, ...]:
        """The share of the image's tokens kept after each stage: `ratios` to the power of `strength` >= 0.

        0 keeps all, 1 is the paper's own schedule, infinity the method's floor. Without knobs all stages keep the same.
        """
        ratios = self.ratios()
        if ratios is None or not 0 < min(ratios) < 1:
            ratios = (1 / math.e,) * len(self.stages(shape))
        return tuple(accumulate((ratio**strength for ratio in ratios), min))  # what has left does not come back


@cache
def _kinds(method: Any) -> dict[str, TypeAdapter]:
    """What each hyper-parameter of a method may be, by its annotation: nothing is converted, and NaN is no number."""
    strict = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    hints = get_type_hints(method, include_extras=True)
    names = [field.name for field in fields(method) if not is_dataclass(hints[field.name])]  # those check themselves
    return {name: TypeAdapter(hints[name], config=strict) for name in names}


def write_json(path: str | Path, value: Any) -> None:
    """Whole or not at all: others may read or write it meanwhile."""
    draft = Path(f"{path}.{os.getpid()}-{threading.get_ident()}.part")
    draft.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError with the file's name where it holds anything else."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {reprlib.repr(found)} where a JSON object describes a method")
    return found
