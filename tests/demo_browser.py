"""The demo as visitors have it: a server process and pages of Debian's Chromium."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, BrowserContext, Page

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(*options: str) -> Iterator[tuple[str, int]]:
    """`vtc demo` on a free port until the block ends: its address and process id."""
    port = free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vtc", "demo", "--port", str(port), *options]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            _wait(server, address := f"http://127.0.0.1:{port}/")
            yield address, server.pid
        finally:
            server.terminate()


def _wait(server: subprocess.Popen, address: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"vtc demo ended with {server.returncode}: {server.stdout.read()}")
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"{address} did not answer in {seconds:.0f} s")


def chromium() -> dict:
    """What both kinds of a browser are launched with."""
    path = shutil.which("chromium")
    if path is None:
        raise RuntimeError("the demo's tests need Chromium: apt-get install -y --no-install-recommends chromium")
    return {"executable_path": path, "args": list(FLAGS)}


@contextmanager
def visitor(browser: Browser, address: str, **options) -> Iterator[Page]:
    """A page of a visitor who has never been here: see `opened`."""
    context = browser.new_context(**options)
    with opened(context, address) as page:
        yield page
    context.close()


@contextmanager
def opened(context: BrowserContext, address: str) -> Iterator[Page]:
    """A page of its own; fails where the page wrote an error to the console or asked another host for anything."""
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if _own(request.url, address) else wrong.append(request.url))
    page.goto(address)
    page.locator("#ask").wait_for()
    page.set_default_timeout(60_000)  # beside other tests on two cores
    yield page
    page.close()
    assert not wrong


def _own(url: str, address: str) -> bool:
    return url.startswith((address, address.replace("http", "ws"), "data:", "blob:"))
