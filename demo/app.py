"""The page and its events: `vtc demo`, and the app file of a Hugging Face Space."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from html import escape
from pathlib import Path
from random import randrange
from typing import Any

import gradio as gr
import torch
from PIL import Image

import vtc
from vtc import adapter
from vtc.budget import average_tokens, counts
from vtc.demo import panels, settings
from vtc.demo.asking import Asked, HandPicked, Pair, compare
from vtc.demo.view import data_url, view
from vtc.eval import scenes
from vtc.eval.images import MAX_BYTES, open_image
from vtc.eval.reader import Reader

try:
    from spaces import GPU as on_gpu  # Hugging Face lends a GPU for the length of such a call
except ImportError:

    def on_gpu(function: Callable) -> Callable:
        return function


HERE = Path(__file__).parent
QUESTION = 300
"""Characters of a question."""
SIDE = 2048
"""Pixels of the longer side; larger images are scaled down, so that the images of waiting visitors stay bounded."""
WAITING = 32
"""Visitors in the queue; the next one is told that it is full."""
EXAMPLES = (0, 3, 5, 7, 10, 17)
"""Questions of the test split."""
CHOOSE = """element.addEventListener("click", (event) => {
    const chosen = event.target.closest("button");
    if (chosen) trigger("select", { number: Number(chosen.dataset.number) });
});"""
MESSAGE = {"duration": 20, "print_exception": False}
FONTS = ("ui-sans-serif", "system-ui", "sans-serif")


class Inspector:
    """The page over one model, which all visitors share."""

    def __init__(self, reader: Reader, name: str):
        self.reader, self.name = reader, name
        self.title = Path(name).name if Path(name).is_dir() else name  # where a folder lies is nobody's business
        self.adapter = adapter.find(reader.model)
        self.examples = [scenes.example("test", 0, index) for index in EXAMPLES]
        device = reader.device
        threads = torch.get_num_threads()
        cpu = f"CPU, {threads} thread{'s' * (threads > 1)}"
        self.device = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu

    def page(self) -> gr.Blocks:
        """The page, without a server."""
        with gr.Blocks(title="vtc inspector", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
            gr.HTML(f"<h1>What does the model still see?</h1><p class='hint'>{self._subtitle()}</p>", elem_id="title")
            with gr.Row(equal_height=False):
                with gr.Column(scale=4, min_width=320):
                    self._inputs()
                with gr.Column(scale=7, min_width=340):
                    self._outputs()
            self._events()
        return demo

    def _subtitle(self) -> str:
        return (
            f"The model {escape(self.title)} answers twice: with all visual tokens, and with those that a method "
            f"keeps. It runs on {escape(self.device)}."
        )

    def _inputs(self) -> None:
        self.image = gr.Image(
            sources=["upload", "clipboard"], format="png", label="Image", height=240, buttons=[], elem_id="image"
        )
        self.gallery = gr.HTML(
            panels.thumbnails([(data_url(scene.image), scene.question) for scene in self.examples]),
            js_on_load=CHOOSE,
            elem_id="examples",
        )
        self.scene = gr.Button("New scene", size="sm", elem_id="scene")
        self.question = gr.Textbox(
            label="Question", placeholder="what color is the circle?", max_length=QUESTION, elem_id="question"
        )
        self.method = gr.Dropdown(list(vtc.list_methods()), value="vtc-cls", label="Method", elem_id="method")
        note = self.budget_note("vtc-cls", 25)
        self.budget = gr.Slider(1, 100, 25, step=1, label="Budget in percent", info=note, buttons=[], elem_id="budget")
        with gr.Accordion("Advanced settings of the method", open=False, elem_id="advanced"):
            self.groups, self.fields = {}, {}
            for name, method in vtc.list_methods().items():
                with gr.Group(visible=name == "vtc-cls") as self.groups[name]:
                    self.fields[name] = settings.components(method)
                    if not self.fields[name]:
                        gr.HTML("<p class='hint'>This method has none.</p>")
        self.submit = gr.Button("Ask", variant="primary", elem_id="ask")

    def _outputs(self) -> None:
        self.shown = gr.State(time_to_live=3600)  # (Asked, Pair) of the visitor
        self.answers = gr.HTML(panels.answers(Pair(), self.device), elem_id="answers")
        script, template = ((HERE / name).read_text() for name in ("viewer.js", "viewer.html"))
        self.viewer = gr.HTML(
            None, html_template=template, js_on_load=script, apply_default_css=False, elem_id="viewer"
        )
        self.curve = gr.HTML(self._curve("vtc-cls", None), elem_id="curve")

    def _events(self) -> None:
        boxes = [box for fields in self.fields.values() for box in fields.values()]
        asking = [self.image, self.question, self.method, self.budget, *boxes]
        shown, drawn = [self.answers, self.shown], [self.viewer, self.curve]
        turn = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "hidden"}
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        # unprocessed: gradio would decode an image of any size, and a file that is none would be its own error
        asks = [self.submit.click, self.question.submit]
        first = gr.on(asks, on_gpu(self.ask), asking, shown, preprocess=False, api_name="ask", **turn)
        again = self.viewer.submit(on_gpu(self.ask_again), self.shown, shown, api_visibility="private", **turn)
        for answered in (first, again):
            answered.success(self.draw, self.shown, drawn, **quick)
        # queued: outside of the queue gradio hides what an error says
        opened = self.image.upload(self.check_image, self.image, None, preprocess=False, **quick | {"queue": True})
        opened.failure(lambda: None, None, self.image, **quick)
        self.scene.click(self.new_scene, None, [self.image, self.question], **quick)
        self.gallery.select(self.example, None, [self.image, self.question], **quick)
        knobs = [self.method, self.budget]
        gr.on(
            [self.budget.change, self.method.change],
            lambda *chosen: gr.Slider(info=self.budget_note(*chosen)),
            knobs,
            self.budget,
            **quick,
        )
        self.method.change(
            lambda chosen: [gr.Group(visible=name == chosen) for name in self.groups],
            self.method,
            list(self.groups.values()),
            **quick,
        )

    # -- what visitors do -----------------------------------------------------------------------------------------

    def ask(
        self, image: dict[str, Any] | None, question: str, method: str, budget: float, *values: Any
    ) -> Iterator[tuple]:
        """Stream both answers, or say what is missing or wrong."""
        with self._told():
            asked = self._checked(image, question, method, budget, values)
            yield from self._stream(asked)

    def ask_again(self, shown: tuple[Asked, Pair] | None, event: gr.EventData) -> Iterator[tuple]:
        """The same question with the tokens alone that the visitor picked."""
        with self._told():
            picked = getattr(event, "keep", [])
            if shown is None or not all(type(token) is int and token >= 0 for token in picked):
                raise ValueError("Ask a question first, then pick patches.")
            asked = replace(shown[0], method=HandPicked(tuple(sorted(set(picked)))), budget=None)
            yield from self._stream(asked)

    def draw(self, shown: tuple[Asked, Pair]) -> tuple[dict[str, Any], str]:
        """The patches, and the curve with its marker."""
        asked, pair = shown
        patches = view(asked.image, pair.trace, self.reader.processor.image_processor)
        return patches, self._curve(asked.method.name, pair.compressed.tokens)

    def new_scene(self) -> tuple[Image.Image, str]:
        """An image and a question of the benchmark's test split."""
        scene = scenes.example("test", 0, randrange(2000))
        return scene.image, scene.question

    def example(self, event: gr.EventData) -> tuple[Image.Image, str]:
        """The example that was chosen."""
        scene = self.examples[event.number]
        return scene.image, scene.question

    def check_image(self, image: dict[str, Any] | None) -> None:
        """Say of an upload that cannot be read why."""
        with self._told():
            if image:
                self._opened(image)

    def budget_note(self, method: str, percent: float) -> str:
        """What the slider means in tokens, or how far the method can go."""
        tokens = self.adapter.tokens_per_image()
        if tokens is None:
            return "Of the image's visual tokens, averaged over the decoder layers."
        budget, shape = self._fraction(percent), self.adapter.shape()
        try:
            bound = vtc.list_methods()[method]().bind(self.reader.model, budget, tokens)
            kept = counts(bound, tokens, budget, shape)
        except vtc.BudgetError as error:
            return f"Too low: {method} reaches down to {error.floor:.0%}."
        except ValueError as error:
            return self._public(error)
        layers = tuple(stage.site for stage in bound.stages(shape))
        spent = budget * tokens if bound.adaptive else average_tokens(tokens, kept, layers, shape.decoder_layers)
        return f"{spent:.0f} of {tokens} visual tokens, averaged over the decoder layers."

    # -- how it is done -------------------------------------------------------------------------------------------

    def _checked(
        self, image: dict[str, Any] | None, question: str, method: str, percent: float, values: tuple
    ) -> Asked:
        """The question as `Asked`. Raises ValueError that says what is missing or wrong."""
        if not image:
            raise ValueError("Choose an image first: upload or paste one, take an example, or press New scene.")
        if not (question := (question or "").strip()):
            raise ValueError("Write a question about the image.")
        if len(question) > QUESTION:
            raise ValueError(f"The question has {len(question)} characters; the limit is {QUESTION}.")
        if method not in vtc.list_methods():
            raise ValueError(f"There is no method {method!r}.")
        names = [(owner, field) for owner, fields in self.fields.items() for field in fields]
        given = {field: value for (owner, field), value in zip(names, values, strict=True) if owner == method}
        chosen = settings.configured(vtc.list_methods()[method], given)
        return Asked(self._opened(image), question, chosen, self._fraction(percent))

    def _fraction(self, percent: float) -> float:
        return min(max(float(percent), 1), 100) / 100

    def _opened(self, upload: dict[str, Any]) -> Image.Image:
        """The upload as an image; errors name the file as the visitor knows it, not where it lies."""
        path = Path(upload["path"])
        try:
            image = open_image(path)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), upload.get("orig_name") or path.name)) from None
        image.thumbnail((SIDE, SIDE))
        return image

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Errors as messages on the page: what a visitor can change in its own words, the rest in the server's log."""
        try:
            yield
        except (ValueError, TypeError) as error:
            raise gr.Error(escape(self._public(error)), **MESSAGE) from None
        except Exception:
            logging.getLogger(__name__).exception("a visitor's question failed")
            message = "The model could not answer this with these settings; the log of the server says why."
            raise gr.Error(message, **MESSAGE) from None

    def _public(self, error: Exception) -> str:
        """What an error says, without where the model lies on this machine."""
        return str(error).replace(str(Path(self.reader.model.config._name_or_path)), self.title)

    def _stream(self, asked: Asked) -> Iterator[tuple[str, tuple[Asked, Pair]]]:
        for pair in compare(self.reader, asked):
            yield panels.answers(pair, self.device), (asked, pair)

    def _curve(self, method: str, tokens: float | None) -> str:
        if self.name == "reference":
            path = Path(vtc.eval.__file__).parent / "results/scenes/summary.json"
        else:
            path = Path("out/demo", self.title.replace("/", "--"), "summary.json")
        methods = "vtc-cls,fastv,random,uniform"
        command = f"vtc eval --model {self.title} --methods {methods} --out {path.parent}"
        return panels.curve(path, command, method, tokens)


def launch(reader: Reader, name: str, host: str | None = None, port: int | None = None) -> None:
    """Serve the page until it is stopped: on 127.0.0.1 unless `host` or GRADIO_SERVER_NAME says otherwise.

    Raises OSError where the port is taken.
    """
    page = Inspector(reader, name).page().queue(max_size=WAITING, default_concurrency_limit=4)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        run_history=False,
        max_file_size=MAX_BYTES,
        state_session_capacity=100,
        footer_links=[],
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=("monospace",)),
        css=(HERE / "page.css").read_text(),
    )
    print(f"vtc inspector: {address} (Ctrl-C stops it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    from vtc.eval.reader import load, model_path, pick_device

    launch(load(model_path("reference"), pick_device("auto"), max_new_tokens=64), "reference")
