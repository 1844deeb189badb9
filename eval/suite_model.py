"""The model `vtc` of lmms-eval: any family that `vtc.wrap` knows, behind any of its methods and budgets.

Replies are the checkpoint's own: its chat template, its processor, greedy unless the task says otherwise; stop strings
are left to the model, as in lmms-eval's own chat models.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.utils import gather_object
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.loggers.evaluation_tracker import GeneralConfigTracker
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import simple_parse_args_string
from PIL import Image
from tqdm import tqdm

import vtc
from vtc.cost import kv_bytes
from vtc.eval.reader import Chat, load, model_path, pick_device
from vtc.eval.run import Store, resolve

MEASURES = ("visual_tokens", "prefill_ms", "kv_bytes")
checkpoint_name = GeneralConfigTracker._get_model_name
FULL = ("uniform", 1.0)
"""A method and a budget that drop nothing: the model as it is, with a trace."""


@dataclass
class Measured(TokenCounts):
    """What a reply took, as it is written beside each sample."""

    visual_tokens: float = 0.0
    """Of all the prompt's images, averaged over the decoder layers."""
    prefill_ms: float | None = None
    """Of the decoder, an equal share of the batch's for each row; None for prompts without an image."""
    kv_bytes: int = 0
    """Keys and values of the prompt after the prefill, without the batch's padding."""

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **{name: getattr(self, name) for name in MEASURES}}


class Vtc(lmms):
    """A compressed model. Without `method` and `budget` it is the full one.

    Args:
        pretrained: "reference", a model folder or a hub id.
        method, budget: as `vtc.wrap` takes them; a budget without a method is an error.
        device: "auto", "cpu", "cuda", ...; with several processes each takes its own.
        device_map: as transformers takes it, "auto" for a model that is larger than one GPU.

    Raises what `vtc.wrap` raises; RuntimeError where several processes were started but do not see each other.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        method: str | None = None,
        budget: int | float | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        device_map: str | None = None,
    ):
        super().__init__()
        device = pick_device(device or "auto")
        self.accelerator = Accelerator(cpu=device == "cpu" and not is_initialized())  # lmms-eval's command made one
        several = self.accelerator.num_processes > 1
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not several:
            raise RuntimeError("the processes do not see each other: on CPUs start them with ACCELERATE_USE_CPU=true")
        self.reader = load(model_path(pretrained), device_map or (str(self.accelerator.device) if several else device))
        self.batch_size = int(batch_size)
        self.replies: Store | None = None
        if method is None and budget is not None:
            raise ValueError(f"a budget of {budget} needs a method: method=vtc-cls, for example")
        self.use(*(FULL if method is None else (method, budget)))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> Vtc:
        # lmms-eval names the folder of a run after the checkpoint alone, and asks for that name after this
        GeneralConfigTracker._get_model_name = staticmethod(folder_name)
        return super().create_from_arg_string(arg_string, additional_config)

    @property
    def device(self) -> torch.device:
        return self.reader.device

    def use(self, method: str | vtc.Method, budget: int | float | None) -> None:
        """Answer with this method and budget from now on."""
        self.arm = method, budget
        vtc.wrap(self.reader.model, resolve(method) if isinstance(method, str) else method, budget)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The replies in the order of `requests`. Any error is the caller's to see."""
        replies: dict[int, GenerationResult] = {}
        start = time.perf_counter()
        with tqdm(total=len(requests), desc=f"{self.arm[0]} {self.arm[1]}", disable=self.rank != 0) as bar:
            for rows in _batches(requests, self.batch_size):
                replies |= zip(rows, self._known_or_asked([requests[row] for row in rows]), strict=True)
                bar.update(len(rows))
        ordered = [replies[row] for row in range(len(requests))]
        self._report(requests, ordered, time.perf_counter() - start)
        return ordered

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("vtc answers by generating; take a task with `output_type: generate_until`")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("vtc answers in one round; take a task with `output_type: generate_until`")

    def _known_or_asked(self, requests: list[Instance]) -> list[GenerationResult]:
        if self.replies is None:
            return self._answers(requests)
        missing = {self._key(request): request for request in requests}
        missing = [request for key, request in missing.items() if key not in self.replies.lines]
        lines = [
            {**self._identity(request), "prediction": reply.text, "measured": asdict(reply.token_counts)}
            for request, reply in zip(missing, self._answers(missing), strict=True)
        ]
        self.replies.add(lines)
        known = [self.replies.lines[self._key(request)] for request in requests]
        return [GenerationResult(line["prediction"], Measured(**line["measured"])) for line in known]

    def _identity(self, request: Instance) -> dict[str, Any]:
        *_, number, task, _ = request.args
        return {"method": self.arm[0], "budget": self.arm[1], "question_id": f"{task}/{number}"}

    def _key(self, request: Instance) -> str:
        return json.dumps(list(self._identity(request).values()))

    def _answers(self, requests: list[Instance]) -> list[GenerationResult]:
        documents = [self._document(request) for request in requests]
        replies: dict[int, GenerationResult] = {}
        for with_image in (True, False):  # a processor takes a batch with images in each row, or in none
            rows = [row for row, (_, images) in enumerate(documents) if bool(images) is with_image]
            if rows:
                answers = self.ask([documents[row] for row in rows], **_options(requests[rows[0]].args[2]))
                replies |= zip(rows, answers, strict=True)
        return [replies[row] for row in range(len(requests))]

    def _document(self, request: Instance) -> tuple[Chat, list[Image.Image]]:
        _, messages, _, number, task, split = request.args
        return chat(messages(self.task_dict[task][split][number]))

    def ask(self, documents: Sequence[tuple[Chat, list[Image.Image]]], **options: Any) -> list[GenerationResult]:
        """Reply and what it took for each (chat, images); either all of them have images or none has."""
        inputs = self.reader.chats(*zip(*documents, strict=True))
        new = self.reader.generate(inputs, **options)
        texts = self.reader.processor.batch_decode(new, skip_special_tokens=True)
        return [GenerationResult(*pair) for pair in zip(texts, self._measured(inputs, new), strict=True)]

    def _measured(self, inputs: dict[str, torch.Tensor], new: torch.Tensor) -> list[Measured]:
        model, tokenizer = self.reader.model, self.reader.processor.tokenizer
        adapter, trace = model.vtc.adapter, model.vtc.trace
        prompt = inputs["attention_mask"].sum(1).tolist()
        text = (inputs["attention_mask"].bool() & (inputs["input_ids"] != adapter.image_token_id)).sum(1).tolist()
        written = (new != tokenizer.pad_token_id).sum(1).tolist()
        layers, element = trace.tokens_per_layer.tolist(), torch.finfo(model.dtype).bits // 8
        seconds = trace.seconds.get("prefill")
        return [
            Measured(
                input_tokens=prompt[row],
                output_tokens=written[row],
                visual_tokens=sum(visual) / len(visual),
                prefill_ms=seconds and 1000 * seconds / len(prompt),
                kv_bytes=kv_bytes(visual, text[row], adapter.decoder.config, element),
            )
            for row, visual in enumerate(layers)
        ]

    def _report(self, requests: list[Instance], replies: list[GenerationResult], seconds: float) -> None:
        """Means over all processes, into the results file: lmms-eval puts "avg_" before each name."""
        own = [
            (request.task_name, reply.token_counts)
            for request, reply in zip(requests, replies, strict=True)
            if "__padding_only__" not in request.metadata  # repeats that keep the processes in step
        ]
        everywhere = gather_object(own)
        means = {"processes": self.accelerator.num_processes}
        for task in dict.fromkeys(task for task, _ in everywhere):
            for measure in MEASURES:
                values = [getattr(count, measure) for name, count in everywhere if name == task]
                known = [value for value in values if value is not None]
                means[f"{task}/{measure}"] = sum(known) / len(known) if known else None
        written = sum(count.output_tokens for _, count in everywhere)
        log_metrics(seconds, written, written / seconds, means)


def chat(messages: list[dict[str, Any]]) -> tuple[Chat, list[Image.Image]]:
    """A task's messages as chat templates take them, and the images in them."""
    messages = ChatMessages(messages=messages)
    images, videos, sounds = messages.extract_media()
    if videos or sounds:
        raise NotImplementedError("vtc reads images and text, no video and no sound")
    opened = [Image.open(image) if isinstance(image, (str, Path)) else image for image in images]
    return messages.to_hf_messages(), opened


def folder_name(model_args: str) -> str:
    """What the folder of a run is named after: the checkpoint, the method and the budget."""
    given = simple_parse_args_string(model_args)
    method = [Path(given["method"]).stem] if "method" in given else []
    budget = [str(given["budget"])] if "budget" in given else []
    return "__".join([checkpoint_name(model_args).rstrip("/"), *method, *budget])


def _batches(requests: list[Instance], size: int) -> Iterator[list[int]]:
    """Indices of requests that may be answered together: of one task, and so with the same options."""
    groups: dict[str, list[int]] = {}
    for row, request in enumerate(requests):
        groups.setdefault(json.dumps([request.task_name, request.args[2]], default=str), []).append(row)
    for rows in groups.values():
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def _options(asked: dict[str, Any]) -> dict[str, Any]:
    """The options of `generate` for what a task file asks."""
    options = {"max_new_tokens": asked.get("max_new_tokens", 1024), "num_beams": asked.get("num_beams", 1)}
    if asked.get("temperature", 0) > 0:
        options |= {"do_sample": True, "temperature": asked["temperature"], "top_p": asked.get("top_p")}
    return options
