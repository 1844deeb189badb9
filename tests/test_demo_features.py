"""What researchers come for, in headless Chromium: the schedule, merges, side by side, re-selection, the curve."""

from __future__ import annotations

from dataclasses import replace

import pytest
from demo_pages import (
    EXAMPLE,
    answered,
    answers,
    ask,
    asked,
    choose,
    kept,
    last,
    pick_method,
    rect,
    screen,
    set_budget,
    set_up,
    write,
)

import vtc
from vtc.demo.reselect import reselect
from vtc.demo.view import fates

pytest_plugins = ("demo_fixtures",)


def wait_kept(page, expected: list[int]) -> None:
    page.wait_for_function(
        "expected => JSON.stringify([...document.querySelectorAll('.current rect.kept')]"
        ".map(rect => Number(rect.dataset.index))) === JSON.stringify(expected)",
        arg=expected,
    )


# -- the schedule -----------------------------------------------------------------------------------------------------


def test_the_slider_and_the_bars_replay_the_schedule(page, reader):
    choose(page)
    set_up(page, "transprune", 50)
    ask(page)
    trace = last(reader, asked("transprune", 0.5)).trace
    for layer in range(trace.depth):
        page.locator("#viewer [name=layer]").fill(str(layer))
        assert kept(page) == trace.alive(layer)[0].tolist()
    titles = page.locator(".bars i").evaluate_all("bars => bars.map(bar => bar.title)")
    counts = trace.tokens_per_layer[0].tolist()
    assert titles == [f"{count} of 144 tokens enter layer {layer}" for layer, count in enumerate(counts)]
    high = page.locator(".bars i").evaluate_all("bars => bars.map(bar => bar.getBoundingClientRect().height)")
    assert high[0] / high[-1] == pytest.approx(counts[0] / counts[-1], rel=0.1)
    page.locator(".bars i").nth(2).click()
    assert kept(page) == trace.alive(2)[0].tolist()
    page.get_by_label("Heat map of ranks").check()
    assert page.locator("rect.heated").count() == 144  # nothing was scored before the first drop
    page.locator("#viewer [name=layer]").fill(str(trace.depth - 1))
    assert page.locator("rect.heated").count() == len(trace.scores(-1)[0])


def test_the_play_button_runs_through_the_layers(page):
    choose(page)
    ask(page)
    where = page.locator(".where")
    assert where.inner_text() == "layer 7 of 7"
    page.get_by_role("button", name="Play the layers").click()
    page.wait_for_function("document.querySelector('.where').textContent === 'layer 2 of 7'")
    page.get_by_role("button", name="Stop").click()
    stopped = where.inner_text()
    page.wait_for_timeout(700)
    assert where.inner_text() == stopped != "layer 7 of 7"


def test_a_patch_tells_its_score_and_where_it_left(page, reader):
    choose(page)
    set_up(page, "fastv", 25)
    ask(page)
    stage = last(reader, asked("fastv")).trace.stages[0]
    token, lost = int(stage.scores[0].argmax()), int(stage.scores[0].argmin())
    rect(page, token).hover()
    assert f"score {stage.scores[0, token]:.3g}"[:9] in page.locator(".detail").inner_text()
    assert "rank 1 of 144; read by every layer" in page.locator(".detail").inner_text()
    rect(page, lost).hover()
    assert page.locator(".detail").inner_text().endswith("rank 144 of 144; left before layer 1")


# -- merges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tome", "vflowopt"])
def test_merges_are_colours_with_their_leader(page, reader, method):
    choose(page)
    set_up(page, method, 25)
    ask(page)
    into = fates(last(reader, asked(method)).trace)["into"]
    members = {token for token, target in enumerate(into) if target is not None}
    leaders = {into[token] for token in members}
    merged = page.locator("rect.merged").evaluate_all(
        "all => all.map(rect => [Number(rect.dataset.index), rect.style.getPropertyValue('--group')])"
    )
    colours = dict(merged)
    assert members
    assert colours.keys() == members | leaders
    assert all(colours[token] == colours[into[token]] for token in members)
    assert page.locator(".leader").count() == len(leaders)
    token = min(members)
    rect(page, token).hover()
    assert f"merged into patch {into[token]} before the decoder" in page.locator(".detail").inner_text()
    group = {other for other in members if into[other] == into[token]} | {into[token]}
    assert page.locator("rect.mate").count() == len(group)
    rect(page, into[token]).hover()
    assert f"stands for {len(group)} patches" in page.locator(".detail").inner_text()


def test_what_is_dropped_is_not_shown_as_merged(page):
    choose(page)
    ask(page)
    assert page.locator("rect.merged, .leader").count() == 0


# -- side by side -----------------------------------------------------------------------------------------------------


def test_two_methods_side_by_side_with_what_only_one_keeps(page, reader):
    choose(page)
    ask(page)
    page.get_by_role("button", name="Pin to compare").click()
    set_up(page, "fastv", 40)
    ask(page)
    one = set(last(reader, asked()).trace.kept()[0].tolist())
    two = set(last(reader, asked("fastv", 0.4)).trace.kept()[0].tolist())
    assert set(kept(page, "pinned")) == one
    assert set(kept(page)) == two
    only = "all => all.map(rect => Number(rect.dataset.index))"
    assert set(page.locator(".pinned rect.only").evaluate_all(only)) == one - two
    assert set(page.locator(".current rect.only").evaluate_all(only)) == two - one
    said = f"Both keep {len(one & two)} tokens; {len(one - two)} only the pinned one, {len(two - one)} only the current"
    assert said in page.locator(".difference").inner_text()
    assert page.locator(".pinned .caption").inner_text().startswith("Pinned: vtc-cls at 25 %")
    page.get_by_role("button", name="Unpin").click()
    assert page.locator(".pinned").is_hidden()
    assert page.locator("rect.only").count() == 0


def test_a_second_question_and_what_changes(page, reader):
    choose(page)
    set_up(page, "fastv", 25)
    ask(page)
    page.get_by_role("button", name="Pin to compare").click()
    write(page, "what word is it?")
    ask(page)
    first = last(reader, asked("fastv"))
    second = last(reader, asked("fastv", question="what word is it?"))
    assert set(kept(page, "pinned")) == set(first.trace.kept()[0].tolist()) != set(kept(page))
    assert set(kept(page)) == set(second.trace.kept()[0].tolist())
    assert f"{EXAMPLE.question} → {first.compressed.text}" in page.locator(".pinned .caption").inner_text()
    assert f"what word is it? → {second.compressed.text}" in page.locator(".current .caption").inner_text()


def test_other_images_are_not_compared(page):
    choose(page)
    ask(page)
    page.get_by_role("button", name="Pin to compare").click()
    choose(page, 0)
    ask(page)
    assert page.locator(".pinned").is_hidden()
    assert "of other images" in page.locator(".difference").inner_text()


@pytest.mark.parametrize(("size", "beside"), [("laptop", True), ("phone", False)])
def test_boards_lie_beside_each_other_where_there_is_room(browser, address, size, beside):
    with screen(browser, address, size, "dark") as page:
        choose(page)
        ask(page)
        page.get_by_role("button", name="Pin to compare").click()
        left, right = (page.locator(f".{board} svg").bounding_box() for board in ("pinned", "current"))
        assert (left["y"] == right["y"]) == beside
        assert (left["x"] == right["x"]) != beside


# -- re-selection -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vtc-cls", "fastv", "vflowopt", "uniform"])
def test_another_budget_is_selected_at_once_and_asked_later(page, reader, inspector, method):
    choose(page)
    set_up(page, method, 25)
    ask(page)
    before, shape = answers(page), inspector.adapter.shape()
    trace = reselect(last(reader, asked(method)).trace, vtc.list_methods()[method](), 0.25, 0.6, shape)
    set_budget(page, 60)
    wait_kept(page, trace.alive(trace.depth - 1)[0].tolist())
    assert "At 60 % the same scores keep" in page.locator(".count").inner_text()
    assert answers(page) == before
    assert page.locator("#answers.old").count() == 1
    ask(page)
    assert kept(page) == last(reader, asked(method, 0.6)).trace.kept()[0].tolist()
    set_budget(page, 30)
    page.get_by_text("At 30 % the same scores keep").wait_for()
    set_budget(page, 60)
    wait_kept(page, last(reader, asked(method, 0.6)).trace.kept()[0].tolist())
    assert "press Ask" not in page.locator(".count").inner_text()


@pytest.mark.parametrize(("method", "reason"), [("transprune", "scores anew"), ("tome", "differently at each budget")])
def test_where_the_scores_would_be_others_it_says_so(page, method, reason):
    choose(page)
    set_up(page, method, 50)
    ask(page)
    before = kept(page)
    set_budget(page, 60)
    page.locator(".count", has_text=reason).wait_for()
    assert kept(page) == before


# -- brush ------------------------------------------------------------------------------------------------------------


def test_dragging_brushes_over_many(page):
    choose(page)
    ask(page)
    before = set(kept(page))
    row = [token for token in range(132, 144) if token not in before][:5]
    rect(page, 143).scroll_into_view_if_needed()
    start, end = rect(page, row[0]).bounding_box(), rect(page, row[-1]).bounding_box()
    page.mouse.move(start["x"] + 5, start["y"] + 5)
    page.mouse.down()
    page.mouse.move(end["x"] + 5, end["y"] + 5, steps=30)
    page.mouse.up()
    assert set(kept(page)) == before | set(range(row[0], row[-1] + 1))
    page.mouse.move(start["x"] + 5, start["y"] + 30)
    assert set(kept(page)) == before | set(range(row[0], row[-1] + 1))  # the stroke has ended
    answered(page, lambda: page.locator("button.again").click())
    assert set(kept(page)) == before | set(range(row[0], row[-1] + 1))


def test_a_tap_toggles_and_a_finger_brushes_only_when_told(browser, address):
    stroke = """(way) => way.forEach(([kind, token]) => {
        const place = document.querySelector(`.current rect[data-index='${token}']`).getBoundingClientRect();
        const at = { clientX: place.x + 3, clientY: place.y + 3, pointerType: "touch", bubbles: true };
        document.elementFromPoint(at.clientX, at.clientY).dispatchEvent(new PointerEvent(kind, at));
    })"""

    def drag(page, first: int, last: int) -> None:
        page.evaluate(stroke, [["pointerdown", first], ["pointermove", last], ["pointerup", last]])

    with screen(browser, address, "phone") as page:
        choose(page)
        set_up(page, "uniform", 1)
        ask(page)
        (only,) = kept(page)
        other = only + 1
        page.locator(".current svg").scroll_into_view_if_needed()
        drag(page, other, other + 1)
        assert kept(page) == [only]
        rect(page, other).tap()
        assert kept(page) == [only, other]
        page.get_by_label("Brush").check()
        drag(page, other + 1, other + 2)
        assert kept(page) == [only, other, other + 1, other + 2]


# -- the curve and the method -----------------------------------------------------------------------------------------


def test_the_curve_has_the_budget_and_names_its_lines(page):
    page.locator("#curve .marker", has_text="this budget: 36 tokens").wait_for()
    set_budget(page, 50)
    page.locator("#curve .marker", has_text="this budget: 72 tokens").wait_for()
    name = page.locator("#curve [data-method=random] .name")
    assert name.evaluate("name => getComputedStyle(name).opacity") == "0"
    page.locator("#curve [data-method=random]").focus()
    assert name.evaluate("name => getComputedStyle(name).opacity") == "1"
    chosen = page.locator("#curve .chosen .name")
    assert chosen.evaluate("name => getComputedStyle(name).opacity") == "0"
    pick_method(page, "tome")
    assert page.locator("#curve .chosen").get_attribute("data-method") == "tome"


def test_the_method_says_what_it_does_and_links_its_paper(page):
    for name in ("fastv", "random"):
        pick_method(page, name)
        method = vtc.list_methods()[name]
        page.locator("#method").get_by_text(method.__doc__.splitlines()[0][:40]).wait_for()
        links = page.locator("#method a").evaluate_all("all => all.map(link => link.href)")
        assert links == (["https://arxiv.org/abs/2403.06764"] if name == "fastv" else [])


def test_a_preview_is_of_the_answer_that_is_shown(inspector, reader):
    """Not of another method, nor of other settings, nor of another visitor."""
    from vtc.demo.shelf import Shown

    trace = last(reader, asked()).trace
    inspector.shelf.put("one", Shown((), "what?", vtc.list_methods()["vtc-cls"](), 0.25, trace))
    assert inspector.preview("one", "vtc-cls", {}, 50)["budget"] == 0.5
    assert inspector.preview("one", "vtc-cls", {}, 25) is None
    assert inspector.preview("one", "fastv", {}, 50) is None
    assert inspector.preview("one", "vtc-cls", {"layers": 1}, 50) is None
    assert inspector.preview("two", "vtc-cls", {}, 50) is None
    everything = last(reader, replace(asked(), budget=1.0)).trace
    inspector.shelf.put("one", Shown((), "what?", vtc.list_methods()["vtc-cls"](), 1.0, everything))
    assert "nothing was scored" in inspector.preview("one", "vtc-cls", {}, 50)["reason"]
