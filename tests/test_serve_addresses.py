"""Images that `vtc serve` fetches: from public addresses, in time, and from the one that was checked."""

import base64
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest
from PIL import Image
from serve_fixtures import (
    data_url,
    picture,
)

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


@pytest.mark.parametrize(
    "url", ["http://8.8.8.8/\x01", "http://8.8.8.8/" + "a" * 70_000, "http://[::1", "http://" + "a" * 64 + ".org/"]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match="cannot be found"):
        images([url], Limits(urls=True))
