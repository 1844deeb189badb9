"""Tally: merge what is alike, count it, cut by the question."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

import vtc.merge as merge
from vtc.choice import Choice, Seen
from vtc.methods.ward import ward
from vtc.observe import PatchStates, TextRow
from vtc.stage import Layer, Method, Shape, Stage


@dataclass(frozen=True)
class Tally(Method):
    """Merge alike patches before the decoder, weigh each by its patches, and cut once by the question's attention.

    Our own, without training or labels. Before the decoder Ward's clustering of the patch states that the projector
    reads leaves r N groups. A group is the plain mean of its projected features, in the place of its first patch, and
    counts as a key as many times as it has patches: log n on its logits, in all decoder layers and at decode. In the
    middle of the decoder the r^power N groups stay that the text after the image attends to most, weights included; of
    an image without later text the first ones. A budget sets r.
    """

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.366
    """r where no budget is given; with the other defaults an average of 25 % of the tokens."""
    power: Annotated[float, Field(ge=1)] = 2.0
    """The cut leaves r^power N; at 1 there is none, and what stays does not depend on the question."""
    layer: Layer | None = None
    """The decoder layer to cut before. None: the middle one."""

    name: ClassVar[str] = "tally"
    paper: ClassVar[str] = "of this package"
    merges: ClassVar[bool] = True
    space: ClassVar[dict[str, tuple[float, float]]] = {"power": (1.0, 4.0), "layer": (1, 31)}

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        states = PatchStates(shape.tower_layers - 1)
        merging = Stage(0, lambda seen: seen.valid.float(), (states,), merge.weighed(partial(_merged, states)))
        if self.power == 1:
            return (merging,)
        (layer,) = shape.layers(None if self.layer is None else (self.layer,), 1, of=2)
        text = TextRow(layer)
        return merging, Stage(layer, lambda seen: seen[text][:, 0], (text,))

    def ratios(self) -> tuple[float, ...]:
        return (self.ratio,) if self.power == 1 else (self.ratio, self.ratio**self.power)


def _merged(need: PatchStates, scores: Tensor, seen: Seen, keep: Tensor) -> Choice:
    """Ward's groups of an image's tokens, each in the place of its first one."""
    into = ward(seen[need].transpose(1, 2), seen.valid, keep)
    return Choice((merge.sizes(into) > 0) & (keep > 0)[:, None], into)
