"""Accuracy against the bytes that a cache holds: dropping before the decoder, within it, after the prefill, and bits.

    python -m vtc.eval.pareto --limit 500 --out out/pareto
    python -m vtc.eval.pareto --limit 1000 --benchmark scenes --out out/pareto-scenes

Runs `vtc eval --per bytes` on one method of each kind, and on mixtures: half of the tokens dropped before the decoder,
and what is left held at 8, 4 or 2 bits, by JSON files that it writes to the folder. Run again, it goes on where it was.

Captions are asked for unless told otherwise: the first token comes from the prefill, which what leaves a cache later
does not touch, so that answers of one word lose nothing to any method of the cache and tell nothing about it.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from rich.console import Console

from vtc.adapter import find
from vtc.budget import counts
from vtc.cli.terminal import errors_in_a_line
from vtc.eval import benchmarks, memory, report, run
from vtc.eval.reader import load, model_path
from vtc.eval.rows import Row
from vtc.methods.compose import Chain, find_method
from vtc.stage import Shape

METHODS = ("vtc-cls", "fastv", "random", "random-kv", "snapkv", "h2o", "bits", "mikv", "zipcache", "vtc-cls+bits")
BUDGETS = (0.75, 0.5, 0.25, 0.125, 0.0625)
DROPPED = "vtc-cls"
HALF = f"half of {DROPPED}, then bits"


def mixtures(out: Path, shape: Shape, tokens: int) -> list[str]:
    """Write the chains that drop half and hold the rest at 8, 4 or 2 bits; their files."""
    files = []
    for bits in (8, 4, 2):
        (stage, *_), left = find_method("bits").stages(shape), tokens // 2
        assert stage.precision is not None
        budget = stage.precision.all_at(bits, left) / tokens
        chain = Chain(DROPPED, "bits", split=(math.log(left / tokens) / math.log(budget),))
        assert counts(chain, tokens, budget, shape)[0] == left
        files.append(str(out / f"half-at-{bits}-bits.json"))
        chain.to_json(files[-1], budget)
    return files


def drawn_together(row: Row) -> Row:
    """The mixtures as one curve."""
    return {**row, "method": HALF} if row["method"].endswith("bits.json") else row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="reference")
    parser.add_argument("--benchmark", default="captions", choices=benchmarks.NAMES)
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--dtype", default="bfloat16", help="what tokens that are not packed are held in")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/pareto"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    adapter = find(load(model_path(asked.model), asked.device, dtype=asked.dtype).model)
    if (tokens := adapter.tokens_per_image()) is None:
        raise ValueError("the mixtures need a model whose images all have as many visual tokens")
    settings = run.Settings(
        asked.model,
        (*METHODS, *mixtures(asked.out, adapter.shape(), tokens)),
        BUDGETS,
        asked.limit,
        max_new_tokens=getattr(benchmarks.find(asked.benchmark), "LONGEST", 8),
        device=asked.device,
        benchmark=asked.benchmark,
        dtype=asked.dtype,
    )
    run.evaluate(settings, asked.out, bar=True, per="bytes")
    rows = list(map(drawn_together, json.loads((asked.out / "bytes.json").read_text())))
    measure = getattr(benchmarks.find(asked.benchmark), "MEASURE", "accuracy")
    title = f"{asked.model} in {asked.dtype}: {measure} over {asked.limit} questions of {asked.benchmark}"
    report.picture(rows, asked.out / "pareto.png", title, per="bytes")
    Console().print(memory.table(rows), f"{asked.out}: pareto.png, bytes.json")


if __name__ == "__main__":
    with errors_in_a_line():
        main()
