"""The second baseline: an even grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import vtc.select as select
from vtc.stage import Method, Shape, Stage


@dataclass(frozen=True)
class Uniform(Method):
    """Keep an evenly spaced grid of patches before the decoder; a strong baseline at moderate budgets."""

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "baseline"

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        return (Stage(0, lambda seen: seen.valid.float(), select=select.grid),)
