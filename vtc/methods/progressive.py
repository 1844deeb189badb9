"""Methods that drop at several depths of the decoder: as many as one likes, each leaving a share of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc.choice import Seen
from vtc.stage import Layer, Method, Shape, Share, Stage


@dataclass(frozen=True)
class Progressive(Method):
    """A method of one `stage` for each of `layers`, after which `keep_ratios` of the image's tokens are left.

    So a schedule that `vtc fit` found for one of them fits all.
    """

    layers: tuple[Layer, ...] | None = None
    """Decoder layers to prune before. None: the paper's, scaled to the depth of the decoder."""
    keep_ratios: tuple[Share, ...] = ()
    """Shares of the image's tokens that are left after each pruning."""

    PAPER: ClassVar[tuple[int, ...]]
    """The paper's layers to prune before, of 32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = self.PAPER if self.layers is None else self.layers
        if len(layers) != len(self.keep_ratios):
            numbers = f"{len(layers)} layers and {len(self.keep_ratios)} keep_ratios"
            raise ValueError(f"{self.name}: {numbers}, and there must be as many of each")

    def stage(self, layer: int) -> Stage:
        """The pruning before one decoder layer."""
        raise NotImplementedError

    def masses(self, stage: Stage, scores: Tensor, seen: Seen) -> Tensor:
        """What `vtc fit` lets as little as possible be lost of: (images, criteria, tokens) >= 0. Here the scores."""
        return scores[:, None]

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        return tuple(self.stage(layer) for layer in shape.layers(self.layers, *self.PAPER, of=32))

    def ratios(self) -> tuple[float, ...] | None:
        return self.keep_ratios
