"""Take it along, in headless Chromium and by gradio_client: PNG, JSON, links, the API."""

from __future__ import annotations

import io
import json

import pytest
from demo_pages import (
    EXAMPLE,
    answered,
    ask,
    asked,
    choose,
    fill,
    kept,
    last,
    problem,
    rect,
    saved,
    saved_json,
    set_number,
    set_up,
    upload,
)
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import vtc
from vtc.demo.asking import HandPicked
from vtc.demo.view import fates

pytest_plugins = ("demo_fixtures",)


@pytest.fixture(scope="module")
def client(address) -> Client:
    return Client(address, verbose=False)


def check(record: dict, pair, method: str, budget) -> None:
    """The record holds what a run gives."""
    assert (record["method"], record["budget"], record["question"]) == (method, budget, EXAMPLE.question)
    assert record["answers"]["full"]["text"] == pair.full.text
    assert record["answers"]["compressed"]["text"] == pair.compressed.text
    assert record["kept"] == pair.trace.kept()[0].tolist()
    fate = json.loads(json.dumps(fates(pair.trace)))
    assert {name: record[name] for name in ("left", "into", "depth")} == {
        name: fate[name] for name in ("left", "into", "depth")
    }
    assert [stage["layer"] for stage in record["stages"]] == [stage["layer"] for stage in fate["stages"]]
    assert record["stages"][0]["scores"] == pytest.approx(fate["stages"][0]["scores"], rel=1e-5)
    assert record["tokens_per_layer"] == pair.trace.tokens_per_layer[0].tolist()
    assert record["versions"]["vtc"] == vtc.__version__
    assert set(record["versions"]) == {"python", "vtc", "torch", "transformers", "gradio"}


# -- files ------------------------------------------------------------------------------------------------------------


def test_json_holds_indices_scores_answers_and_versions(page, reader):
    choose(page)
    set_up(page, "fastv", 40)
    ask(page)
    record = saved_json(page)
    check(record, last(reader, asked("fastv", 0.4)), "fastv", 0.4)
    assert record["truth"] == EXAMPLE.answer
    assert record["settings"] == {"layer": None, "ratio": 0.5}


def test_png_shows_what_the_page_shows(page):
    choose(page)
    set_up(page, "uniform", 25)
    ask(page)
    page.mouse.move(0, 0)
    alone = Image.open(io.BytesIO(saved(page, "png"))).convert("RGB")
    assert alone.width == 1200
    cell = (1200 - 32) / 12

    def inside(token: int) -> tuple[int, ...]:
        """The middle of the patch's fifth pixel, in the file."""
        return alone.getpixel((int(16 + (token % 12 + 9 / 16) * cell), int(68 + (token // 12 + 9 / 16) * cell)))

    shown = set(kept(page))
    for token in range(144):
        level = EXAMPLE.image.getpixel((token % 12 * 8 + 4, token // 12 * 8 + 4))
        bright = 1.0 if token in shown else 0.28  # what left is dark
        assert inside(token) == pytest.approx([bright * channel for channel in level], abs=20), token
    page.get_by_role("button", name="Pin to compare").click()
    both = Image.open(io.BytesIO(saved(page, "png")))
    assert both.width == 1200
    assert both.height < 0.6 * alone.height


# -- links ------------------------------------------------------------------------------------------------------------


def link(page) -> str:
    page.locator("#viewer button.link").click()
    page.locator(".taken", has_text="Copied").wait_for()
    return page.url


def test_a_link_restores_the_state_and_asks(page, reader):
    choose(page)
    set_up(page, "vflowopt", 30)
    page.locator("#advanced").get_by_text("Advanced settings").click()
    set_number(page, "alpha", 0.437)
    ask(page)
    before = kept(page)
    assert before == last(reader, asked("vflowopt", 0.3, alpha=0.437)).trace.kept()[0].tolist()
    address = link(page)
    page.goto("about:blank")
    answered_after(page, address)
    assert kept(page) == before
    assert page.locator(".answer .setting").nth(1).inner_text() == "vflowopt at 30 %"
    assert page.locator("#question textarea, #question input").input_value() == EXAMPLE.question
    assert page.locator(".truth").inner_text() == f"Right answer: {EXAMPLE.answer}"
    assert page.locator("#stale").inner_text().strip() == ""


def answered_after(page, address: str, results: int = 1) -> None:
    """Open an address, and wait for its answers."""
    page.goto(address)
    page.wait_for_function(
        "results => Number(document.querySelector('#viewer')?.dataset.results ?? 0) > results "
        "&& document.querySelectorAll('#viewer rect').length && !document.querySelector('#viewer.waiting')",
        arg=results,
    )


def test_a_link_restores_what_was_picked(page, reader):
    choose(page)
    ask(page)
    rect(page, 143).click()
    chosen = tuple(kept(page))
    answered(page, lambda: page.locator("button.again").click())
    address = link(page)
    assert "picked=" in address
    page.goto("about:blank")
    answered_after(page, address, results=2)
    assert tuple(kept(page)) == chosen
    assert (
        saved_json(page)["answers"]["compressed"]["text"]
        == last(reader, asked(HandPicked(chosen), None)).compressed.text
    )


def test_a_link_with_an_image_of_ones_own_says_so(page, picture):
    fill(page, picture, method="random", percent=50)
    ask(page)
    address = link(page)
    assert "has to add the image" in page.locator(".taken").inner_text()
    page.goto("about:blank")
    page.goto(address)
    problem(page, "made with an image of its own (photo.png): add it and press Ask")
    assert page.locator("#method input").input_value() == "random"
    upload(page, picture)
    page.locator("#image img").wait_for()
    ask(page)
    assert page.locator(".answer .setting").nth(1).inner_text() == "random at 50 %"


@pytest.mark.parametrize(
    "query",
    [
        "?method=none",
        "?scene=../../etc&question=x",
        "?method=fastv&budget=1e9",
        f"?scene={EXAMPLE.question_id}&method=none",
    ],
)
def test_a_link_that_cannot_be_restored_says_so(page, address, query):
    page.goto(address + query)
    problem(page, "The link")
    page.wait_for_timeout(600)  # a page that has what it needs asks after 200 ms; this one would say that it lacks it
    problem(page, "The link")
    assert page.locator("#method input").input_value() == "vtc-cls"


# -- the API ----------------------------------------------------------------------------------------------------------


def test_predict_returns_json(client, picture, reader):
    record = client.predict(
        image=handle_file(picture), question=EXAMPLE.question, method="fastv", budget=0.4, api_name="/predict"
    )
    check(record, last(reader, asked("fastv", 0.4)), "fastv", 0.4)
    assert record["images"] == [{"name": "photo.png", "size": [96, 96]}]


def test_predict_counts_tokens_and_takes_settings(client, picture, reader):
    given = {"image": handle_file(picture), "question": EXAMPLE.question, "api_name": "/predict"}
    record = client.predict(**given, method="vflowopt", budget=30, settings={"retain": [0.5, 0.9, 1.0], "alpha": 0.5})
    pair = last(reader, asked("vflowopt", 30, retain=(0.5, 0.9, 1.0), alpha=0.5))
    check(record, pair, "vflowopt", 30)
    assert client.predict(**given)["budget"] == 0.25
    several = client.predict(**given | {"image": [handle_file(picture)] * 2})
    assert several["tokens"] == 288


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"question": " "}, "Write a question"),
        ({"method": "none"}, "There is no method"),
        ({"method": "fastv", "budget": 0.05}, "its range is"),
        ({"budget": 1.5}, "a fractional budget"),
        ({"budget": "much"}, "budget must be a number"),
        ({"settings": {"nothing": 1}}, "no setting 'nothing'"),
        ({"settings": [1]}, "hyper-parameters by name"),
        ({"image": []}, "Choose an image"),
        ({"image": {"path": "/etc/hostname"}}, "uploaded files"),
        ({"image": "/etc/hostname"}, "uploaded files"),
    ],
)
def test_predict_says_what_is_wrong(client, picture, change, told):
    given = {"image": handle_file(picture), "question": "what?"} | change
    with pytest.raises(AppError, match=told):
        client.predict(**given, api_name="/predict")


def test_only_predict_is_public(client):
    assert list(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == ["/predict"]


def test_what_the_page_documents_runs(page, address, picture):
    page.locator("#api").get_by_text("Ask from Python").click()
    code = page.locator("#api pre").inner_text()
    assert f'Client("{address}")' in code
    names = {}
    lines = code.replace('"photo.png"', repr(str(picture))).splitlines()
    exec("\n".join([*lines[:-1], f"shown = {lines[-1]}"]), names)
    text, indices = names["shown"]
    assert text
    assert len(indices) == 36
