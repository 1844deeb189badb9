"""Requests that share no batch: `generate()` of the wrapped model, one after the other."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch
from torch import Tensor

from vtc.serve.ticket import Ticket
from vtc.wrapping import compressed


class Solo:
    """A model for one request: compressed while it generates, and silent once its client is gone."""

    def __init__(self, model: Any, ticket: Ticket):
        self.model, self.ticket = model, ticket
        self.gone = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(self, **inputs: Any) -> Tensor:
        if self.gone.is_set():
            raise RuntimeError("the client is gone")
        with compressed(self.model, *self.ticket.spend) as trace:

            def gone(ids: Tensor, scores: Any, **_: Any) -> Tensor:
                if self.ticket.first is None:
                    self.ticket.first = time.perf_counter()
                    self.ticket.before, self.ticket.after = sum(trace.sizes), float(trace.average_tokens.sum())
                return torch.full((len(ids),), self.gone.is_set(), device=ids.device)

            output: Tensor = self.model.generate(**inputs, stopping_criteria=[gone])
        return output
