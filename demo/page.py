"""The page: its components and their events. What they do is in `inspector.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

import vtc
from vtc.demo import budgets, examples, link, panels, settings
from vtc.demo.asking import Pair
from vtc.demo.inspector import QUESTION, Inspector
from vtc.demo.media import FILMS, data_url
from vtc.eval import scenes

try:
    from spaces import GPU as on_gpu  # Hugging Face lends a GPU for the length of such a call
except ImportError:

    def on_gpu(function: Callable) -> Callable:
        return function


HERE = Path(__file__).parent
SCRIPTS = ("board.js", "compare.js", "hand.js", "take.js", "viewer.js")
FIRST = link.State(method="vtc-cls", percent=25)
"""How the page opens, unless a link or whoever serves it says otherwise."""
CHOOSE = """element.addEventListener("click", (event) => {
    const chosen = event.target.closest("button");
    if (chosen) trigger("select", { number: Number(chosen.dataset.number) });
});"""
TELL = """(...values) => {{ document.dispatchEvent(new CustomEvent("vtc:{0}", {{ detail: values }})); return []; }}"""
"""Hands the values of the inputs to the viewer, which marks what no longer belongs to them."""
PREVIEW = """watch("value", () => {
    document.dispatchEvent(new CustomEvent("vtc:preview", { detail: JSON.parse(props.value || "null") }));
});"""
PRESS = """(problem) => { if (!problem && new URLSearchParams(location.search).has("scene")) setTimeout(() => {
    document.querySelector("#ask").click(); }, 200); }"""
HERE_NOW = """element.querySelector(".origin").textContent = location.origin + location.pathname;"""


def build(inspector: Inspector, first: link.State = FIRST) -> gr.Blocks:
    """The page, without a server; `first` is the method, budget and settings that it opens with."""
    return Page(inspector, first).blocks


class Page:
    """The components, and the events between them."""

    def __init__(self, inspector: Inspector, first: link.State = FIRST):
        self.inspector, self.first = inspector, first
        with gr.Blocks(title="vtc inspector", analytics_enabled=False, delete_cache=(3600, 3600)) as self.blocks:
            title, device = inspector.title, inspector.device
            gr.Markdown(
                f"# What does the model still see?\nThe model `{title}` answers twice: with all visual tokens, and "
                f"with those that a method keeps. It runs on {device}.",
                elem_id="title",
            )
            with gr.Row(equal_height=False):
                with gr.Column(scale=4, min_width=320, elem_id="inputs"):
                    self._inputs()
                with gr.Column(scale=7, min_width=340):
                    self._outputs()
            with gr.Accordion("Ask from Python", open=False, elem_id="api"):
                gr.HTML(panels.api(), js_on_load=HERE_NOW)
            self._events()
            gr.api(self._predict, api_name="predict", concurrency_limit=1, concurrency_id="model")

    # -- components -----------------------------------------------------------------------------------------------

    def _inputs(self) -> None:
        self.image = gr.Image(
            sources=["upload", "clipboard"], format="png", label="Image", height=210, buttons=[], elem_id="image"
        )
        shown = [scenes.example("test", 0, number) for number in examples.SHOWN]
        self.gallery = gr.HTML(
            panels.thumbnails([(data_url(scene.image), scene.question) for scene in shown]),
            js_on_load=CHOOSE,
            elem_id="examples",
        )
        with gr.Accordion("More images, or a short video", open=False, elem_id="more"):
            self.files = gr.File(file_count="multiple", file_types=["image", *FILMS], label="Files", height=120)
        with gr.Row(equal_height=True, elem_id="asking"):
            self.question = gr.Textbox(
                label="Question",
                placeholder="what color is the circle?",
                max_length=QUESTION,
                elem_id="question",
                scale=4,
                min_width=200,
            )
            self.submit = gr.Button("Ask", variant="primary", elem_id="ask", scale=1, min_width=70)
        self.problem = gr.HTML(panels.problem(), elem_id="problem")
        first, info = self.first, panels.described(vtc.list_methods()[self.first.method])
        self.method = gr.Dropdown(
            list(vtc.list_methods()), value=first.method, label="Method", info=info, elem_id="method"
        )
        slider, curve = self._budget(first.method, first.percent, first.values)
        slider = {"value": first.percent, **slider}
        self.budget = gr.Slider(**slider, step=1, label="Budget in percent", buttons=[], elem_id="budget")
        self.curve = gr.HTML(curve, elem_id="curve")
        with gr.Accordion("Advanced settings of the method", open=False, elem_id="advanced"):
            self.groups, self.fields = {}, {}
            for name, method in vtc.list_methods().items():
                with gr.Group(visible=name == first.method) as self.groups[name]:
                    self.fields[name] = settings.components(method, first.values if name == first.method else {})
                    if not self.fields[name]:
                        gr.HTML("<p class='hint'>This method has none.</p>")
        self.boxes = [box for fields in self.fields.values() for box in fields.values()]

    def _outputs(self) -> None:
        gr.HTML("<p class='stale' role='status'></p>", elem_id="stale")
        self.answers = gr.HTML(panels.answers(Pair(), self.inspector.device), elem_id="answers")
        script = "\n".join((HERE / name).read_text() for name in SCRIPTS)
        template = (HERE / "viewer.html").read_text()
        self.viewer = gr.HTML(
            None, html_template=template, js_on_load=script, apply_default_css=False, elem_id="viewer"
        )
        self.preview = gr.HTML(None, html_template="", js_on_load=PREVIEW, elem_id="preview")

    # -- events ---------------------------------------------------------------------------------------------------

    def _events(self) -> None:
        asking = [self.image, self.files, self.question, self.method, self.budget, *self.boxes]
        knobs, drawn = [self.method, self.budget, *self.boxes], [self.answers, self.viewer, self.problem, self.curve]
        turn = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "hidden"}
        private = {"api_visibility": "private", "show_progress": "hidden"}
        quick = {"queue": False, **private}
        # unprocessed: gradio would decode an image of any size, and a file that is none would be its own error
        asks = [self.submit.click, self.question.submit]
        gr.on(asks, None, asking, None, js=TELL.format("ask"), **quick)
        load = {"api_name": "ask", "api_visibility": "undocumented"}  # tests/demo_load.py asks by it
        first = gr.on(asks, on_gpu(self._ask), asking, drawn, preprocess=False, **load, **turn)
        again = self.viewer.submit(on_gpu(self._pick), self.method, drawn, api_visibility="private", **turn)
        for answered in (first, again):
            answered.then(None, asking, None, js=TELL.format("answered"), **quick)
        changes = [box.change for box in asking]
        gr.on(changes, None, asking, None, js=TELL.format("settings"), **quick)
        gr.on(
            [self.image.upload, self.files.upload],
            self._check,
            [self.image, self.files],
            [self.problem, self.image],
            preprocess=False,
            **quick,
        )
        self.gallery.select(self._scene, None, [self.image, self.question, self.problem], **quick)
        self.method.change(self._method, knobs, [self.method, self.budget, self.curve, *self.groups.values()], **quick)
        gr.on(
            [box.change for box in (self.budget, *self.boxes)],
            self._moved,
            knobs,
            [self.budget, self.curve, self.preview],
            trigger_mode="always_last",
            **quick,
        )
        restored = self.blocks.load(self._restore, None, [*asking, self.problem], **quick)
        restored.then(None, self.problem, None, js=PRESS, **quick)

    def _named(self, method: str, values: tuple) -> dict[str, Any]:
        """Of all input fields those of the method, by name."""
        names = [(owner, field) for owner, fields in self.fields.items() for field in fields]
        return {field: value for (owner, field), value in zip(names, values, strict=True) if owner == method}

    def _ask(self, request: gr.Request, image: Any, files: Any, question: str, method: str, budget: float, *values):
        uploads, named = _uploads(image, files), self._named(method, values)
        yield from self.inspector.ask(request.session_hash, uploads, question, budget, method, named)

    def _pick(self, request: gr.Request, event: gr.EventData, method: str):
        yield from self.inspector.ask_picked(request.session_hash, getattr(event, "keep", [None]), method)

    def _predict(
        self,
        image: list[dict],
        question: str,
        method: str = FIRST.method,
        budget: float = 0.25,
        settings: dict = {},  # noqa: B006  (gradio reads the default, and nobody changes it)
    ) -> dict:
        """Ask the full and the compressed model about an image, or several.

        `budget` is a share of the visual tokens, averaged over the decoder layers (float in (0, 1]), or a number of
        them (int); `settings` are hyper-parameters of the method by name.
        """
        uploads = image if isinstance(image, list) else [image] if image else []
        return self.inspector.predict(uploads, question, method, budget, settings)

    def _check(self, image: Any, files: Any):
        """Say of an upload that cannot be read why, and take it away where it was the image."""
        reason = self.inspector.unreadable(_uploads(image, files))
        bad = bool(image) and bool(self.inspector.unreadable([image]))
        return panels.problem(reason), None if bad else gr.skip()

    def _scene(self, event: gr.EventData) -> tuple[str, str, str]:
        """The example that was chosen, or a new scene."""
        return *examples.scene(examples.SHOWN[event.number] if event.number >= 0 else None), panels.problem()

    def _method(self, method: str, percent: float, *values):
        slider, curve = self._budget(method, percent, self._named(method, values))
        groups = [gr.Group(visible=name == method) for name in self.groups]
        return gr.Dropdown(info=panels.described(vtc.list_methods()[method])), gr.Slider(**slider), curve, *groups

    def _moved(self, request: gr.Request, method: str, percent: float, *values):
        named = self._named(method, values)
        slider, curve = self._budget(method, percent, named)
        preview = self.inspector.preview(request.session_hash, method, named, percent)
        return gr.Slider(**slider), curve, json.dumps(preview)

    def _budget(self, method: str, percent: float, values: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """The slider as far as it depends on the rest, and the curve with the budget's marker."""
        try:
            chosen = self.inspector.configured(method, values)
            offered = self.inspector.offered(chosen)
        except ValueError as error:
            return {"minimum": 1, "maximum": 100, "info": self.inspector.public(error)}, (
                self.inspector.curve(method, None)
            )
        near = budgets.nearest(offered, percent)
        info = budgets.note(self.inspector.adapter, chosen, near, offered)
        share = budgets.spent(self.inspector.adapter, chosen, near) / self.inspector.tokens
        slider = {"minimum": offered[0], "maximum": 100, "info": info}
        if near != percent:  # else it stays the visitor's, who may have moved on
            slider["value"] = near
        return slider, self.inspector.curve(method, share)

    def _restore(self, request: gr.Request):
        """What the link says."""
        keep = [gr.skip()] * (5 + len(self.boxes))
        try:
            state = link.read(dict(request.query_params))
        except ValueError as error:
            return *keep, panels.problem(str(error))
        image, question = (None, state.question) if state.scene is None else examples.scene(state.scene)
        method = state.method or self.first.method
        given = [image, None, state.question or question, method, state.percent]
        given = [gr.skip() if value is None else value for value in given]
        boxes = [
            state.values.get(field, gr.skip()) if owner == method else gr.skip()
            for owner, fields in self.fields.items()
            for field in fields
        ]
        own = f"This link was made with an image of its own ({state.image}): add it and press Ask."
        return *given, *boxes, panels.problem(own if state.image else "")


def _uploads(image: dict[str, Any] | None, files: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """All files of a prompt, in order."""
    return [*([image] if image else []), *(files or [])]
