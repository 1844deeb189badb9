"""An image before the decoder: through the vision tower, and pruned by the wrapped model's own machinery."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from vtc.adapter import Adapter
from vtc.core.forward import Forward
from vtc.core.running import running
from vtc.stage import Budget, Method
from vtc.wrapping import compressed

Spend = tuple[str | Method, Budget | None]
"""A method and its budget."""
NOTHING: Spend = ("uniform", 1.0)
"""The full model: all visual tokens stay."""


class Alone(Exception):
    """These requests cannot share a batch with others; says why."""


class _Entered(Exception):
    """The decoder is about to run, and is not wanted."""


entering: ContextVar[dict[str, Any] | None] = ContextVar("vtc_entering", default=None)
"""Where a running `prune` waits for what enters the decoder. Other threads may run the same model meanwhile."""


@dataclass(frozen=True)
class Pruned:
    """What the decoder is to read of an image."""

    expansion: list[int]
    """The ids that stand for the image in a prompt, with a placeholder for each visual token."""
    index: list[int]
    """Which placeholders stayed, ascending."""
    tokens: int
    """Placeholders, that is visual tokens before pruning."""
    rows: Tensor
    """(kept, width)."""
    renumbered: bool
    """Whether the method renumbers survivors without gaps."""


@torch.no_grad()
def prune(model: Any, adapter: Adapter, processor: Any, images: Sequence[Image], spend: Spend) -> list[Pruned]:
    """All images through the tower together, and pruned.

    Raises Alone where what the decoder reads is not rows at positions alone, ValueError for a method or a budget that
    cannot be.
    """
    if spend[1] == 0:
        raise Alone("an image of which nothing is left has no place in a packed prompt")
    token = processor.tokenizer.convert_ids_to_tokens(adapter.image_token_id)
    each, text = [[image] for image in images], [token] * len(images)
    batch = processor(images=each, text=text, add_special_tokens=False, padding=True, return_tensors="pt")
    inputs = dict(batch.to(model.device, dtype=model.dtype))
    decoder: nn.Module = adapter.decoder
    with compressed(model, *spend):
        handle = decoder.register_forward_pre_hook(_stop, with_kwargs=True)  # behind that of vtc
        waiting = entering.set({})
        try:
            model(**inputs, use_cache=False)
        except _Entered:
            pass
        finally:
            entered = entering.get() or {}
            entering.reset(waiting)
            handle.remove()
    return _pruned(adapter, inputs, entered["forward"], entered["kwargs"])


def _stop(decoder: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
    # torch hangs a hook first and notes that it takes kwargs then: another thread's call may come between
    if (entered := entering.get()) is not None:
        entered.update(forward=running.get(), kwargs=kwargs)
        raise _Entered


def _pruned(adapter: Adapter, inputs: dict[str, Any], forward: Forward, kwargs: dict[str, Any]) -> list[Pruned]:
    _check(adapter, forward, kwargs)
    ids, embeds, columns = inputs["input_ids"], kwargs["inputs_embeds"], forward.stream.columns.place
    visual = ids == adapter.image_token_id
    number = visual.long().cumsum(1) - 1
    renumbered = any(stage.contiguous for stage in forward.compression.stages)
    result = []
    for row, real in enumerate(inputs["attention_mask"].bool()):
        left = columns[row][columns[row] >= 0]
        stays = visual[row, left]
        rows = embeds[row][columns[row] >= 0][stays]
        index, tokens = number[row, left[stays]].tolist(), int(visual[row].sum())
        result.append(Pruned(ids[row][real].tolist(), index, tokens, rows, renumbered))
    return result


def _check(adapter: Adapter, forward: Forward, kwargs: dict[str, Any]) -> None:
    """Raise Alone where rows at positions are not all that the decoder reads."""
    method, positions = forward.compression.method.name, kwargs.get("position_ids")
    if any(stage.site != 0 for stage in forward.compression.stages):
        raise Alone(f"{method} drops inside the decoder, where a packed batch has one length for all layers")
    if forward.compression.reads_text:
        raise Alone(f"{method} chooses by the question, and here an image is pruned once for all questions")
    if forward.stream.columns.weight is not None:
        raise Alone(f"{method} weighs merged tokens, and kernels for packed batches know no weights")
    if positions is not None and positions.ndim == 3:
        raise Alone("this model's positions are in time, height and width, and those of a packed batch in one axis")
    if any(adapter.window(layer) is not None for layer in adapter.layers):
        raise Alone("this model's sliding windows count original positions, and those of a packed batch keys")
    if adapter.blocks(forward.call.inputs) is not None:
        raise Alone("this model's images see themselves both ways, and a packed batch is causal")
    if forward.call.late or adapter.late_features(kwargs)[1]:
        raise Alone("this model adds visual features after its first layers")
