"""Visual-token compression for vision-language models.

>>> model = vtc.wrap(model, "vtc-cls", budget=64)
>>> model.generate(**inputs)
>>> model.vtc.trace.average_tokens
>>> vtc.unwrap(model)
"""

from vtc.methods import methods
from vtc.prefix import prefix
from vtc.stage import BudgetError, Method, Shape, Stage
from vtc.trace import Trace
from vtc.wrapping import compressed, unwrap, wrap

__version__ = "0.1.0"
__all__ = ["BudgetError", "Method", "Shape", "Stage", "Trace", "compressed", "methods", "prefix", "unwrap", "wrap"]
