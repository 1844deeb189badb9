"""The demo over models of one's own, with several images and with videos, in headless Chromium."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from demo_browser import served, visitor
from demo_pages import EXAMPLE, ask, fill, kept, rect, saved_json, serving, set_budget, write
from own_models import load_qwen2_vl, save_llava_next, save_qwen2_vl
from PIL import Image, ImageDraw

from vtc.eval.reader import load

pytest_plugins = ("demo_fixtures",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("own")


@pytest.fixture(scope="module")
def tiled(folder):
    """A LLaVA-NeXT-like model, from disk."""
    save_llava_next(folder / "llava-next")
    with serving(load(str(folder / "llava-next"), "cpu", 8), str(folder / "llava-next")) as address:
        yield address


@pytest.fixture(scope="module")
def squares(folder):
    """A Qwen-VL-like model, from disk."""
    save_qwen2_vl(folder / "qwen")
    with serving(load_qwen2_vl(folder / "qwen"), str(folder / "qwen")) as address:
        yield address


@pytest.fixture
def wide(tmp_path):
    image = Image.new("RGB", (192, 96), "navy")
    ImageDraw.Draw(image).ellipse((120, 20, 170, 70), fill="red")
    image.save(tmp_path / "wide.png")
    return tmp_path / "wide.png"


def boxes(page, selector="#viewer .current rect") -> list[tuple[float, ...]]:
    numbers = "all => all.map(r => ['x', 'y', 'width', 'height'].map(name => Number(r.getAttribute(name))))"
    return page.locator(selector).evaluate_all(numbers)


def middle(box) -> tuple[float, float]:
    x, y, width, height = box
    return x + width / 2, y + height / 2


def test_tiles_lie_where_they_are(browser, tiled, wide):
    with visitor(browser, tiled) as page:
        fill(page, wide, "what color is the dot?")
        page.get_by_text("Of the image's visual tokens").wait_for()
        ask(page)
        record = saved_json(page)
        shown = boxes(page)
        assert record["tokens"] == len(shown) == 36 + 6 * 13
        # the overview: 6 x 6 cells over the whole image; beside it the mosaic: 6 rows of 12 cells and a newline
        for row in range(6):
            for column in range(6):
                x, y = middle(shown[6 * row + column])
                assert (x, y) == (pytest.approx((column + 0.5) * 32), pytest.approx((row + 0.5) * 16))
            for column in range(12):
                x, y = middle(shown[36 + 13 * row + column])
                assert (x, y) == (pytest.approx(1.06 * 192 + (column + 0.5) * 16), pytest.approx((row + 0.5) * 16))
            assert shown[36 + 13 * row + 12][0] > 2.06 * 192  # outside of the image, of which it shows nothing
        assert page.locator("rect.newline").count() == 6
        rect(page, 48).hover()
        assert page.locator(".detail").inner_text().startswith("Newline of row 1")
        (seam,) = page.locator(".seam").evaluate_all("all => all.map(line => Number(line.getAttribute('x1')))")
        assert seam == pytest.approx(1.06 * 192 + 96)  # two tiles side by side
        assert kept(page) == record["kept"]


def test_merged_squares_lie_where_they_are(browser, squares, wide):
    with visitor(browser, squares) as page:
        fill(page, wide, "what color is the dot?")
        ask(page)
        shown = boxes(page)
        rows = len({round(y, 3) for _, y, _, _ in shown})
        columns = len(shown) // rows
        assert columns > rows > 1  # the image is wide
        for token, box in enumerate(shown):
            x, y = middle(box)
            assert x == pytest.approx((token % columns + 0.5) * 192 / columns, abs=0.05)
            assert y == pytest.approx((token // columns + 0.5) * 96 / rows, abs=0.05)


@pytest.mark.parametrize("model", ["tiled", "squares"])
def test_several_images_in_a_prompt(browser, request, model, wide, tmp_path):
    Image.new("RGB", (96, 96), "green").save(tmp_path / "second.png")
    with visitor(browser, request.getfixturevalue(model)) as page:
        fill(page, wide, "what color is the dot?")
        page.locator("#more").get_by_text("More images").click()
        page.locator("#more input[type=file]").set_input_files([tmp_path / "second.png"])
        page.locator("#more").get_by_text("second").first.wait_for()
        ask(page)
        record = saved_json(page)
        assert [image["name"] for image in record["images"]] == ["wide.png", "second.png"]
        assert page.locator(".pictures .name").inner_text() == "Image 1 of 2: wide.png"
        first = page.locator("#viewer .current rect").count()
        drawn = set(kept(page))
        page.locator("#viewer [name=picture]").fill("1")
        assert page.locator(".pictures .name").inner_text() == "Image 2 of 2: second.png"
        assert first + page.locator("#viewer .current rect").count() == record["tokens"]
        assert drawn | set(kept(page)) == set(record["kept"])
        token = int(page.locator("#viewer .current rect").first.get_attribute("data-index"))
        assert token == first  # tokens are counted over all images
        rect(page, token).click()
        assert (token in kept(page)) != (token in record["kept"])


def test_a_short_video_is_frames_with_a_slider(browser, squares, tmp_path):
    frames = [Image.new("RGB", (96, 96), (40 * number, 0, 200 - 40 * number)) for number in range(5)]
    frames[0].save(tmp_path / "clip.webp", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    with visitor(browser, squares) as page:
        page.locator("#more").get_by_text("More images").click()
        page.locator("#more input[type=file]").set_input_files([tmp_path / "clip.webp"])
        page.locator("#more").get_by_text("clip").first.wait_for()
        write(page, "what color is it?")
        ask(page)
        seen = []
        for number in range(5):
            page.locator("#viewer [name=picture]").fill(str(number))
            seen.append(page.locator("#viewer .current image").first.get_attribute("href"))
            assert (
                page.locator(".pictures .name").inner_text()
                == f"Image {number + 1} of 5: clip.webp, frame {number + 1}"
            )
        assert len(set(seen)) == 5
        set_budget(page, 60)
        page.get_by_text("At 60 % the same scores keep").wait_for()


def test_one_image_has_no_slider(page, picture):
    fill(page, picture)
    ask(page)
    assert page.locator("#viewer .pictures").is_hidden()


def test_the_command_serves_a_model_of_ones_own_at_once(browser, folder, tiled, wide):
    """`vtc demo --model FOLDER` as its own process, with visitors beside each other."""
    from gradio_client import Client, handle_file

    with served("--model", str(folder / "llava-next"), "--max-new-tokens", "4") as (address, _):

        def predict(number: int) -> dict:
            client = Client(address, verbose=False)
            return client.predict(image=handle_file(wide), question=EXAMPLE.question, api_name="/predict")

        with ThreadPoolExecutor(3) as pool:
            records = list(pool.map(predict, range(3)))
        assert {record["model"] for record in records} == {"llava-next"}
        assert len({record["answers"]["compressed"]["text"] for record in records}) == 1
