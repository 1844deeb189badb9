"""One server in this process and one browser for all tests of the demo: `pytest_plugins = ("demo_fixtures",)`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from demo_browser import chromium, opened
from demo_pages import EXAMPLE, serving
from playwright.sync_api import Browser, BrowserContext, Page, Playwright, sync_playwright

from vtc.demo import speed
from vtc.demo.inspector import Inspector
from vtc.eval.reader import Reader, load, model_path


@pytest.fixture(scope="session")
def reader() -> Reader:
    speed.ROUNDS = 1  # the figures are not what these tests are about
    return load(model_path("reference"), "cpu", max_new_tokens=64)


@pytest.fixture(scope="session")
def address(reader) -> Iterator[str]:
    with serving(reader, "reference") as url:
        yield url


@pytest.fixture(scope="session")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as started:
        yield started


@pytest.fixture(scope="session")
def browser(playwright) -> Iterator[Browser]:
    """For visitors who have never been here."""
    with playwright.chromium.launch(**chromium()) as started:
        yield started


@pytest.fixture(scope="session")
def context(playwright, tmp_path_factory) -> Iterator[BrowserContext]:
    """Of a visitor who comes back: what a page is made of lies in the browser's cache, and compiled, too, as the cache
    is on a disk. That saves a second of each test."""
    with playwright.chromium.launch_persistent_context(tmp_path_factory.mktemp("profile"), **chromium()) as made:
        yield made


@pytest.fixture
def page(context, address) -> Iterator[Page]:
    with opened(context, address) as page:
        yield page


@pytest.fixture
def inspector(reader) -> Inspector:
    return Inspector(reader, "reference")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "photo.png"
    EXAMPLE.image.save(path)
    return path
