"""Fixtures that several files share: a cell of the table (`table.parametrize`), and the plainest model."""

from __future__ import annotations

import gc

import pytest


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector, which torch and gradio call often, need not walk it again."""
    gc.freeze()


@pytest.fixture
def model(request):
    """A family's model, unwrapped afterwards."""
    yield from _unwrapped(request.param)


@pytest.fixture
def llava():
    """For what does not depend on the family."""
    yield from _unwrapped("llava")


def _unwrapped(family: str):
    from models import FAMILIES

    import vtc

    yield FAMILIES[family].model
    vtc.unwrap(FAMILIES[family].model)


@pytest.fixture
def method(request):
    """A method and its budget."""
    from table import METHODS

    return METHODS[request.param]


@pytest.fixture
def dropping(request, method):
    """Methods that only drop: for those that merge, masking is no oracle."""
    from table import merges

    if merges(request.node.callspec.params["method"]):
        pytest.skip("it merges")
    return method


@pytest.fixture
def inputs(request, model):
    """A batch."""
    from models import prompt
    from table import BATCHES

    images, pad = BATCHES[request.param]
    return prompt(model, images, pad=pad)


@pytest.fixture
def untouched(request, model, inputs):
    """What the unwrapped model makes of the batch: see `bare.untouched`."""
    import bare

    return bare.untouched(request.node.callspec.params["model"], request.node.callspec.params["inputs"])


@pytest.fixture(scope="module")
def served():
    """A server of a tiny model, with small bounds."""
    from serve_fixtures import serving

    from vtc.serve.limits import Limits

    with serving(Limits(body=100_000, pixels=10_000, images=2, new_tokens=20, waiting=30)) as server:
        yield server
