"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vtc.serve.ticket import Ticket

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        here: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("vtc_requests", "Requests that got a reply, by HTTP status", ["status"], **here)
        self.visual = Counter("vtc_visual_tokens", "Visual tokens of whole answers", ["when"], **here)
        self.new = Counter("vtc_new_tokens", "Tokens of whole answers", **here)
        self.first = Histogram("vtc_first_token_seconds", "From request to first token", buckets=SECONDS, **here)

    def answered(self, ticket: Ticket, tokens: int) -> None:
        """An answer of so many tokens is whole."""
        self.new.inc(tokens)
        self.visual.labels("before").inc(ticket.before)
        self.visual.labels("after").inc(ticket.after)
        if ticket.first is not None:
            self.first.observe(ticket.first - ticket.start)

    def watch(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A gauge that is read when somebody looks."""
        Gauge(name, about, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)
