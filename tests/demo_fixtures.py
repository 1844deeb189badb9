"""One server in this process and one browser for all tests of the demo: `pytest_plugins = ("demo_fixtures",)`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from demo_browser import chromium, visitor
from demo_pages import EXAMPLE, serving
from playwright.sync_api import Page

from vtc.demo import speed
from vtc.demo.inspector import Inspector
from vtc.eval.reader import Reader, load, model_path


@pytest.fixture(scope="session")
def reader() -> Reader:
    speed.ROUNDS = 2  # the figures are not what these tests are about
    return load(model_path("reference"), "cpu", max_new_tokens=64)


@pytest.fixture(scope="session")
def address(reader) -> Iterator[str]:
    with serving(reader, "reference") as url:
        yield url


@pytest.fixture(scope="session")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser, address) -> Iterator[Page]:
    with visitor(browser, address) as opened:
        yield opened


@pytest.fixture
def inspector(reader) -> Inspector:
    return Inspector(reader, "reference")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "photo.png"
    EXAMPLE.image.save(path)
    return path
