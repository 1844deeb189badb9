"""Images that `vtc serve` fetches: from public addresses, in time, and from the one that was checked."""

import asyncio
import base64
import gzip
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import httpx
import pytest
from PIL import Image
from serve_fixtures import QUESTIONS, data_url, in_a_loop, picture, request, serving

from vtc.serve.images import images
from vtc.serve.limits import Limits


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


def test_what_comes_compressed_is_refused(elsewhere):
    """A few bytes of it could be gigabytes."""
    url, asked, sent = elsewhere
    body = gzip.compress(base64.b64decode(data_url(picture(0)).partition(",")[2]))
    sent.append(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    with pytest.raises(ValueError, match=r"elsewhere.test sends the image as gzip: send it as data:image"):
        fetched(url, Limits(urls=True, seconds=10))
    assert re.search(rb"(?i)\r\naccept-encoding: identity\r\n", asked[0])


@contextmanager
def slow(monkeypatch, *parts: bytes):
    """The address of a server, taken for public, that sends a part each 0.2 seconds, to many at once."""
    public = SimpleNamespace(ip_address=lambda address: SimpleNamespace(is_global=True))
    monkeypatch.setattr("vtc.serve.images.ipaddress", public)

    def answer(client: socket.socket) -> None:
        with client, suppress(OSError):
            client.recv(9999)
            for part in parts:
                time.sleep(0.2)
                client.sendall(part)
            client.recv(9999)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listening.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0), backlog=99) as listening:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/x.png"
        listening.shutdown(socket.SHUT_RDWR)


def test_all_images_of_a_request_have_one_time(monkeypatch):
    """Each takes 0.4 of 0.7 seconds."""
    body = base64.b64decode(data_url(picture(0)).partition(",")[2])
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
    with (
        slow(monkeypatch, head, body) as url,
        ThreadPoolExecutor(1) as thread,
        pytest.raises(ValueError, match=r"was not here after 0.7 s"),
    ):
        thread.submit(images, [url] * 2, Limits(urls=True, seconds=0.7)).result()


def test_nobody_waits_for_addresses_of_others(monkeypatch):
    """More of them than the threads in which prompts are tokenized."""
    with slow(monkeypatch) as url, serving(Limits(urls=True, seconds=2)) as server:

        async def run() -> tuple[int, list[bool]]:
            async def sent(body: dict) -> int:
                return (await client.post("/v1/chat/completions", json=body)).status_code

            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
            waits = request(QUESTIONS[0])
            waits["messages"][0]["content"].insert(0, {"type": "image_url", "image_url": {"url": url}})
            transport = httpx.ASGITransport(app=server.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60) as client:
                waiting = [asyncio.create_task(sent(waits)) for _ in range(4)]
                await asyncio.sleep(0.3)
                status = await sent(request(QUESTIONS[0]))
                found = [task.done() for task in waiting]
                assert await asyncio.gather(*waiting) == [400] * 4
                return status, found

        status, done = in_a_loop(run())
        assert (status, any(done)) == (200, False)


@pytest.mark.parametrize(
    "url", ["http://8.8.8.8/\x01", "http://8.8.8.8/" + "a" * 70_000, "http://[::1", "http://" + "a" * 64 + ".org/"]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match="cannot be found"):
        images([url], Limits(urls=True))
