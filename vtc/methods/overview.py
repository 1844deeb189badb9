"""What each method is, from the method itself: where tokens leave, what it needs for that, and whether it merges."""

from __future__ import annotations

from dataclasses import dataclass

from vtc.methods import described, list_methods
from vtc.stage import Cache, Method, Shape, Stage
from vtc.trained import Trained

TYPICAL = Shape(decoder_layers=32, tower_layers=23, key_heads=8)
"""Of LLaVA-1.5-7B's depths."""


@dataclass(frozen=True)
class Overview:
    """One method."""

    name: str
    where: str
    """Where tokens leave, in a model of `TYPICAL` depths."""
    trained: bool
    question: bool
    """Whether the choice depends on the text of the prompt."""
    merges: bool
    line: str
    """The first of its docstring."""
    paper: str


def overview() -> list[Overview]:
    """All methods by name, as they are without settings."""
    lines = described()
    return [of(kind(), lines.get(name, ("", ""))[0]) for name, kind in list_methods().items()]


def of(method: Method, line: str = "") -> Overview:
    stages = method.stages(TYPICAL)
    question = any(need.reads_text for stage in stages for need in stage.needs)
    trained = isinstance(method, Trained)
    return Overview(method.name, where(stages), trained, question, method.merges, line, method.paper)


def where(stages: tuple[Stage, ...]) -> str:
    """ "before the decoder; layers 8, 16 of 32; the cache of each layer"."""
    layers = [stage.site for stage in stages if isinstance(stage.site, int)]
    caches = {stage.site.layer for stage in stages if isinstance(stage.site, Cache)}
    inside = ", ".join(str(layer) for layer in layers if layer)
    tower = any(need.changes for stage in stages for need in stage.needs)
    parts = ["inside the vision tower" if tower else "before the decoder"] if 0 in layers else []
    if inside:
        parts.append(f"layer{'s' * (',' in inside)} {inside} of {TYPICAL.decoder_layers}")
    if caches:
        every = len(caches) == TYPICAL.decoder_layers
        parts.append("the cache of each layer" if every else f"the cache of {len(caches)} layers")
    return "; ".join(parts)
