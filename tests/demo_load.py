"""Eight visitors ask the demo 200 questions at once; run by hand: python tests/demo_load.py

Prints how many answers equal those asked one after the other, the seconds, and the server's memory over the run.
"""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from demo_browser import served
from gradio_client import Client, handle_file

from vtc.eval import scenes

VISITORS, REQUESTS, QUESTIONS = 8, 200, 25
METHODS = ("vtc-cls", "fastv", "vflowopt", "uniform")


def texts(client: Client, picture: Path, question: str, method: str) -> list[str]:
    """Both answers, full and compressed; all advanced settings at their defaults."""
    parameters = client.view_api(return_format="dict", print_info=False)["named_endpoints"]["/ask"]["parameters"]
    defaults = [None] * (len(parameters) - 4)
    answers = client.predict(handle_file(picture), question, method, 25, *defaults, api_name="/ask")
    return re.findall(r'class="text"[^>]*>(.*?)</p>', answers)


def memory(pid: int) -> float:
    """MiB that the process holds."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def main() -> None:
    with TemporaryDirectory() as folder, served() as (address, pid):
        asked = []
        for number in range(QUESTIONS):
            scene = scenes.example("test", 0, number)
            scene.image.save(path := Path(folder) / f"{number}.png")
            asked.append((path, scene.question, METHODS[number % len(METHODS)]))
        client = Client(address, verbose=False)
        serial = [texts(client, *question) for question in asked]
        held = [memory(pid)]
        clients = [Client(address, verbose=False) for _ in range(VISITORS)]

        def visit(number: int) -> bool:
            answers = texts(clients[number % VISITORS], *asked[number % QUESTIONS])
            if number % 20 == 19:
                held.append(memory(pid))
            return answers == serial[number % QUESTIONS]

        start = time.perf_counter()
        with ThreadPoolExecutor(VISITORS) as pool:
            equal = sum(pool.map(visit, range(REQUESTS)))
        seconds = time.perf_counter() - start
        print(f"{equal} of {REQUESTS} answers equal the serial ones; {VISITORS} visitors, {seconds:.1f} s")
        print("server memory in MiB after the serial round and every 20 requests:", *(f"{x:.0f}" for x in held))


if __name__ == "__main__":
    main()
