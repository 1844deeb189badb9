"""One file a paper. A file here that defines a `Method` with a `name` is a method; nothing else registers it.

Methods of other packages come through the entry-point group `vtc.methods`, or by "package.module:Class".
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtc.stage import Method


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
            found[entry.name] = check_class(entry.load(), entry.value)
        except (ImportError, AttributeError) as error:
            raise ImportError(f"the method {entry.name!r} of another package ({entry.value}): {error}") from error
    return dict(sorted(found.items()))


def described() -> dict[str, tuple[str, str]]:
    """(first line of the docstring, paper) by name, read from the files: importing them would load torch.

    Of a method of another package, where it is.
    """
    others = {entry.name: (f"of another package: {entry.value}", "") for entry in entry_points(group="vtc.methods")}
    return dict(sorted((_own() | others).items()))


@cache
def _own() -> dict[str, tuple[str, str]]:
    """Those of vtc: a file tells the same as long as the process runs."""
    found = {}
    for path in Path(__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and "name" in (texts := _texts(node)):
                lines = (ast.get_docstring(node) or "").splitlines() or [""]
                found[texts["name"]] = lines[0], texts["paper"]
    return found


def check_names(*names: str, also: Sequence[str] = ()) -> None:
    """Refuse a plain name that no method has, within a chain, too; other forms are for those who read them.

    Raises ValueError with the names of all methods, and those that are `also` known.
    """
    known = (*described(), *also)
    for name in (part.partition("@")[0] for text in names if "/" not in text for part in text.split("+")):
        if re.fullmatch(r"[\w-]+", name) and name not in known:
            raise ValueError(f"unknown method {name!r}; vtc knows {', '.join(known)}")


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


def check_class(thing: object, source: str) -> type[Method]:
    """`thing`, if it is a class of methods; else a ValueError that names its `source`."""
    from vtc.stage import Method

    if not (isinstance(thing, type) and issubclass(thing, Method)):
        raise ValueError(f"{source} is no subclass of vtc.Method")
    return thing
