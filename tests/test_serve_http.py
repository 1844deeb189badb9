"""The server: replies as OpenAI's, bounds that hold, clients that go away, a worker that dies."""

import asyncio
import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
import torch
from openai import BadRequestError, OpenAI
from PIL import Image, ImageFile
from serve_fixtures import (
    NAME,
    NEW,
    QUESTIONS,
    SIZES,
    alone,
    chat,
    data_url,
    get,
    in_a_loop,
    picture,
    post,
    request,
    serving,
    soon,
    tiny,
)
from test_readme import SERVED, blocks
from transformers.cli.serving.utils import CBStreamer

from vtc.serve.alone import Solo
from vtc.serve.encode import NOTHING, Pruned
from vtc.serve.gate import Gate
from vtc.serve.images import images
from vtc.serve.limits import Limits
from vtc.serve.metrics import Metrics
from vtc.serve.request import read
from vtc.serve.stops import Stops

QUARTER = ("vtc-cls", 0.25)


@pytest.fixture(scope="module")
def served():
    with serving(Limits(body=100_000, pixels=10_000, images=2, new_tokens=20, waiting=30)) as server:
        yield server


def spoken(question: str, spend, *seen: Image.Image) -> str:
    """The answer of generate(), as text."""
    processor = tiny()[1]
    text = processor.apply_chat_template(chat(question, len(seen)), add_generation_prompt=True)
    return processor.decode(alone(text, seen, spend), skip_special_tokens=True)


def content(reply: httpx.Response) -> str:
    """Of a reply, whole or in chunks."""
    assert reply.status_code == 200, reply.text
    if not reply.headers["content-type"].startswith("text/event-stream"):
        return reply.json()["choices"][0]["message"]["content"]
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    deltas = [choice["delta"] for line in lines[:-1] for choice in json.loads(line)["choices"]]
    return "".join(delta.get("content", "") for delta in deltas)


# -- answers ------------------------------------------------------------------------------------------------------


def test_replies_are_those_of_generate(served):
    """At once: packed and alone, streamed and whole, several budgets, several images, none."""
    asked = [
        (QUESTIONS[0], QUARTER, [picture(0)], {}),
        (QUESTIONS[0], QUARTER, [picture(0)], {"stream": True}),
        (QUESTIONS[1], ("vtc-cls", 5), [picture(1)], {"vtc": {"budget": 5}}),
        (QUESTIONS[1], ("tome", 0.5), [picture(2)], {"vtc": {"method": "tome", "budget": 0.5}, "stream": True}),
        (QUESTIONS[2], NOTHING, [picture(3), picture(4)], {"vtc": {"method": "none"}}),
        (QUESTIONS[2], ("fastv", 0.5), [picture(5)], {"vtc": {"method": "fastv", "budget": 0.5}}),
        (QUESTIONS[2], ("fastv", 0.5), [picture(6)], {"vtc": {"method": "fastv", "budget": 0.5}, "stream": True}),
        (QUESTIONS[2], ("coverpruner", 0.25), [picture(7)], {"vtc": {"method": "coverpruner", "budget": 0.25}}),
        (QUESTIONS[0], QUARTER, [], {}),
    ]
    replies = post(served, *(request(question, *seen, **more) for question, _, seen, more in asked))
    assert [*map(content, replies)] == [spoken(question, spend, *seen) for question, spend, seen, _ in asked]


def test_a_reply_tells_what_it_cost(served):
    packed, alone_ = post(
        served,
        request(QUESTIONS[0], picture(0), picture(1)),
        request(QUESTIONS[0], picture(0), vtc={"method": "fastv", "budget": 0.5}),
    )
    told = packed.json()["usage"]
    assert told["vtc"] == {
        "method": "vtc-cls", "budget": 0.25, "visual_tokens_before": 72, "visual_tokens_after": 18, "packed": True
    }  # fmt: skip
    assert told["completion_tokens"] == NEW
    assert told["prompt_tokens"] == told["total_tokens"] - NEW > 72
    fastv = alone_.json()["usage"]["vtc"]
    assert (fastv["visual_tokens_before"], fastv["packed"]) == (36, False)
    assert 17 <= fastv["visual_tokens_after"] <= 18


def test_a_sampled_answer_is_alone(served):
    reply = post(served, request(QUESTIONS[0], picture(0), temperature=0.7, top_p=0.9))[0].json()
    assert reply["usage"]["vtc"]["packed"] is False


def test_a_temperature_that_is_all_but_nothing_is_greedy(served):
    """Packed, and alone where something else asks for that."""
    asked = [request(QUESTIONS[0], picture(0), temperature=1e-40, **more) for more in ({}, {"top_p": 0.9})]
    replies = post(served, *asked, request(QUESTIONS[0], picture(0), temperature=1e-3))
    assert [*map(content, replies[:2])] == [spoken(QUESTIONS[0], QUARTER, picture(0))] * 2
    assert [reply.json()["usage"]["vtc"]["packed"] for reply in replies] == [True, False, False]


def test_an_answer_ends_before_a_stop_string(served):
    """Whole and streamed, where it spans two tokens, and where it only begins."""
    answer = spoken(QUESTIONS[0], QUARTER, picture(0))
    first, second, *_, last = answer.split()
    stops = [second, f"{first} {second}", ["no such words", f"{first[-1]} {second[0]}"], f"{last} and more", []]
    asked = [request(QUESTIONS[0], picture(0), stop=stop, stream=stream) for stop in stops for stream in (False, True)]
    replies = post(served, *asked)
    cut = [answer.partition(stop)[0] for stop in (second, f"{first} {second}", f"{first[-1]} {second[0]}")]
    assert [*map(content, replies)] == [text for text in (*cut, answer, answer) for _ in (False, True)]
    assert len({*cut, answer}) == 4
    whole = [reply.json() for reply in replies[::2]]
    assert [reply["choices"][0]["finish_reason"] for reply in whole] == [*["stop"] * 3, *["length"] * 2]
    assert [reply["usage"]["completion_tokens"] < NEW for reply in whole] == [*[True] * 3, *[False] * 2]


def test_pieces_that_may_become_a_stop_string_wait():
    stops = Stops(["end", "and so"])
    assert [stops.tell(piece) for piece in ("a", " e", "n", "t", "r an", "d ", "s", "i en", "d.")] == [
        "", "a ", "", "ent", "r ", "", "", "and si ", ""
    ]  # fmt: skip
    assert stops.over
    assert [stops.tell(""), stops.tell("more", last=True)] == ["", ""]
    stops = Stops(["end"])
    assert [stops.tell("an en"), stops.tell("", last=True), stops.over] == ["an ", "en", False]


def test_a_budget_goes_down_with_the_load_and_up_again():
    with serving(Limits(waiting=9), budgets=(0.5, 0.25, 0.11)) as server:
        found = [server.spend()]
        for inside in (1, 3, 4, 6, 7, 9, 2):
            server.app.inside = inside
            found.append(server.spend())
        assert [budget for _, budget in found] == [0.5, 0.5, 0.5, 0.25, 0.25, 0.11, 0.11, 0.5]
        server.app.inside = 6
        told = post(server, request(QUESTIONS[0], picture(0)))[0].json()["usage"]["vtc"]
        assert (told["budget"], told["visual_tokens_after"]) == (0.11, 4)


# -- what is refused ----------------------------------------------------------------------------------------------


def png(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def damaged_exif(place: int, byte: int) -> str:
    """A picture that says how it is turned, with a byte of its tags changed."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif.update({0x010F: "maker", 0x0112: 6, 0x011A: 72.0})
    Image.new("L", (8, 8)).save(buffer, "JPEG", exif=exif)
    content = bytearray(buffer.getvalue())
    content[place] = byte
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def shows(*urls: str) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"model": "tiny", "messages": [{"role": "user", "content": parts}]}


BAD = {
    "no image": (400, shows("data:image/png;base64," + base64.b64encode(b"GIF? no").decode()), "not an image"),
    "no base64": (400, shows("data:image/png;base64,%%%"), "no base64"),
    "a damaged one": (400, shows(data_url(picture(0))[:-400]), "damaged|base64"),
    "damaged tags": (400, shows(damaged_exif(65, 0)), "a damaged image"),
    "tags of a wrong type": (400, shows(damaged_exif(67, 7)), "a damaged image"),
    "half a character": (400, json.dumps(request("a \ud800")).encode(), "no Unicode text: surrogates not allowed at 2"),
    "half a character for a name": (400, json.dumps(request("a") | {"\ud800": 1}).encode(), "a unicode string"),
    "half a character of kind": (400, json.dumps(shows("x")).replace("image_url", "\\ud800", 1).encode(), "."),
    "half a character to stop at": (400, json.dumps(request("a", stop="\udfff")).encode(), "stop.*[Uu]nicode"),
    "a bomb": (400, shows(png(9_000, 9_000)), "9000 x 9000 pixels"),
    "too many pixels together": (400, shows(png(90, 90), png(90, 90)), "1900 are left"),
    "a strip": (400, shows(png(3000, 1)), "3000 x 1 pixels: one side is over 200"),
    "a standing strip": (400, shows(png(1, 201)), "1 x 201 pixels: one side is over 200"),
    "too many images": (400, shows(*[png(1, 1)] * 3), "3 images"),
    "an address": (400, shows("http://127.0.0.1/x.png"), "fetches no URLs"),
    "a file": (400, shows("file:///etc/passwd"), "data URL"),
    "too large": (413, request("a" * 100_001), "more than 100000 bytes"),
    "no JSON": (400, b"{", "JSON object"),
    "no object": (400, b"[1]", "JSON object"),
    "deep": (400, b"[" * 50_000, "."),
    "no messages": (400, {"model": "tiny", "messages": []}, "messages"),
    "unknown role": (400, {"model": "tiny", "messages": [{"role": "tool", "content": "a"}]}, "role"),
    "another model": (404, request("a", model="other"), "'tiny'"),
    "unknown field": (400, request("a", logprobs=True), "logprobs"),
    "several answers": (400, request("a", n=2), "n: "),
    "unknown method": (400, request("a", vtc={"method": "nope"}), "unknown method 'nope'.*vtc-cls"),
    "a path for a method": (400, request("a", vtc={"method": "/etc/passwd"}), "unknown method"),
    "no budget": (400, request("a", picture(0), vtc={"method": "vtc-cls"}), "budget"),
    "unreachable budget": (400, request("a", picture(0), vtc={"method": "fastv", "budget": 0.01}), "range is"),
    "budget above all": (400, request("a", picture(0), vtc={"budget": 1.5}), "budget"),
    "a budget without bounds": (400, request("a", vtc={"budget": 10**400}), "less than or equal to 1000000"),
    "too long a stop string": (400, request("a", stop="a" * 65), "stop.*at most 64 characters"),
    "an empty stop string": (400, request("a", stop=[""]), "stop.*at least 1 character"),
    "too many stop strings": (400, request("a", stop=["a"] * 5), "stop.*at most 4"),
    "too long an answer": (400, request("a", max_tokens=21), "20 at most"),
    "too long a prompt": (400, request("a " * 1100), "this server holds 1024"),
    "a placeholder in text": (400, request("what is <image>", picture(0)), "<image> stands for an image"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_a_reason(served, case, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # lmms-eval sets it, where it was imported before
    status, body, why = BAD[case]
    (reply,) = post(served, body)
    assert reply.status_code == status, reply.text
    assert re.search(why, reply.json()["error"]["message"], re.DOTALL)


def test_the_server_lives_after_bad_input(served):
    post(served, *(body for _, body, _ in BAD.values()))
    assert content(post(served, request(QUESTIONS[0], picture(0)))[0]) == spoken(QUESTIONS[0], QUARTER, picture(0))
    assert soon(lambda: not served.engine.prompts and served.app.inside == 0)
    assert served.engine.blocks_in_use() == 0


def test_only_what_is_for_clients_is_served(served):
    assert get(served, "/v1/models").json()["data"][0]["id"] == "tiny"
    assert get(served, "/health").json() == {"status": "ok"}
    for path in ("/docs", "/openapi.json", "/reset", "/load_model", "/v1/completions", "/v1/responses"):
        assert get(served, path).status_code in (404, 405), path

    async def gone(path: str) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=served.app), base_url="http://x") as client:
            return (await client.post(path, json={"model": "x"})).status_code

    assert {in_a_loop(gone(path)) for path in ("/reset", "/load_model", "/v1/responses")} == {404}


def test_metrics_count(served):
    def value(name: str) -> float:
        return float(re.search(rf"^{re.escape(name)} (\S+)$", get(served, "/metrics").text, re.MULTILINE)[1])

    names = ('vtc_requests_total{status="200"}', 'vtc_visual_tokens_total{when="before"}', "vtc_new_tokens_total")
    names += ('vtc_visual_tokens_total{when="after"}', "vtc_first_token_seconds_count")
    post(served, request(QUESTIONS[0], picture(0)))
    before = [value(name) for name in names]
    post(served, request(QUESTIONS[0], picture(0)), request(QUESTIONS[0], picture(1), stream=True))
    assert [value(name) - start for name, start in zip(names, before, strict=True)] == [2, 72, 2 * NEW, 18, 2]
    assert soon(lambda: value("vtc_blocks_in_use") == 0)
    assert value("vtc_visual_tokens_remembered") >= 18


def test_addresses_are_public_ones():
    with pytest.raises(ValueError, match="no public address"):
        images(["http://127.0.0.1:1/x.png"], Limits(urls=True))
    with pytest.raises(ValueError, match="no public address"):
        images(["http://[::1]/x.png"], Limits(urls=True))


@pytest.fixture
def elsewhere(monkeypatch):
    """A server with a name, found once and taken for public, that sends what it is told to; and what it was asked."""
    found, asked, sent = [], [], []
    look_up = socket.getaddrinfo

    def once(host, *args, **kwargs):
        if host == "elsewhere.test":
            found.append(host)
            host = "127.0.0.1" if len(found) == 1 else "127.0.0.2"
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", once)
    public = SimpleNamespace(ip_address=lambda address: SimpleNamespace(is_global=True))
    monkeypatch.setattr("vtc.serve.images.ipaddress", public)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with listening.accept()[0] as client, suppress(OSError):
                asked.append(client.recv(9999))
                for part in sent:
                    client.sendall(part)
                    time.sleep(0.1 * (len(sent) > 1))

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://elsewhere.test:{listening.getsockname()[1]}/x.png", asked, sent
        thread.join(10)


def fetched(url: str, limits: Limits) -> list[Image.Image]:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(images, [url], limits).result()


def test_an_image_is_read_from_the_address_that_was_checked(elsewhere):
    """A name that stands for another address when it is looked up again does not lead there."""
    url, asked, sent = elsewhere
    body = base64.b64decode(data_url(picture(0)).partition(",")[2])
    sent.append(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    (image,) = fetched(url, Limits(urls=True, seconds=10))
    assert image.tobytes() == picture(0).tobytes()
    assert re.search(rb"(?i)\r\nhost: elsewhere.test:\d+\r\n", asked[0])


@pytest.mark.parametrize("slow", ["head", "body"])
def test_an_image_that_comes_by_the_byte_is_given_up(elsewhere, slow):
    url, _, sent = elsewhere
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 60\r\n\r\n"
    sent += [*map(bytes, zip(head, strict=True))] if slow == "head" else [head, *[b"x"] * 60]
    with pytest.raises(ValueError, match=r"elsewhere.test was not here after 0.5 s"):
        fetched(url, Limits(urls=True, seconds=0.5))


@pytest.mark.parametrize(
    "url", ["http://8.8.8.8/\x01", "http://8.8.8.8/" + "a" * 70_000, "http://[::1", "http://" + "a" * 64 + ".org/"]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match="cannot be found"):
        images([url], Limits(urls=True))


def test_greedy_is_packed_and_only_greedy():
    messages = [{"role": "user", "content": "a"}]
    for more, packed in ({}, True), ({"temperature": 0}, True), ({"temperature": 1}, False), ({"stop": "a"}, False):
        assert read({"model": "m", "messages": messages, **more}).packed is packed
    assert read({"model": "m", "messages": messages, "max_completion_tokens": 3}).max_tokens == 3


def test_images_that_have_no_room_now_are_told_to_come_again():
    with serving(sizes=replace(SIZES, remembered=40)) as server:
        memory = server.tower.memory
        kept = memory.add("another's", Pruned([], [], 36, torch.zeros(36, 32), False))
        (refused,) = post(server, request(QUESTIONS[0], picture(0)))
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        memory.release(kept)
        assert content(post(server, request(QUESTIONS[0], picture(0)))[0]) == spoken(QUESTIONS[0], QUARTER, picture(0))


def test_what_is_too_long_is_refused_before_the_work(served, monkeypatch):
    """A text of more characters than any prompt before the tokenizer, one of more tokens before the tower."""
    worked = []
    tokenizer = type(served.chat.reading._beside.tokenizer)
    monkeypatch.setattr(tokenizer, "__call__", lambda *args, **kwargs: worked.append("tokenizer") or {"input_ids": []})
    (reply,) = post(served, request("color " * 3000, picture(0)))
    assert (reply.status_code, worked) == (400, [])
    assert re.search(r"a text of 180\d\d characters; this server holds 1024 tokens", reply.json()["error"]["message"])
    monkeypatch.undo()
    monkeypatch.setattr(served.tower, "submit", lambda *args: worked.append("tower"))
    (reply,) = post(served, request("color " * 1020, picture(0)))
    assert (reply.status_code, worked) == (400, [])
    assert "this server holds 1024" in reply.json()["error"]["message"]


def test_a_request_fills_the_blocks_of_the_cache_and_no_more():
    """Of 62 tokens in blocks of 8 there are 56: the engine dies of a request that needs one more."""
    with serving(sizes=replace(SIZES, cache=62)) as server:
        prompt = post(server, request(QUESTIONS[0], max_tokens=1))[0].json()["usage"]["prompt_tokens"]
        fits, does_not = (request(QUESTIONS[0], max_tokens=most - prompt) for most in (56, 57))
        assert post(server, does_not)[0].json()["error"]["message"].endswith("this server holds 56")
        assert post(server, fits)[0].json()["usage"]["total_tokens"] == 56


def test_images_that_never_have_room_together_are_refused():
    """Memory for 16 visual tokens, of which an image keeps 9: two are too much, unless they are one."""
    with serving(sizes=replace(SIZES, remembered=16)) as server:
        (refused,) = post(server, request(QUESTIONS[0], picture(0), picture(1)))
        assert refused.status_code == 400
        assert "images of 18 visual tokens together, and memory for 16" in refused.json()["error"]["message"]
        (twice,) = post(server, request(QUESTIONS[0], picture(1), picture(1)))
        assert content(twice) == spoken(QUESTIONS[0], QUARTER, picture(1), picture(1))


@pytest.mark.parametrize("more", [{}, {"temperature": 1}], ids=["packed", "alone"])
def test_who_leaves_before_the_first_part_is_answered_no_further(more, monkeypatch):
    """Nothing of a stream runs, nor ends, before somebody asks for a part."""
    solos: list[Solo] = []
    monkeypatch.setattr("vtc.serve.chat.Solo", lambda *parts: solos.append(Solo(*parts)) or solos[-1])
    with serving(Limits(new_tokens=900)) as server:
        cancelled, cancel = [], server.engine.cancel_request
        monkeypatch.setattr(server.engine, "cancel_request", lambda one: (cancelled.append(one), cancel(one)))

        async def run() -> bool:
            asked = request(QUESTIONS[0], picture(0), stream=True, **more) | {"max_tokens": 900}
            await asyncio.create_task(server.chat.handle_request(asked, "its task ends here"))
            return await asyncio.to_thread(
                soon, lambda: not server.engine.prompts and not server.engine.blocks_in_use()
            )

        assert in_a_loop(run())
        assert bool(cancelled) is not bool(solos)
        assert all(solo.gone.is_set() for solo in solos)


def test_a_stream_that_fails_says_why(served, monkeypatch):
    """As OpenAI's do: an object of its own, and no [DONE] behind it."""

    def broken(*model, **inputs):
        raise RuntimeError('no "room"\nhere')

    monkeypatch.setattr(type(served.chat.reading.model), "generate", broken)
    (reply,) = post(served, request(QUESTIONS[0], picture(0), stream=True, temperature=1))
    *_, last = [line for line in reply.text.splitlines() if line]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["message"], error["type"]) == ('no "room"\nhere', "server_error")


def test_an_answer_that_is_there_at_once_is_streamed(served, monkeypatch):
    """Upstream says who is to be called once it has handed the request in, which may be answered by then."""
    router, answered, begin = served.engine.output_router, [], CBStreamer.__init__
    deliver = router.deliver_batch
    monkeypatch.setattr(router, "deliver_batch", lambda outputs: (deliver(outputs), answered.extend(outputs)))
    monkeypatch.setattr(CBStreamer, "__init__", lambda *args, **more: soon(lambda: answered) and begin(*args, **more))

    async def run() -> str:
        reply = await served.chat.handle_request(request(QUESTIONS[1], picture(0), stream=True, max_tokens=1), "x")
        return "".join([part async for part in reply.body_iterator])

    streamed = in_a_loop(asyncio.wait_for(run(), 20))
    assert spoken(QUESTIONS[1], QUARTER, picture(0)).split()[0] in streamed
    assert streamed.endswith("data: [DONE]\n\n")


# -- the gate -----------------------------------------------------------------------------------------------------


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


# -- a process against a process ----------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """`vtc serve` with a model that never ends by itself, and OpenAI's client for it."""
    port, folder = free_port(), tmp_path_factory.mktemp("served")
    for part in tiny():
        part.save_pretrained(folder)
    given = {"--model": folder, "--name": "tiny", "--port": port, "--max-new-tokens": 300}
    command = [sys.executable, "-m", "vtc.cli", "serve", *(str(x) for pair in given.items() for x in pair)]
    one_core = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=one_core) as running:
        try:
            url = f"http://127.0.0.1:{port}"

            def up() -> bool:
                assert running.poll() is None, running.stderr.read()
                try:
                    return httpx.get(f"{url}/health").status_code == 200
                except httpx.HTTPError:
                    return False

            assert soon(up, 120)
            yield OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), url
            running.send_signal(signal.SIGINT)
            assert running.wait(20) in (0, -signal.SIGINT, 130)
        finally:
            running.kill()


def test_openai_client_against_the_command(process):
    client, _ = process
    asked = request(QUESTIONS[0], picture(0))
    whole = client.chat.completions.create(**asked)
    chunks = [*client.chat.completions.create(**asked, stream=True)]
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert whole.choices[0].message.content == streamed == spoken(QUESTIONS[0], QUARTER, picture(0))
    assert chunks[-1].usage.vtc["visual_tokens_after"] == whole.usage.vtc["visual_tokens_after"] == 9
    more = {"extra_body": {"vtc": {"method": "vtc-cls", "budget": 12}}}
    assert client.chat.completions.create(**asked, **more).usage.vtc["visual_tokens_after"] == 12
    with pytest.raises(BadRequestError, match="unknown method"):
        client.chat.completions.create(**asked, extra_body={"vtc": {"method": "nope"}})
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_the_chat_of_gradio_against_the_command(process, tmp_path):
    """It sends an image as a message of its own, and a turn before as it keeps it, with fields that say nothing."""
    import gradio

    image, said = tmp_path / "photo.png", {"metadata": None, "options": None}
    picture(0).save(image)
    talk = gradio.load_chat(f"{process[1]}/v1", model=NAME, file_types="image")
    asked = {"text": QUESTIONS[0], "files": [str(image)]}
    *_, answer = talk.fn(asked, [])
    parts = [{"type": "image"}], [{"type": "text", "text": QUESTIONS[0]}]
    messages = [{"role": "user", "content": part} for part in parts]
    prompt = tiny()[1].apply_chat_template(messages, add_generation_prompt=True)
    first = tiny()[1].decode(alone(prompt, [picture(0)], QUARTER), skip_special_tokens=True)
    assert answer.startswith(first)
    turns = [
        {"role": "user", "content": [{"type": "file", "file": {"path": str(image)}}], **said},
        {"role": "user", "content": [{"type": "text", "text": QUESTIONS[0]}], **said},
        {"role": "assistant", "content": [{"type": "text", "text": first}], **said},
    ]
    assert [*talk.fn({"text": QUESTIONS[1], "files": []}, turns)][-1]


def test_clients_that_are_killed_give_their_blocks_back(process):
    client, url = process
    curl = ["curl", "-sN", f"{url}/v1/chat/completions", "-H", "content-type: application/json", "-d", "@-"]

    def blocks() -> float:
        return float(re.search(r"^vtc_blocks_in_use (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)[1])

    for stream in (True, False):
        asked = request(QUESTIONS[0], picture(0), stream=stream) | {"max_tokens": 300}
        with subprocess.Popen(curl, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as child:
            child.stdin.write(json.dumps(asked).encode())
            child.stdin.close()
            assert soon(lambda: blocks() > 0)
            child.kill()
        assert soon(lambda: blocks() == 0)
    text = client.chat.completions.create(**request(QUESTIONS[1], picture(1))).choices[0].message.content
    assert text == spoken(QUESTIONS[1], QUARTER, picture(1))


@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_what_pages_say_to_the_server(process, page, tmp_path):
    """Blocks of Python and lines of curl, with this server's address and model in theirs."""
    _, url = process
    picture(0).save(tmp_path / "scene.png")
    spoken_to = [(kind, block) for kind in ("python", "sh") for block in blocks(page, kind) if SERVED in block]
    assert spoken_to
    for kind, block in spoken_to:
        here = block.replace(f"http://{SERVED}", url).replace('"reference"', '"tiny"')
        command = [sys.executable if kind == "python" else "bash", "-c", here]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "visual_tokens_after" in done.stdout, done.stdout
