"""A tiny random LLaVA behind the server of `vtc serve`, and the answers that it has to give."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import models
import numpy
import torch
from eval_fixtures import TEMPLATE
from own_models import tokenizer
from PIL import Image
from transformers import CLIPImageProcessor, LlavaProcessor

import vtc
import vtc.adapter as adapters
from vtc.serve.app import Server
from vtc.serve.encode import prune
from vtc.serve.engine import Engine, batching
from vtc.serve.limits import Limits, Sizes
from vtc.serve.memory import Memory
from vtc.serve.prompt import Prompt

NAME = "tiny"
QUARTER = ("vtc-cls", 0.25)
NEW = 10
QUESTIONS = ("what color is the a", "how many is there", "what is of the many color there a is")
SIZES = Sizes(cache=1024, page=8, batch=48, requests=8, remembered=512)


def in_a_loop(coroutine):
    """What it returns, run in a thread of its own: playwright leaves a running loop in that of the tests."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


@functools.cache
def tiny():
    """Model and processor: 36 visual tokens, attention that is far from uniform."""
    model = models.llava()
    model.generation_config.suppress_tokens = None
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"height": 48, "width": 48}, do_center_crop=False),
        tokenizer=tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return model, processor


def picture(seed: int) -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=numpy.uint8))


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def chat(question: str, images: int = 1) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": question}]}]


def alone(text: str, images: Sequence[Image.Image], spend, new: int = NEW, served=None) -> list[int]:
    """What generate() of the wrapped model (`served`, with its processor) answers to a whole prompt."""
    model, processor = served or tiny()
    given = [list(images)] if len(images) > 1 else list(images) or None
    inputs = processor(images=given, text=text, add_special_tokens=False, return_tensors="pt")
    with vtc.compressed(model, *spend), torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=new, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def request(question: str, *images: Image.Image, **more) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    content = [*parts, {"type": "text", "text": question}]
    return {"model": NAME, "messages": [{"role": "user", "content": content}], "max_tokens": NEW, **more}


def post(server: Server, *bodies: dict | bytes) -> list[httpx.Response]:
    """The replies to requests that are sent at the same time."""

    async def sent() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=server.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://served", timeout=60) as client:
            json_ = {"content-type": "application/json"}
            each = ({"content": x, "headers": json_} if isinstance(x, bytes) else {"json": x} for x in bodies)
            return await asyncio.gather(*(client.post("/v1/chat/completions", **one) for one in each))

    return in_a_loop(sent())


def get(server: Server, path: str) -> httpx.Response:
    async def got() -> httpx.Response:
        transport = httpx.ASGITransport(app=server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://served") as client:
            return await client.get(path)

    return in_a_loop(got())


@contextmanager
def serving(limits: Limits | None = None, sizes: Sizes = SIZES, served=None, **more):
    server = Server(*(served or tiny()), NAME, limits=limits, sizes=sizes, **more)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def engine(sizes: Sizes = SIZES, served=None):
    """An engine, and what makes prompts for it."""
    model, processor = served or tiny()
    memory = Memory(model, sizes.remembered)
    runs = Engine(model, memory, batching(sizes))

    def prompt(text: str, images: Sequence[Image.Image], spend) -> Prompt:
        adapter, kept = adapters.find(model), []
        for image in images:
            key = memory.digest(image), spend
            one = memory.find(key)
            if one is None:
                (pruned,) = prune(model, adapter, processor, [image], spend)
                one = memory.add(key, pruned)
            kept.append(one)
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return Prompt.of(ids, adapter.image_token_id, kept, memory.vocabulary)

    runs.start()
    try:
        yield runs, prompt
    finally:
        runs.stop(timeout=10, hard_stop=True)


def results(runs: Engine, prompts: Sequence[Prompt], new: int = NEW) -> list[list[int]]:
    """What the engine generates, all prompts being in at once."""
    names = [
        runs.add_request(prompt, f"{time.monotonic()} {n}", max_new_tokens=new) for n, prompt in enumerate(prompts)
    ]
    found: dict[str, list[int]] = {}
    while len(found) < len(prompts):
        output = runs.get_result(timeout=20)
        assert output is not None
        assert output.error is None
        found[output.request_id] = output.generated_tokens
    for name in names:
        runs.cancel_request(name)
    return [found[name] for name in names]


def healthy(url: str) -> bool:
    """Whether a server answers; asked often, so without the certificates that httpx would read at each call."""
    try:
        return httpx.get(f"{url}/health", verify=False).status_code == 200
    except httpx.HTTPError:
        return False


def soon(what, seconds: float = 10) -> bool:
    """Whether something becomes true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.02)
    return False


def spoken(question: str, spend, *seen: Image.Image, served=None) -> str:
    """The answer of generate(), as text."""
    processor = (served or tiny())[1]
    text = processor.apply_chat_template(chat(question, len(seen)), add_generation_prompt=True)
    return processor.decode(alone(text, seen, spend, served=served), skip_special_tokens=True)


def content(reply: httpx.Response) -> str:
    """Of a reply, whole or in chunks."""
    assert reply.status_code == 200, reply.text
    if not reply.headers["content-type"].startswith("text/event-stream"):
        return reply.json()["choices"][0]["message"]["content"]
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    deltas = [choice["delta"] for line in lines[:-1] for choice in json.loads(line)["choices"]]
    return "".join(delta.get("content", "") for delta in deltas)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
