"""ToMe: merge similar patches inside the vision tower, so that the tower gets faster, too."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad
from torch.utils.hooks import RemovableHandle

import vtc.core.compact as compact
import vtc.merge as merge
from vtc.adapter import Adapter
from vtc.choice import Choice, Seen
from vtc.need import Need
from vtc.observe import Tower
from vtc.select import top_k
from vtc.stage import Budget, Method, Shape, Share, Stage


@dataclass(frozen=True)
class ToMe(Method):
    """Merge patches with similar keys between the tower's blocks; each group becomes one visual token.

    "Token Merging: Your ViT But Faster" (arXiv 2210.09461): bipartite matching on head-averaged keys, means weighted by
    size, attention proportional to size. Where more groups are left than the budget allows (a block halves its patches
    at most), the largest stay. ToMe merges between a block's attention and its feed-forward, and lets the order of the
    tokens go; here merging comes after both, and a group's token sits where the first of its patches that the decoder
    reads was, in raster order. Where the projector averages patches, of a video or a scaled image, a visual token of
    several groups joins none.
    """

    share: Share | None = None
    """The share of patches that is left before the tower's last block. Never less than the budget, the default."""
    weighs: bool = False
    """Whether a group counts in the decoder, too, as many times as it has patches; not in the paper."""

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "ToMe, arXiv 2210.09461"
    merges: ClassVar[bool] = True

    def bind(self, model: nn.Module, budget: Budget | None, tokens: int | None) -> ToMe:
        if budget is None:
            if self.share is None:
                raise ValueError("tome has no default number of tokens: pass budget=, for example budget=0.25")
            return self
        if isinstance(budget, int):
            if tokens is None:
                raise ValueError(f"images of this model differ in size: give tome a fraction, not {budget} tokens")
            budget = budget / tokens
        return replace(self, share=max(min(1.0, budget), self.share or 0.0))

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        need = MergedPatches(shape.tower_layers - 1, 1.0 if self.share is None else self.share)
        largest = partial(_largest, need)
        return (Stage(0, lambda seen: seen[need][:, 0], (need,), merge.weighed(largest) if self.weighs else largest),)

    def ratios(self) -> tuple[float, ...] | None:
        return None if self.share is None else (self.share,)


def _largest(need: MergedPatches, sizes: Tensor, seen: Seen, keep: Tensor) -> Choice:
    """The largest groups stay, each as the patch that stands for it; the others of a group are merged into that one."""
    stays, group = top_k(sizes, seen, keep).keep, seen[need][:, 1].round().long()
    group = group.masked_fill((_mark(group) - seen[need][:, 2]).abs() > 1e-4, 0)
    place = torch.arange(sizes.shape[1], device=sizes.device).expand_as(group)
    leaders = torch.full((len(sizes), int(group.max()) + 1), -1, device=sizes.device)
    leaders.scatter_reduce_(1, group, torch.where(stays & seen.valid, place, -1), "amax")
    leaders[:, 0] = -1  # tokens that are no patch, such as the newlines of anyres, or of patches of several groups
    return Choice(stays, torch.where(stays, place, leaders.gather(1, group)))


def matches(key: Tensor, count: int, protected: int) -> Tensor:
    """Bipartite soft matching: the token that takes in each one, itself where it stays: (crops, length) int64.

    Every other token, from the first on, may join the most similar one of the rest; the `count` most similar pairs do.
    The first `protected` tokens (0 or 1) stay alone. `key` (crops, length, head_dim) is the mean over heads.
    """
    key = normalize(key.float(), dim=-1)
    with torch.autocast(key.device.type, enabled=False):  # this one runs within the tower
        similarity = key[:, ::2] @ key[:, 1::2].transpose(1, 2)
    similarity[:, :protected] = -math.inf
    best, partner = similarity.max(-1)
    joins = best.argsort(dim=1, descending=True, stable=True)[:, :count]
    into = torch.arange(key.shape[1], device=key.device).repeat(len(key), 1)
    return into.scatter(1, 2 * joins, 2 * partner.gather(1, joins) + 1)


@dataclass(frozen=True)
class MergedPatches(Need):
    """Merges a tower's patches until `share` of them is left before block `layer`, the last that the projector reads.

    The row is how many patches each one stands for, 0 where another one does, the number of its group, counted from 1
    over all crops, and that number's `_mark`: (crops, 3, patches). Every block before merges equally many, half of its
    patches at most. ToMe merges between a block's attention and its feed-forward; here it is after both, on the same
    keys, so that no block's code has to be copied.
    """

    share: float

    tower: ClassVar[bool] = True
    changes: ClassVar[bool] = True

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        if not adapter.merges_patches:
            raise ValueError(
                "this method merges patches inside the vision tower, and vtc can do that in towers like CLIP's and "
                "SigLIP's only, where each patch becomes a visual token; this family's tower or projector is another"
            )
        kernel = adapter.backbone.vision_tower.config._attn_implementation
        if kernel not in ("sdpa", "eager"):
            raise ValueError(
                f"merged patches weigh more as keys, which {kernel} cannot do: use sdpa or eager attention"
            )
        return {}

    def hooks(self, adapter: Adapter) -> list[RemovableHandle]:
        handles = []
        for number, block in enumerate(adapter.tower_blocks()):
            handles.append(block.register_forward_pre_hook(self._weigh))
            if number == self.layer:  # before any hook that reads the block's output
                handles.append(block.register_forward_hook(self._unmerge, prepend=True))
            else:
                key = adapter.tower_attention(block).key
                handles.append(key.register_forward_hook(partial(self._keep, "key")))
                handles.append(block.register_forward_hook(partial(self._merge, number, adapter), prepend=True))
        return handles

    def row(self, record: dict[str, Any], tower: Tower) -> Tensor:
        source, size = record["source"], record["size"]
        length, protected = source.shape[1], int(tower.adapter.has_cls())
        unseen = pad(~_visible(tower, len(source), length - protected), (protected, 0))
        place = torch.arange(length, device=source.device) + length * unseen.to(source.device)  # the visible come first
        first = torch.full_like(size, 2 * length, dtype=torch.long).scatter_reduce(1, source, place, "amin") % length
        sizes = torch.zeros(source.shape, device=size.device).scatter(1, first, size)
        number = source + 1 + length * torch.arange(len(source), device=source.device)[:, None]
        return torch.stack((sizes, number.to(sizes), _mark(number).to(sizes)), dim=1)[:, :, protected:]

    def _weigh(self, block: nn.Module, args: tuple) -> tuple | None:
        """Before a block: each key counts as many times as it has patches."""
        if (record := self.record()) is None:
            return None
        hidden, _, *rest = args
        if "size" not in record:
            record["size"] = torch.ones(hidden.shape[:2], device=hidden.device)
            record["source"] = torch.arange(hidden.shape[1], device=hidden.device).repeat(len(hidden), 1)
        if record["size"].shape == record["source"].shape:
            return None
        return hidden, record["size"].log()[:, None, None].to(hidden.dtype), *rest

    def _merge(self, number: int, adapter: Adapter, block: nn.Module, args: tuple, hidden: Tensor) -> Tensor | None:
        """After a block: its share of what there is to merge."""
        if (record := self.record()) is None:
            return None
        protected, length, whole = int(adapter.has_cls()), hidden.shape[1], record["source"].shape[1]
        target = protected + max(1, round(self.share * (whole - protected)))
        count = min(math.ceil((length - target) / (self.layer - number)), (length + 1) // 2 - protected, length // 2)
        if count <= 0:
            return None
        key = adapter.tower_attention(block).keys(record.pop("key")).mean(1)
        size, into = record["size"], matches(key, count, protected)
        place = torch.arange(length, device=into.device)
        plan = compact.plan(into == place, [length - count] * len(into))
        record["size"] = compact.gather(torch.zeros_like(size).scatter_add(1, into, size), plan.index)
        record["source"] = plan.source.gather(1, into).gather(1, record["source"])
        return compact.gather(merge.absorb(hidden, into, size), plan.index)

    def _unmerge(self, block: nn.Module, args: tuple, hidden: Tensor) -> Tensor | None:
        """After the last block: every patch gets the features of its group."""
        if (record := self.record()) is None or record["size"].shape == record["source"].shape:
            return None
        return compact.gather(hidden, record["source"])


def _mark(number: Tensor) -> Tensor:
    """A fixed draw from [0, 1) for the number of each group: int64 to float32, of the same shape.

    A visual token may be a mean of several patches. Of patches of one group it has the number and its mark; the mean
    numbers of several groups may be that of another group, but their mean marks are not its mark.
    """
    return (number % 65521) ** 3 % 65521 * 40503 % 65521 / 65521


def _visible(tower: Tower, crops: int, patches: int) -> Tensor:
    """(crops, patches) bool: the patches that any visual token is made of; unpadding cuts the others away.

    Packing is linear with weights that are not negative, so those are where the sum of all tokens has a slope.
    """
    with torch.inference_mode(False), torch.enable_grad():
        values = torch.zeros(crops, patches, 1, requires_grad=True)
        total = torch.stack([tokens.sum() for tokens in tower.adapter.pack(values, tower.call)]).sum()
        return torch.autograd.grad(total, values)[0][..., 0] > 0
