"""VFlowOpt: importance from a few relevant patches of the tower, pruning before and within the decoder, recycling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from operator import mul
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

import vtc.methods.groups as groups
import vtc.scores as scores
from vtc.adapter import Adapter
from vtc.choice import Choice, Seen
from vtc.grids import squares
from vtc.merge import weighed
from vtc.need import Need
from vtc.observe import ReceivedAttention, Tower
from vtc.select import top_k
from vtc.stage import Layer, Method, Select, Shape, Share, Stage


@dataclass(frozen=True)
class VFlowOpt(Method):
    """Keep what the tower's most attended patches attend to; recycle the rest by grid cell; prune twice more inside.

    "Token Pruning with Visual Information Flow-Guided Optimization" (arXiv 2508.05211). Eq. 1-4: the importance map is
    the mean attention paid by the relatively important patches (those that receive more than `threshold` times the
    mean) in the block that the projector reads, plus `alpha` times the softmax of the patches' entropy; it serves all
    three sites. Eq. 6-7: before the decoder the tokens below the top become one token a grid cell, their
    importance-weighted mean.

    The defaults are the released ones for LLaVA-OneVision-7B at 25 %; `vtc tune` finds them for other models. Where no
    patch passes the threshold all do (the code gets NaN). The entropy is of de-normalised pixels (the code's wraps
    around) and in bits, as in the code. Recycled tokens count towards the budget exactly; the code's approximately. A
    newline between rows of tiles (LLaVA-NeXT, LLaVA-OneVision) has the importance 0, in the code 1, and cells are a
    part of each grid's sides, there a fixed number of patches.
    """

    retain: tuple[Share, Share, Share] = (0.265, 0.983, 0.877)
    """R1, R2, R3: the share of the tokens entering each site that stays."""
    threshold: NonNegativeFloat = 34.8
    """t: how many times the mean a patch must receive to be relatively important."""
    cell: Annotated[float, Field(ge=0.001, le=1)] = 15.6 / 27
    """a: the side of a recycling cell, as a part of the grid's side (the paper counts patches of a grid of 27)."""
    alpha: float = 0.0
    """Weight of the entropy term."""
    layers: tuple[Layer, Layer] | None = None
    """Decoder layers to prune before. None: the paper's 9 and 18 of 28, scaled to the depth of the decoder."""
    weighs: bool = False
    """Whether a recycled token counts as many times as it has patches; not in the paper."""

    name: ClassVar[str] = "vflowopt"
    paper: ClassVar[str] = "VFlowOpt, arXiv 2508.05211"
    merges: ClassVar[bool] = True
    space: ClassVar[dict[str, tuple[float, float]]] = {
        "retain.0": (0.05, 0.99),
        "retain.1": (0.3, 1.0),
        "retain.2": (0.3, 1.0),
        "threshold": (0.0, 50.0),
        "cell": (0.1, 1.0),
        "alpha": (-1.0, 1.0),
    }

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        last = shape.tower_layers - 1
        attention, entropy = RelevantAttention(last, self.threshold), PatchEntropy(last)
        needs = (attention, entropy) if self.alpha else (attention,)

        def score(seen: Seen) -> Tensor:
            importance = seen[attention][:, 0]
            if not self.alpha:
                return importance
            more = seen[entropy][:, 0]
            return (importance + self.alpha * more).where(more > 0, -abs(self.alpha))  # newlines have none

        first: Select = partial(recycle, cell=self.cell)
        inside = (Stage(layer, score, needs) for layer in shape.layers(self.layers, 9, 18, of=28))
        return Stage(0, score, needs, weighed(first) if self.weighs else first), *inside

    def ratios(self) -> tuple[float, ...]:
        return tuple(accumulate(self.retain, mul))


@dataclass(frozen=True)
class RelevantAttention(ReceivedAttention):
    """Mean attention that a tower block's relatively important patches pay to each patch: (images, 1, tokens).

    Those are the patches that receive more than `threshold` times the mean, or all where none does (Eq. 1-3).
    """

    threshold: float

    def row(self, record: dict[str, Tensor], tower: Tower) -> Tensor:
        states = tower.states(self.layer, record)
        received = self.paid(states, tower)
        every = torch.ones_like(received, dtype=torch.bool)
        valid = every if states.valid is None else states.valid[:, int(tower.adapter.has_cls()) :]
        important = (received > self.threshold * scores.mean(received, valid)[:, None]) & valid
        important = important | ~important.any(1, keepdim=True)
        return self.paid(states, tower, important)[:, None]


@dataclass(frozen=True)
class PatchEntropy(Need):
    """Softmax over patches of the Shannon entropy, in bits, of a patch's grey values: (crops, 1, patches).

    Grey is the rounded mean of the de-normalised channels, 256 bins (Eq. 4). What pixels were normalised by is known
    from the image processor beside the checkpoint; frames of a video are taken to be normalised alike.
    """

    tower: ClassVar[bool] = True

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        if not adapter.has_pixels:
            raise ValueError("this method looks at the pixels of patches, which this family packs: set its weight to 0")
        _processor(adapter)
        return {}

    def row(self, record: dict[str, Tensor], tower: Tower) -> Tensor:
        pixels, processor = tower.adapter.pixels(tower.call).float(), _processor(tower.adapter)
        if processor.do_normalize:
            mean, std = (pixels.new_tensor(values)[:, None] for values in (processor.image_mean, processor.image_std))
            pixels = pixels * std + mean
        levels = pixels / processor.rescale_factor if processor.do_rescale else pixels
        grey = levels.mean(2).round().clamp(0, 255).long()
        counts = torch.zeros(*grey.shape[:2], 256, device=grey.device)
        counts.scatter_add_(2, grey, torch.ones_like(grey, dtype=torch.float32))
        entropy = torch.special.entr(counts / counts.sum(-1, keepdim=True)).sum(-1) / math.log(2)
        return entropy.softmax(1)[:, None]


def _processor(adapter: Adapter) -> Any:
    """What pixels were normalised by. Raises ValueError where that is not known."""
    if adapter.image_processor is None:
        raise ValueError(
            "the entropy of patches needs the mean and deviation that pixels were normalised by, and beside this "
            f"model's checkpoint {adapter.model.config._name_or_path!r} is no image processor: save it there with "
            "processor.save_pretrained(folder), or set the weight of the entropy to 0"
        )
    return adapter.image_processor


def recycle(scores: Tensor, seen: Seen, keep: Tensor, cell: float) -> Choice:
    """Eq. 6-7: the best stay, the others become one token a grid cell, where its most important one was.

    `cell` is the side of a cell as a part of the grid's. Only where no token has left yet, so that the grid is whole.
    """
    cells = seen.by_grids(partial(squares, side=float(cell)))[0]
    number = int(cells.max()) + 1
    best = top_k(scores, seen, (keep - cells.amax(1) - 1).clamp(min=0)).keep
    rest = seen.valid & ~best
    leads = rest & (groups.ranks(scores, cells, rest, number) == 0)
    place = torch.arange(scores.shape[1], device=scores.device).expand_as(cells)
    leader = place.new_zeros(len(keep), number + 1).scatter(1, cells.where(leads, number), place).gather(1, cells)
    stays = top_k(torch.where(best | leads, scores + scores.abs().max() * 2 + 1, scores), seen, keep).keep
    led = rest & ~stays & stays.gather(1, leader)
    return Choice(stays, torch.where(stays, place, leader.where(led, -1)))
