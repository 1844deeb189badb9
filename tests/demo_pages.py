"""What a visitor does on a page of the demo, and what is expected of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from demo_browser import free_port, visitor
from playwright.sync_api import Page

import vtc
from vtc.demo import examples
from vtc.demo.app import serve
from vtc.demo.asking import Asked, Pair, compare
from vtc.demo.media import Picture
from vtc.eval import scenes
from vtc.eval.reader import Reader

NUMBER = 5
EXAMPLE = scenes.example("test", 0, NUMBER)
"""Its question is one of the page's examples, the second."""
SIZES = {"desktop": (1440, 1000), "laptop": (1280, 720), "phone": (390, 844)}


@contextmanager
def serving(reader: Reader, name: str) -> Iterator[str]:
    """A server in this process, until the block ends."""
    page, url = serve(reader, name, port=free_port())
    yield url
    page.close(verbose=False)


def screen(browser, address, size: str, scheme: str = "light", **options):
    """A visitor with a screen of this size; a phone is touched."""
    width, height = SIZES[size]
    phone = {"has_touch": True, "is_mobile": True} if size == "phone" else {}
    return visitor(
        browser, address, viewport={"width": width, "height": height}, color_scheme=scheme, **phone, **options
    )


# -- what is expected -------------------------------------------------------------------------------------------------


def asked(method="vtc-cls", budget=0.25, example=EXAMPLE, question=None, **settings) -> Asked:
    chosen = vtc.list_methods()[method](**settings) if isinstance(method, str) else method
    return Asked((Picture(example.image, "photo.png"),), question or example.question, chosen, budget)


def last(reader: Reader, question: Asked) -> Pair:
    *_, pair = compare(reader, question)
    return pair


# -- what a visitor does ----------------------------------------------------------------------------------------------


def upload(page: Page, path) -> None:
    page.locator("#image input[type=file]").set_input_files(path)


def choose(page: Page, number: int = 1) -> None:
    """An example: by default the one that `EXAMPLE` is."""
    assert examples.SHOWN[1] == NUMBER
    page.locator(".thumbnails button").nth(number).click()
    page.locator("#image img").wait_for()
    page.wait_for_function(  # an image and a question may be there from before
        "question => document.querySelector('#question textarea, #question input').value === question",
        arg=examples.scene(examples.SHOWN[number])[1],
    )


def write(page: Page, question: str) -> None:
    page.locator("#question textarea, #question input").fill(question)


def pick_method(page: Page, name: str) -> None:
    page.locator("#method input").click()
    page.get_by_role("option", name=name, exact=True).click()
    page.wait_for_function("name => document.querySelector(`[data-method='${name}']`)?.matches('.chosen')", arg=name)


def set_budget(page: Page, percent: int) -> None:
    box = page.locator("#budget input[type=number]")
    box.fill(str(percent))
    box.press("Tab")


def fill(page: Page, path, question=EXAMPLE.question, method="vtc-cls", percent=25) -> None:
    upload(page, path)
    page.locator("#image img").wait_for()
    write(page, question)
    set_up(page, method, percent)


def set_up(page: Page, method="vtc-cls", percent=25) -> None:
    if page.locator("#method input").input_value() != method:
        pick_method(page, method)
    if page.locator("#budget input[type=number]").input_value() != str(percent):
        set_budget(page, percent)
        page.wait_for_function(
            "percent => document.querySelector('#budget input[type=number]').value === percent", arg=str(percent)
        )


def set_number(page: Page, label: str, value: float) -> None:
    """An advanced setting to a value that no other one has; waits until the page knows of it, a moment later.

    No visitor is there in a tenth of a second after a box is shown, in which gradio still gives it its first value.
    """
    page.wait_for_timeout(500)
    page.evaluate(
        "() => { window.told = []; "
        "document.addEventListener('vtc:settings', event => window.told.push(...event.detail)); }"
    )
    page.locator("#advanced").get_by_label(label).fill(str(value))
    page.keyboard.press("Tab")
    page.wait_for_function("value => window.told.includes(value)", arg=value)


def ask(page: Page) -> None:
    """Ask, and wait until all of the answer is there."""
    answered(page, lambda: page.locator("#ask").click())


def answered(page: Page, action) -> None:
    before = page.locator("#viewer").get_attribute("data-results") or "0"
    action()
    page.wait_for_function(
        "before => (document.querySelector('#viewer').dataset.results ?? '0') !== before "
        "&& !document.querySelector('#viewer').classList.contains('waiting')",
        arg=before,
    )


def kept(page: Page, board: str = "current") -> list[int]:
    rects = page.locator(f"#viewer .{board} rect.kept")
    return rects.evaluate_all("all => all.map(rect => Number(rect.dataset.index))")


def rect(page: Page, token: int):
    return page.locator(f"#viewer .current rect[data-index='{token}']")


def answers(page: Page) -> list[str]:
    return [text.strip() for text in page.locator(".answer .text").all_inner_texts()]


def problem(page: Page, text: str) -> None:
    page.locator("#problem .problem", has_text=text).wait_for()


def saved(page: Page, button: str) -> bytes:
    """What the browser downloads."""
    with page.expect_download() as waiting:
        page.locator(f"#viewer button.{button}").click()
    return waiting.value.path().read_bytes()


def saved_json(page: Page) -> dict:
    return json.loads(saved(page, "json"))
