"""Visual-token compression for vision-language models.

>>> model = vtc.wrap(model, "vtc-cls", budget=64)
>>> model.generate(**inputs)
>>> model.vtc.trace.average_tokens
>>> vtc.unwrap(model)

Names are loaded when they are first used (PEP 562), so that `import vtc` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtc.adapter import Adapter, register
    from vtc.budget import BudgetError
    from vtc.choice import Choice, Seen
    from vtc.methods import list_methods
    from vtc.methods.atp import Atp
    from vtc.methods.compose import Chain, find_method
    from vtc.methods.fastv import FastV
    from vtc.methods.random import Random
    from vtc.methods.random_kv import RandomKv
    from vtc.methods.tally import Tally
    from vtc.methods.tome import ToMe
    from vtc.methods.transprune import TransPrune
    from vtc.methods.uniform import Uniform
    from vtc.methods.vflowopt import VFlowOpt
    from vtc.methods.vtc_cls import VtcCls
    from vtc.need import Need
    from vtc.sharing import prefix
    from vtc.stage import Budget, Cache, Method, Shape, Stage
    from vtc.trace import Trace
    from vtc.trained import Trained
    from vtc.wrapping import compressed, unwrap, wrap

__version__ = "0.1.0"
_HOMES = {
    "Adapter": "adapter",
    "Atp": "methods.atp",
    "Budget": "stage",
    "BudgetError": "budget",
    "Cache": "stage",
    "Chain": "methods.compose",
    "Choice": "choice",
    "FastV": "methods.fastv",
    "Method": "stage",
    "Need": "need",
    "Random": "methods.random",
    "RandomKv": "methods.random_kv",
    "Seen": "choice",
    "Shape": "stage",
    "Stage": "stage",
    "Tally": "methods.tally",
    "ToMe": "methods.tome",
    "Trace": "trace",
    "Trained": "trained",
    "TransPrune": "methods.transprune",
    "Uniform": "methods.uniform",
    "VFlowOpt": "methods.vflowopt",
    "VtcCls": "methods.vtc_cls",
    "compressed": "wrapping",
    "find_method": "methods.compose",
    "list_methods": "methods",
    "prefix": "sharing",
    "register": "adapter",
    "unwrap": "wrapping",
    "wrap": "wrapping",
}
__all__ = [
    "Adapter",
    "Atp",
    "Budget",
    "BudgetError",
    "Cache",
    "Chain",
    "Choice",
    "FastV",
    "Method",
    "Need",
    "Random",
    "RandomKv",
    "Seen",
    "Shape",
    "Stage",
    "Tally",
    "ToMe",
    "Trace",
    "Trained",
    "TransPrune",
    "Uniform",
    "VFlowOpt",
    "VtcCls",
    "compressed",
    "find_method",
    "list_methods",
    "prefix",
    "register",
    "unwrap",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """A public name or a submodule, on its first use."""
    if name in _HOMES:
        value = getattr(import_module(f"vtc.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:
            return import_module(f"vtc.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"vtc.{name}":
                raise
    raise AttributeError(f"module 'vtc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
