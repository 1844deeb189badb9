"""What visitors of the page do, over one model that all share."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from gradio.utils import get_upload_folder

import vtc
from vtc import adapter
from vtc.budget import check_budget
from vtc.demo import budgets, examples, link, panels, settings
from vtc.demo.asking import Asked, HandPicked, Pair, compare
from vtc.demo.curve import curve
from vtc.demo.media import Picture, opened
from vtc.demo.record import hyper_parameters, record
from vtc.demo.reselect import reselect
from vtc.demo.shelf import Shelf, Shown
from vtc.demo.view import fates, pictures
from vtc.eval.reader import Reader
from vtc.eval.scenes import Example
from vtc.stage import Budget, Method

QUESTION = 300
"""Characters of a question."""
Uploads = list[dict[str, Any]]
"""Files as gradio describes them: a path, and the name that the visitor knows."""
Steps = Iterator[tuple]
Keep = gr.skip
"""What stays on the page as it is."""


class Inspector:
    """What the page shows and answers."""

    def __init__(self, reader: Reader, name: str):
        self.reader, self.name = reader, name
        self.title = Path(name).name if Path(name).is_dir() else name  # where a folder lies is nobody's business
        self.adapter = adapter.find(reader.model)
        self.shelf = Shelf()
        device = reader.device
        threads = torch.get_num_threads()
        cpu = f"CPU, {threads} thread{'s' * (threads > 1)}"
        self.device = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
        self.offered = lru_cache(maxsize=256)(self._offered)
        self.tokens = self.adapter.tokens_per_image() or budgets.TYPICAL

    # -- what visitors ask ----------------------------------------------------------------------------------------

    def ask(self, visitor: str, uploads: Uploads, question: str, percent: float, name: str, values: dict) -> Steps:
        """Stream both answers: (answers, what the viewer draws, problem, curve), or say what is missing or wrong."""
        with self._told() as told:
            method = self.configured(name, values)
            budget = budgets.nearest(self.offered(method), float(percent)) / 100
            asked = self.checked(self.opened(uploads), question, method, budget)
            yield from self._stream(visitor, uploads, asked)
        if told:
            yield self._failed(visitor, told[0])

    def ask_picked(self, visitor: str, picked: list[int], behind: str) -> Steps:
        """The same question with the tokens alone that the visitor picked; the curve of `behind` shows how many."""
        with self._told() as told:
            shown = self.shelf.get(visitor)
            if shown is None or not all(type(token) is int and token >= 0 for token in picked):
                raise ValueError("Ask first, then pick patches: the server remembers no answer of this page.")
            method = HandPicked(tuple(sorted(set(picked))))
            asked = self.checked(self.opened(shown.uploads), shown.question, method, None)
            yield from self._stream(visitor, shown.uploads, asked)
            share = len(method.tokens) / self.tokens
            yield Keep(), Keep(), Keep(), self.curve(behind, min(share, 1), "picked by hand")
        if told:
            yield self._failed(visitor, told[0])

    def predict(self, uploads: Uploads, question: str, method: str, budget: Budget, values: dict) -> dict[str, Any]:
        """Both answers as JSON. Raises `gr.Error` that says what is missing or wrong."""
        with self._told() as told:
            if not isinstance(values, dict):
                raise ValueError('settings are hyper-parameters by name, such as {"layers": 2}')
            check_budget(budget)
            asked = self.checked(self.opened(uploads), question, self.configured(method, values), budget)
            *_, pair = compare(self.reader, asked)
            return record(self.title, self.device, asked, pair, self.truth(asked))
        raise gr.Error(told[0], print_exception=False)

    def preview(self, visitor: str, name: str, values: dict[str, Any], percent: float) -> dict[str, Any] | None:
        """What another budget would keep of the shown answer's tokens; None where the answer is of another method."""
        shown = self.shelf.get(visitor)
        try:
            method = self.configured(name, values)
            if shown is None or shown.method != method or shown.budget is None:
                return None
            budget = budgets.nearest(self.offered(method), float(percent)) / 100
        except ValueError:
            return None  # the slider's note says it
        if budget == shown.budget:
            return None
        try:
            trace = reselect(shown.trace, method, shown.budget, budget, self.adapter.shape())
        except ValueError as error:
            return {"budget": budget, "reason": self.public(error)}
        fate = fates(trace)
        return {"budget": budget, "left": fate["left"], "into": fate["into"]}

    # -- what the page says ---------------------------------------------------------------------------------------

    def configured(self, name: str, values: dict[str, Any]) -> Method:
        """The method with its hyper-parameters. Raises ValueError for what cannot be."""
        if name not in vtc.list_methods():
            raise ValueError(f"There is no method {name!r}; choose from {', '.join(vtc.list_methods())}.")
        return settings.configured(vtc.list_methods()[name], values)

    def opened(self, uploads: Uploads) -> tuple[Picture, ...]:
        """The pictures. Raises ValueError for what is no file that was uploaded to this server."""
        home = Path(get_upload_folder()).resolve()
        for upload in uploads:
            path = upload.get("path") if isinstance(upload, dict) else None
            if not isinstance(path, str) or not Path(path).resolve().is_relative_to(home):
                raise ValueError("Images are uploaded files: gradio_client.handle_file makes one.")
        return opened(uploads)

    def checked(self, shown: tuple[Picture, ...], question: str | None, method: Method, budget: Budget | None) -> Asked:
        """The question as `Asked`. Raises ValueError that says what is missing or wrong."""
        if not shown:
            raise ValueError("Choose an image first: upload or paste one, take an example, or press New scene.")
        if not (question := (question or "").strip()):
            raise ValueError("Write a question about the image.")
        if len(question) > QUESTION:
            raise ValueError(f"The question has {len(question)} characters; the limit is {QUESTION}.")
        tokenizer = self.reader.processor.tokenizer
        if found := [token for token in tokenizer.all_special_tokens if token in question]:
            raise ValueError(f"The question holds {found[0]}, which means something else to this model: leave it out.")
        return Asked(shown, question, method, budget)

    def unreadable(self, uploads: Uploads) -> str:
        """Why files cannot be read; "" where they can."""
        with self._told() as told:
            self.opened(uploads)
        return "".join(told)

    def truth(self, asked: Asked) -> str | None:
        """The right answer where this is a question of the benchmark."""
        scene = self.scene_of(asked.pictures)
        return scene.answer if scene is not None and scene.question == asked.question else None

    def scene_of(self, shown: tuple[Picture, ...]) -> Example | None:
        """The benchmark's question that this one picture belongs to; files of scenes carry their number."""
        return examples.known(shown[0].name, shown[0].image) if len(shown) == 1 else None

    def _offered(self, method: Method) -> list[int]:
        return budgets.reachable(self.adapter, method)

    def curve(self, method: str, share: float | None, label: str = "this budget") -> str:
        """The measured curve of this model, or how to make it."""
        if self.name == "reference":
            path = Path(vtc.eval.__file__).parent / "results/scenes/summary.json"
        else:
            path = Path("out/demo", self.title.replace("/", "--"), "summary.json")
        methods = "vtc-cls,fastv,random,uniform"
        command = f"vtc eval --model {self.title} --methods {methods} --out {path.parent}"
        return curve(path, command, method, share, label)

    def public(self, error: Exception) -> str:
        """What an error says, without where the model lies on this machine."""
        return str(error).replace(str(Path(self.reader.model.config._name_or_path)), self.title)

    # -- how it is done -------------------------------------------------------------------------------------------

    @contextmanager
    def _told(self) -> Iterator[list[str]]:
        """Errors as words for the page: what a visitor can change in its own words, the rest in the server's log."""
        told: list[str] = []
        try:
            yield told
        except (ValueError, TypeError) as error:
            told.append(self.public(error))
        except Exception:
            logging.getLogger(__name__).exception("a visitor's question failed")
            told.append("The model could not answer this with these settings; the log of the server says why.")

    def _stream(self, visitor: str, uploads: Uploads, asked: Asked) -> Steps:
        truth = self.truth(asked)
        for pair in compare(self.reader, asked):
            self.shelf.drop(visitor)  # what was shown is gone from the page as soon as there is something new
            if pair.trace is None:
                yield panels.answers(pair, self.device, asked), Keep(), "", Keep()
        self.shelf.put(visitor, Shown(tuple(uploads), asked.question, asked.method, asked.budget, pair.trace))
        drawn = {
            "pictures": pictures(self.reader, asked.pictures, pair.trace),
            "link": self._link(asked),
            "record": record(self.title, self.device, asked, pair, truth),
        }
        yield panels.answers(pair, self.device, asked, truth), json.dumps(drawn), "", Keep()

    def _failed(self, visitor: str, reason: str) -> tuple:
        """What was shown before stays, to be marked by the page; half an answer goes."""
        if self.shelf.get(visitor) is None:
            return panels.answers(Pair(), self.device), None, panels.problem(reason), Keep()
        return Keep(), Keep(), panels.problem(reason), Keep()

    def _link(self, asked: Asked) -> str:
        """What restores this state: the query of an address."""
        scene = self.scene_of(asked.pictures)
        picked = asked.method.tokens if isinstance(asked.method, HandPicked) else None
        values = {} if picked is not None else hyper_parameters(asked.method)
        names = [picture.name for picture in asked.pictures]
        return link.query(asked.question, asked.method.name, asked.budget, values, scene, names, picked)
