"""The peers' way beside vtc's: the same scores read out of materialised attention, in one interleaved run.

The released code of FastV and of VTC-CLS asks transformers for `output_attentions`: eager attention, and the matrices
of all layers held at once. Weights, kept tokens and compaction are the same in both arms here, so that the ratio is
what seeing costs. vtc's own scoring runs in the peers' arm, too; `vtc bench` tells how little that is.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import vtc
from vtc.eval import bench, shapes

ATTENTION = {"vtc-cls": "vision_config", "fastv": "text_config"}
"""Whose attention each of the methods asks for."""


@torch.no_grad()
def compare(model: nn.Module, budgets: Sequence[vtc.stage.Budget], case: bench.Case) -> list[dict[str, Any]]:
    """Medians over rounds of seconds to the first token, and of bytes beyond what was held before it.

    On a CPU these are of the process, whose allocator keeps what it once had: they are too low rather than too high.
    One row a method and budget: {"method", "budget", "vtc", "peers", "agreement"}; the last is the share of the kept
    tokens that the peers' scores keep, too: 1 in float32, less where half precision rounds the matrices.
    Raises ValueError for a model whose images differ in size.
    """
    if vtc.adapter.find(model).tokens_per_image() is None:
        raise ValueError("the comparison reads single crops: use a LLaVA-1.5 shape, such as llava-qwen2-0.5b")
    inputs = shapes.prompt(model, case.batch, case.prompt_tokens)
    arms = [(method, budget) for method in ATTENTION for budget in budgets]
    rounds = [
        [{way: _run(model, *arm, inputs, way == "peers") for way in ("vtc", "peers")} for arm in arms]
        for _ in range(case.rounds + 1)
    ][1:]  # the first warms up
    rows = []
    for (method, budget), runs in zip(arms, zip(*rounds, strict=True), strict=True):
        row = {"method": method, "budget": budget, "agreement": runs[0]["peers"]["agreement"]}
        for way in ("vtc", "peers"):
            row[way] = {part: statistics.median(run[way][part] for run in runs) for part in ("seconds", "bytes")}
        rows.append(row)
    return rows


def _run(model: nn.Module, method: str, budget: vtc.stage.Budget, inputs: dict[str, Tensor], peers: bool) -> dict:
    with _eager(model, ATTENTION[method]) if peers else nullcontext(), vtc.compressed(model, method, budget) as trace:
        with _scored(model, inputs) if peers else nullcontext() as scores:
            bench.reset_peak(model.device)
            before = bench.peak_bytes(model.device)
            seconds, _ = bench.timed(lambda: model(**inputs, logits_to_keep=1), model)
        found = {"seconds": seconds, "bytes": max(0, (bench.peak_bytes(model.device) or 0) - (before or 0))}
        if peers:
            kept = torch.stack(trace.kept())
            theirs = sum(scores.values()).topk(kept.shape[1]).indices.cpu()
            found["agreement"] = (kept[:, :, None] == theirs[:, None]).any(2).float().mean().item()
    return found


@contextmanager
def _eager(model: nn.Module, part: str) -> Iterator[None]:
    """Eager attention and `output_attentions` in the vision tower or in the decoder."""
    config = getattr(model.config, part)
    kernel = config._attn_implementation
    model.set_attn_implementation({part: "eager"})
    config.output_attentions = True
    try:
        yield
    finally:
        config.output_attentions = False
        model.set_attn_implementation({part: kernel})


@contextmanager
def _scored(model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[dict[int, Tensor]]:
    """By layer the scores (batch, tokens) out of the matrices that the wrapped method's layers return."""
    adapter, scores = model.vtc.adapter, {}
    visual = inputs["input_ids"] == adapter.image_token_id

    def score(need: vtc.observe.Need):
        def hook(module: nn.Module, args: tuple, output: tuple) -> None:
            matrix = output[1].mean(1)
            if not need.tower:
                scores[need.layer] = matrix[:, -1][visual].view(len(visual), -1)
            elif adapter.has_cls():
                scores[need.layer] = matrix[:, 0, 1:]
            else:
                scores[need.layer] = matrix.mean(1)

        return hook

    blocks = {True: adapter.tower_blocks(), False: adapter.layers}
    handles = [blocks[need.tower][need.layer].self_attn.register_forward_hook(score(need)) for need in model.vtc.needs]
    try:
        yield scores
    finally:
        for handle in handles:
            handle.remove()


def table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Milliseconds and MiB of both ways, and how many times as long the peers' takes."""
    grid = Table(title=title, caption="MiB: the peak beyond the model and its inputs")
    for column in ("", "budget", "vtc, ms", "peers, ms", "ratio", "vtc, MiB", "peers, MiB", "same tokens"):
        grid.add_column(column, justify="right" if column else "left")
    for row in rows:
        own, theirs = row["vtc"], row["peers"]
        grid.add_row(
            row["method"],
            str(row["budget"]),
            *(f"{way['seconds'] * 1e3:.0f}" for way in (own, theirs)),
            f"{theirs['seconds'] / own['seconds']:.2f}x",
            *(f"{way['bytes'] * 2**-20:.0f}" for way in (own, theirs)),
            f"{row['agreement']:.0%}",
        )
    return grid
