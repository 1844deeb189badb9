"""What each method is: where tokens leave, what it needs for that, and whether it merges.

Its stages tell that, and take torch to make; so it is written to a file, too (`python tests/methods_table.py`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vtc.methods import described, list_methods

if TYPE_CHECKING:
    from vtc.stage import Method, Stage

FILE = Path(__file__).parent / "overview.json"
DEPTH = 32
"""Decoder layers of LLaVA-1.5-7B; its tower has 23 blocks that count."""


@dataclass(frozen=True)
class Overview:
    """One method, as it is without settings."""

    where: str
    """Where tokens leave, in a decoder of `DEPTH` layers."""
    trained: bool
    question: bool
    """Whether the choice depends on the text of the prompt."""
    merges: bool

    @property
    def flags(self) -> tuple[str, str, str]:
        """As cells of a table."""
        trained, question, merges = ("yes" * flag for flag in (self.trained, self.question, self.merges))
        return trained, question, merges


def overview() -> dict[str, Overview]:
    """All methods by name: from the file; those that it does not know, as of other packages, are loaded."""
    known = {name: Overview(**told) for name, told in json.loads(FILE.read_text()).items()}
    return {name: known[name] if name in known else of(list_methods()[name]()) for name in described()}


def of(method: Method) -> Overview:
    from vtc.stage import Shape
    from vtc.trained import Trained

    stages = method.stages(Shape(decoder_layers=DEPTH, tower_layers=23, key_heads=8))
    question = any(need.reads_text for stage in stages for need in stage.needs)
    return Overview(where(stages), isinstance(method, Trained), question, method.merges)


def where(stages: tuple[Stage, ...]) -> str:
    """ "before the decoder; layers 8, 16 of 32; the cache of each layer"."""
    layers = [stage.site for stage in stages if isinstance(stage.site, int)]
    caches = {stage.site for stage in stages} - {*layers}
    inside = ", ".join(str(layer) for layer in layers if layer)
    if len(layers) > 3 and layers == [*range(layers[0], layers[-1] + 1)]:
        inside = f"{layers[0]} to {layers[-1]}"
    tower = any(need.changes for stage in stages for need in stage.needs)
    parts = ["inside the vision tower" if tower else "before the decoder"] if 0 in layers else []
    if inside:
        parts.append(f"layer{'s' * (len(inside.split()) > 1)} {inside} of {DEPTH}")
    if caches:
        parts.append("the cache of each layer" if len(caches) == DEPTH else f"the cache of {len(caches)} layers")
        parts[-1] += ", of which each token reads a part" * any(stage.when == "decode" for stage in stages)
    return "; ".join(parts)
