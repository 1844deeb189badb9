"""The application: transformers' own server around one model, with a gate before it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import CBWorkerDeadError

from vtc.core.compression import Compression
from vtc.methods.compose import with_budget
from vtc.serve.chat import Chat
from vtc.serve.encode import NOTHING, Spend
from vtc.serve.engine import Engine, Packed, State, batching
from vtc.serve.gate import Gate, problem
from vtc.serve.limits import Limits, Sizes
from vtc.serve.memory import Memory
from vtc.serve.metrics import Metrics
from vtc.serve.reading import Reading
from vtc.serve.tower import Tower
from vtc.stage import Budget, Method

ROUTES = ("/v1/chat/completions", "/v1/models", "/health")
"""What of transformers' server is served: the others load any model, or unload this one."""


class Models(ModelManager):
    """The one model that is served."""

    def __init__(self, name: str):
        super().__init__(model_timeout=-1)
        self.force_model = name

    def get_gen_models(self) -> list[dict]:  # type: ignore[override]
        return [{"id": self.force_model, "object": "model", "owned_by": "vtc", "created": 0}]


class Server:
    """One model behind the OpenAI API. `app` is its ASGI application; `start` before it is asked, `stop` at the end."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str,
        method: str | Method | None = "vtc-cls",
        budgets: Sequence[Budget | None] | None = None,
        limits: Limits | None = None,
        sizes: Sizes | None = None,
    ):
        """A server that is not started.

        Args:
            method: of requests that name none; None: all visual tokens stay.
            budgets: of those requests; with several, later ones as more requests wait. None: what the method's JSON
                file says, or a quarter.

        Raises ValueError for a method, or BudgetError for a budget, that cannot be on this model.
        """
        limits, sizes = limits or Limits(), sizes or Sizes()
        if method is not None and budgets is None:
            own = with_budget(method)[1]
            budgets = (0.25 if own is None else own,)
        self.spends: list[Spend] = [NOTHING] if method is None else [(method, budget) for budget in budgets or ()]
        for method, budget in self.spends:
            Compression(model, with_budget(method)[0], budget)
        memory, self.metrics = Memory(model, sizes.remembered), Metrics()
        self.tower = Tower(model, processor, memory, sizes.tower)
        self.engine = Engine(model, memory, batching(sizes))
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", sizes.cache)
        held = sizes.cache // sizes.page * sizes.page  # the engine has whole blocks
        reading = Reading(model, processor, self.tower, limits, min(held, longest))
        self.chat = Chat(Models(name), State(Packed(self.engine)), reading, self.metrics)
        self.chat.default = self.spend
        self.app = Gate(_application(self.chat), limits, self.metrics)
        self.metrics.watch("vtc_requests_inside", "Requests that wait or are answered", lambda: self.app.inside)
        self.metrics.watch("vtc_blocks_in_use", "Blocks of the KV cache that requests hold", self.engine.blocks_in_use)
        self.metrics.watch("vtc_visual_tokens_remembered", "Of images that may come again", lambda: memory.used)

    def spend(self) -> Spend:
        """Method and budget at this load: the list of budgets is spread over the bound of waiting requests."""
        level = (self.app.inside - 1) * len(self.spends) // self.app.limits.waiting
        return self.spends[max(0, min(level, len(self.spends) - 1))]

    def start(self) -> None:
        self.tower.start()
        self.engine.start()

    def stop(self) -> None:
        self.engine.stop(timeout=10, hard_stop=True)
        self.tower.stop()

    async def serve(self, host: str, port: int) -> None:
        """Until the process is told to stop. Raises RuntimeError where the engine dies: requests get 503 till then."""
        config = uvicorn.Config(self.app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not serving.done() and (error := self.engine.background_thread_status.fatal_error) is None:
            await asyncio.wait((serving,), timeout=0.5)
        if serving.done():
            return serving.result()
        server.should_exit = True
        await serving
        raise RuntimeError(f"the engine has died: {error}")


def _application(chat: Chat) -> FastAPI:
    """Transformers' application without the routes that are not for clients, with errors as OpenAI's."""
    other: Any = None
    app = build_server(chat.model_manager, chat, other, other, other, other, chat.generation_state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(chat.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(problem(error.status_code, error.detail), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def unreadable(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(problem(400, "the request is no JSON object"), 400)

    @app.exception_handler(CBWorkerDeadError)
    async def dead(_: Request, error: CBWorkerDeadError) -> JSONResponse:
        return JSONResponse(problem(503, str(error)), 503)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(problem(500, "the server failed at this request; its log says why"), 500)

    return app
