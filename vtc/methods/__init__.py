"""One file a paper. A file here that defines a `Method` with a `name` is a method; nothing else registers it."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtc.stage import Method


@cache
def methods() -> dict[str, type[Method]]:
    """All methods by name, in alphabetical order."""
    from vtc.stage import Method

    found = {}
    for module in pkgutil.iter_modules(__path__):
        for thing in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(thing, type) and issubclass(thing, Method) and hasattr(thing, "name"):
                found[thing.name] = thing
    return dict(sorted(found.items()))


def described() -> dict[str, tuple[str, str]]:
    """(first line of the docstring, paper) by name, read from the files: importing them would load torch."""
    found = {}
    for path in Path(__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and "name" in (texts := _texts(node)):
                lines = (ast.get_docstring(node) or "").splitlines() or [""]
                found[texts["name"]] = lines[0], texts["paper"]
    return dict(sorted(found.items()))


def _texts(node: ast.ClassDef) -> dict[str, str]:
    """The class variables that are literal strings."""
    return {
        line.target.id: line.value.value
        for line in node.body
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.value, ast.Constant)
        and isinstance(line.value.value, str)
    }
