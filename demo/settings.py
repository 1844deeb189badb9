"""A method's hyper-parameters as input fields, made from its dataclass, and back."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import gradio as gr
from gradio.components import Component

from vtc.stage import Method

DEFAULT = "the paper's default"


def components(method: type[Method], given: Mapping[str, Any] | None = None) -> dict[str, Component]:
    """An input for each hyper-parameter that is a number, a switch, a choice or a row of numbers.

    `given` are the values that are not the method's defaults.
    """
    notes, made = _notes(method), {}
    for name, (kind, default) in _typed(method).items():
        default = (given or {}).get(name, default)
        shared = {"label": name, "info": notes.get(name)}
        if kind is bool:
            made[name] = gr.Checkbox(default, **shared)
        elif get_origin(kind) is Literal:
            made[name] = gr.Dropdown(get_args(kind), value=default, **shared)
        elif kind in (int, float):
            low, high = method.space.get(name, (None, None))
            precision = 0 if kind is int else None
            made[name] = gr.Number(
                default, minimum=low, maximum=high, precision=precision, placeholder=DEFAULT, **shared
            )
        elif get_origin(kind) is tuple:
            text = "" if default is None else ", ".join(map(str, default))
            made[name] = gr.Textbox(text, placeholder=DEFAULT, max_length=200, **shared)
    return made


def configured(method: type[Method], values: dict[str, Any]) -> Method:
    """The method with what a visitor wrote; empty inputs are defaults. Raises ValueError for what cannot be read."""
    if unknown := [name for name in values if name not in _typed(method)]:
        raise ValueError(f"{method.name} has no setting {unknown[0]!r}; it has {', '.join(_typed(method)) or 'none'}")
    given = {}
    for name, (kind, _) in _typed(method).items():
        value = values.get(name)
        if value is None or value == "":
            continue
        value = _read(name, value, kind)
        for key, number in _named(name, value):
            low, high = method.space.get(key, (number, number))
            if isinstance(number, int | float) and not low <= number <= high:
                raise ValueError(f"{key} lies between {low:g} and {high:g}, not at {number:g}")
        given[name] = value
    return replace(method(), **given)


def _named(name: str, value: Any) -> list[tuple[str, Any]]:
    """A value by the name that `Method.space` has for it; entries of a tuple are counted."""
    return [(f"{name}.{i}", entry) for i, entry in enumerate(value)] if isinstance(value, tuple) else [(name, value)]


def _read(name: str, value: Any, kind: Any) -> Any:
    """What a visitor wrote, as the type of the field."""
    if get_origin(kind) is tuple:
        return _numbers(name, ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value), kind)
    if kind in (int, float) and type(value) in (int, float) and kind(value) == value:
        return kind(value)
    if (kind is bool and isinstance(value, bool)) or value in get_args(kind):
        return value
    raise ValueError(f"{name} cannot be {value!r}")


def _numbers(name: str, text: str, kind: Any) -> tuple[int | float, ...]:
    entry, *others = get_args(kind)
    try:
        numbers = tuple(entry(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name}: {text!r} is not a row of numbers such as 4, 14, 24") from None
    if Ellipsis not in others and len(numbers) != 1 + len(others):
        raise ValueError(f"{name} takes {1 + len(others)} numbers, not {len(numbers)}")
    return numbers


def _typed(method: type[Method]) -> dict[str, tuple[Any, Any]]:
    """The type, without None, and the default of each hyper-parameter."""
    hints = get_type_hints(method)
    return {field.name: (_required(hints[field.name]), field.default) for field in fields(method)}


def _required(kind: Any) -> Any:
    if get_origin(kind) not in (Union, UnionType):
        return kind
    choices = [choice for choice in get_args(kind) if choice is not NoneType]
    return choices[0] if len(choices) == 1 else kind


def _notes(method: type[Method]) -> dict[str, str]:
    """The docstring under each field, which Python itself throws away."""
    body = ast.parse(inspect.getsource(method)).body[0].body
    return {
        field.target.id: " ".join(note.value.value.split())
        for field, note in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(note, ast.Expr)
        and isinstance(note.value, ast.Constant)
    }
