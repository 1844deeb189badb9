"""Seconds and bytes with and without compression, and what would be possible, in one interleaved run.

The limit is measured, not computed: the same model runs natively on prompts that are as short from the start as the
pruned ones are in the end. Where a method drops tokens in the middle of the stack, each layer counts with the native
prefill of its own length; where it narrows a cache after the prefill, each layer counts with the prefill of what it
read, and with the decoding of what it holds.
"""

from __future__ import annotations

import functools
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from rich.table import Table
from torch import Tensor

import vtc
from vtc import adapter
from vtc.cache.held import nbytes
from vtc.eval import cost, shapes
from vtc.trace import Trace

PARTS = {
    "vision": "vision tower",
    "prefill": "prefill",
    "first": "first token",
    "decode": "decode, a token",
    "kv_bytes": "KV cache",
    "peak_bytes": "peak memory",
}
"""What is compared; the first token is vision tower and prefill together."""
OWN = ("score", "select", "compact")
"""What compression itself costs; parts of `first`."""
NOISE = 0.2
"""Where a ratio of seconds ranges over the rounds by more than this share of itself, nothing is concluded from it."""
Step = Callable[[str], None]
"""Told what begins, in words."""
Parts = dict[str, float]
"""Seconds or bytes, by names of `PARTS` or `OWN`."""
Ends = tuple[float, float]
"""The least and the greatest of a ratio over the rounds."""


class Tokens(TypedDict):
    full: int
    """Visual tokens of the image."""
    average: float
    """Of these, what a layer's cache holds after the prefill, averaged over the layers: tokens at fewer bits count by
    their bytes."""
    last: int
    """What the last layer reads in the prefill."""
    text: int


class Ranges(TypedDict):
    gain: dict[str, Ends]
    """Full to pruned, by part."""
    possible: dict[str, Ends]
    """Full to natively short, by part."""


class Row(TypedDict):
    """A method at a budget: medians over the rounds."""

    method: str
    budget: vtc.Budget
    tokens: Tokens
    full: Parts
    pruned: Parts
    limit: Parts
    """Of natively short prompts."""
    range: Ranges
    own: Parts
    """What compression itself took."""
    noisy: list[str]
    """Parts of which nothing is concluded: their ratios range by more than `NOISE`."""
    binds: str
    """What keeps the first token from coming sooner, in a sentence."""


@dataclass(frozen=True)
class Case:
    """What is measured: a batch of prompts of one image and `prompt_tokens` of text each, `new_tokens` decoded."""

    batch: int = 1
    prompt_tokens: int = 60
    new_tokens: int = 8
    rounds: int = 3
    pixels: int | None = None
    """The side of the image, for families that choose their resolution by it."""
    compiled: bool = False
    """Whether torch.compile makes the decoder layers of all that is measured; each run is then preceded by two more."""


@torch.inference_mode()
def bench(
    model: torch.nn.Module,
    arms: Sequence[tuple[str | vtc.Method, vtc.Budget]],
    case: Case,
    step: Step = lambda text: None,
) -> list[Row]:
    """One row for each (method, budget), from rounds in which the full, the pruned and the natively short model take
    turns.
    """
    if case.compiled:
        _compile(adapter.find(model).layers)
    step("preparing the prompts")
    inputs = shapes.prompt(model, case.batch, case.prompt_tokens, case.pixels)
    traces = [_traced(model, arm, inputs) for arm in arms]
    text = case.prompt_tokens
    reads = [[n + text for n in trace.tokens_per_layer[0].tolist()] for trace in traces]
    holds = [[n + text for n in trace.held_sizes[0].round().int().tolist()] for trace in traces]
    works = _works(model, arms, inputs, {n for lengths in (*reads, *holds) for n in lengths}, case)
    rounds = take_turns(works, case.rounds, step)
    full = _median([runs["full"] for runs in rounds])
    total = int((inputs["input_ids"][0] == model.config.image_token_id).sum())
    rows = []
    for number, ((method, budget), trace) in enumerate(zip(arms, traces, strict=True)):
        pruned, layers = _median([runs["pruned", number] for runs in rounds]), trace.tokens_per_layer[0].tolist()
        limits = [_limit(runs, reads[number], holds[number]) for runs in rounds]
        ranges: Ranges = {
            "gain": _ranges([(runs["full"], runs["pruned", number]) for runs in rounds]),
            "possible": _ranges([(runs["full"], limit) for runs, limit in zip(rounds, limits, strict=True)]),
        }
        row: Row = {
            "method": method if isinstance(method, str) else method.name,
            "budget": budget,
            "tokens": {"full": total, "average": float(trace.average_tokens[0]), "last": layers[-1], "text": text},
            "full": full,
            "pruned": {part: pruned[part] for part in full},
            "limit": _median(limits),
            "range": ranges,
            "own": {part: pruned.get(part, 0.0) for part in OWN},
            "noisy": noisy(ranges),
            "binds": "",
        }
        row["binds"] = what_binds(model, row, layers)
        rows.append(row)
    return rows


def _traced(model: torch.nn.Module, arm: tuple, inputs: dict[str, Tensor]) -> Trace:
    with vtc.compressed(model, *arm) as trace:
        model(**inputs, logits_to_keep=1)
    return trace.record


Work = Callable[[], Parts]


def _works(
    model: torch.nn.Module, arms: Sequence[tuple], inputs: dict, lengths: set[int], case: Case
) -> dict[Any, Work]:
    """What takes turns: "full", ("pruned", number of the arm), and for natively short prompts their length."""

    def pruned(arm: tuple) -> Parts:
        with vtc.compressed(model, *arm) as trace:
            return _run(model, inputs, case) | {part: trace.seconds.get(part, 0.0) for part in OWN}

    def short(length: int) -> Parts:
        ids = torch.full((case.batch, length), 2, device=model.device)
        return _run(model, {"input_ids": ids}, case)

    works: dict[Any, Work] = {"full": lambda: _run(model, inputs, case)}
    works |= {("pruned", number): functools.partial(pruned, arm) for number, arm in enumerate(arms)}
    return works | {length: functools.partial(short, length) for length in sorted(lengths)}


def take_turns(works: Mapping[Any, Work], rounds: int, step: Step) -> list[dict[Any, Parts]]:
    """What each work returns in each round, after a round that warms up.

    Each round has an order of its own: what ran just before tells in caches and in the allocator. `step` hears how far
    it is and, once every work has run, how long the rest will take: as long as each took when it ran last.
    """
    found: list[dict[Any, Parts]] = []
    last: dict[Any, float] = {}
    for number in range(rounds + 1):
        results: dict[Any, Parts] = {}
        for name in random.Random(number).sample([*works], len(works)):
            at = f"round {number} of {rounds}" if number else "warming up"
            left = sum(last.get(work, 0) for work in works if work not in results) + (rounds - number) * sum(
                last.values()
            )
            step(f"{at}, {len(results) + 1} of {len(works)}" + (f", about {left:.0f} s left" if number else ""))
            start = time.perf_counter()
            results[name] = works[name]()
            last[name] = time.perf_counter() - start
        found.append(results)
    return found[1:]


def _ranges(pairs: list[tuple[Parts, Parts]]) -> dict[str, Ends]:
    """The least and the greatest ratio of each part that both have."""
    ratios = {part: [one[part] / other[part] for one, other in pairs] for part in PARTS if part in pairs[0][1]}
    return {part: (min(found), max(found)) for part, found in ratios.items()}


def wide(low: float, high: float) -> bool:
    """Whether a range is wider than `NOISE` of its middle."""
    return high - low > NOISE * (low + high) / 2


def noisy(ranges: Ranges) -> list[str]:
    """The parts with a ratio of seconds whose range over the rounds is too wide."""
    seconds = [part for part in PARTS if not part.endswith("bytes")]
    kinds = ranges["gain"], ranges["possible"]
    return [part for part in seconds if any(part in kind and wide(*kind[part]) for kind in kinds)]


def _median(runs: list[Parts]) -> Parts:
    return {part: statistics.median(run[part] for run in runs) for part in runs[0]}


def _limit(runs: Mapping[Any, Parts], reads: Sequence[int], holds: Sequence[int]) -> Parts:
    """The vision tower of the full model before a decoder whose every layer has the prefill of a natively short prompt,
    of the length that it reads, and the decoding and the cache of one of the length that it holds."""
    vision, prefill = runs["full"]["vision"], statistics.mean(runs[length]["prefill"] for length in reads)
    decode, kv_bytes = (statistics.mean(runs[length][part] for length in holds) for part in ("decode", "kv_bytes"))
    return {"vision": vision, "prefill": prefill, "decode": decode, "kv_bytes": kv_bytes, "first": vision + prefill}


def _compile(layers: Sequence[torch.nn.Module]) -> None:
    """Each layer by itself, as wrapped ones have hooks of their own, often enough for prompts and decoded tokens."""
    torch._dynamo.config.recompile_limit = 8 * len(layers)
    for layer in layers:
        layer.compile()


def _run(model: torch.nn.Module, inputs: dict[str, Tensor], case: Case) -> Parts:
    """`_once`, after what a compiled model needs to warm up."""
    for _ in range(2 * case.compiled):  # wrapping makes the compiler look again, first at these lengths, then at any
        _once(model, inputs, case.new_tokens)
    return _once(model, inputs, case.new_tokens)


def _once(model: torch.nn.Module, inputs: dict[str, Tensor], new_tokens: int) -> Parts:
    """One prompt to its last token: the parts that `PARTS` names."""
    vision: list[float] = []
    reset_peak(model.device)
    with _timed_vision(model, vision):
        first, out = timed(lambda: model(**inputs, use_cache=True, logits_to_keep=1), model)
    peak, cache = peak_bytes(model.device), out.past_key_values
    held = nbytes(cache)

    def decode() -> None:
        token = out.logits[:, -1:].argmax(-1)
        for _ in range(new_tokens):
            token = model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)

    seconds = timed(decode, model)[0] / new_tokens
    parts = {"vision": sum(vision), "prefill": first - sum(vision), "first": first, "decode": seconds}
    return parts | {"kv_bytes": held} | ({} if peak is None else {"peak_bytes": peak})


@contextmanager
def _timed_vision(model: torch.nn.Module, seconds: list[float]) -> Iterator[None]:
    """Append what each `get_image_features` takes, for the wrapped and the bare model alike."""
    backbone = model.base_model
    own = backbone.__dict__.get("get_image_features")
    original = backbone.get_image_features

    def get_image_features(*args, **kwargs):
        passed, features = timed(lambda: original(*args, **kwargs), model)
        seconds.append(passed)
        return features

    backbone.get_image_features = get_image_features
    try:
        yield
    finally:
        del backbone.get_image_features
        if own is not None:
            backbone.get_image_features = own


def timed(work: Callable[[], Any], model: torch.nn.Module) -> tuple[float, Any]:
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - start, result


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif RESET_PEAK.exists():
        RESET_PEAK.write_text("5")


def peak_bytes(device: torch.device) -> int | None:
    """The most bytes held since `reset_peak`: allocated on a GPU, resident on a CPU; None where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not RESET_PEAK.exists():
        return None
    high = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(high[1]) * 1024 if high else None


RESET_PEAK = Path("/proc/self/clear_refs")
"""Linux: writing 5 makes the peak resident size start anew (proc(5))."""


def what_binds(model: torch.nn.Module, row: Row, layers: Sequence[int]) -> str:
    """One sentence: what keeps the first token from coming sooner, and what would help."""
    full, limit, tokens = row["full"], row["limit"], row["tokens"]
    if min(layers) == tokens["full"] > tokens["average"]:
        return (
            "The prefill is that of the full model: what leaves the cache after it saves memory and decoding, and "
            "never the first token."
        )
    vision = limit["vision"] / limit["first"]
    if vision > 0.5:
        return (
            f"The vision tower binds: {vision:.0%} of the time to the first token passes before the decoder, out of "
            "reach of what is dropped there. Fewer tiles, a smaller image or merging inside the tower would help."
        )
    config = adapter.find(model).decoder.config
    flops = cost.speed_up_limit(layers, tokens["full"], tokens["text"], config)
    gain = full["prefill"] / limit["prefill"]
    if gain > 0.7 * flops:
        return f"Compute binds: the decoder does {flops:.1f} times less of it, and the prefill follows."
    return (
        f"Weights and launches bind: the decoder computes {flops:.1f} times less, but a prompt that short from the "
        f"start is only {gain:.1f} times faster. Larger batches would help; on a GPU also CUDA graphs."
    )


def table(row: Row, title: str) -> Table:
    """Each part: full, pruned, their ratio, the ratio that was possible, both with their range over the rounds, and how
    much of it was reached, or that the rounds differ too much to say."""
    full, pruned, limit, ranges = row["full"], row["pruned"], row["limit"], row["range"]
    grid = Table(title=title, caption="\n".join(caption(row)))
    for column in ("", "full", "pruned", "gain", "possible", "of possible"):
        grid.add_column(column, justify="right" if column else "left")
    for part, name in PARTS.items():
        if part in full:
            unit, scale = ("MiB", 2**-20) if part.endswith("bytes") else ("ms", 1e3)
            reached = ""
            if part in limit:
                reached = "noisy" if part in row["noisy"] else f"{limit[part] / pruned[part]:.0%}"
            grid.add_row(
                name,
                *(f"{kind[part] * scale:.1f} {unit}" for kind in (full, pruned)),
                ratio(full[part] / pruned[part], ranges["gain"][part]),
                ratio(full[part] / limit[part], ranges["possible"][part]) if part in limit else "",
                reached,
            )
    return grid


def ratio(median: float, ends: Ends) -> str:
    """1.63x, and on the next line its range over the rounds: 1.61–1.65."""
    low, high = (f"{end:.2f}" for end in ends)
    return f"{median:.2f}x" + (f"\n{low}–{high}" if low != high else "")


def caption(row: Row) -> list[str]:
    """What the ratios mean, what compression itself costs, and what binds, or why that cannot be said."""
    pruned, limit = row["pruned"], row["limit"]
    own = ", ".join(f"{part} {1e3 * seconds:.2f} ms" for part, seconds in row["own"].items())
    share = sum(row["own"].values()) / pruned["first"]
    lines = [
        "possible: the same model on a prompt that is short from the start; below a ratio its range over the rounds",
        f"compression itself: {own}; {share:.1%} of the first token",
    ]
    if any(limit[part] > 1.05 * pruned[part] for part in limit if part not in row["noisy"]):
        lines.append(
            "Over 100 %: in the vision tower, and by it in the first token, a method may do less work than the full "
            "model's tower does; elsewhere it is chance."
        )
    if not row["noisy"]:
        return [*lines, row["binds"]]
    names = ", ".join(PARTS[part] for part in row["noisy"])
    lines.append(
        f"Too noisy to conclude anything about {names}: over the rounds a ratio ranges by more than {NOISE:.0%}. Stop "
        "other work on this machine, or take more --rounds."
    )
    return lines if "first" in row["noisy"] or "prefill" in row["noisy"] else [*lines, row["binds"]]


def picture(rows: list[Row], path: Path, title: str) -> None:
    """The time to the first token, in parts, of the full model and of each arm, with a mark where the limit is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.6 + 0.5 * len(rows)), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    names = ["full model", *(f"{row['method']}, {row['tokens']['average']:.0f} tokens" for row in rows)]
    bars = [rows[0]["full"] | dict.fromkeys(OWN, 0.0), *(row["pruned"] | row["own"] for row in rows)]
    seen, rest = ([1e3 * bar[part] for bar in bars] for part in ("vision", "prefill"))
    stack(axes, names, {"vision tower": ("#999999", seen), "rest of the prefill": ("#0072B2", rest)})
    limits = [1e3 * row["limit"]["first"] for row in rows]
    axes.plot(limits, names[1:], "|", color="black", markersize=22, markeredgewidth=2, label="possible")
    dress(axes, title, "milliseconds to the first token (median)")
    figure.savefig(path)


def stack(axes: Any, names: Sequence[str], parts: Mapping[str, tuple[str, Sequence[float]]]) -> None:
    """A bar for each name, laid together of parts: by label a colour and their lengths."""
    left = [0.0] * len(names)
    for label, (colour, widths) in parts.items():
        axes.barh(names, widths, left=left, color=colour, label=label)
        left = [start + width for start, width in zip(left, widths, strict=True)]


def dress(axes: Any, title: str, unit: str) -> None:
    """The first bar on top, and what is said around them."""
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
