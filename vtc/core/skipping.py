"""Blocks of the vision tower that nobody reads are not run: LLaVA, for one, leaves out the last block of CLIP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from vtc.adapter import Adapter
from vtc.core.patch import Patch, around

skipping: ContextVar[bool] = ContextVar("vtc_skipping", default=False)
"""Whether the running call of the tower leaves them out."""


def skippable(adapter: Adapter) -> list[Patch]:
    """Let the tower's unread blocks hand their input on while `skipped`."""
    return [Patch(block, "forward", around(block.forward, _run)) for block in adapter.unread_blocks({})]


@contextmanager
def skipped(adapter: Adapter, call: dict[str, Any]) -> Iterator[bool]:
    """For one call of the encoder with these arguments; yields whether any block is left out."""
    skips = len(adapter.unread_blocks(call)) > 0
    token = skipping.set(skips)
    try:
        yield skips
    finally:
        skipping.reset(token)


def _run(forward: Callable[..., Tensor], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden if skipping.get() else forward(hidden, *args, **kwargs)
