"""Before a request is read: how many there are, how large it is, and whether its client is still there."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from contextlib import ExitStack
from typing import Any

from vtc.serve.limits import Limits
from vtc.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]


class Gate:
    """ASGI around the application. A client that goes away ends its request wherever that is."""

    def __init__(
        self, app: Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]], limits: Limits, metrics: Metrics
    ):
        self.app, self.limits, self.metrics = app, limits, metrics
        self.inside = 0
        """Requests that are read, wait, or are answered."""
        self.usual = 1.0
        """Seconds that a request took lately."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        if self.inside >= self.limits.waiting:
            seconds = str(max(1, math.ceil(self.usual)))
            why = f"{self.inside} requests are waiting: try again in {seconds} s"
            return await self._refuse(send, 429, why, ("retry-after", seconds))
        with self._place() as place:
            await self._answer(scope, receive, _leaving(place, send))
        return None

    def _place(self) -> ExitStack:
        """A request's, until it is closed."""
        start, place = time.monotonic(), ExitStack()

        def left() -> None:
            self.inside -= 1
            self.usual += 0.1 * (time.monotonic() - start - self.usual)

        self.inside += 1
        place.callback(left)
        return place

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self.limits.seconds):
                body = await self._body(receive)
        except TimeoutError:
            return await self._refuse(send, 408, f"the request was not here after {self.limits.seconds:g} s")
        if body is None:
            return None
        if len(body) > self.limits.body:
            return await self._refuse(send, 413, f"the request has more than {self.limits.body} bytes")
        whole = asyncio.create_task(self.app(scope, _replay(bytes(body)), self._counted(send)))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not whole.done():
                whole.cancel()
            await asyncio.gather(whole, gone, return_exceptions=True)
        if not whole.cancelled() and (error := whole.exception()) is not None:
            raise error
        return None

    async def _body(self, receive: Receive) -> bytearray | None:
        """All of it, or a little more than is allowed; None where the client left before it was here."""
        body = bytearray()
        while len(body) <= self.limits.body:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        return body

    def _counted(self, send: Send) -> Send:
        async def counted(message: Scope) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(message["status"]).inc()
            await send(message)

        return counted

    async def _refuse(self, send: Send, status: int, why: str, *headers: tuple[str, str]) -> None:
        send = self._counted(send)
        given = [(b"content-type", b"application/json"), (b"connection", b"close")]
        given += [(name.encode(), value.encode()) for name, value in headers]
        await send({"type": "http.response.start", "status": status, "headers": given})
        await send({"type": "http.response.body", "body": json.dumps(problem(status, why)).encode()})


def problem(status: int, why: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    why = why.encode(errors="backslashreplace").decode()  # it may name what the client sent
    kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
    return {"error": {"message": why, "type": kind, "param": None, "code": status}}


def _leaving(place: ExitStack, send: Send) -> Send:
    """A client that has its whole answer finds its place free: it is given back before the last part goes out."""

    async def leaving(message: Scope) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            place.close()
        await send(message)

    return leaving


def _replay(body: bytes) -> Receive:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Scope:
        if messages:
            return messages.pop()
        await asyncio.Future()  # whether the client is gone is watched outside
        raise AssertionError

    return receive


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
