"""One question to the full and to the compressed model, streamed and measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from statistics import median
from threading import Lock, Thread
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import vtc
from vtc.cache.held import nbytes
from vtc.choice import Choice, Seen
from vtc.demo import speed
from vtc.demo.media import Picture
from vtc.eval.reader import Reader
from vtc.stage import Budget, Method, Shape, Stage

MODEL = Lock()
"""Held while a visitor's two answers are made: `vtc.compressed` changes the model that all visitors share."""


@dataclass(frozen=True)
class Asked:
    """What a visitor asked, checked and bounded."""

    pictures: tuple[Picture, ...]
    question: str
    method: Method
    budget: Budget | None


@dataclass(frozen=True)
class Answer:
    """One model's answer, which grows token by token; the figures follow when it is complete."""

    text: str = ""
    tokens: float | None = None
    """Visual tokens averaged over the decoder layers."""
    prefill: float | None = None
    """Seconds from the prepared inputs to the first token, the vision tower included; the median of several runs."""
    decode: float | None = None
    """Seconds a token after the first; None where there was only one."""
    kv_bytes: int | None = None
    """Bytes of keys and values at the end."""


@dataclass(frozen=True)
class Pair:
    """The full model's answer and the compressed one's; trace and reason when both are complete."""

    full: Answer = field(default_factory=Answer)
    compressed: Answer = field(default_factory=Answer)
    trace: vtc.Trace | None = None
    why: str = ""


@dataclass(frozen=True)
class HandPicked(Method):
    """Keep exactly these visual tokens of a prompt, counted over all its images; it needs no budget."""

    tokens: tuple[int, ...]

    name: ClassVar[str] = "picked by hand"
    paper: ClassVar[str] = "chosen in the demo"
    adaptive: ClassVar[bool] = True

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        return (Stage(0, lambda seen: torch.zeros(seen.valid.shape), select=self._select),)

    def keep(self, tokens: int, budget: Budget | None, shape: Shape) -> tuple[int, ...]:
        """Nobody knows before it is seen which of the tokens are this image's."""
        return (0,)

    def _select(self, scores: Tensor, seen: Seen, keep: Tensor) -> Choice:
        sizes = [sum(height * width for height, width in parts) for parts in seen.parts]
        picked = torch.zeros(sum(sizes), dtype=torch.bool)
        picked[[token for token in self.tokens if token < len(picked)]] = True
        return Choice(pad_sequence(picked.split(sizes), batch_first=True).to(seen.valid.device))


def compare(reader: Reader, asked: Asked) -> Iterator[Pair]:
    """Both answers, full first; yields after every token.

    The work runs to its end in a thread of its own, so that a visitor who leaves does not keep the model.
    Raises what the method or the model raises.
    """
    steps: SimpleQueue[Pair | Exception | None] = SimpleQueue()

    def work() -> None:
        try:
            _compare(reader, asked, steps.put)
        except Exception as error:
            steps.put(error)
        finally:
            MODEL.release()
            steps.put(None)

    MODEL.acquire()
    Thread(target=work, daemon=True).start()
    while (step := steps.get()) is not None:
        if isinstance(step, Exception):
            raise step
        yield step


def prompt(reader: Reader, asked: Asked) -> dict[str, Tensor]:
    """What the model reads: all pictures, then the question."""
    content = [{"type": "image"} for _ in asked.pictures] + [{"type": "text", "text": asked.question}]
    return reader.chats([[{"role": "user", "content": content}]], [[picture.image for picture in asked.pictures]])


def _compare(reader: Reader, asked: Asked, tell: Callable[[Pair], None]) -> None:
    inputs = prompt(reader, asked)
    total = int(reader.visual_tokens(inputs)[0])
    text = inputs["input_ids"].shape[1] - total
    with vtc.compressed(reader.model, asked.method, asked.budget):
        reader.answers(inputs, max_new_tokens=1)  # a budget out of reach is known before the full model is asked
    pair = Pair()
    full = _answer(reader, inputs, lambda words: tell(replace(pair, full=Answer(words))))
    pair = Pair(replace(full, tokens=float(total)))
    with vtc.compressed(reader.model, asked.method, asked.budget) as live:
        small = _answer(reader, inputs, lambda words: tell(replace(pair, compressed=Answer(words))))
    trace = live.record
    small = replace(small, tokens=float(trace.average_tokens[0]))
    tell(replace(pair, compressed=small))
    timing = speed.measure(reader, inputs, asked.method, asked.budget)
    why = speed.sentence(timing, speed.limit(reader, trace, total, text))
    full, small = replace(pair.full, prefill=median(timing.full)), replace(small, prefill=median(timing.small))
    tell(Pair(full, small, trace, why))


def _answer(reader: Reader, inputs: dict[str, Tensor], tell: Callable[[str], None]) -> Answer:
    """The greedy answer with its seconds and bytes, `tell` given the text after each token."""
    cache = DynamicCache(config=reader.model.config.get_text_config())
    stopwatch = Stopwatch(reader, tell)
    ids = reader.generate(inputs, max_new_tokens=reader.max_new_tokens, past_key_values=cache, streamer=stopwatch)
    first, *later = stopwatch.times[1:]
    return Answer(
        reader.processor.tokenizer.decode(ids[0], skip_special_tokens=True).strip(),
        decode=(later[-1] - first) / len(later) if later else None,
        kv_bytes=nbytes(cache),
    )


class Stopwatch(BaseStreamer):
    """Notes when each token came. `generate` hands tokens over as they are on the CPU, so the device has finished."""

    def __init__(self, reader: Reader, tell: Callable[[str], None]):
        self.tokenizer, self.tell = reader.processor.tokenizer, tell
        self.times: list[float] = []
        """Of the prompt, then of each token."""
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) > 1:
            self.ids += value.tolist()
            self.tell(self.tokenizer.decode(self.ids, skip_special_tokens=True).strip())

    def end(self) -> None:
        pass
