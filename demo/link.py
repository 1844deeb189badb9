"""A permanent link: the state of the page in the query of its address, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlencode

import vtc
from vtc.demo import examples, settings
from vtc.eval.scenes import Example
from vtc.methods.compose import with_budget
from vtc.stage import Budget

LONGEST = 300
"""Characters of a question."""


@dataclass(frozen=True)
class State:
    """What a link restores; None where it says nothing."""

    scene: int | None = None
    image: str | None = None
    """The name of an image of the visitor's own, which no link can hold."""
    question: str | None = None
    method: str | None = None
    percent: float | None = None
    values: dict[str, Any] = field(default_factory=dict)
    """The method's hyper-parameters as its input fields take them."""


def chosen(name: str, tokens: int) -> State:
    """The state of a page that opens with a method, its JSON file's settings and budget, or a quarter of the `tokens`.

    Raises ValueError and OSError as `vtc.find_method` does, and ValueError for what is none of the page's methods.
    """
    method, budget = with_budget(name)
    if vtc.list_methods().get(method.name) is not type(method):
        raise ValueError(f"the page has single methods of {', '.join(vtc.list_methods())}, not {name}")
    share = 0.25 if budget is None else budget / tokens if isinstance(budget, int) else budget
    values = {entry.name: getattr(method, entry.name) for entry in fields(method)}
    given = {key: value for key, value in values.items() if value is not None}
    return State(method=method.name, percent=max(1, round(100 * min(1.0, share))), values=given)


def query(
    question: str,
    method: str,
    budget: Budget | None,
    values: Mapping[str, Any],
    scene: Example | None,
    names: Iterable[str],
    picked: Iterable[int] | None,
) -> str:
    """The query of an address that restores this, from "?" on."""
    says: dict[str, str] = {"scene": scene.question_id} if scene else {"image": ", ".join(names)}
    says["question"] = question
    if picked is not None:
        says["picked"] = spans(picked)
    else:
        says["method"] = method
        if budget is not None:
            says["budget"] = f"{100 * budget:g}"
        says |= {f"set.{name}": written(value) for name, value in values.items() if value is not None}
    return f"?{urlencode(says)}"


def read(says: Mapping[str, str]) -> State:
    """What a link says. Raises ValueError for what cannot be restored."""
    method = says.get("method")
    if method is not None and method not in vtc.list_methods():
        raise ValueError(f"The link names a method that there is not: {method!r}.")
    values = {name.removeprefix("set."): _value(text) for name, text in says.items() if name.startswith("set.")}
    if values and method is None:
        raise ValueError("The link has settings, but no method.")
    if method is not None:
        settings.configured(vtc.list_methods()[method], values)
    try:
        percent = float(says["budget"]) if "budget" in says else None
    except ValueError:
        raise ValueError(f"The link has a budget that is no number: {says['budget']!r}.") from None
    if percent is not None and not 0 < percent <= 100:
        raise ValueError("The link has a budget that is no percentage.")
    scene = examples.number(says["scene"]) if "scene" in says else None
    if "scene" in says and scene is None:
        raise ValueError(f"The link names a scene that there is not: {says['scene']!r}.")
    question = says.get("question")
    return State(scene, says.get("image"), question[:LONGEST] if question else None, method, percent, values)


def written(value: Any) -> str:
    """A hyper-parameter as one writes it on the page."""
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _value(text: str) -> Any:
    """What an input field holds: a number, a switch, or text."""
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def spans(numbers: Iterable[int]) -> str:
    """Sorted numbers in short: "0-3,7,9-10"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
