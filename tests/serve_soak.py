"""`vtc serve` under many clients for long: python tests/serve_soak.py [--requests 200] [--soak 2000] [--clients 12]

Against the command as a process, with the shipped model. First every answer of concurrent clients (mixed images,
budgets, questions, streamed and whole) is compared with that of generate() on the wrapped model. Then a soak, in which
every tenth client goes away in the middle: the server's memory stays flat, and no block of its cache stays behind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import subprocess
import sys
import time

import httpx
import psutil
import torch
from serve_fixtures import data_url, free_port, healthy, soon

import vtc
from vtc.eval import load, scenes

SPENDS = [("vtc-cls", 0.25), ("vtc-cls", 0.11), ("vtc-cls", 64), ("tome", 0.25), ("uniform", 0.5), ("uniform", 1.0)]
ALONE = ("fastv", 0.5)
NEW = 8


def asked(number: int, images: int) -> tuple[int, tuple, bool]:
    """Of the request with this number: which scene, method and budget, and whether it is streamed."""
    draw = random.Random(number)
    spend = ALONE if draw.random() < 0.05 else draw.choice(SPENDS)
    return draw.randrange(images), spend, draw.random() < 0.5


def body(example, spend, stream: bool) -> dict:
    image = {"type": "image_url", "image_url": {"url": data_url(example.image)}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": example.question}]}]
    told = {"method": spend[0], "budget": spend[1]}
    return {"model": "reference", "messages": messages, "max_tokens": NEW, "stream": stream, "vtc": told}


def serial(model, processor, example, spend) -> str:
    """The answer of generate()."""
    content = [{"type": "image"}, {"type": "text", "text": example.question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=example.image, text=text, add_special_tokens=False, return_tensors="pt")
    with vtc.compressed(model, *spend), torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=NEW)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


async def answered(client: httpx.AsyncClient, url: str, given: dict, leave: bool = False) -> str | None:
    """The text of a reply; None where the client leaves after its first bytes."""
    from vtc.eval.clients import spoken

    async with client.stream("POST", f"{url}/v1/chat/completions", json=given) as reply:
        if leave:
            with contextlib.suppress(StopAsyncIteration):
                await anext(reply.aiter_bytes())
            return None
        content = (await reply.aread()).decode()
    assert reply.status_code == 200, content
    return spoken(content, given["stream"])


async def clients(count: int, work: list) -> list:
    """The results of coroutines, `count` of them at a time."""
    gate = asyncio.Semaphore(count)

    async def one(job):
        async with gate:
            return await job()

    return await asyncio.gather(*map(one, work))


def compare(url: str, requests: int, count: int) -> None:
    model, processor = load("reference", "cpu")
    examples = [scenes.example("test", 0, number) for number in range(40)]
    cases = [asked(number, len(examples)) for number in range(requests)]

    async def run() -> list[str]:
        async with httpx.AsyncClient(timeout=600) as client:
            work = [
                lambda scene=scene, spend=spend, stream=stream: answered(
                    client, url, body(examples[scene], spend, stream)
                )
                for scene, spend, stream in cases
            ]
            return await clients(count, work)

    given = asyncio.run(run())
    expected = [serial(model, processor, examples[scene], spend) for scene, spend, _ in cases]
    wrong = [n for n, (a, b) in enumerate(zip(given, expected, strict=True)) if a != b]
    right = sum(text.strip() == examples[case[0]].answer for text, case in zip(given, cases, strict=True))
    print(f"{requests} requests of {count} clients: {requests - len(wrong)} as the serial answers, {right} are right")
    assert not wrong, [(cases[n], given[n], expected[n]) for n in wrong]


def soak(url: str, process: psutil.Process, requests: int, count: int) -> None:
    examples = [scenes.example("test", 0, number) for number in range(100)]  # more than the server remembers

    def gauge(name: str) -> float:
        return float(re.search(rf"^{name} (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)[1])

    async def run(numbers: range) -> None:
        async with httpx.AsyncClient(timeout=600) as client:
            work = []
            for number in numbers:
                scene, spend, stream = asked(number, len(examples))
                leave = number % 10 == 0
                given = body(examples[scene], spend, stream)
                work.append(lambda given=given, leave=leave: answered(client, url, given, leave))
            await clients(count, work)

    sizes, step = [], max(1, requests // 10)
    for start in range(0, requests, step):
        asyncio.run(run(range(start, start + step)))
        assert soon(lambda: gauge("vtc_blocks_in_use") == 0 and gauge("vtc_requests_inside") == 0), "something is left"
        sizes.append(process.memory_info().rss / 2**20)
        remembered = gauge("vtc_visual_tokens_remembered")
        print(f"{start + step} requests: {sizes[-1]:.0f} MiB, {remembered:.0f} visual tokens remembered", flush=True)
    early, late = sizes[len(sizes) // 4], sizes[-1]
    print(f"memory from a quarter to the end: {early:.0f} to {late:.0f} MiB")
    assert late < 1.05 * early + 10, "the server's memory grows"


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in {"requests": 200, "soak": 2000, "clients": 12}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options, port = parser.parse_args(), free_port()
    command = [
        sys.executable,
        "-m",
        "vtc.cli",
        "serve",
        "--port",
        str(port),
        "--remember",
        "2048",
    ]  # room for what 12 clients ask, and no more
    server = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    url = f"http://127.0.0.1:{port}"

    try:
        assert soon(lambda: healthy(url), 300)
        start = time.monotonic()
        compare(url, options.requests, options.clients)
        soak(url, psutil.Process(server.pid), options.soak, options.clients)
        print(f"whole and well after {time.monotonic() - start:.0f} s")
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
