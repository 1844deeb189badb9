"""Visual-token compression for vision-language models.

>>> model = vtc.wrap(model, "vtc-cls", budget=64)
>>> model.generate(**inputs)
>>> model.vtc.trace.average_tokens
>>> vtc.unwrap(model)
"""

from vtc.budget import BudgetError
from vtc.methods import find_method, list_methods
from vtc.sharing import prefix
from vtc.stage import Method, Shape, Stage
from vtc.trace import Trace
from vtc.wrapping import compressed, unwrap, wrap

__version__ = "0.1.0"
__all__ = [
    "BudgetError",
    "Method",
    "Shape",
    "Stage",
    "Trace",
    "compressed",
    "find_method",
    "list_methods",
    "prefix",
    "unwrap",
    "wrap",
]
