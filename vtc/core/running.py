"""The call that runs in this context, and what the hooks on the decoder tell it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from vtc.core.call import Call
from vtc.core.forward import Forward
from vtc.need import recording

running: ContextVar[Call | Forward | None] = ContextVar("vtc_running", default=None)
"""The call of the backbone that runs, and once its decoder runs, the forward."""


def forget() -> None:
    """No call runs in this context; one that was interrupted within a graph may have left itself behind."""
    running.set(None)
    recording.set(None)


def enter_decoder(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    if not isinstance(call := running.get(), Call):
        return None
    forward = Forward.of(call, kwargs)
    running.set(forward)
    kwargs = forward.enter_decoder(kwargs)
    recording.set(call.record or None)
    return args, kwargs


def leave_decoder(decoder: nn.Module, args: tuple, outputs: Any) -> None:
    if isinstance(forward := running.get(), Forward):
        recording.set(None)
        forward.leave_decoder(outputs)


def enter_layer(number: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    if not isinstance(forward := running.get(), Forward) or not forward.busy:
        return None
    hidden, kwargs = forward.before_layer(number, args[0], kwargs)
    return (hidden, *args[1:]), kwargs


def leave_layer(number: int, layer: nn.Module, args: tuple, output: Tensor) -> None:
    if isinstance(forward := running.get(), Forward) and forward.busy:
        forward.after_layer(number, output)
