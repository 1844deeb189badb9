"""Visual-token compression for vision-language models.

>>> model = vtc.wrap(model, "vtc-cls", budget=64)
>>> model.generate(**inputs)
>>> model.vtc.trace.average_tokens
>>> vtc.unwrap(model)

Names and submodules are loaded when they are first used (PEP 562), so that `import vtc` loads neither torch nor
transformers.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtc.eval.reader import pretrained as load
    from vtc.methods import methods
    from vtc.prefix import prefix
    from vtc.stage import BudgetError, Method, Shape, Stage
    from vtc.trace import Trace
    from vtc.wrap import compressed, unwrap, wrap

__version__ = "0.1.0"
__all__ = [
    "BudgetError",
    "Method",
    "Shape",
    "Stage",
    "Trace",
    "compressed",
    "load",
    "methods",
    "prefix",
    "unwrap",
    "wrap",
]
_HOMES = {
    "BudgetError": "vtc.stage.BudgetError",
    "Method": "vtc.stage.Method",
    "Shape": "vtc.stage.Shape",
    "Stage": "vtc.stage.Stage",
    "Trace": "vtc.trace.Trace",
    "compressed": "vtc.wrap.compressed",
    "load": "vtc.eval.reader.pretrained",
    "methods": "vtc.methods.methods",
    "prefix": "vtc.prefix.prefix",
    "unwrap": "vtc.wrap.unwrap",
    "wrap": "vtc.wrap.wrap",
}


def __getattr__(name: str) -> Any:
    """A public name or a submodule, on its first use."""
    if name in _HOMES:
        module, _, attribute = _HOMES[name].rpartition(".")
        value = getattr(import_module(module), attribute)
        globals()[name] = value
        return value
    missing = AttributeError(f"module 'vtc' has no attribute {name!r}")
    if name.startswith("_"):
        raise missing
    try:
        return import_module(f"vtc.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"vtc.{name}":
            raise
        raise missing from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Three functions have the names of the submodules that they live in: importing those must not hide them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
