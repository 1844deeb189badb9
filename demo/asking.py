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
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import vtc
from vtc import adapter, cost
from vtc.choice import Choice, Seen
from vtc.eval.reader import Reader
from vtc.stage import Budget, Method, Shape, Stage

MODEL = Lock()
"""Held while a visitor's two answers are made: `vtc.compressed` changes the model that all visitors share."""
ROUNDS = 5
"""Passes that a prefill is timed by, so that one hiccup of the machine does not make the figure."""
PATIENCE = 0.5
"""Seconds after which no further pass is begun."""


@dataclass(frozen=True)
class Asked:
    """What a visitor asked, checked and bounded."""

    image: Image.Image
    question: str
    method: Method
    budget: Budget | None


@dataclass(frozen=True)
class Answer:
    """One model's answer, which grows token by token; the figures follow with the last one."""

    text: str = ""
    tokens: float | None = None
    """Visual tokens averaged over the decoder layers."""
    prefill: float | None = None
    """Seconds from the prepared inputs to the first token, the vision tower included."""
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

    name: ClassVar[str] = "hand-picked"
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
        picked[list(self.tokens)] = True
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


def _compare(reader: Reader, asked: Asked, tell: Callable[[Pair], None]) -> None:
    inputs = reader.inputs([asked.image], [asked.question])
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
    tell(Pair(pair.full, small, trace, why(reader, pair.full, small, trace, text)))


def _answer(reader: Reader, inputs: dict[str, Tensor], tell: Callable[[str], None]) -> Answer:
    """The greedy answer with its seconds and bytes, `tell` given the text after each token."""
    prefill = _prefill(reader, inputs)
    cache = DynamicCache(config=reader.model.config.get_text_config())
    stopwatch = Stopwatch(reader, tell)
    ids = reader.generate(inputs, max_new_tokens=reader.max_new_tokens, past_key_values=cache, streamer=stopwatch)
    first, *later = stopwatch.times[1:]
    return Answer(
        reader.processor.tokenizer.decode(ids[0], skip_special_tokens=True).strip(),
        prefill=prefill,
        decode=(later[-1] - first) / len(later) if later else None,
        kv_bytes=sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers),
    )


def _prefill(reader: Reader, inputs: dict[str, Tensor]) -> float:
    """Seconds to the first token: the median of `ROUNDS` passes, or of those that `PATIENCE` allows."""
    reader.generate(inputs, max_new_tokens=1)  # the first pass pays for allocations
    seconds: list[float] = []
    while not seconds or (len(seconds) < ROUNDS and sum(seconds) < PATIENCE):
        start = time.perf_counter()
        reader.generate(inputs, max_new_tokens=1).cpu()  # on the CPU, so that the device has finished
        seconds.append(time.perf_counter() - start)
    return median(seconds)


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


def why(reader: Reader, full: Answer, small: Answer, trace: vtc.Trace, text: int) -> str:
    """One sentence: what keeps this prefill from being faster, or that nothing does."""
    if small.tokens == full.tokens:
        return "Every visual token stays, so there is nothing to gain."
    config = adapter.find(reader.model).decoder.config
    possible = cost.speed_up_limit(trace.tokens_per_layer[0].tolist(), int(full.tokens), text, config)
    gain = full.prefill / small.prefill
    vision = trace.seconds.get("vision", 0.0) / small.prefill
    measured = f"Prefill {gain:.1f} times as fast; the decoder's arithmetic alone would allow {possible:.1f}."
    if gain > 0.7 * possible:
        return f"{measured} Arithmetic binds here, and the clock follows it."
    if vision > 0.5:
        return f"{measured} The vision tower binds: it takes {vision:.0%} of the prefill and always reads all patches."
    return (
        f"{measured} Weights and launches bind: a prompt this short leaves the processor idle in between, and the "
        f"vision tower ({vision:.0%}) reads all patches. Larger models, images and batches gain more."
    )
