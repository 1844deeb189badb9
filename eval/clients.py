"""Clients of an OpenAI server, and what they wait: `vtc load`.

Transformers' own server, which answers one request after the other, with the full model and with a wrapped one; and
`vtc serve`, unpruned and at each budget. They take turns on the same requests.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from vtc.eval.arms import NAME, Arm, Case, servers

Row = dict[str, Any]
NUMBERS = ("requests_per_second", "tokens_per_second", "first_median", "first_95", "refused")


@dataclass(frozen=True)
class Sample:
    """One request, in seconds from when it was sent."""

    first: float
    whole: float
    tokens: int
    status: int = 200


# -- requests ---------------------------------------------------------------------------------------------------------


def body(arm: Arm, case: Case, number: int, turns: Sequence[str] = ()) -> Row:
    """A request about an image that no other number has, and the turns after it."""
    from PIL import Image

    draw, buffer = random.Random(f"{case.seed} {number}"), io.BytesIO()
    Image.frombytes("RGB", (96, 96), draw.randbytes(96 * 96 * 3)).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    question = {"type": "text", "text": f"what color is the {draw.choice(('circle', 'square', 'digit', 'word'))}?"}
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, question]}]
    for role, text in zip(("assistant", "user") * len(turns), turns, strict=False):
        messages.append({"role": role, "content": [{"type": "text", "text": text}]})
    given = {"model": NAME, "messages": messages, "max_tokens": case.new_tokens, "stream": True}
    told = {"method": "none"} if arm.budget is None else {"method": case.method, "budget": arm.budget}
    return given | ({"vtc": told} if arm.packs else {})


async def ask(client: Any, url: str, given: Row) -> Sample:
    """Send a request and wait for its end."""
    start, first, lines = time.perf_counter(), None, []
    async with client.stream("POST", f"{url}/v1/chat/completions", json=given) as reply:
        async for line in reply.aiter_lines():
            lines.append(line)
            if first is None and '"content":' in line:
                first = time.perf_counter() - start
    whole = time.perf_counter() - start
    if reply.status_code != 200:
        return Sample(whole, whole, 0, reply.status_code)
    parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    usage = next(part["usage"] for part in reversed(parts) if "usage" in part)
    return Sample(whole if first is None else first, whole, usage["completion_tokens"])


def spoken(content: str, stream: bool) -> str:
    """The text of a reply of `/v1/chat/completions`. Raises ValueError where it tells an error."""
    if not stream:
        return json.loads(content)["choices"][0]["message"]["content"]
    parts = [json.loads(line[6:]) for line in content.splitlines() if line.startswith("data: {")]
    if errors := [part["error"] for part in parts if "error" in part]:
        raise ValueError(str(errors[0]))
    return "".join(choice["delta"].get("content") or "" for part in parts for choice in part["choices"])


async def closed(url: str, bodies: Sequence[Row], clients: int) -> tuple[list[Sample], float]:
    """All requests by so many clients: samples, and seconds of the whole."""
    import httpx

    waiting, found = iter(bodies), []

    async def one(client: Any) -> None:
        for given in waiting:
            found.append(await ask(client, url, given))

    async with httpx.AsyncClient(timeout=3600) as client:
        start = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(clients)))
        return found, time.perf_counter() - start


async def opened(url: str, bodies: Sequence[Row], rate: float, seed: int) -> tuple[list[Sample], float]:
    """All requests at random moments, `rate` a second on average: samples, and seconds of the whole."""
    import httpx

    draw, jobs = random.Random(seed), []
    async with httpx.AsyncClient(timeout=3600) as client:
        start = time.perf_counter()
        for given in bodies:
            jobs.append(asyncio.create_task(ask(client, url, given)))
            await asyncio.sleep(draw.expovariate(rate))
        return [await job for job in jobs], time.perf_counter() - start


def summary(samples: Sequence[Sample], seconds: float) -> Row:
    """Requests and tokens a second, seconds to the first token; of what was answered."""
    good = [sample for sample in samples if sample.status == 200]
    firsts = sorted(sample.first for sample in good)
    return {
        "requests_per_second": len(good) / seconds,
        "tokens_per_second": sum(sample.tokens for sample in good) / seconds,
        "first_median": statistics.median(firsts) if firsts else math.nan,
        "first_95": firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))] if firsts else math.nan,
        "refused": len(samples) - len(good),
    }


# -- a run ------------------------------------------------------------------------------------------------------------


def run(case: Case, compared: Sequence[Arm], step: Callable[[str], None]) -> list[Row]:
    """One row for each round, load and arm; arms take turns within a load."""
    rows: list[Row] = []
    loads: list[Row] = [{"clients": count} for count in case.clients] + [{"rate": rate} for rate in case.rates]
    with servers(case, compared) as urls:
        for arm in compared:
            step(f"warming up: {arm.name}")
            asyncio.run(closed(urls[arm], [body(arm, case, -1 - n) for n in range(2)], 1))
        for number in range(case.rounds):
            for at, load in enumerate(loads):
                for arm in compared:
                    step(f"round {number + 1}: {load}, {arm.name}")
                    first = (number * len(loads) + at) * case.requests  # an image is new to its server
                    bodies = [body(arm, case, first + n) for n in range(case.requests)]
                    if "clients" in load:
                        work = closed(urls[arm], bodies, load["clients"])
                    else:
                        work = opened(urls[arm], bodies, load["rate"], case.seed + number)
                    rows.append({"arm": arm.name, "round": number, **load, **summary(*asyncio.run(work))})
    return rows


def again(case: Case, arm: Arm, count: int = 8) -> Row:
    """Seconds to the first token: of an image that is new, of the same one asked again, and of a second turn."""
    found: dict[str, list[float]] = {"first": [], "again": [], "next turn": []}
    with servers(case, [arm]) as urls:
        asyncio.run(closed(urls[arm], [body(arm, case, -1)], 1))
        for number in range(count):
            for name, turns in (("first", ()), ("again", ()), ("next turn", ("red", "how many are there?"))):
                samples, _ = asyncio.run(closed(urls[arm], [body(arm, case, number, turns)], 1))
                found[name].append(samples[0].first)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def medians(rows: Sequence[Row]) -> list[Row]:
    """Over the rounds, with the ratio of requests a second to the first arm at the same load."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.get("clients"), row.get("rate"), row["arm"]), []).append(row)
    result: list[Row] = []
    for (clients, rate, arm), same in groups.items():
        values = {name: statistics.median(row[name] for row in same) for name in NUMBERS}
        result.append({"arm": arm, "clients": clients, "rate": rate, **values})
    for row in result:
        base = next(one for one in result if (one["clients"], one["rate"]) == (row["clients"], row["rate"]))
        row["ratio"] = row["requests_per_second"] / base["requests_per_second"] if base["requests_per_second"] else 0.0
    return result


def table(rows: Sequence[Row], title: str) -> Table:
    heads = {"requests_per_second": "requests/s", "ratio": "ratio", "tokens_per_second": "tokens/s"}
    heads |= {"first_median": "first token, s", "first_95": "95 %", "refused": "refused"}
    found = Table("load", "server", *heads.values(), title=title)
    for row in medians(rows):
        load = f"{row['rate']:g} a second" if row["rate"] else f"{row['clients']} clients"
        found.add_row(load, row["arm"], *(f"{row[name]:.3g}" for name in heads))
    return found


def picture(rows: Sequence[Row], path: Path, title: str) -> None:
    """Requests a second, and seconds to the first token, against the number of clients: a line for each arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=160, layout="constrained")
    closed_ = [row for row in medians(rows) if row["clients"]]
    names = {"requests_per_second": "requests a second", "first_median": "seconds to the first token (median)"}
    for axes, (value, label) in zip(figure.subplots(1, 2), names.items(), strict=True):
        for arm in dict.fromkeys(row["arm"] for row in closed_):
            points = [(row["clients"], row[value]) for row in closed_ if row["arm"] == arm]
            axes.plot(*zip(*points, strict=True), marker="o", linestyle="-" if "packed" in arm else "--", label=arm)
        axes.set_xlabel("clients")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)
