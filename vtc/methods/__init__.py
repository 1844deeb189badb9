"""One file a paper. A file here that defines a `Method` with a `name` is a method; nothing else registers it.

Methods of other packages come through the entry-point group `vtc.methods`, or by "package.module:Class".
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import reprlib
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtc.stage import Budget, Method


@cache
def list_methods() -> dict[str, type[Method]]:
    """All methods by name, in alphabetical order: those of vtc, and those of installed packages."""
    from vtc.stage import Method

    found = {}
    for module in pkgutil.iter_modules(__path__):
        for thing in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(thing, type) and issubclass(thing, Method) and "name" in vars(thing):
                found[thing.name] = thing
    for entry in entry_points(group="vtc.methods"):
        try:
            found[entry.name] = _checked(entry.load(), entry.value)
        except (ImportError, AttributeError) as error:
            raise ImportError(f"the method {entry.name!r} of another package ({entry.value}): {error}") from error
    return dict(sorted(found.items()))


def find_method(name: str | Path | Method) -> Method:
    """The method that a text stands for.

    Args:
        name: a name out of `list_methods()`, "package.module:Class", or the path of a JSON file that `Method.to_json`,
            `vtc tune` or `vtc choose` wrote; a method stands for itself.

    Raises:
        ValueError: what names no method, with the known ones, or with the file and the field that is wrong.
        OSError: a file that cannot be read.
    """
    return with_budget(name)[0]


def with_budget(name: str | Path | Method) -> tuple[Method, Budget | None]:
    """The method that a text stands for, and the budget where it is a JSON file that names one (`vtc choose`).

    Takes and raises what `find_method` does.
    """
    from vtc.budget import check_budget
    from vtc.stage import EVIDENCE, Method, read_json

    if isinstance(name, Method):
        return name, None
    name = str(name)
    if not name.endswith(".json"):
        return _kind(name, "unknown method ")(), None
    settings = read_json(name)
    kind, budget = _kind(settings.pop("method", None), f"{name}: method is "), settings.pop("budget", None)
    try:
        check_budget(budget)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
    settings.pop(EVIDENCE, None)
    return kind.described(settings, name), budget


def described() -> dict[str, tuple[str, str]]:
    """(first line of the docstring, paper) by name, read from the files: importing them would load torch.

    Of a method of another package, where it is.
    """
    found = {}
    for path in Path(__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and "name" in (texts := _texts(node)):
                lines = (ast.get_docstring(node) or "").splitlines() or [""]
                found[texts["name"]] = lines[0], texts["paper"]
    found |= {entry.name: (f"of another package: {entry.value}", "") for entry in entry_points(group="vtc.methods")}
    return dict(sorted(found.items()))


def _texts(node: ast.ClassDef) -> dict[str, str]:
    """The class variables that are literal strings."""
    return {
        line.target.id: line.value.value
        for line in node.body
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and isinstance(line.value, ast.Constant)
        and isinstance(line.value.value, str)
    }


def _kind(name: object, complaint: str) -> type[Method]:
    if isinstance(name, str) and ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return _checked(getattr(importlib.import_module(module), attribute), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{complaint}{name!r}: {error}") from error
    if not isinstance(name, str) or name not in list_methods():
        raise ValueError(f"{complaint}{reprlib.repr(name)}; vtc knows {', '.join(list_methods())}")
    return list_methods()[name]


def _checked(thing: object, source: str) -> type[Method]:
    from vtc.stage import Method

    if not (isinstance(thing, type) and issubclass(thing, Method)):
        raise ValueError(f"{source} is no subclass of vtc.Method")
    return thing
