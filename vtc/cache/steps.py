"""What a step reads of the visual tokens that lie apart in a cache, where it chooses anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import vtc.cache.held as held
from vtc.cache.parted_layer import PartedLayer
from vtc.choice import Seen
from vtc.core.columns import Columns
from vtc.core.shared import Shared
from vtc.need import Need
from vtc.stage import Cache, Stage
from vtc.trace import Reads

See = Callable[[Need], Tensor]
"""What a step shows, once the queries of the layer are there."""


def handed(
    stages: Iterable[Stage], layer: int, cache: Any, now: Columns, see: See, reads: Reads, shared: Shared
) -> Columns:
    """What the kernel of a layer is handed of the columns `now`: all of them; or, where a stage chooses and leaves
    anything, what it will have chosen when the layer takes in its keys."""
    own = [stage for stage in stages if stage.when == "decode" and stage.site == Cache(layer)]
    if not own or (parted := held.parted(cache, layer)) is None or parted.most >= parted.apart:
        return now
    place = now.among(0, parted.apart).place
    parted.choose = lambda: _chosen(own[0], layer, parted, place, see, reads)
    return shared(_columns, now, parted.apart, parted.most, None if parted.even else parted.number)


def _columns(now: Columns, apart: int, most: int, number: Tensor | None) -> Columns:
    """Of the columns `now`, where `most` of the first `apart` are read, or of each row `number`.

    All of those are in sight, so it does not matter which they are: they stand as the first column.
    """
    read = now.place.new_zeros(len(now.place), most)
    if number is not None:
        read = read.masked_fill(torch.arange(most, device=read.device) >= number.to(read.device)[:, None], -1)
    return Columns(read, number is not None, False).then(now.among(apart))


@torch.no_grad()
def _chosen(stage: Stage, layer: int, parted: PartedLayer, place: Tensor, see: See, reads: Reads) -> Tensor:
    """The visual tokens that a step reads: (batch, most), among those that lie apart, whose columns are `place`."""
    device, alike = parted.number.device, None
    place = place.to(device)
    with torch.autocast(device.type, enabled=False):
        rows = {need: see(need) for need in stage.needs}
        seen = Seen(rows, place >= 0, torch.arange(place.shape[1], device=device).expand_as(place), ())
        keep = stage.select(stage.score(seen), seen, parted.number).keep
    chosen = (~keep).long().argsort(dim=1, stable=True)[:, : parted.most]
    if stage.reuse is not None:
        need, least = stage.reuse
        chosen, alike = parted.settled(rows[need][..., 0], chosen, least)
    filling = torch.arange(parted.most, device=device) >= parted.number[:, None]
    reads.note(layer, place.gather(1, chosen).masked_fill(filling, -1), alike)
    return chosen
