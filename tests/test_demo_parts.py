"""The demo's parts, without a browser."""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qsl

import gradio as gr
import models
import pytest
import torch
from demo_pages import EXAMPLE, NUMBER, asked, last
from gradio.utils import get_upload_folder
from PIL import Image

import vtc
from vtc.demo import budgets, examples, link, media, panels, settings, speed
from vtc.demo.asking import MODEL, Answer, HandPicked, Pair, compare
from vtc.demo.curve import curve
from vtc.demo.layout import layout
from vtc.demo.media import opened, sampled
from vtc.demo.shelf import Shelf, Shown
from vtc.demo.view import _by_picture, fates
from vtc.eval import cost, scenes
from vtc.eval.reader import model_path

pytest_plugins = ("demo_fixtures",)

SUMMARY = Path(scenes.__file__).parent / "results/scenes/summary.json"


# -- asking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [(), (5,), tuple(range(0, 144, 2)), tuple(range(144))])
def test_hand_picked_keeps_exactly_these(reader, tokens):
    pair = last(reader, asked(HandPicked(tokens), None))
    assert tuple(pair.trace.kept()[0].tolist()) == tokens


@pytest.mark.parametrize("method", ["tokenselect", "random-kv", "bits"])
def test_what_acts_on_the_cache_leaves_every_token_on_the_board(reader, method):
    pair = last(reader, asked(method))
    fate = json.loads(json.dumps(fates(pair.trace)))
    assert fate["left"] == [None] * 144
    assert fate["stages"] == []
    assert pair.compressed.tokens == pytest.approx(pair.trace.average_tokens.item())
    assert (pair.compressed.kv_bytes >= pair.full.kv_bytes) == (method == "tokenselect")


@pytest.mark.parametrize("family", [models.idefics3, models.llava_next, models.qwen2_vl])
def test_every_family_can_be_picked_from(family):
    model = family()
    inputs = models.prompt(model)
    with vtc.compressed(model, HandPicked((1, 20, 23))) as live, torch.inference_mode():
        model(**inputs)
    assert live.kept()[0].tolist() == [1, 20, 23]
    left = fates(live.record)["left"]
    assert len(left) == sum(live.sizes)
    assert [token for token, layer in enumerate(left) if layer is None] == [1, 20, 23]


def test_the_figures_are_those_of_the_run(reader):
    pair = last(reader, asked("fastv"))
    config = reader.model.config.get_text_config()
    text = reader.inputs([EXAMPLE.image], [EXAMPLE.question])["input_ids"].shape[1] - 144
    assert pair.compressed.tokens == pytest.approx(pair.trace.average_tokens.item())
    counts = pair.trace.tokens_per_layer[0].tolist()
    new = len(reader.processor.tokenizer(f" {pair.compressed.text}", add_special_tokens=False).input_ids)
    assert pair.compressed.kv_bytes == cost.kv_bytes(counts, text + new, config, 4)
    assert pair.full.kv_bytes > pair.compressed.kv_bytes
    assert pair.compressed.decode > 0 < pair.compressed.prefill


def test_a_visitor_who_leaves_frees_the_model(reader):
    steps = compare(reader, asked())
    next(steps)
    steps.close()
    assert MODEL.acquire(timeout=30)
    MODEL.release()
    assert "vtc" not in reader.model.__dict__


def test_visitors_at_once_get_the_serial_answers(reader, monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", 1)
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


# -- speed ------------------------------------------------------------------------------------------------------------

STEADY = {"full": [0.040, 0.041, 0.040], "small": [0.020, 0.0201, 0.020]}


@pytest.mark.parametrize(
    ("timing", "possible", "says"),
    [
        (STEADY, 2.2, "The clock follows the arithmetic"),
        (STEADY | {"vision": [0.6] * 3}, 5.0, "The vision tower takes 60 % of"),
        (STEADY | {"vision": [2.11] * 3}, 5.0, "The vision tower takes 100 % of"),
        (STEADY | {"choosing": [0.5] * 3, "vision": [0.45] * 3}, 5.0, "Choosing the tokens takes 50 % of"),
        (STEADY, 5.0, "leaves the processor idle"),
        (STEADY, 1.0, "nothing to gain"),
        (
            {"full": [0.04, 0.09, 0.02, 0.04, 0.07], "small": [0.02] * 5},
            5.0,
            "Too noisy to tell: the same prefill took",
        ),
        ({"full": [4.0], "small": [2.0]}, 5.0, "(one run)"),
    ],
)
def test_the_sentence_about_speed(timing, possible, says):
    timing = {"vision": [0.1] * 9, "choosing": [0.1] * 9} | timing
    said = speed.sentence(speed.Timing(**timing), possible)
    assert says in said
    reasons = ("arithmetic here", "vision tower", "Choosing", "idle", "nothing to gain", "noisy")
    assert sum(reason in said for reason in reasons) == 1


def test_shares_of_a_prefill_are_of_the_same_run(reader, monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", 5)
    timing = speed.measure(
        reader, reader.inputs([EXAMPLE.image], [EXAMPLE.question]), vtc.list_methods()["fastv"](), 0.25
    )
    assert 1 <= len(timing.full) == len(timing.small) == len(timing.vision) <= 5
    for vision, choosing in zip(timing.vision, timing.choosing, strict=True):
        assert 0 < vision < 1
        assert 0 < choosing < 1 - vision


# -- what is remembered -----------------------------------------------------------------------------------------------


def test_the_shelf_is_bounded_by_bytes(reader):
    trace = last(reader, asked()).trace
    shown = Shown(({"path": "x"},), "what?", vtc.list_methods()["vtc-cls"](), 0.25, trace)
    shelf = Shelf(limit=10 * shown.bytes)
    for visitor in range(50):
        shelf.put(str(visitor), shown)
        shelf.get("0")  # who is still there is not forgotten
        assert shelf.held <= shelf.limit
    assert shelf.get("0") is not None
    assert shelf.get("49").trace.kept()[0].tolist() == trace.kept()[0].tolist()
    assert shelf.get("5") is None
    shelf.put("49", shown)
    held = shelf.held
    shelf.drop("49")
    assert shelf.held < held
    assert shelf.get("49") is None


def test_what_is_remembered_holds_no_pixels(reader):
    shelf = Shelf()
    shelf.put(
        "one", Shown(({"path": "x"},), "what?", vtc.list_methods()["vtc-cls"](), 0.25, last(reader, asked()).trace)
    )
    assert shelf.held < 16_384
    for stage in shelf.get("one").trace.stages:
        assert stage.scores.untyped_storage().nbytes() == stage.scores.nbytes


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_a_video_becomes_evenly_spaced_frames(tmp_path):
    frames = [Image.new("RGB", (8, 8), (number * 6, 0, 0)) for number in range(40)]
    frames[0].save(tmp_path / "film.png", save_all=True, append_images=frames[1:])
    shown = opened([{"path": str(tmp_path / "film.png"), "orig_name": "film.png"}])
    reds = [picture.image.getpixel((0, 0))[0] // 6 for picture in shown]
    assert reds == [0, 8, 16, 24, 32]
    assert shown[1].name == "film.png, frame 2"
    assert sampled(range(8)) == list(range(8))
    with pytest.raises(ValueError, match="more than 1,800 frames"):
        sampled(range(1801))


def test_a_video_file(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "film.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=5)
        stream.width, stream.height = 32, 32
        for number in range(6):
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), (40 * number, 0, 0)))
            film.mux(stream.encode(frame))
        film.mux(stream.encode(None))
    assert len(opened([{"path": str(tmp_path / "film.mp4")}])) == 6
    (tmp_path / "bad.mp4").write_text("no film")
    with pytest.raises(ValueError, match=r"bad\.mp4 is not a video"):
        opened([{"path": str(tmp_path / "bad.mp4")}])


def test_a_video_file_without_its_reader(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "film.mp4").write_text("no film")
    with pytest.raises(ValueError, match=r"^mine.mp4 is a video file, and reading it needs PyAV"):
        opened([{"path": str(tmp_path / "film.mp4"), "orig_name": "mine.mp4"}])


def film(path: Path, *reds: int) -> dict[str, str]:
    """An upload of as many frames."""
    first, *more = [Image.new("RGB", (8, 8), (red, 0, 0)) for red in reds]
    first.save(path, save_all=True, append_images=more)
    return {"path": str(path), "orig_name": "mine.png"}


def test_what_is_too_much_is_refused_before_the_next_file_is_opened(tmp_path):
    missing = {"path": str(tmp_path / "none.png")}
    with pytest.raises(ValueError, match="These are 9 images and frames at least; the limit is 8"):
        opened([missing] * 9)
    with pytest.raises(ValueError, match="These are 10 images and frames at least; the limit is 8"):
        opened([film(tmp_path / "film.png", *range(5))] * 2 + [missing])


def test_frames_are_small_before_others_are_read(tmp_path, monkeypatch):
    """Eight of 50 megapixels would be more than a gigabyte."""
    seen = []
    monkeypatch.setattr(media, "SIDE", 4)
    monkeypatch.setattr(media, "sampled", lambda frames: [seen.append(frame.size) or frame for frame in frames])
    assert len(opened([film(tmp_path / "film.png", 0, 9, 18)])) == 3
    assert seen == [(4, 4)] * 3


def test_the_frames_of_a_video_are_bounded_together(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "DECODED", 3 * 8 * 8)
    upload = film(tmp_path / "film.png", 0, 9, 18)
    assert len(opened([upload])) == 3
    with pytest.raises(ValueError, match=r"^The frames of mine.png have more than .* megapixels together: cut it"):
        opened([film(tmp_path / "film.png", 0, 9, 18, 27)])


def test_too_many_pictures(picture):
    assert len(opened([{"path": str(picture)}] * media.PICTURES)) == media.PICTURES
    with pytest.raises(ValueError, match="the limit is 8"):
        opened([{"path": str(picture)}] * 9)


def test_tiles_lie_in_place_with_the_overview_beside():
    looks, grids = layout([(2, 2)] * 7, (300, 200), (0, 0, 300, 200))
    assert looks == [(0, 0, 300, 200), (318, 0, 300, 200)]
    assert [grid.box for grid in grids[:4]] == [
        (0, 0, 100, 100),
        (100, 0, 100, 100),
        (200, 0, 100, 100),
        (0, 100, 100, 100),
    ]
    assert grids[6].box == (318, 0, 300, 200)


def test_one_grid_lies_over_what_the_model_sees():
    _, (grid,) = layout([(2, 2)], (300, 200), (50, 0, 250, 200))
    assert (grid.rows, grid.columns, grid.box, grid.newlines) == (2, 2, (50, 0, 200, 200), False)


def test_a_mosaic_has_newlines_and_seams_where_its_tiles_meet():
    # 6 x 6 cells a tile, two tiles across: 12 columns and the newline; 4 of 6 rows are left of the padding
    _, (overview, mosaic) = layout([(6, 6), (4, 13)], (120, 40), (0, 0, 120, 40), newlines=True)
    assert (overview.newlines, overview.seams) == (False, ((), ()))
    assert (mosaic.newlines, mosaic.seams) == (True, ((127.2 + 60,), ()))
    _, (_, tall) = layout([(6, 6), (10, 7)], (60, 100), (0, 0, 60, 100), newlines=True)
    assert tall.seams == ((), (50.0,))  # 12 rows less 2 of padding, one above and one below


def test_tiles_of_several_images_that_cannot_be_told_apart():
    assert _by_picture([[1], [2], [3], [4]], 2) == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match="nobody can tell"):
        _by_picture([[1], [2], [3]], 2)


# -- settings and texts -----------------------------------------------------------------------------------------------


def test_settings_come_from_the_dataclass():
    fields = settings.components(vtc.list_methods()["vflowopt"])
    assert list(fields) == ["retain", "threshold", "cell", "alpha", "layers", "weighs"]
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
        ("vtc-cls", {"nothing": 1}),
        ("atp", {"modules": 1}),
    ],
)
def test_settings_that_cannot_be(method, values):
    with pytest.raises(ValueError, match=next(iter(values))):
        settings.configured(vtc.list_methods()[method], values)


@pytest.mark.parametrize(("name", "first"), [("vtc-cls", 1), ("fastv", 13), ("transprune", 26)])
def test_the_slider_begins_at_the_floor(inspector, name, first):
    method = vtc.list_methods()[name]()
    offered = budgets.reachable(inspector.adapter, method)
    assert offered == list(range(first, 101))
    assert ("reaches down" in budgets.note(inspector.adapter, method, 50, offered)) == (first > 1)


def test_where_the_model_lies_stays_private(inspector):
    with pytest.raises(ValueError, match=model_path("reference")) as caught:
        vtc.list_methods()["atp"]().bind(inspector.reader.model, 0.4, 144)
    said = inspector.public(caught.value)
    assert model_path("reference") not in said
    assert "reference/atp has modules" in said


def test_texts_are_escaped_and_differences_marked(reader):
    trace = last(reader, asked()).trace
    shown = panels.answers(
        Pair(Answer("a red <b>"), Answer("a blue <b>"), trace, "x < y"), "CPU", asked(question="<i>")
    )
    assert "a <mark>blue</mark> &lt;b&gt;" in shown
    assert "x &lt; y" in shown
    assert "&lt;i&gt;" in shown


def test_every_method_has_a_line_and_its_paper():
    for name, method in vtc.list_methods().items():
        line = panels.described(method)
        assert method.__doc__.splitlines()[0] in line
        assert ("https://arxiv.org/abs/" in line) == ("arXiv" in method.paper), name


def test_a_missing_curve_names_its_command(tmp_path):
    assert "vtc eval --model m" in curve(tmp_path / "none.json", "vtc eval --model m", "vtc-cls", 0.25)


@pytest.mark.parametrize("share", [0, 0.05, 0.3, 0.49, 0.5, 0.8, 1])
def test_no_label_of_the_curve_crosses_its_marker(share):
    drawn = curve(SUMMARY, "", "vtc-cls", share)
    marker = float(re.search(r'class="marker"><line x1="([\d.]+)"', drawn)[1])
    for x, anchor, text in re.findall(
        r'<text(?: class="name")? x="([\d.]+)" y="[\d.]+" text-anchor="(\w+)">([^<]+)', drawn
    ):
        if re.fullmatch(r"[\d%]+|visual tokens, layer average|this budget.*", text):
            continue  # on the axes, and above the plot
        wide = 6.2 * len(text)
        left, right = (float(x), float(x) + wide) if anchor == "start" else (float(x) - wide, float(x))
        assert not left <= marker <= right, text


# -- links ------------------------------------------------------------------------------------------------------------


def says(query: str) -> dict[str, str]:
    return dict(parse_qsl(query.removeprefix("?")))


def test_a_link_restores_what_it_was_made_of():
    values = {"retain": (0.5, 0.9, 1.0), "threshold": 3.0, "layers": None}
    query = link.query("what & why?", "vflowopt", 0.3, values, EXAMPLE, ["scene"], None)
    state = link.read(says(query))
    assert (state.scene, state.question, state.method, state.percent) == (NUMBER, "what & why?", "vflowopt", 30)
    assert settings.configured(vtc.list_methods()["vflowopt"], state.values).retain == (0.5, 0.9, 1.0)
    own = link.query("what?", "", None, {}, None, ["a b.png"], (0, 1, 2, 9))
    assert says(own) == {"image": "a b.png", "question": "what?", "picked": "0-2,9"}


@pytest.mark.parametrize(
    "given",
    [
        {"method": "none"}, {"scene": "test-0-99999"}, {"scene": "../etc"}, {"budget": "much", "method": "fastv"},
        {"budget": "-3"}, {"budget": "nan"}, {"method": "vtc-cls", "set.layers": "x"}, {"set.layers": "2"},
    ],
)  # fmt: skip
def test_a_link_that_cannot_be_restored(given):
    with pytest.raises(ValueError):  # noqa: PT011  (each has its own words)
        link.read(given)


def test_scenes_are_known_by_name_and_pixels(inspector):
    path, question = examples.scene(NUMBER)
    name = Path(path).name
    assert question == EXAMPLE.question
    assert examples.known(name, EXAMPLE.image).answer == EXAMPLE.answer
    assert examples.known("photo.png", EXAMPLE.image) is None
    assert examples.known(name, Image.new("RGB", (96, 96))) is None


# -- what comes past the page -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"question": "x" * 301}, "the limit is 300"),
        ({"name": "none"}, "no method"),
        ({"percent": "many"}, "could not convert"),
        ({"uploads": []}, "Choose an image"),
        ({"uploads": [{"path": "/etc/hostname"}]}, "uploaded files"),
        ({"uploads": ["/etc/hostname"]}, "uploaded files"),
        ({"uploads": [{"path": 3}]}, "uploaded files"),
    ],
)
def test_what_comes_past_the_page_is_checked_too(inspector, change, told):
    path = Path(get_upload_folder(), "scene.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    EXAMPLE.image.save(path)
    given = {"visitor": "v", "uploads": [{"path": str(path)}], "question": "what?", "percent": 25, "name": "vtc-cls"}
    (step,) = inspector.ask(**given | {"values": {}} | change)
    assert told in step[2]
    assert "<p" in step[2]


def test_predict_raises_what_the_page_says(inspector):
    with pytest.raises(gr.Error, match="Choose an image"):
        inspector.predict([], "what?", "vtc-cls", 0.25, {})
