"""`vtc bench`, `vtc peers` and `vtc throughput`: seconds and bytes of true shapes with random weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from vtc.cli.arguments import Device, need, parse_budget, parse_budgets, split, typed
from vtc.cli.terminal import note, note_above, note_one, note_rounds, quiet, status, steps
from vtc.methods import check_names

if TYPE_CHECKING:
    from torch import nn

    from vtc.eval.bench import Case


def _dtype(name: str) -> str:
    if name not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"{name!r}: choose float32, bfloat16 or float16")
    return name


Shape = Annotated[
    str,
    typer.Option(
        "--model",
        "--shape",
        help="llava-1.5-7b, llava-1.5-13b, llava-next-7b, onevision-0.5b, onevision-7b, qwen2.5-vl-3b, "
        "llava-qwen2-0.5b, or a model folder.",
    ),
]
SingleCrop = Annotated[
    str,
    typer.Option(
        "--model", "--shape", help="Of the LLaVA-1.5 kind: llava-1.5-7b, llava-1.5-13b, llava-qwen2-0.5b, or a folder."
    ),
]
Methods = Annotated[
    str, typer.Option("--methods", "--method", help="`vtc methods` lists them; all: those that the shape takes.")
]
Budgets = Annotated[
    str,
    typer.Option("--budgets", "--budget", help="64 (tokens per image), 0.25 or 25%; commas between several."),
]
Batch = Annotated[int, typer.Option(min=1, help="Prompts at once, one image each.")]
PromptTokens = Annotated[int, typer.Option(min=9, help="Text of each prompt.")]
Rounds = Annotated[int, typer.Option(min=1, help="Measured rounds after one that warms up; medians count.")]
Dtype = Annotated[str, typer.Option(callback=_dtype, help="float32, bfloat16 or float16.")]
Attention = Annotated[str, typer.Option(help="sdpa, eager, flash_attention_2, ...")]


def bench(
    context: typer.Context,
    model: Shape = "llava-qwen2-0.5b",
    methods: Methods = "vtc-cls",
    budgets: Budgets = "64",
    batch: Batch = 1,
    prompt_tokens: PromptTokens = 60,
    pixels: Annotated[
        int | None, typer.Option(min=28, help="Side of the image where the family reads tiles or any resolution.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 8,
    rounds: Rounds = 3,
    dtype: Dtype = "float32",
    device: Device = "auto",
    attention: Attention = "sdpa",
    compiled: Annotated[bool, typer.Option("--compile", help="Decoder layers by torch.compile, in all arms.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.json and bench.png.")] = None,
) -> None:
    """Measure seconds and bytes with and without compression, what would be possible, and what is in the way.

    A true shape with random weights: nothing is downloaded. In each round the unpruned model, each pruned one and the
    same model on natively short prompts take turns. Without --budgets a file that names a budget is run at that one.

    Examples:

      vtc bench --methods vtc-cls,fastv --budgets 0.5,0.25

      vtc bench --model llava-1.5-7b --dtype bfloat16 --device cuda --batch 8 --budgets 192,128,64 --out out/bench
    """
    chosen, spend = split(methods), parse_budgets(budgets)
    check_names(*chosen, also=("all",))
    if out:
        need("matplotlib", extra="eval")
    note_one(spend)
    note_rounds(rounds)
    loaded, name = _load(model, dtype, device, attention)
    from vtc.eval import bench as benchmark
    from vtc.eval import selection as chooses

    case = benchmark.Case(batch, prompt_tokens, new_tokens, rounds, pixels, compiled)
    title, described = _told(model, dtype, attention, name, case)
    with steps() as step:
        arms = chooses.arms(loaded, chosen, spend, note, named=not typed(context, "budgets"))
        rows = benchmark.bench(loaded, arms, case, step)
    note_above(spend, rows[0]["tokens"]["full"])
    for row in rows:
        tokens = f"{row['tokens']['average']:g} of {row['tokens']['full']} visual tokens"
        Console().print(benchmark.table(row, f"{row['method']}: {tokens}\n{title}"))
    if out:
        _write(out / "bench.json", {**described, "rows": rows})
        benchmark.picture(rows, out / "bench.png", title)


def selection(
    context: typer.Context,
    model: Shape = "llava-qwen2-0.5b",
    methods: Methods = "all",
    budgets: Budgets = "64",
    batch: Batch = 8,
    prompt_tokens: PromptTokens = 60,
    rounds: Rounds = 3,
    dtype: Dtype = "float32",
    device: Device = "auto",
    attention: Attention = "sdpa",
    out: Annotated[Path | None, typer.Option(help="Folder for selection.json and selection.png.")] = None,
) -> None:
    """Measure what choosing the tokens costs: to score, select and compact, as a share of the unpruned prefill.

    One table of all methods, prefills only: a part of what `vtc bench` measures, for many methods at once.

    Example:

      vtc selection --rounds 3 --out out/selection
    """
    chosen, spend = split(methods), parse_budgets(budgets)
    check_names(*chosen, also=("all",))
    if out:
        need("matplotlib", extra="eval")
    note_one(spend)
    note_rounds(rounds)
    loaded, name = _load(model, dtype, device, attention)
    from vtc.eval import bench as benchmark
    from vtc.eval import selection as chooses

    case = benchmark.Case(batch, prompt_tokens, rounds=rounds)
    title, described = _told(model, dtype, attention, name, case)
    arms = chooses.arms(loaded, chosen, spend, note, named=not typed(context, "budgets"))
    with steps() as step:
        rows = chooses.measure(loaded, arms, case, step)
    Console().print(chooses.table(rows, title))
    if out:
        _write(out / "selection.json", {**described, "rows": rows})
        chooses.picture(rows, out / "selection.png", title)


def peers(
    model: SingleCrop = "llava-qwen2-0.5b",
    budgets: Budgets = "64",
    batch: Batch = 1,
    prompt_tokens: PromptTokens = 60,
    rounds: Rounds = 3,
    dtype: Dtype = "float32",
    device: Device = "auto",
    attention: Attention = "sdpa",
    out: Annotated[Path | None, typer.Option(help="Folder for peers.json.")] = None,
) -> None:
    """Measure what seeing attention costs FastV and VTC-CLS, here and as others read it.

    Seconds to the first token: the same scores from rows that vtc computes beside the model's kernel, from
    output_attentions, and from one layer's attention that is run again. --attention is the kernel of the first and the
    last.

    Example:

      vtc peers --budgets 0.25 --rounds 5
    """
    spend = parse_budgets(budgets)
    note_one(spend)
    note_rounds(rounds)
    loaded, name = _load(model, dtype, device, attention)
    from vtc.eval import bench as benchmark
    from vtc.eval import peers as compared

    case = benchmark.Case(batch, prompt_tokens, rounds=rounds)
    title, described = _told(model, dtype, attention, name, case)
    with steps() as step:
        rows = compared.compare(loaded, spend, case, step)
    Console().print(compared.table(rows, title))
    if out:
        _write(out / "peers.json", {**described, "rows": rows})


def throughput(
    model: SingleCrop = "llava-qwen2-0.5b",
    budget: Annotated[str, typer.Option(help="A fraction up to 0.5 (0.25 or 25%).")] = "0.25",
    count: Annotated[int, typer.Option(min=2, help="Questions about one image, and rows of the uneven batch.")] = 8,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode for each question.")] = 4,
    rounds: Rounds = 3,
    dtype: Dtype = "float32",
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for throughput.json.")] = None,
) -> None:
    """Measure questions a second where work can be shared, with and without compression.

    One image asked --count questions: each as a prompt of its own, or all on copies of one pruned cache. And a batch
    whose rows keep different counts: together, or one after the other.

    Example:

      vtc throughput --count 4
    """
    spend = parse_budget(budget)
    if not isinstance(spend, float) or spend > 0.5:
        raise typer.BadParameter(f"--budget {budget}: use a fraction up to 0.5, as the last row keeps twice as much")
    note_rounds(rounds)
    loaded, name = _load(model, dtype, device)
    from vtc.eval import throughput as shared

    with steps() as step:
        seconds = shared.compare(loaded, spend, count, new_tokens, rounds, step)
    for case, found in seconds.items():
        Console().print(shared.table(case, found, count, f"{model}, {dtype}, {name}, budget {spend:g}"))
    if out:
        described = {"model": model, "budget": spend, "dtype": dtype, "device": loaded.device.type, "rounds": rounds}
        _write(out / "throughput.json", {**described, "seconds": seconds})


def _load(model: str, dtype: str, device: str, attention: str | None = None) -> tuple[nn.Module, str]:
    """A shape with random weights, and what its device is called."""
    quiet()
    import torch

    from vtc.eval import shapes
    from vtc.eval.reader import pick_device

    where = pick_device(device)
    with status(f"making {model} with random weights"):
        loaded = shapes.load(model, getattr(torch, dtype), where, attention)
    name = torch.cuda.get_device_name(where) if where.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    return loaded, name


def _told(model: str, dtype: str, attention: str, device: str, case: Case) -> tuple[str, dict[str, Any]]:
    """What is measured, as a title and as its file says it."""
    title = f"{model}, batch {case.batch}, {dtype}, {attention}{', compiled' * case.compiled}, {device}"
    return title, {"model": model, "dtype": dtype, "attention": attention, "device": device, "case": asdict(case)}


def _write(path: Path, described: dict[str, Any]) -> None:
    from vtc.stage import write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, described)
