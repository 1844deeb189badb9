"""Merging patches inside the vision tower, between its blocks: so the tower itself computes less.

Token merging (arXiv 2210.09461): a patch joins the one whose keys are most like its own, and as a key it then counts as
many times as it has patches. What the projector reads has its full length again, every patch with the features of its
group; which patch stands for a group is known from the sizes, and the others leave at the encoder site.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtc import compact, merge
from vtc.adapter import Adapter
from vtc.observe import Need, Tower, recording


def matches(key: Tensor, count: int, protected: int) -> Tensor:
    """Bipartite soft matching: the token that takes in each one, itself where it stays: (crops, length) int64.

    Every other token, from the first on, may join the most similar one of the rest; the `count` most similar pairs do.
    The first `protected` tokens (0 or 1) stay alone. `key` (crops, length, head_dim) is the mean over heads.
    """
    key = torch.nn.functional.normalize(key.float(), dim=-1)
    similarity = key[:, ::2] @ key[:, 1::2].transpose(1, 2)
    similarity[:, :protected] = -math.inf
    best, partner = similarity.max(-1)
    joins = best.argsort(dim=1, descending=True, stable=True)[:, :count]
    into = torch.arange(key.shape[1], device=key.device).repeat(len(key), 1)
    return into.scatter(1, 2 * joins, 2 * partner.gather(1, joins) + 1)


@dataclass(frozen=True)
class MergedPatches(Need):
    """Merges a tower's patches until `share` of them is left before block `layer`, the last that the projector reads.

    The row is how many patches each one stands for, 0 where another one does, and the number of its group, counted from
    1 over all crops: (crops, 2, patches). Every block before merges equally many, half of its patches at most. ToMe
    merges between a block's attention and its feed-forward; here it is after both, on the same keys, so that no
    block's code has to be copied.
    """

    share: float

    tower: ClassVar[bool] = True

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

    def hooks(self, adapter: Adapter) -> list[torch.utils.hooks.RemovableHandle]:
        handles = []
        for number, block in enumerate(adapter.tower_blocks()):
            handles.append(block.register_forward_pre_hook(self._weigh))
            if number == self.layer:  # before any hook that reads the block's output
                handles.append(block.register_forward_hook(self._unmerge, prepend=True))
            else:
                after = functools.partial(self._merge, number, adapter)
                handles += [
                    adapter.tower_attention(block).key.register_forward_hook(self._keep_key),
                    block.register_forward_hook(after, prepend=True),
                ]
        return handles

    def row(self, record: dict[str, Any], tower: Tower) -> Tensor:
        source, size = record["source"], record["size"]
        place = torch.arange(source.shape[1], device=source.device).expand_as(source)
        first = torch.full_like(size, source.shape[1], dtype=torch.long).scatter_reduce(1, source, place, "amin")
        sizes = torch.zeros(source.shape, device=size.device).scatter(1, first, size)
        number = source + 1 + source.shape[1] * torch.arange(len(source), device=source.device)[:, None]
        return torch.stack((sizes, number.to(sizes.dtype)), dim=1)[:, :, tower.adapter.has_cls() :]

    def _record(self) -> dict[str, Any] | None:
        return None if (record := recording.get()) is None else record.setdefault(self, {})

    def _weigh(self, block: nn.Module, args: tuple) -> tuple | None:
        """Before a block: each key counts as many times as it has patches."""
        if (record := self._record()) is None:
            return None
        hidden, _, *rest = args
        if "size" not in record:
            record["size"] = torch.ones(hidden.shape[:2], device=hidden.device)
            record["source"] = torch.arange(hidden.shape[1], device=hidden.device).repeat(len(hidden), 1)
        if record["size"].shape == record["source"].shape:
            return None
        return hidden, record["size"].log()[:, None, None].to(hidden.dtype), *rest

    def _keep_key(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if (record := self._record()) is not None:
            record["key"] = output

    def _merge(self, number: int, adapter: Adapter, block: nn.Module, args: tuple, hidden: Tensor) -> Tensor | None:
        """After a block: its share of what there is to merge."""
        if (record := self._record()) is None:
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
        if (record := self._record()) is None or record["size"].shape == record["source"].shape:
            return None
        return compact.gather(hidden, record["source"])
