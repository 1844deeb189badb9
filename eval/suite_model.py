"""The model `vtc` of lmms-eval: any family that `vtc.wrap` knows, behind any of its methods and budgets.

Replies are the checkpoint's own: its chat template, its processor, greedy unless the task says otherwise, cut off where
a stop string begins that the task names.
"""

from __future__ import annotations

import atexit
import copy
import inspect
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.utils import gather_object
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.loggers.evaluation_tracker import GeneralConfigTracker
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import simple_parse_args_string
from loguru import logger
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

import vtc
from vtc.eval import arguments, progress, video
from vtc.eval.cost import kv_bytes
from vtc.eval.reader import Chat, load, model_path, pick_device
from vtc.eval.rows import Asked, Reply
from vtc.eval.store import Store, key_of
from vtc.eval.video import Video


class Document(NamedTuple):
    """A conversation, and the images and videos in it in the order of their mention."""

    chat: Chat
    images: list[Image.Image]
    videos: list[Video]


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
    """Keys and values of the prompt after the prefill, without the batch's padding and for one beam."""
    at_floor: bool = False
    """Whether the budget was out of reach for this prompt's images, so that it was asked at the method's floor."""

    @classmethod
    def total(cls, counts: Sequence[Measured]) -> Measured:
        """Of several rounds together."""
        sums = {f.name: [getattr(c, f.name) for c in counts if getattr(c, f.name) is not None] for f in fields(cls)}
        totals: dict[str, Any] = {name: sum(values) if values else None for name, values in sums.items()}
        return cls(**{**totals, "at_floor": bool(totals["at_floor"])})

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **{name: getattr(self, name) for name in (*MEASURES, "at_floor")}}


class Unreadable(ValueError):
    """A batch of documents that the processor does not take; the cause says why."""


class Vtc(lmms):
    """A compressed model. Without `method` and `budget` it is the full one.

    Args:
        pretrained: "reference", "reference-pages", a model folder or a hub id.
        method: a name, a JSON file of `vtc tune`, or a `vtc.Method`.
        budget: as `vtc.wrap` takes it, or "25%"; unless given that of a file of `vtc choose`. Alone it is an error.
        device: "auto", "cpu", "cuda", ...; with several processes each takes its own.
        device_map: as transformers takes it, "auto" for a model that is larger than one GPU.
        dtype, attn_implementation, revision: as `from_pretrained` takes them.
        min_pixels, max_pixels: of an image, where the processor reads them (Qwen-VL).
        max_num_frames: of a video, evenly spaced.
        given: the method's hyper-parameters, in --model_args as in
            `pretrained=reference,method=transprune,alpha=0.3,layers=[2,3,4],budget=25%`.

    Raises what `vtc.wrap` and `reader.load` raise; RuntimeError where several processes were started but do not see
    each other. Warns where several were asked for and there is one.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        method: str | vtc.Method | None = None,
        budget: int | float | str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        revision: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_num_frames: int = 32,
        **given: Any,
    ):
        super().__init__()
        self.batch_size = arguments.batch_size(batch_size)
        if method is None and budget is not None:
            raise ValueError(f"a budget of {budget} needs a method: method=vtc-cls, for example")
        if method is None and given:
            raise TypeError(f"{', '.join(given)}: neither an argument of vtc nor, without a method, a hyper-parameter")
        arm = FULL if method is None else (arguments.method(method, given), arguments.budget(budget, method))
        device = pick_device(device or "auto")
        self.accelerator = Accelerator(cpu=device == "cpu" and not is_initialized())  # lmms-eval's command made one
        several = self.accelerator.num_processes > 1
        _check_processes(several)
        if several:  # a process that ends with its group open is at times aborted in torch's own destructors
            atexit.register(self.accelerator.state.destroy_process_group)
        kernel: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
        self.reader = load(
            model_path(pretrained),
            device_map or (str(self.accelerator.device) if several else device),
            dtype=dtype,
            revision=None if revision is None else str(revision),  # lmms-eval reads a commit of digits as a number
            pixels={k: v for k, v in (("min_pixels", min_pixels), ("max_pixels", max_pixels)) if v is not None},
            **kernel,
        )
        self.replies: Store[Reply] | None = None
        self.failed: dict[tuple[str, int], str] = {}
        """What kept questions, by task and number, from being asked; only noted where there is a store of replies."""
        self.taken: list[tuple[str, Measured]] = []
        self.seconds = 0.0
        self.frames = max_num_frames
        self.use(*arm)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> Vtc:
        # lmms-eval names the folder of a run after the checkpoint alone, and asks for that name after this
        GeneralConfigTracker._get_model_name = staticmethod(folder_name)
        return super().create_from_arg_string(arg_string, additional_config)

    @property
    def device(self) -> torch.device:
        return self.reader.device

    @property
    def chat_template(self) -> str:
        """Read by lmms-eval for --apply_chat_template only, which its own tasks do not survive."""
        raise ValueError("vtc always asks by the checkpoint's chat template: leave --apply_chat_template out")

    apply_chat_template = chat_template

    def use(self, method: str | vtc.Method, budget: int | float | None) -> None:
        """Answer with this method and budget from now on."""
        self.arm: tuple[str, Any] = str(method), budget
        vtc.wrap(self.reader.model, method, budget)

    # -- what lmms-eval calls ---------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The replies in the order of `requests`. Any error is the caller's to see."""
        return self._all(requests, self._answers)

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Of each request's answer: the mean of its tokens' negative log-likelihoods, and whether greedy says it.

        The mean, and negative, because lmms-eval's tasks take the smallest for the best, as its own models give it. It
        makes strings of bare pairs, but not of what a `GenerationResult` holds.

        Raises ValueError for a method that chooses anew at each step: an answer is rated in one.
        """
        if self.reader.model.vtc.compression.selects:
            raise ValueError(
                f"{self.arm[0]} chooses at each decoded token what it reads, and an answer is rated in one step: take "
                "tasks that generate their answers"
            )
        return self._all(requests, self._rated)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[GenerationResult]:
        """The replies of all rounds of each request; each round's prompt is the task's, made of the replies before."""
        return self._all(requests, self._rounds)

    def try_out(self, requests: list[Instance]) -> list[Any]:
        """Replies to the requests about one question, one token long and nowhere kept."""
        documents = [self._document(requests[0])]
        if requests[0].request_type == "loglikelihood":
            return self.rate(documents, [[self._target(request) for request in requests]])[0].text
        (reply,) = self.ask(documents, max_new_tokens=1)
        return [[reply.text] if requests[0].request_type == "generate_until_multi_round" else reply.text]

    def clean(self) -> None:
        """Called in every process once all requests are answered, also where a process had none to answer. Frees
        nothing: the model stays for the next arm."""
        self._report()

    def _all(self, requests: list[Instance], answers: Any) -> list[GenerationResult]:
        found: dict[int, GenerationResult] = {}
        start = time.perf_counter()
        with progress.bar(f"{self.arm[0]} {self.arm[1]}", len(requests), shown=self.rank == 0) as tick:
            for rows in _batches(requests, self.batch_size):
                found |= zip(rows, self._known_or_asked([requests[row] for row in rows], answers), strict=True)
                tick(len(rows))
        self.seconds += time.perf_counter() - start
        ordered = [found[row] for row in range(len(requests))]
        self.taken += [
            (request.task_name, reply.token_counts)
            for request, reply in zip(requests, ordered, strict=True)
            if "__padding_only__" not in request.metadata  # repeats that keep the processes in step
        ]
        return ordered

    def _known_or_asked(self, requests: list[Instance], answers: Any) -> list[GenerationResult]:
        if self.replies is None:
            return answers(requests)
        asked = {self._key(request): request for request in requests}
        missing = [request for key, request in asked.items() if key not in self.replies.lines]
        new: dict[str, Reply] = {
            self._key(request): {
                **self._identity(request),
                "prediction": reply.text,
                "measured": asdict(reply.token_counts),
            }
            for request, reply in zip(missing, answers(missing), strict=True)
        }
        failed = {self._key(request) for request in missing if self._where(request) in self.failed}
        self.replies.add([line for key, line in new.items() if key not in failed])  # they are asked again next time
        known = [new.get(key) or self.replies.lines[key] for key in map(self._key, requests)]
        return [GenerationResult(line["prediction"], Measured(**line["measured"])) for line in known]

    @staticmethod
    def _where(request: Instance) -> tuple[str, int]:
        *_, number, task, _ = request.args
        return task, number

    def _identity(self, request: Instance) -> Asked:
        task, number = self._where(request)
        choice = f"/{request.idx}" if request.request_type == "loglikelihood" else ""
        return {"method": self.arm[0], "budget": self.arm[1], "question_id": f"{task}/{number}{choice}"}

    def _key(self, request: Instance) -> str:
        return key_of(self._identity(request))

    # -- asking -----------------------------------------------------------------------------------------------------

    def _answers(self, requests: list[Instance]) -> list[GenerationResult]:
        if not requests:
            return []
        options = arguments.generation(_asked(requests[0]))
        return self._each(requests, lambda batch, documents: self.ask(documents, **options), "")

    def _rated(self, requests: list[Instance]) -> list[GenerationResult]:
        prompts: dict[Any, list[Instance]] = {}
        for request in requests:  # a question's choices have one prompt
            prompts.setdefault((*self._where(request), request.args[0]), []).append(request)

        def rate(batch: list[Instance], documents: list[Document]) -> list[GenerationResult]:
            chosen = [prompts[(*self._where(request), request.args[0])] for request in batch]
            return self.rate(documents, [[self._target(choice) for choice in choices] for choices in chosen])

        found = self._each([choices[0] for choices in prompts.values()], rate, None)
        rated: dict[int, GenerationResult] = {}
        for choices, reply in zip(prompts.values(), found, strict=True):
            for choice, one in zip(choices, reply.text or [(math.inf, False)] * len(choices), strict=True):
                rated[id(choice)] = GenerationResult(one, reply.token_counts)
        return [rated[id(request)] for request in requests]

    def _rounds(self, requests: list[Instance]) -> list[GenerationResult]:
        return [self._conversation(request) for request in requests]

    def _conversation(self, request: Instance) -> GenerationResult:
        options, texts, counts = arguments.generation(_asked(request)), [], []
        messages, (task, number) = request.args[1], self._where(request)
        doc, round_info = self.task_dict[task][request.args[-1]][number], None
        turn, done = messages(doc), False
        while not done:
            (reply,) = self.ask([document(turn, self.frames)], **options)
            texts.append(reply.text)
            counts.append(reply.token_counts)
            following = messages(doc, round_idx=len(texts), previous_output=list(texts), previous_round_info=round_info)
            if not isinstance(following, tuple):
                break
            turn, done, _, round_info = following
        return GenerationResult(texts, Measured.total(counts))

    def _each(self, requests: list[Instance], asked: Any, instead: Any) -> list[GenerationResult]:
        """What `asked(requests, documents)` gives for each; `instead` of it for a question that cannot be asked."""
        documents: dict[int, Document] = {}
        replies: dict[int, GenerationResult] = {}
        for row, request in enumerate(requests):
            with self._noting(request):
                documents[row] = self._document(request)
        kinds: dict[Any, list[int]] = {}  # a processor takes a batch with images in each row, or in none
        for row, found in documents.items():
            kinds.setdefault((bool(found.images), bool(found.videos)), []).append(row)
        for rows in kinds.values():
            replies |= self._together(requests, documents, rows, asked)
        nothing = GenerationResult(instead, Measured(input_tokens=0, output_tokens=0))
        return [replies.get(row, nothing) for row in range(len(requests))]

    def _together(self, requests: Any, documents: Any, rows: list[int], asked: Any) -> dict[int, GenerationResult]:
        try:
            answered = asked([requests[row] for row in rows], [documents[row] for row in rows])
        except (Unreadable, vtc.BudgetError) as error:
            if isinstance(error, vtc.BudgetError) and self.replies is None:
                raise
            if len(rows) > 1:  # which of them is it
                return {k: v for row in rows for k, v in self._together(requests, documents, [row], asked).items()}
            if isinstance(error, vtc.BudgetError):
                return self._at_floor(error.floor, requests, documents, rows, asked)
            with self._noting(requests[rows[0]]):
                raise
            return {}
        return dict(zip(rows, answered, strict=True))

    def _at_floor(self, floor: float, requests: Any, documents: Any, rows: list[int], asked: Any) -> dict:
        """Images of other sizes have other floors: a budget that is out of reach for one is not for all."""
        given = self.reader.model.vtc.compression
        vtc.wrap(self.reader.model, given.method, floor)
        try:
            replies = self._together(requests, documents, rows, asked)
        finally:
            vtc.wrap(self.reader.model, given.method, given.budget)
        for reply in replies.values():
            reply.token_counts.at_floor = True
        return replies

    @contextmanager
    def _noting(self, request: Instance) -> Iterator[None]:
        """A question that cannot be read does not cost the others, where a run says in the end which it was."""
        try:
            yield
        except Exception as error:
            task, number = self._where(request)
            cause = error.__cause__ if isinstance(error, Unreadable) else error
            message = f"{task}, question {number}: {type(cause).__name__}: {cause}"
            if self.replies is None:
                raise ValueError(message) from error
            self.failed[task, number] = message

    def _document(self, request: Instance) -> Document:
        task, number = self._where(request)
        doc = self.task_dict[task][request.args[-1]][number]
        if not callable(request.args[1]) or callable(request.args[2]):  # of a task for "simple" models
            visuals = request.args[2](doc) or []
            return document(ConfigurableMessagesTask._build_user_turn(visuals, request.args[0]), self.frames)
        messages = request.args[1]
        config = getattr(getattr(messages, "__self__", None), "config", None)
        if config is not None and config.doc_to_visual and (config.num_fewshot or 0) > 0:
            raise NotImplementedError("lmms-eval gives chat models no examples with images: leave num_fewshot out")
        return document(messages(doc), self.frames)

    def _target(self, request: Instance) -> str:
        task, number = self._where(request)
        target = request.args[1]
        return target(self.task_dict[task][request.args[-1]][number]) if callable(target) else target

    def ask(self, documents: Sequence[Document], **options: Any) -> list[GenerationResult]:
        """Reply and what it took for each; either all of them have images or none has, and so for videos."""
        inputs = self._inputs(documents)
        new = self.reader.generate(inputs, **options)
        texts = self.reader.processor.batch_decode(new, skip_special_tokens=True)
        texts = [_cut(text, options.get("until", ())) for text in texts]
        beams = options.get("num_beams", 1)
        return [GenerationResult(*pair) for pair in zip(texts, self._measured(inputs, new, beams), strict=True)]

    def rate(self, documents: Sequence[Document], answers: Sequence[Sequence[str]]) -> list[GenerationResult]:
        """For each document, of each of its answers: (mean negative log-likelihood of its tokens, whether greedy).

        The prompts alone are prefilled and pruned, once; each answer goes on from a copy of the cache. So no answer is
        looked at when it is decided what stays.
        """
        inputs = self._inputs(documents)
        with torch.inference_mode():
            prompt = self.reader.model(**inputs, use_cache=True, logits_to_keep=1)
        measured = self._measured(inputs, inputs["input_ids"][:, :0])
        rated: list[list[tuple[float, bool]]] = [[] for _ in documents]
        for number in range(max(map(len, answers))):  # the documents' first answers together, then their second ones
            chosen = [choices[min(number, len(choices) - 1)] for choices in answers]
            ids = [self.reader.continuation(chat, text) for (chat, *_), text in zip(documents, chosen, strict=True)]
            for row, pair in enumerate(self._likelihoods(prompt, inputs["attention_mask"], ids)):
                rated[row] += [pair] if number < len(answers[row]) else []
        return [GenerationResult(*pair) for pair in zip(rated, measured, strict=True)]

    def _likelihoods(self, prompt: Any, mask: torch.Tensor, ids: list[list[int]]) -> list[tuple[float, bool]]:
        rows = pad_sequence([torch.tensor(row) for row in ids], batch_first=True).to(self.device)
        with torch.inference_mode():
            answer = self.reader.model(
                input_ids=rows,
                attention_mask=torch.cat((mask, torch.ones_like(rows)), dim=1),
                past_key_values=copy.deepcopy(prompt.past_key_values),
            )
        logits = torch.cat((prompt.logits[:, -1:], answer.logits[:, :-1]), dim=1).float()
        losses = F.cross_entropy(logits.transpose(1, 2), rows, reduction="none")
        greedy = logits.argmax(-1) == rows
        return [(float(losses[i, : len(row)].mean()), bool(greedy[i, : len(row)].all())) for i, row in enumerate(ids)]

    def _inputs(self, documents: Sequence[Document]) -> dict[str, torch.Tensor]:
        try:
            return self.reader.chats(*zip(*documents, strict=True))
        except Exception as error:  # of the processor, and so of what it was given
            raise Unreadable from error

    def _measured(self, inputs: dict[str, torch.Tensor], new: torch.Tensor, beams: int = 1) -> list[Measured]:
        model, tokenizer = self.reader.model, self.reader.processor.tokenizer
        adapter, trace = model.vtc.adapter, model.vtc.trace
        visual = torch.stack([inputs["input_ids"] == token for token in adapter.placeholders().values()]).any(0)
        prompt = inputs["attention_mask"].sum(1).tolist()
        text = (inputs["attention_mask"].bool() & ~visual).sum(1).tolist()
        written = (new != tokenizer.pad_token_id).sum(1).tolist()
        layers, element = trace.held_sizes[::beams].tolist(), torch.finfo(model.dtype).bits // 8
        seconds = trace.seconds.get("prefill")
        return [
            Measured(
                input_tokens=prompt[row],
                output_tokens=written[row],
                visual_tokens=sum(visual) / len(visual),
                prefill_ms=seconds and 1000 * seconds / len(prompt),
                kv_bytes=round(kv_bytes(visual, text[row], adapter.decoder.config, element)),
            )
            for row, visual in enumerate(layers)
        ]

    def _report(self) -> None:
        """Means over all processes, into the results file: lmms-eval puts "avg_" before each name."""
        everywhere, seconds = gather_object(self.taken), self.seconds
        self.taken, self.seconds = [], 0.0
        if not everywhere or not seconds:
            return
        means = {"processes": self.accelerator.num_processes}
        for task in dict.fromkeys(task for task, _ in everywhere):
            for measure in MEASURES:
                values = [getattr(count, measure) for name, count in everywhere if name == task]
                known = [value for value in values if value is not None]
                means[f"{task}/{measure}"] = sum(known) / len(known) if known else None
        written = sum(count.output_tokens for _, count in everywhere)
        log_metrics(seconds, written, written / seconds, means)


class Simple(Vtc):
    """The same model for tasks that lmms-eval words for "simple" models: multiple choice by likelihood."""

    is_simple = True


def _check_processes(several: bool) -> None:
    """Several processes that were promised by the launcher have to be there, and have to know of each other."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not several:
        raise RuntimeError("the processes do not see each other: on CPUs start them with ACCELERATE_USE_CPU=true")
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if launched and "WORLD_SIZE" not in os.environ:
        logger.warning(  # lmms-eval silences Python's own warnings
            "accelerate launch was asked for several processes and started one, as it does with --cpu: this run takes "
            "all questions itself. Start several with torchrun, and on CPUs with ACCELERATE_USE_CPU=true"
        )


def document(messages: list[dict[str, Any]], frames: int) -> Document:
    """A task's messages as chat templates take them, and the images and videos, of so many frames each, in them."""
    given = ChatMessages(messages=messages)
    images, _, sounds = given.extract_media()
    if sounds:
        raise NotImplementedError("vtc reads images, videos and text, no sound")
    opened = [Image.open(image) if isinstance(image, (str, Path)) else image for image in images]
    parts = [part for message in given.messages for part in message.content if part.type == "video"]
    videos = [video.read(part.url, frames, part.start_time, part.end_time) for part in parts]
    return Document(given.to_hf_messages(), opened, videos)


def folder_name(model_args: str) -> str:
    """What the folder of a run is named after: the checkpoint, the method, its hyper-parameters and the budget."""
    given = simple_parse_args_string(model_args)
    method = [Path(given["method"]).stem] if "method" in given else []
    hyper = [f"{name}={value}" for name, value in given.items() if name not in inspect.signature(Vtc).parameters]
    spend = given["budget"] if "budget" in given else arguments.budget(None, given.get("method"))
    budget = [] if spend is None else [str(spend)]
    return "__".join([checkpoint_name(model_args).rstrip("/"), *method, *hyper, *budget])


def _batches(requests: list[Instance], size: int) -> Iterator[list[int]]:
    """Indices of requests that may be answered together: of one task, and with the same options of generation."""
    groups: dict[str, list[int]] = {}
    for row, request in enumerate(requests):
        options = [argument for argument in request.args if isinstance(argument, dict)]
        groups.setdefault(json.dumps([request.task_name, options], default=str), []).append(row)
    for rows in groups.values():
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def _asked(request: Instance) -> dict[str, Any]:
    """What the task asks of generation: chat tasks have it third, those for simple models second."""
    return next(argument for argument in request.args if isinstance(argument, dict))


def _cut(text: str, stops: Sequence[str]) -> str:
    """Up to the first of the strings that end a reply."""
    return text[: min((found for stop in stops if (found := text.find(stop)) >= 0), default=len(text))]
