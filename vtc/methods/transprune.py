"""TransPrune: keep the tokens that the layers change most, and that the instruction attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import vtc.scores as scores
from vtc.adapter import Adapter
from vtc.choice import Seen
from vtc.need import Need
from vtc.observe import TextRow
from vtc.stage import Layer, Method, Shape, Share, Stage
from vtc.view import View


@dataclass(frozen=True)
class TransPrune(Method):
    """Keep the tokens that middle layers change most (TTV), and that the instruction attends to (IGA); three prunings.

    "Token Transition Pruning for Efficient LVLM" (arXiv 2507.20630). Eq. 1-3: a module's TTV is softmax(1 - cos) * the
    norm ratio of its output to its normed input. Eq. 4: summed from the layer before the first pruning on. Eq. 5: IGA
    is the attention of the text after the image in the layer that follows. Eq. 6: each is divided by its sum over the
    image, then weighed by `alpha`. As in the released code 1 - cos has no absolute value; the softmax runs over the
    image's own tokens, where the code's runs over the whole batch. Unlike the code, survivors keep their original
    positions.
    """

    keep_ratios: tuple[Share, Share, Share] = (0.875, 0.625, 0.125)
    """Shares of the image's tokens after each pruning: the released code's, the paper's "High" (41 % on average). Those
    of its "Low" are not in the code; (0.5, 0.25, 0.0625) give the FLOPs that it prints for it (1.19 T)."""
    alpha: Share = 0.5
    """Weight of TTV. At 1.0 the instruction is not looked at (the paper's TTV-only row)."""
    layers: tuple[Layer, Layer, Layer] | None = None
    """Decoder layers to prune before. None: the paper's 7, 9 and 12 of 32, scaled to the depth of the decoder."""

    name: ClassVar[str] = "transprune"
    paper: ClassVar[str] = "TransPrune, arXiv 2507.20630"
    space: ClassVar[dict[str, tuple[float, float]]] = {
        "keep_ratios.0": (0.3, 0.99),
        "keep_ratios.1": (0.2, 0.99),
        "alpha": (0.0, 1.0),
    }

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        layers = shape.layers(self.layers, 7, 9, 12, of=32)
        return tuple(self._stage(layer, layers[0] - 1) for layer in layers)

    def _stage(self, layer: int, first: int) -> Stage:
        transitions = tuple(TokenTransition(before) for before in range(first, layer))
        instruction = TextRow(layer)

        def score(seen: Seen) -> Tensor:
            transition = scores.share(torch.stack([seen[need][:, 0] for need in transitions]).sum(0), seen.valid)
            if self.alpha == 1:
                return transition
            return self.alpha * transition + (1 - self.alpha) * scores.share(seen[instruction][:, 0], seen.valid)

        return Stage(layer, score, transitions if self.alpha == 1 else (*transitions, instruction))

    def ratios(self) -> tuple[float, ...]:
        return self.keep_ratios


@dataclass(frozen=True)
class TokenTransition(Need):
    """TTV of the attention and of the feed-forward module of decoder layer `layer`, summed: (images, 1, tokens).

    Eq. 1-3, from a module's normed input and its output before the residual addition. The paper prints 1 - |cos|.
    """

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        return adapter.branches(adapter.layers[self.layer])

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        def transition(module: str) -> Tensor:
            before, after = record[f"{module} in"].float(), record[f"{module} out"].float()
            ratio = after.norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-8)
            cosine = torch.cosine_similarity(after, before, dim=-1)
            ratio, cosine = view.of_tokens(torch.stack((ratio, cosine), dim=1)).unbind(1)
            return (1 - cosine).masked_fill(~view.alive, -torch.inf).softmax(1) * ratio

        return (transition("attention") + transition("feed-forward"))[:, None]
