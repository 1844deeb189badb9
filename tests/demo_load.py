"""Twelve visitors ask the demo at once, about photos and scenes; run by hand: python tests/demo_load.py

Each question comes from a page of its own, as people come and go. Prints how many answers equal those asked one after
the other, and the server's memory: at the start, over the questions, and how far above the start; fails where an answer
is another or the memory is more than allowed.
"""

from __future__ import annotations

import random
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from demo_browser import served
from gradio_client import Client, handle_file
from PIL import Image

from vtc.eval import scenes

VISITORS, PHOTO_QUESTIONS, SCENE_QUESTIONS, EVERY = 12, 500, 100, 50
METHODS = ("vtc-cls", "fastv", "vflowopt", "uniform", "tome", "random")
ALLOWED = 200
"""MiB above the start."""


class Question(NamedTuple):
    image: Path
    text: str
    method: str


def texts(address: str, asked: Question) -> list[str]:
    """Both answers, full and compressed, as a new visitor's page gets them; advanced settings at their defaults."""
    client = Client(address, verbose=False)
    (event,) = (event for event in client.config["dependencies"] if event.get("api_name") == "ask")
    values = [handle_file(asked.image), None, asked.text, asked.method, 25]
    values += [None] * (len(event["inputs"]) - len(values))
    shown = client.predict(*values, fn_index=event["id"])[0]
    client.close()
    return re.findall(r'class="text"[^>]*>(.*?)</p>', re.sub(r"</?mark>", "", shown))


def memory(pid: int) -> float:
    """MiB that the process holds."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def photo(path: Path, side: int = 2048) -> Path:
    """Colours and detail of a photograph's size."""
    small = Image.frombytes("RGB", (256, 192), random.Random(0).randbytes(256 * 192 * 3))
    small.resize((side, side * 3 // 4), Image.Resampling.BICUBIC).save(path, quality=92)
    return path


def questions(folder: Path) -> tuple[list[Question], list[Question]]:
    """About one photo, and about scenes."""
    big = photo(folder / "photo.jpg")
    words = [scenes.example("test", 0, number).question for number in range(20)]
    photos = [Question(big, words[number % 20], METHODS[number % len(METHODS)]) for number in range(60)]
    found = []
    for number in range(24):
        scene = scenes.example("test", 0, number)
        scene.image.save(path := folder / f"{number}.png")
        found.append(Question(path, scene.question, METHODS[number % len(METHODS)]))
    return photos, found


def main() -> None:
    with TemporaryDirectory() as folder, served() as (address, pid):
        photos, small = questions(Path(folder))
        started = memory(pid)
        expected = {asked: texts(address, asked) for asked in (*photos, *small)}
        held, right, count, start = [memory(pid)], 0, 0, time.perf_counter()

        def visit(asked: Question) -> bool:
            return texts(address, asked) == expected[asked]

        with ThreadPoolExecutor(VISITORS) as pool:
            for kind, number in ((photos, PHOTO_QUESTIONS), (small, SCENE_QUESTIONS)):
                for equal in pool.map(visit, (kind[i % len(kind)] for i in range(number))):
                    right, count = right + equal, count + 1
                    if count % EVERY == 0:
                        held.append(memory(pid))
        seconds = time.perf_counter() - start
    above = max(held) - started
    print(f"{right} of {count} answers equal the serial ones; {VISITORS} visitors, {seconds:.0f} s")
    print(f"server memory in MiB: {started:.0f} at the start; after the serial questions, and every {EVERY}:")
    print(*(f"{x:.0f}" for x in held))
    print(f"at most {above:.0f} MiB above the start (allowed: {ALLOWED})")
    if right < count or above > ALLOWED:
        sys.exit(1)


if __name__ == "__main__":
    main()
