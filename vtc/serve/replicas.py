"""`vtc serve` as a deployment of Ray Serve: serve run vtc.serve.replicas:application model=reference replicas=2

Each replica is one `Server` with a model of its own; Ray starts, balances, restarts and scales them, on all machines of
its cluster.
"""

from __future__ import annotations

from typing import Any

from vtc.budget import check_budget
from vtc.serve.app import Server
from vtc.serve.gate import Gate
from vtc.serve.limits import Limits
from vtc.stage import Budget

CHOICES = ("model", "name", "method", "budget", "replicas", "device", "waiting")


class Replica:
    """One model and its engine."""

    def __init__(self, model: str, name: str, method: str, budget: Budget, device: str, waiting: int):
        from vtc.eval.reader import load, model_path, pick_device

        reader = load(model_path(model), pick_device(device))
        chosen, limits = None if method == "none" else method, Limits(waiting=waiting)
        self.server = Server(reader.model, reader.processor, name, chosen, (budget,), limits)
        self.server.start()

    def __serve_build_asgi_app__(self) -> Gate:
        return self.server.app

    def check_health(self) -> None:
        """Ray replaces a replica that raises."""
        if (error := self.server.engine.background_thread_status.fatal_error) is not None:
            raise RuntimeError(f"the engine has died: {error}")

    def __del__(self) -> None:
        if hasattr(self, "server"):
            self.server.stop()


def budget_of(given: str | float) -> Budget:
    """Of an argument, which is a number in a config file without quotation marks: "0.25", 0.25 or 64.

    Raises ValueError for what is no budget.
    """
    try:
        budget = int(given) if str(given).isdecimal() else float(str(given))
        check_budget(budget)
    except ValueError:
        raise ValueError(f"budget: {given!r}; name a fraction like 0.25, or a number of tokens like 64") from None
    return budget


def application(given: dict[str, Any]) -> Any:
    """What `serve run` and a config file of Ray Serve name; `replicas` is a number, or "auto" for autoscaling.

    Raises ValueError for a name that is none of `CHOICES`, and as `budget_of`.
    """
    if unknown := [name for name in given if name not in CHOICES]:
        raise ValueError(f"unknown {', '.join(unknown)}; there are {', '.join(CHOICES)}")
    model, waiting = given.get("model", "reference"), int(given.get("waiting", 64))
    replicas, budget = given.get("replicas", "1"), budget_of(given.get("budget", 0.25))
    from ray import serve

    deployment: Any = serve.deployment(serve.ingress(None)(Replica))
    deployment = deployment.options(
        name="vtc",
        num_replicas="auto" if replicas == "auto" else int(replicas),
        max_ongoing_requests=waiting,
        health_check_period_s=2,
    )
    return deployment.bind(
        model=model,
        name=given.get("name", model),
        method=given.get("method", "vtc-cls"),
        budget=budget,
        device=given.get("device", "auto"),
        waiting=waiting,
    )
