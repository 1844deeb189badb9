"""The page of the demo in headless Chromium: what it shows is true in every state."""

from __future__ import annotations

import re
import socket

import pytest
from demo_browser import visitor
from demo_pages import (
    EXAMPLE,
    answered,
    answers,
    ask,
    asked,
    choose,
    fill,
    kept,
    last,
    pick_method,
    problem,
    rect,
    screen,
    set_budget,
    set_number,
    set_up,
    upload,
    write,
)
from PIL import Image

from vtc.demo.asking import HandPicked
from vtc.eval import scenes

pytest_plugins = ("demo_fixtures",)


def stale(page) -> str:
    return page.locator("#stale").inner_text().strip()


# -- an answer --------------------------------------------------------------------------------------------------------


def test_upload_ask_and_read_the_mask(page, picture, reader):
    expected = last(reader, asked())
    fill(page, picture)
    ask(page)
    assert answers(page) == [expected.full.text, expected.compressed.text]
    assert kept(page) == expected.trace.kept()[0].tolist()
    figures = page.locator(".answer dd").all_inner_texts()
    assert (figures[0].strip(), figures[4].strip()) == ("144", "36")
    for text in figures[1:4] + figures[5:]:
        assert re.fullmatch(r"[\d.,]+ (ms|MiB)", text.strip()), text
    assert "Measured now on CPU" in page.locator(".why").inner_text()
    assert "%" not in re.sub(r"takes \d\d? %", "", page.locator(".why").inner_text())


def test_the_card_says_what_was_asked(page):
    choose(page)
    set_up(page, "fastv", 40)
    ask(page)
    assert page.locator(".asked").inner_text() == EXAMPLE.question
    assert page.locator(".answer .setting").nth(1).inner_text() == "fastv at 40 %"


def test_the_right_answer_of_a_scene_stands_beside(page, picture):
    choose(page)
    ask(page)
    assert page.locator(".truth").inner_text() == f"Right answer: {EXAMPLE.answer}"
    verdicts = ["✓ right" if text == EXAMPLE.answer else "✗ wrong" for text in answers(page)]
    assert page.locator(".verdict").all_inner_texts() == verdicts
    write(page, "what word is it?")
    ask(page)
    assert page.locator(".truth, .verdict").count() == 0
    upload(page, picture)  # the same pixels, but nobody knows of what file
    write(page, EXAMPLE.question)
    ask(page)
    assert page.locator(".truth, .verdict").count() == 0


def test_an_empty_answer_is_said(page, reader, monkeypatch):
    monkeypatch.setattr(reader.processor.tokenizer, "decode", lambda *args, **kwargs: " ")
    choose(page)
    ask(page)
    assert answers(page) == ["(no answer)", "(no answer)"]


def test_patches_picked_by_hand_are_asked_again(page, picture, reader):
    fill(page, picture)
    ask(page)
    before = kept(page)
    added = next(token for token in range(144) if token not in before)
    rect(page, before[0]).click()
    rect(page, added).click()
    chosen = tuple(sorted({*before[1:], added}))
    assert tuple(kept(page)) == chosen
    assert "36 of 144 tokens picked by hand, not asked yet" in page.locator(".count").inner_text()
    answered(page, lambda: page.get_by_role("button", name="Ask again with these 36 alone").click())
    assert tuple(kept(page)) == chosen
    assert page.locator(".answer .setting").nth(1).inner_text() == "36 tokens picked by hand"
    assert answers(page)[1] == last(reader, asked(HandPicked(chosen), None)).compressed.text
    page.get_by_text("picked by hand: 36 tokens").wait_for()


def test_no_token_at_all_has_its_marker_at_zero(page):
    choose(page)
    set_up(page, "uniform", 1)
    ask(page)
    (only,) = kept(page)
    rect(page, only).click()
    answered(page, lambda: page.get_by_role("button", name="Ask again with these 0 alone").click())
    page.get_by_text("picked by hand: 0 tokens").wait_for()
    marker, zero = page.locator("#curve .marker line"), page.locator("#curve text", has_text=re.compile("^0$"))
    assert marker.get_attribute("x1") == zero.get_attribute("x")
    assert kept(page) == []


# -- what no longer belongs to the settings ---------------------------------------------------------------------------


def test_changed_settings_mark_the_answer_and_setting_them_back_unmarks_it(page):
    choose(page)
    ask(page)
    assert stale(page) == ""
    write(page, "what word is it?")
    page.get_by_text("Below is the answer before the question changed").wait_for()
    assert page.locator("#answers.old").count() == 1
    write(page, EXAMPLE.question)
    page.locator("#answers.old").wait_for(state="detached")
    pick_method(page, "random")
    page.get_by_text("Below is the answer before the method changed").wait_for()
    ask(page)
    assert stale(page) == ""
    assert page.locator("#viewer.old").count() == 0


def test_another_example_marks_the_answer(page):
    choose(page)
    ask(page)
    choose(page, 0)
    page.get_by_text("Below is the answer before the image and question changed").wait_for()
    assert page.locator("#viewer.old").count() == page.locator("#answers.old").count() == 1


def test_an_error_after_an_answer(page):
    choose(page)
    ask(page)
    page.locator("#problem .problem").wait_for(state="detached")
    write(page, " ")
    page.locator("#ask").click()
    problem(page, "Write a question")
    assert stale(page).startswith("Below is the answer before the question changed")
    assert page.locator(".asked").inner_text() == EXAMPLE.question
    assert page.locator("#viewer.waiting").count() == 0
    write(page, EXAMPLE.question)
    ask(page)
    assert page.locator("#problem .problem").count() == 0


def test_a_failure_half_way_leaves_nothing_half(page, reader, monkeypatch):
    choose(page)
    ask(page)
    monkeypatch.setattr("vtc.demo.speed.measure", lambda *args: 1 / 0)
    page.locator("#ask").click()
    problem(page, "the log of the server says why")
    assert answers(page) == ["", ""]
    assert page.locator("#viewer .viewer.empty").count() == 1


def test_what_is_missing_or_wrong_is_said_in_place(page, picture, tmp_path):
    page.locator("#ask").click()
    problem(page, "Choose an image first")
    bad = tmp_path / "notes<b>.png"
    bad.write_text("no image at all")
    upload(page, bad)
    problem(page, "is not an image that Pillow can read")
    huge = tmp_path / "huge.png"
    Image.new("1", (8000, 8000)).save(huge)
    upload(page, huge)
    problem(page, "the limit is 50 megapixels")
    fill(page, picture, question="what is <image>?")
    page.locator("#ask").click()
    problem(page, "The question holds <image>")
    assert page.locator(".toast-body").count() == 0


# -- the controls -----------------------------------------------------------------------------------------------------


def test_the_slider_offers_what_the_method_can(page):
    choose(page)
    slider, note = page.locator("#budget input[type=range]"), page.locator("#budget")
    assert slider.get_attribute("min") == "1"
    pick_method(page, "fastv")
    note.get_by_text("fastv reaches down to 13 %").wait_for()
    assert slider.get_attribute("min") == "13"
    pick_method(page, "atp")
    note.get_by_text("atp is trained for 15, 25, 50 %").wait_for()
    for wished, offered in ((30, "25"), (45, "50"), (90, "100"), (16, "15")):
        set_budget(page, wished)
        page.wait_for_function(
            "value => document.querySelector('#budget input[type=number]').value === value", arg=offered
        )
    ask(page)
    assert page.locator(".answer .setting").nth(1).inner_text() == "atp at 15 %"


def test_advanced_settings_reach_the_method(page, picture, reader):
    fill(page, picture, method="random")
    page.locator("#advanced").get_by_text("Advanced settings").click()
    set_number(page, "seed", 707)
    ask(page)
    assert kept(page) == last(reader, asked("random", seed=707)).trace.kept()[0].tolist()
    set_number(page, "seed", 808)
    page.get_by_text("Below is the answer before the settings changed").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_heat_map_says_ranks_and_a_checked_box_looks_checked(browser, address, scheme):
    def fill_of(box) -> str:
        return box.evaluate("box => getComputedStyle(box).backgroundColor + getComputedStyle(box).backgroundImage")

    with screen(browser, address, "desktop", scheme) as page:
        choose(page)
        ask(page)
        box = page.get_by_label("Heat map of ranks")
        assert page.locator(".scale").is_hidden()
        plain, outline = fill_of(box), "rect => getComputedStyle(rect).stroke"
        colours = set(page.locator("rect.kept").evaluate_all(f"all => all.map({outline})"))
        box.check()
        assert fill_of(box) != plain
        assert "29, 78, 216" in fill_of(box)
        assert page.locator(".scale").inner_text().split("\n") == ["rank 144", "rank 1"]
        page.mouse.move(0, 0)
        assert set(page.locator("rect.kept.heated").evaluate_all(f"all => all.map({outline})")) == colours
        assert len(colours) == 1


def test_patches_by_keyboard(page, picture):
    fill(page, picture)
    ask(page)
    before = set(kept(page))
    rect(page, 0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    assert set(kept(page)) == before ^ {13}
    page.get_by_role("button", name="Back to the method's choice").click()
    assert set(kept(page)) == before


# -- visitors ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desktop", "laptop", "phone"])
def test_the_answer_is_in_view_and_nothing_scrolls_sideways(browser, address, size, scheme):
    with screen(browser, address, size, scheme) as page:
        choose(page)
        page.locator("#ask").scroll_into_view_if_needed()
        ask(page)
        page.wait_for_function(
            "(() => { const at = document.querySelector('.answers').getBoundingClientRect();"
            " return at.top >= 0 && at.top + 80 < innerHeight; })()"
        )
        wide, hint = page.evaluate("[document.documentElement.scrollWidth, innerWidth]"), page.locator(".detail")
        assert wide[0] <= wide[1]
        assert ("Tap a patch" in hint.inner_text()) == (size == "phone")
        assert page.get_by_label("Brush").is_visible() == (size == "phone")


IN_VIEW = """(() => {
    const at = document.querySelector('#problem').getBoundingClientRect();
    return at.top >= 0 && at.bottom < innerHeight;
})()"""


def test_a_problem_is_in_view_on_a_phone(browser, address):
    with screen(browser, address, "phone") as page:
        choose(page)
        write(page, " ")
        page.locator("#ask").click()
        problem(page, "Write a question")
        page.wait_for_function(IN_VIEW)
        # an error that comes at once, while the page still scrolls to where the answers will be
        page.evaluate("""() => new Promise((settled) => {
            document.addEventListener("scrollend", settled, { once: true });
            for (const name of ["vtc:ask", "vtc:answered"])
                document.dispatchEvent(new CustomEvent(name, { detail: [] }));
            setTimeout(settled, 2000);
        })""")
        assert page.evaluate(IN_VIEW)


def test_only_this_machine_unless_told_otherwise(address):
    port = int(address.split(":")[-1].strip("/"))
    with pytest.raises(ConnectionRefusedError):  # what listens on all addresses would answer at this one, too
        socket.create_connection(("127.0.0.2", port), timeout=5)
