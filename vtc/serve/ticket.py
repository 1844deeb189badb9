"""A request's id, and what its reply tells about it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from openai.types.completion_usage import CompletionUsage

from vtc.serve.encode import Spend
from vtc.serve.stops import Stops


class Ticket(str):
    """An id that no other client can know or take, as it goes through the engine and back."""

    spend: Spend
    prompt_tokens: int
    """Of the unpruned prompt."""
    packed: bool
    before: float
    """Visual tokens of the prompt."""
    after: float
    """Those that a decoder layer read of them, averaged over the layers."""
    first: float | None
    """When the first token was there."""
    stops: Stops
    ends: Sequence[int]
    """Ids with which the model ends an answer."""
    ended: bool
    """Whether it has done so, be it with the last token that it may say."""
    counted: bool
    """Whether its reply tells its usage."""

    def __new__(cls) -> Ticket:
        ticket = super().__new__(cls, f"chatcmpl-{uuid.uuid4().hex}")
        ticket.ends, ticket.ended = (), False
        ticket.start, ticket.first, ticket.stops, ticket.counted = time.perf_counter(), None, Stops(), True
        return ticket

    start: float

    def usage(self, usage: CompletionUsage) -> CompletionUsage:
        """With the unpruned prompt's length, and the visual tokens before and after."""
        method, budget = self.spend
        told: dict[str, Any] = {"method": method if isinstance(method, str) else method.name, "budget": budget}
        told |= {"visual_tokens_before": self.before, "visual_tokens_after": self.after, "packed": self.packed}
        counts = {"prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens + usage.completion_tokens}
        return CompletionUsage.model_validate({**usage.model_dump(), **counts, "vtc": told})
