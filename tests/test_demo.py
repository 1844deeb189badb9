"""The demo: its parts, and the whole page as visitors use it, in headless Chromium."""

from __future__ import annotations

import re
import socket
from concurrent.futures import ThreadPoolExecutor

import gradio as gr
import models
import pytest
import torch
from demo_browser import chromium, served, visitor
from eval_fixtures import run_vtc
from PIL import Image
from playwright.sync_api import Page

import vtc
from vtc.demo import panels, settings
from vtc.demo.app import Inspector
from vtc.demo.asking import MODEL, Answer, Asked, HandPicked, Pair, compare
from vtc.demo.view import layout, view
from vtc.eval import scenes
from vtc.eval.reader import Reader, load, model_path

EXAMPLE = scenes.example("test", 0, 3)


@pytest.fixture(scope="module")
def reader() -> Reader:
    return load(model_path("reference"), "cpu", max_new_tokens=64)


@pytest.fixture(scope="module")
def address():
    with served() as (url, _):
        yield url


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser, address):
    with visitor(browser, address) as opened:
        yield opened


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "scene.png"
    EXAMPLE.image.save(path)
    return path


def asked(method="vtc-cls", budget=0.25, example=EXAMPLE) -> Asked:
    return Asked(example.image, example.question, vtc.list_methods()[method](), budget)


def last(reader: Reader, question: Asked) -> Pair:
    *_, pair = compare(reader, question)
    return pair


# -- the page ---------------------------------------------------------------------------------------------------------


def upload(page: Page, path) -> None:
    page.locator("#image input[type=file]").set_input_files(path)


def fill(page: Page, path, question=EXAMPLE.question, method="vtc-cls", percent=25) -> None:
    upload(page, path)
    page.locator("#image img").wait_for()
    page.locator("#question textarea, #question input").fill(question)
    page.locator("#method input").click()
    page.get_by_role("option", name=method, exact=True).click()
    page.locator("#budget input[type=number]").fill(str(percent))
    page.locator("#budget input[type=number]").press("Tab")


def ask(page: Page) -> None:
    page.locator("#ask").click()
    page.locator(".why").wait_for()
    page.locator("#viewer rect").first.wait_for()


def kept(page: Page) -> list[int]:
    return page.locator("#viewer rect.kept").evaluate_all("all => all.map(rect => Number(rect.dataset.index))")


def answers(page: Page) -> list[str]:
    return [text.strip() for text in page.locator(".answer .text").all_inner_texts()]


def told(page: Page, text: str) -> None:
    page.locator(".toast-body", has_text=text).wait_for()


def test_upload_ask_and_read_the_mask(page, picture, reader):
    expected = last(reader, asked())
    fill(page, picture)
    ask(page)
    assert answers(page) == [expected.full.text, expected.compressed.text]
    assert kept(page) == expected.trace.kept()[0].tolist()
    figures = page.locator(".answer dd").all_inner_texts()
    assert (figures[0].strip(), figures[4].strip()) == ("144", "36")
    for text in figures[1:4] + figures[5:]:
        assert re.fullmatch(r"[\d.e+]+ (ms|MiB)", text.strip()), text
    assert "Measured now on CPU" in page.locator(".why").inner_text()
    assert "this budget: 36 tokens" in page.locator("#curve").inner_text()


def test_the_sliders_replay_the_schedule(page, picture, reader):
    fill(page, picture, method="transprune", percent=50)
    page.get_by_text("72 of 144 visual tokens").wait_for()
    ask(page)
    trace = last(reader, asked("transprune", 0.5)).trace
    for layer in range(trace.depth):
        page.locator("#viewer [name=layer]").fill(str(layer))
        assert kept(page) == trace.alive(layer)[0].tolist()
    page.locator("#viewer [name=heat]").check()
    entered = len(trace.scores(-1)[0])
    assert page.locator("#viewer rect.heated").count() == entered
    assert page.locator("#viewer rect.heated").first.evaluate("rect => getComputedStyle(rect).fill") != "rgb(0, 0, 0)"


def test_a_patch_tells_its_score_and_where_it_left(page, picture, reader):
    fill(page, picture, method="fastv")
    ask(page)
    stage = last(reader, asked("fastv")).trace.stages[0]
    token = int(stage.scores[0].argmax())
    lost = int(stage.scores[0].argmin())
    page.locator(f"#viewer rect[data-index='{token}']").hover()
    assert f"score {stage.scores[0, token]:.3g}" in page.locator(".detail").inner_text()
    assert "rank 1 of 144; read by every layer" in page.locator(".detail").inner_text()
    page.locator(f"#viewer rect[data-index='{lost}']").hover()
    assert page.locator(".detail").inner_text().endswith("rank 144 of 144; left before layer 1")


def test_patches_picked_by_hand_are_asked_again(page, picture, reader):
    fill(page, picture)
    ask(page)
    before = kept(page)
    added = next(token for token in range(144) if token not in before)
    page.locator(f"#viewer rect[data-index='{before[0]}']").click()
    page.locator(f"#viewer rect[data-index='{added}']").click()
    chosen = tuple(sorted({*before[1:], added}))
    assert tuple(kept(page)) == chosen
    page.get_by_role("button", name="Ask again with these 36 alone").click()
    page.locator("#viewer rect.changed").first.wait_for(state="detached")
    assert tuple(kept(page)) == chosen
    again = last(reader, Asked(EXAMPLE.image, EXAMPLE.question, HandPicked(chosen), None))
    assert answers(page)[1] == again.compressed.text


def test_patches_by_keyboard(page, picture):
    fill(page, picture)
    ask(page)
    before = set(kept(page))
    page.locator("#viewer rect[data-index='0']").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    assert set(kept(page)) == before ^ {13}
    page.get_by_role("button", name="Back to the method's choice").click()
    assert set(kept(page)) == before


def test_merged_patches_are_coloured(page, picture, reader):
    fill(page, picture, method="vflowopt")
    ask(page)
    trace = last(reader, asked("vflowopt")).trace
    taken = sum(target is not None for target in view(EXAMPLE.image, trace, reader.processor.image_processor)["into"])
    assert page.locator("#viewer rect.merged:not(.kept)").count() >= taken > 0


def test_what_is_missing_or_wrong_is_a_message(page, picture, tmp_path):
    page.locator("#ask").click()
    told(page, "Choose an image first")
    bad = tmp_path / "notes<b>.png"
    bad.write_text("no image at all")
    upload(page, bad)
    told(page, "is not an image that Pillow can read")
    huge = tmp_path / "huge.png"
    Image.new("1", (8000, 8000)).save(huge)
    upload(page, huge)
    told(page, "the limit is 50 megapixels")
    fill(page, picture, question=" ")
    page.locator("#ask").click()
    told(page, "Write a question")
    fill(page, picture, method="fastv", percent=5)
    page.get_by_text("Too low: fastv reaches down to 13%").wait_for()
    page.locator("#ask").click()
    told(page, "so its range is 18.9 to 144 tokens")


def test_advanced_settings_reach_the_method(page, picture, reader):
    fill(page, picture, method="random")
    page.locator("#advanced").get_by_text("Advanced settings").click()
    page.locator("#advanced").get_by_label("seed").fill("7")
    page.keyboard.press("Tab")
    ask(page)
    question = Asked(EXAMPLE.image, EXAMPLE.question, vtc.list_methods()["random"](seed=7), 0.25)
    assert kept(page) == last(reader, question).trace.kept()[0].tolist()


def test_an_example_and_a_new_scene(page, reader):
    page.get_by_role("button", name="Example:").nth(1).click()
    picture = page.locator("#image img")
    picture.wait_for()
    ask(page)
    assert answers(page)[0] == last(reader, asked()).full.text
    before = picture.get_attribute("src")
    page.locator("#scene").click()
    page.wait_for_function("old => document.querySelector('#image img')?.src !== old", arg=before)
    assert page.locator("#question textarea, #question input").input_value().endswith("?")


def test_two_visitors_keep_their_own_page(browser, address, page, picture, tmp_path, reader):
    other = scenes.example("test", 0, 10)
    other.image.save(tmp_path / "other.png")
    fill(page, picture)
    with visitor(browser, address) as second:
        fill(second, tmp_path / "other.png", other.question)
        page.locator("#ask").click()
        ask(second)
        page.locator(".why").wait_for()
        assert kept(second) == last(reader, asked(example=other)).trace.kept()[0].tolist()
        assert answers(second)[0] == last(reader, asked(example=other)).full.text
    assert answers(page)[0] == last(reader, asked()).full.text
    assert kept(page) == last(reader, asked()).trace.kept()[0].tolist()


def test_a_phone_needs_no_sideways_scrolling(browser, address, picture):
    with visitor(browser, address, viewport={"width": 390, "height": 844}, color_scheme="dark") as phone:
        fill(phone, picture)
        ask(phone)
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_port_in_use_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run_vtc("demo", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")


def test_only_this_machine_unless_told_otherwise(address):
    port = int(address.split(":")[-1].strip("/"))
    with pytest.raises(ConnectionRefusedError):  # what listens on all addresses would answer at this one, too
        socket.create_connection(("127.0.0.2", port), timeout=5)


# -- its parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [(), (5,), tuple(range(0, 144, 2)), tuple(range(144))])
def test_hand_picked_keeps_exactly_these(reader, tokens):
    pair = last(reader, Asked(EXAMPLE.image, EXAMPLE.question, HandPicked(tokens), None))
    assert tuple(pair.trace.kept()[0].tolist()) == tokens


@pytest.mark.parametrize("family", [models.idefics3, models.llava_next, models.qwen2_vl])
def test_every_family_can_be_picked_from_and_drawn(family):
    model = family()
    inputs = models.prompt(model)
    with vtc.compressed(model, HandPicked((1, 20, 23))) as live, torch.inference_mode():
        model(**inputs)
    assert live.kept()[0].tolist() == [1, 20, 23]
    shown = view(Image.new("RGB", (60, 40)), live.record, None)
    assert len(shown["patches"]) == len(shown["left"]) == sum(live.sizes)
    assert [token for token, left in enumerate(shown["left"]) if left is None] == [1, 20, 23]


def test_the_figures_are_those_of_the_run(reader):
    pair = last(reader, asked("fastv"))
    config = reader.model.config.get_text_config()
    text = reader.inputs([EXAMPLE.image], [EXAMPLE.question])["input_ids"].shape[1] - 144
    assert pair.compressed.tokens == pytest.approx(pair.trace.average_tokens.item())
    counts = pair.trace.tokens_per_layer[0].tolist()
    new = len(reader.processor.tokenizer(f" {pair.compressed.text}", add_special_tokens=False).input_ids)
    assert pair.compressed.kv_bytes == vtc.cost.kv_bytes(counts, text + new, config, 4)
    assert pair.full.kv_bytes > pair.compressed.kv_bytes
    assert 0 < pair.compressed.decode < pair.compressed.prefill


def test_a_visitor_who_leaves_frees_the_model(reader):
    steps = compare(reader, asked())
    next(steps)
    steps.close()
    assert MODEL.acquire(timeout=30)
    MODEL.release()
    assert "vtc" not in reader.model.__dict__


def test_visitors_at_once_get_the_serial_answers(reader):
    questions = [asked(method, 0.25, scenes.example("test", 0, i)) for i, method in enumerate(("vtc-cls", "fastv") * 4)]
    serial = [last(reader, question) for question in questions]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda question: last(reader, question), questions))
    for alone, among in zip(serial, together, strict=True):
        assert (alone.full.text, alone.compressed.text) == (among.full.text, among.compressed.text)
        assert torch.equal(alone.trace.kept()[0], among.trace.kept()[0])


def test_an_error_is_raised_and_frees_the_model(reader):
    with pytest.raises(vtc.BudgetError):
        last(reader, asked("fastv", 0.05))
    assert not MODEL.locked()


def test_tiles_lie_in_place_with_the_overview_beside():
    panels_, patches = layout([(2, 2)] * 7, (300, 200), (0, 0, 300, 200))
    assert panels_ == [(0, 0, 300, 200), (312, 0, 300, 200)]
    assert len(patches) == 28
    assert patches[0] == (0, 0, 50, 50)
    assert patches[4] == (100, 0, 50, 50)  # the second tile of the first row of three
    assert patches[12] == (0, 100, 50, 50)
    assert patches[24] == (312, 0, 150, 100)


def test_one_grid_lies_over_what_the_model_sees():
    _, patches = layout([(2, 2)], (300, 200), (50, 0, 250, 200))
    assert patches == [(50, 0, 100, 100), (150, 0, 100, 100), (50, 100, 100, 100), (150, 100, 100, 100)]


def test_settings_come_from_the_dataclass():
    fields = settings.components(vtc.list_methods()["vflowopt"])
    assert list(fields) == ["retain", "threshold", "cell", "alpha", "layers"]
    assert fields["retain"].value == "0.265, 0.983, 0.877"
    assert "share of the tokens" in fields["retain"].info
    assert settings.components(vtc.list_methods()["vtc-cls"])["ensemble"].choices[0] == ("sum", "sum")
    read = settings.configured(vtc.list_methods()["vflowopt"], {"retain": "0.5, 0.9, 1", "threshold": 3, "layers": ""})
    assert read == vtc.list_methods()["vflowopt"](retain=(0.5, 0.9, 1.0), threshold=3.0)


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("vflowopt", {"cell": 1e-9}),
        ("vflowopt", {"retain": "0.5, x, 1"}),
        ("vflowopt", {"retain": "0.5, 1"}),
        ("vtc-cls", {"ensemble": "most"}),
        ("vtc-cls", {"layers": 2.5}),
    ],
)
def test_settings_that_cannot_be(method, values):
    with pytest.raises(ValueError, match=next(iter(values))):
        settings.configured(vtc.list_methods()[method], values)


def test_where_the_model_lies_stays_private(reader):
    note = Inspector(reader, "reference").budget_note("atp", 60)
    assert "reference/atp has modules for 0.15, 0.25, 0.5" in note
    assert model_path("reference") not in note


def test_texts_are_escaped_and_differences_marked(reader):
    trace = last(reader, asked()).trace
    html = panels.answers(Pair(Answer("a red <b>"), Answer("a blue <b>"), trace, "x < y"), "CPU")
    assert "a <mark>blue</mark> &lt;b&gt;" in html
    assert "x &lt; y" in html


def test_a_missing_curve_names_its_command(tmp_path):
    assert "vtc eval --model m" in panels.curve(tmp_path / "none.json", "vtc eval --model m", "vtc-cls", 36.0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"question": "x" * 301}, "the limit is 300"),
        ({"method": "none"}, "no method"),
        ({"budget": "many"}, "could not convert"),
        ({"image": None}, "Choose an image"),
    ],
)
def test_what_comes_past_the_page_is_checked_too(reader, picture, change, told):
    inspector = Inspector(reader, "reference")
    inspector.page()
    values = [box.value for fields in inspector.fields.values() for box in fields.values()]
    given = {"image": {"path": str(picture)}, "question": "what?", "method": "vtc-cls", "budget": 25, **change}
    with pytest.raises(gr.Error, match=told):
        list(inspector.ask(*given.values(), *values))
