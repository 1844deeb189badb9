"""Requests that share no batch: `generate()` of the wrapped model, one after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtc.serve.ticket import Ticket
from vtc.wrapping import compressed


class Solo:
    """A model for one request: compressed while it generates, silent after a stop string or once its client is gone."""

    def __init__(self, model: Any, ticket: Ticket, decode: Callable[..., str], inputs: dict[str, Any]):
        self.model, self.ticket, self.decode, self.inputs = model, ticket, decode, inputs
        self.gone = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def leave(self) -> None:
        """The client is gone: what it has sent is not kept until its turn comes."""
        self.gone.set()
        self.inputs = {}

    def generate(self, **options: Any) -> Tensor:
        """`options` are those of the call, with the ids."""
        inputs = self.inputs | options
        if self.gone.is_set():
            raise RuntimeError("the client is gone")
        prompt, stops = inputs["input_ids"].shape[1], self.ticket.stops
        longest = prompt + inputs["generation_config"].max_new_tokens
        with compressed(self.model, *self.ticket.spend) as trace:

            def over(ids: Tensor, scores: Any, **_: Any) -> Tensor:
                if self.ticket.first is None:
                    self.ticket.first = time.perf_counter()
                    self.ticket.before, self.ticket.after = sum(trace.sizes), float(trace.average_tokens.sum())
                if ids.shape[1] == longest:  # an answer that ends before is known to have ended
                    self.ticket.ended = int(ids[0, -1]) in self.ticket.ends
                ends = self.gone.is_set()
                if stops.strings:
                    ends |= stops.met(self.decode(ids[0, prompt:], skip_special_tokens=True))
                return torch.full((len(ids),), ends, device=ids.device)

            output: Tensor = self.model.generate(**inputs, stopping_criteria=[over])
        return output
