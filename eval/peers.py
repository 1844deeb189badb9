"""The peers' ways beside vtc's: the same scores read out of materialised attention, in one interleaved run.

The released code of FastV and of VTC-CLS asks transformers for `output_attentions`: eager attention, and the matrices
of all layers held at once. Others leave the model its kernel, and run the attention of the one layer again, eagerly, in
a hook. Weights, kept tokens and compaction are the same in all arms here, so that the ratio is what seeing costs. vtc's
own scoring runs in the peers' arms, too; `vtc bench` tells how little that is.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NotRequired, TypedDict

import torch
from rich.table import Table
from torch import Tensor, nn

import vtc
from vtc.eval import bench, shapes

ATTENTION = {"vtc-cls": "vision_config", "fastv": "text_config"}
"""Whose attention each of the methods asks for."""
Name = Literal["vtc", "output_attentions", "run again"]
NAMES: tuple[Name, ...] = ("vtc", "output_attentions", "run again")
"""vtc's own way of seeing attention, and the peers'."""


class Way(TypedDict):
    """Medians over the rounds. On a CPU bytes are of the process, whose allocator keeps what it once had: they are too
    low rather than too high."""

    seconds: float
    """To the first token."""
    bytes: float
    """Beyond what was held before."""
    agreement: NotRequired[float]
    """Of a peer's way: the share of the kept tokens that its scores keep, too; 1 in float32, less where half precision
    rounds the matrices."""
    range: NotRequired[bench.Ends]
    """Of a peer's way: the ends of the ratio of its seconds to vtc's."""


Row = TypedDict("Row", {"method": str, "budget": vtc.Budget, "vtc": Way, "output_attentions": Way, "run again": Way})
"""A method at a budget, each way."""


@torch.no_grad()
def compare(
    model: nn.Module, budgets: Sequence[vtc.Budget], case: bench.Case, step: bench.Step = lambda text: None
) -> list[Row]:
    """One row a method and budget, from rounds in which all ways take turns; of `case` nothing is decoded.

    Raises ValueError for a model whose images differ in size.
    """
    if vtc.adapter.find(model).tokens_per_image() is None:
        raise ValueError("the comparison reads single crops: use a LLaVA-1.5 shape, such as llava-qwen2-0.5b")
    inputs = shapes.prompt(model, case.batch, case.prompt_tokens)
    arms = [(method, budget) for method in ATTENTION for budget in budgets]
    works = {
        (number, way): functools.partial(_run, model, *arm, inputs, way)
        for number, arm in enumerate(arms)
        for way in NAMES
    }
    rounds = bench.take_turns(works, case.rounds, step)
    return [
        _row(method, budget, {way: [found[number, way] for found in rounds] for way in NAMES})
        for number, (method, budget) in enumerate(arms)
    ]


def _row(method: str, budget: vtc.Budget, runs: Mapping[Name, list[bench.Parts]]) -> Row:
    ours = [run["seconds"] for run in runs["vtc"]]

    def way(name: Name) -> Way:
        median = {part: statistics.median(run[part] for run in runs[name]) for part in runs[name][0]}
        found: Way = {"seconds": median["seconds"], "bytes": median["bytes"]}
        if name != "vtc":
            ratios = [run["seconds"] / own for run, own in zip(runs[name], ours, strict=True)]
            found["agreement"], found["range"] = median["agreement"], (min(ratios), max(ratios))
        return found

    return {
        "method": method,
        "budget": budget,
        "vtc": way("vtc"),
        "output_attentions": way("output_attentions"),
        "run again": way("run again"),
    }


def _run(model: nn.Module, method: str, budget: vtc.Budget, inputs: dict[str, Tensor], way: Name) -> bench.Parts:
    scores: dict[int, Tensor] = {}
    with vtc.compressed(model, method, budget) as trace:
        with WAYS[way](model, _reader(model, inputs, scores)) if way in WAYS else nullcontext():
            bench.reset_peak(model.device)
            before = bench.peak_bytes(model.device)
            seconds, _ = bench.timed(lambda: model(**inputs, logits_to_keep=1), model)
        found = {"seconds": seconds, "bytes": max(0, (bench.peak_bytes(model.device) or 0) - (before or 0))}
    if way in WAYS:
        kept = torch.stack(trace.kept())
        best = torch.stack([*scores.values()]).sum(0).topk(kept.shape[1]).indices.cpu()
        found["agreement"] = (kept[:, :, None] == best[:, None]).any(2).float().mean().item()
    return found


Read = Callable[[vtc.Need, Tensor], None]


def _reader(model: nn.Module, inputs: dict[str, Tensor], scores: dict[int, Tensor]) -> Read:
    """What puts a layer's scores (batch, tokens), out of its (batch, heads, queries, keys) matrix, into `scores`."""
    cls, visual = model.vtc.adapter.has_cls(), inputs["input_ids"] == model.vtc.adapter.image_token_id

    def read(need: vtc.Need, matrix: Tensor) -> None:
        matrix = matrix.mean(1)
        if not need.tower:
            scores[need.layer] = matrix[:, -1][visual].view(len(visual), -1)
        else:
            scores[need.layer] = matrix[:, 0, 1:] if cls else matrix.mean(1)

    return read


@contextmanager
def output_attentions(model: nn.Module, read: Read) -> Iterator[None]:
    """All attention of the vision tower or of the decoder is eager, and its matrices are kept."""
    part = ATTENTION[model.vtc.method.name]
    config = getattr(model.config, part)
    kernel = config._attn_implementation
    model.set_attn_implementation({part: "eager"})
    config.output_attentions = True
    try:
        with _hooked(model, lambda need: lambda module, args, kwargs, output: read(need, output[1])):
            yield
    finally:
        config.output_attentions = False
        model.set_attn_implementation({part: kernel})


@contextmanager
def run_again(model: nn.Module, read: Read) -> Iterator[None]:
    """The attention of the layers that are read runs a second time, eagerly, after its own kernel."""

    def again(need: vtc.Need):
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple) -> None:
            kernel = module.config._attn_implementation
            module.config._attn_implementation = "eager"
            try:
                read(need, module.forward(*args, **{**kwargs, "past_key_values": None})[1])
            finally:
                module.config._attn_implementation = kernel

        return hook

    with _hooked(model, again):
        yield


WAYS = {"output_attentions": output_attentions, "run again": run_again}


@contextmanager
def _hooked(model: nn.Module, hook: Callable[[vtc.Need], Callable]) -> Iterator[None]:
    """`hook` of each need of the wrapped method, on the attention of its layer."""
    blocks = {True: model.vtc.adapter.tower_blocks(), False: model.vtc.adapter.layers}
    handles = [
        blocks[need.tower][need.layer].self_attn.register_forward_hook(hook(need), with_kwargs=True)
        for need in model.vtc.compression.needs
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def table(rows: Sequence[Row], title: str) -> Table:
    """Milliseconds and MiB of each way, and how many times as long the peers' take."""
    caption = "below a ratio its range over the rounds; MiB: the peak beyond the model and its inputs"
    if any(bench.wide(*row[way]["range"]) for row in rows for way in NAMES if way != "vtc"):
        caption += (
            f"\nnoisy: a range wider than {bench.NOISE:.0%}. Stop other work on this machine, or take more --rounds."
        )
    grid = Table(title=title, caption=caption)
    for column in ("", "budget", "way", "ms", "ratio", "MiB", "same tokens"):
        grid.add_column(column, justify="right" if column in ("ms", "ratio", "MiB", "same tokens") else "left")
    for row in rows:
        for way in NAMES:
            median, ends = row[way]["seconds"] / row["vtc"]["seconds"], row[way].get("range", (1.0, 1.0))
            grid.add_row(
                *((row["method"], str(row["budget"])) if way == "vtc" else ("", "")),
                way,
                f"{row[way]['seconds'] * 1e3:.0f}",
                bench.ratio(median, ends) + " noisy" * bench.wide(*ends),
                f"{row[way]['bytes'] * 2**-20:.0f}",
                "" if way == "vtc" else f"{row[way]['agreement']:.0%}",
                end_section=way == NAMES[-1],
            )
    return grid
