"""Methods one after another, and the texts that methods are named by."""

from __future__ import annotations

import importlib
import math
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field

import vtc.adapter as adapters
from vtc.budget import average_tokens, check_budget, counts
from vtc.methods import check_class, list_methods
from vtc.methods.modifiers import MODIFIERS
from vtc.stage import EVIDENCE, Budget, Cache, Method, Shape, Stage, read_json


@dataclass(frozen=True, init=False)
class Chain(Method):
    """Methods one after another, on one budget: each chooses from what those before it have left.

    Args:
        methods: what `find_method` takes. Each has to drop behind the one before it; what drops from the cache is last.
        split: how they share what is dropped. The logarithm of the share of tokens that the whole chain leaves is cut
            in parts, so that the shares that the methods leave of what enters them multiply to it: entry n is what
            method n takes of the part that is still to be given away, and the last one takes the rest. At a quarter
            and a split of (0.5,) each of two methods leaves half of what it gets, at (0.25,) the first one 71 %, the
            second 35 % of those. None: equal parts. Without a budget each method runs with its own paper's knobs.

    Raises ValueError for fewer than two methods, for one that decides by itself how many tokens stay, and, when it
    meets a model, for stages that do not come one behind the other there.
    """

    methods: tuple[Method, ...] = field(init=False)
    split: tuple[Annotated[float, Field(gt=0, lt=1)], ...]

    def __init__(self, *methods: str | Path | Method, split: Sequence[float] | None = None):
        found = tuple(map(find_method, methods))
        if len(found) < 2:
            raise ValueError('a chain has two methods or more, as in vtc.Chain("vtc-cls", "fastv")')
        rest = len(found) - 1
        said = {
            "methods": found,
            "split": tuple(1 / (rest + 1 - n) for n in range(rest)) if split is None else tuple(split),
            "name": "+".join(method.name for method in found),
            "paper": "; ".join(method.paper for method in found),
            "merges": any(method.merges for method in found),
            "space": {f"split.{n}": (0.05, 0.95) for n in range(rest)}
            | {f"{n}.{name}": ends for n, method in enumerate(found) for name, ends in method.space.items()},
        }
        for name, value in said.items():  # what other methods say in their class, this one says of its parts
            object.__setattr__(self, name, value)
        self.__post_init__()
        if len(self.split) != rest:
            raise ValueError(f"{self.name}: split: {rest} numbers share between {rest + 1} methods, not {self.split}")
        if own := [method.name for method in found if method.adaptive]:
            raise ValueError(f"{own[0]} decides by itself how many tokens stay: not in a chain")

    def tuned(self, values: dict[str, Any]) -> Self:
        """With other values for names of `space`: "split", "split.0", or "1.layer" for the second method's `layer`."""
        split, parts = list(self.split), list(self.methods)
        for name, value in values.items():
            first, _, rest = name.partition(".")
            if first.isdecimal():
                parts[int(first)] = parts[int(first)].tuned({rest: value})
            elif rest:
                split[int(rest)] = value
            else:
                split = list(value)
        return type(self)(*parts, split=split)

    def settings(self) -> dict[str, Any]:
        return {"chain": [method.settings() for method in self.methods], "split": self.split}

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        found: list[Stage] = []
        for method in self.methods:
            stages = method.stages(shape)
            if found:
                self._check(found[-1], stages[0], method)
            found += stages
        return tuple(found)

    def _check(self, last: Stage, first: Stage, method: Method) -> None:
        """Raise ValueError where a method does not begin behind the last stage of the one before it."""
        if isinstance(last.site, Cache):
            raise ValueError(f"{self.name}: what drops from the cache comes last in a chain, not before {method.name}")
        if not isinstance(first.site, Cache) and first.site <= last.site:
            raise ValueError(
                f"{self.name}: {method.name} begins before decoder layer {first.site}, and the method before it still "
                f"drops before layer {last.site} (0 is before the decoder): take other layers, or another order"
            )

    def ratios(self) -> tuple[float, ...] | None:
        ratios = [method.ratios() for method in self.methods]
        kept, entering = [], 1.0
        for own in ratios:
            if own is None:
                return None
            kept += [entering * ratio for ratio in own]
            entering = min(kept)
        return tuple(kept)

    def schedule(self, strength: float, shape: Shape) -> tuple[float, ...]:
        """The share kept after each stage where the chain as a whole leaves e^-strength.

        A method takes its part of the strength by its own schedule, whose strength 1 is its paper's last share.
        """
        kept: list[float] = []
        for method, part in zip(self.methods, self._parts(), strict=True):
            entering, last = kept[-1] if kept else 1.0, method.schedule(1.0, shape)[-1]
            kept += [entering * share for share in method.schedule(strength * part / -math.log(last), shape)]
        return tuple(kept)

    def _parts(self) -> Iterator[float]:
        """What each method takes of the logarithm; in sum 1."""
        left = 1.0
        for taken in (*self.split, 1.0):
            yield left * taken
            left -= left * taken

    def bind(self, model: Any, budget: Budget | None, tokens: int | None) -> Self:
        """With each method bound to its own budget: what it would average over the layers on the tokens it gets."""
        if budget is None or (tokens is None and isinstance(budget, int)):
            return type(self)(*(method.bind(model, budget, tokens) for method in self.methods), split=self.split)
        shape = adapters.find(model).shape()
        size = tokens or 1 << 20  # where images differ in size, one so large that nothing is rounded
        entering, kept, bound = float(size), list(counts(self, size, budget, shape)), []
        for method in self.methods:
            sites = [stage.site for stage in method.stages(shape)]
            own, kept = kept[: len(sites)], kept[len(sites) :]
            share = average_tokens(entering, own, sites, shape.decoder_layers) / max(1, entering)
            bound.append(method.bind(model, share, tokens))
            entering = own[-1]
        return type(self)(*bound, split=self.split)


# -- names ------------------------------------------------------------------------------------------------------------


def find_method(name: str | Path | Method) -> Method:
    """The method that a text stands for.

    Args:
        name: a name out of `list_methods()`, "package.module:Class", or the path of a JSON file that `Method.to_json`,
            `vtc tune` or `vtc choose` wrote; several of them with "+" between for a chain, each with "@" and a modifier
            behind it ("vtc-cls@sinks+fastv"). A method stands for itself.

    Raises:
        ValueError: what names no method, with the known ones, or with the file and the field that is wrong.
        OSError: a file that cannot be read.
    """
    return with_budget(name)[0]


def with_budget(name: str | Path | Method) -> tuple[Method, Budget | None]:
    """The method that a text stands for, and the budget where it is a JSON file that names one (`vtc choose`).

    Takes and raises what `find_method` does.
    """
    if isinstance(name, Method):
        return name, None
    name = str(name)
    if not (name.endswith(".json") and (Path(name).exists() or not {*name} & {*"+@"})):
        return _named(name), None
    settings = read_json(name)
    settings.pop(EVIDENCE, None)
    budget = settings.pop("budget", None)
    try:
        check_budget(budget)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
    return _described(settings, name), budget


def _named(name: str) -> Method:
    """The method of a name, a chain of them, or one with modifiers."""
    if "+" in name:
        return Chain(*name.split("+"))
    name, _, modifiers = name.partition("@") if not Path(name).exists() else (name, "", "")
    method = find_method(name) if modifiers else _class(name, "unknown method ")()
    for modifier in filter(None, modifiers.split("@")):
        if modifier not in MODIFIERS:
            raise ValueError(f"unknown modifier {modifier!r}; vtc knows {', '.join(MODIFIERS)}")
        method = MODIFIERS[modifier](method)
    return method


def _described(settings: object, source: str) -> Method:
    """The method that `Method.settings` describes, or a text in its place. Errors name their `source`."""
    if isinstance(settings, str):
        return find_method(settings)
    if not isinstance(settings, dict):
        raise ValueError(f"{source} holds {reprlib.repr(settings)} where a name or a JSON object describes a method")
    settings = dict(settings)
    try:
        if "chain" in settings:
            parts = [_described(part, source) for part in settings.pop("chain")]
            return Chain(*parts, **settings)
        if "modifier" in settings:
            kind, inner = MODIFIERS[settings.pop("modifier")], _described(settings.pop("method", None), source)
            return kind.described({"method": inner, **settings}, source)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{source}: {error}") from None
    return _class(settings.pop("method", None), f"{source}: method is ").described(settings, source)


def _class(name: object, complaint: str) -> type[Method]:
    if isinstance(name, str) and ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return check_class(getattr(importlib.import_module(module), attribute), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{complaint}{name!r}: {error}") from error
    if not isinstance(name, str) or name not in list_methods():
        raise ValueError(f"{complaint}{reprlib.repr(name)}; vtc knows {', '.join(list_methods())}")
    return list_methods()[name]
