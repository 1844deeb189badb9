"""The gate of `vtc serve`: how many are inside, who leaves, what does not come, an engine that dies."""

import asyncio

import httpx
import pytest
from serve_fixtures import (
    QUESTIONS,
    free_port,
    get,
    in_a_loop,
    picture,
    post,
    request,
    serving,
)

from vtc.serve.gate import Gate
from vtc.serve.limits import Limits
from vtc.serve.metrics import Metrics


def test_one_more_is_told_when_to_come_again():
    async def slow(scope, receive, send):
        await asyncio.sleep(0.3)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def run() -> list[httpx.Response]:
        gate = Gate(slow, Limits(waiting=2), Metrics())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=gate), base_url="http://x") as client:
            replies = await asyncio.gather(*(client.post("/") for _ in range(5)))
        assert gate.inside == 0
        return replies

    replies = in_a_loop(run())
    assert sorted(reply.status_code for reply in replies) == [200, 200, 429, 429, 429]
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"


def test_who_has_the_whole_answer_finds_a_place():
    """The last part and nothing before it gives the place back: a client sends its next request upon it."""
    inside = []

    async def streams(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def run() -> None:
        gate, messages = Gate(streams, Limits(waiting=1), Metrics()), asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": b"{}"})

        async def send(_):
            inside.append(gate.inside)

        await gate({"type": "http", "method": "POST"}, messages.get, send)
        assert gate.inside == 0

    in_a_loop(run())
    assert inside == [1, 1, 0]


def test_a_client_that_goes_ends_its_request():
    ended = []

    async def endless(scope, receive, send):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def run() -> None:
        gate, messages = Gate(endless, Limits(), Metrics()), asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": b"{}"})
        asyncio.get_running_loop().call_later(0.1, messages.put_nowait, {"type": "http.disconnect"})
        await asyncio.wait_for(gate({"type": "http", "method": "POST"}, messages.get, None), 5)
        assert gate.inside == 0

    in_a_loop(run())
    assert ended == [True]


def test_a_body_that_does_not_come_is_given_up():
    async def run() -> list[dict]:
        gate, sent = Gate(None, Limits(seconds=0.1), Metrics()), []

        async def send(message):
            sent.append(message)

        await gate({"type": "http", "method": "POST"}, asyncio.Queue().get, send)
        return sent

    assert in_a_loop(run())[0]["status"] == 408


def test_a_dead_engine_is_told_and_ends_the_server(monkeypatch):
    with serving() as server:
        post(server, request(QUESTIONS[0], picture(0)))

        def broken(*args, **kwargs):
            raise MemoryError("no room on this device")

        monkeypatch.setattr(server.engine.batch_processor, "_generation_step", broken)
        first, second = (post(server, request(QUESTIONS[0], picture(0), stream=stream))[0] for stream in (False, True))
        assert (first.status_code, second.status_code) == (503, 503)
        assert "no room on this device" in first.json()["error"]["message"]
        assert get(server, "/health").status_code == 503
        with pytest.raises(RuntimeError, match="the engine has died: no room on this device"):
            in_a_loop(asyncio.wait_for(server.serve("127.0.0.1", free_port()), 20))
