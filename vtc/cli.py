"""The `vtc` command.

Torch and transformers take seconds to load: the commands do so when their arguments are known to be good. Answers and
tables go to stdout, all that is said about them to stderr.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

import vtc
from vtc.install import install_line

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Make a vision-language model read fewer visual tokens, and measure what that costs.\n\n"
    "Start with [bold]vtc ask scene 'what color is the word?' --compare[/]: the shipped model on a picture of the kind "
    "that it knows, nothing to download. Then [bold]vtc eval --limit 200 --out out/first[/]: accuracy against token "
    "budget.",
    epilog="VTC_DEBUG=1 in the environment shows warnings, and the stack trace of an error.",
)
train_app = typer.Typer(no_args_is_help=True, help="Train the models that vtc ships.")
app.add_typer(train_app, name="train")

MODEL_HELP = "'reference' (shipped), a model folder, or a Hugging Face id such as llava-hf/llava-1.5-7b-hf."
EMPTY = "(no answer)"
SIDE = 96
"""Pixels of a scene."""
SCENE = 0
"""The question of the test split whose picture `vtc ask scene` is about."""
REHEARSED = "dry run: the model answers with every method and budget, or at the method's floor, and all data is there"


def parse_budget(text: str) -> int | float:
    """ "64" is tokens per image (int); "0.25" and "25%" are a fraction of the image's tokens (float in (0, 1])."""
    text = text.strip()
    try:
        if text.isdecimal():
            return int(text)
        fraction = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no budget: use tokens (64), a fraction (0.25) or a percentage (25%)"
        ) from None
    if not 0 < fraction <= 1:
        raise typer.BadParameter(f"{text!r}: a fraction lies above 0 and up to 1; no visual token at all is 0, a count")
    return fraction


def parse_budgets(text: str) -> tuple[int | float, ...]:
    return tuple(parse_budget(part) for part in _split(text))


def _split(text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if not parts:
        raise typer.BadParameter("the list is empty")
    return parts


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(vtc.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What may stand before a command."""


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "reference",
    methods: Annotated[
        str,
        typer.Option(help="Comma-separated; `vtc methods` lists them, and smaller-image is one more baseline."),
    ] = "vtc-cls,fastv,random,uniform",
    budgets: Annotated[
        str,
        typer.Option(help="Comma-separated: fractions (0.25), percentages (25%) or tokens per image (64)."),
    ] = "0.5,0.25,0.11",
    benchmark: Annotated[
        str,
        typer.Option(help="scenes, a few small things on a photograph, or pages, full of words, digits and shapes."),
    ] = "scenes",
    tasks: Annotated[
        str,
        typer.Option(
            help="Benchmarks of lmms-eval instead, comma-separated: pope,mme,gqa,... Their own prompts, "
            "metrics and lengths count; --suffix and --max-new-tokens do not."
        ),
    ] = "",
    include_path: Annotated[Path | None, typer.Option(help="With --tasks: a folder with more task files.")] = None,
    gen_kwargs: Annotated[
        str, typer.Option(help="With --tasks: over what task files ask of generation, such as max_new_tokens=16.")
    ] = "",
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Questions of each task; unless given 1000, or with --tasks all of a benchmark."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the questions and of the bootstrap.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the run; the same command resumes it.")] = Path("out/eval"),
    batch_size: Annotated[int, typer.Option(min=1, help="Questions a forward.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 8,
    suffix: Annotated[
        str,
        typer.Option(help="Put after each question, for models that answer in sentences when not told otherwise."),
    ] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what --out holds of an earlier run.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check model, methods, tasks and data on one question each, and stop."),
    ] = False,
    by_task: Annotated[bool, typer.Option("--by-task", help="Also print accuracy by task.")] = False,
    faithfulness: Annotated[
        bool,
        typer.Option(
            "--faithfulness", help="Compare score maps with occlusion instead, on --limit questions (try 50)."
        ),
    ] = False,
) -> None:
    """Measure accuracy against token budget on scenes or pages, or with --tasks on benchmarks of lmms-eval.

    Always runs the full and the blind model beside the methods. Writes results.jsonl (a line a question), summary.json,
    config.json and curve.png to --out. Killed and run again, it goes on where it was. With --tasks it may be started
    as many processes, by torchrun or accelerate launch.

    Examples:

      vtc eval --limit 200 --out out/first

      vtc eval --methods vtc-cls,random,smaller-image --budgets 50%,25%,16 --out out/mine --by-task

      vtc eval --benchmark pages --model out/both/model --out out/pages --by-task

      vtc eval --model llava-hf/llava-1.5-7b-hf --suffix ' Answer with a single word.' --out out/llava

      vtc eval --model llava-hf/llava-1.5-7b-hf --tasks pope,gqa --batch-size 8 --out out/suites
    """
    chosen, spend = _split(methods), parse_budgets(budgets)
    _check_methods(*chosen, also=("smaller-image", "full", "blind"))
    _need("matplotlib", "sklearn", extra="eval")
    _note_one(spend)
    _quiet()
    from vtc.eval import report, run, suites

    console = Console()
    if tasks:
        if by_task or faithfulness or suffix:
            raise typer.BadParameter("--by-task, --faithfulness and --suffix are for --benchmark, not for --tasks")
        more = str(include_path.absolute()) if include_path else None
        asked = suites.Settings(_split(tasks), model, chosen, spend, limit, seed, batch_size, device, more, gen_kwargs)
        _suites(asked, out, restart, dry_run, console)
        return
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("many processes share the questions of a benchmark only with --tasks, such as vtc_scenes")
    if faithfulness:
        _faithfulness(model, chosen, benchmark, limit or 1000, seed, device, out, console)
        return
    settings = run.Settings(
        model, chosen, spend, limit or 1000, seed, batch_size, max_new_tokens, suffix, device, benchmark
    )
    _say(f"loading {model}")
    rows = run.evaluate(settings, out, restart=restart, dry_run=dry_run, console=Console(stderr=True))
    if dry_run:
        console.print(REHEARSED)
        return
    _note_above(spend, next(row["tokens"] for row in rows if row["method"] == "full"))
    console.print(report.table(rows))
    if by_task:
        console.print(report.task_table(rows))
    console.print(f"{escape(str(out))}: curve.png, summary.json, results.jsonl, config.json")


def _suites(settings: Any, out: Path, restart: bool, dry_run: bool, console: Console) -> None:
    from vtc.eval import published, report, suites

    def show(task: str, rows: list[dict[str, Any]]) -> None:
        console.print(f"[bold]{escape(task)}[/]", report.table(rows), report.metrics_table(rows))
        if figures := published.table(task, rows):
            console.print(figures)
        console.print(f"{escape(str(out / task))}: curve.png, summary.json, results.jsonl")

    suites.evaluate(settings, out, restart, dry_run, show)
    if dry_run:
        console.print(REHEARSED)


def _faithfulness(
    model: str,
    methods: tuple[str, ...],
    benchmark: str,
    limit: int,
    seed: int,
    device: str,
    out: Path,
    console: Console,
) -> None:
    from vtc.eval import benchmarks, faithfulness
    from vtc.eval.reader import load, model_path, pick_device

    examples = benchmarks.find(benchmark).load("test", limit, seed)
    reader = load(model_path(model), pick_device(device))
    rows = faithfulness.faithfulness(reader, examples, methods)
    out.mkdir(parents=True, exist_ok=True)
    (out / "faithfulness.json").write_text(json.dumps(rows, indent=2) + "\n")
    console.print(faithfulness.table(rows))


@app.command()
def bench(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "--shape",
            help="llava-1.5-7b, llava-1.5-13b, llava-next-7b, onevision-0.5b, onevision-7b, qwen2.5-vl-3b, "
            "llava-qwen2-0.5b, or a model folder.",
        ),
    ] = "llava-qwen2-0.5b",
    methods: Annotated[str, typer.Option("--methods", "--method", help="`vtc methods` lists them.")] = "vtc-cls",
    budgets: Annotated[
        str, typer.Option("--budgets", "--budget", help="64 (tokens per image), 0.25 or 25%; commas between several.")
    ] = "64",
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once, one image each.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=9, help="Text of each prompt.")] = 60,
    pixels: Annotated[
        int | None, typer.Option(min=28, help="Side of the image where the family reads tiles or any resolution.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds after one that warms up; medians count.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    attention: Annotated[str, typer.Option(help="sdpa, eager, flash_attention_2, ...")] = "sdpa",
    compiled: Annotated[bool, typer.Option("--compile", help="Decoder layers by torch.compile, in all arms.")] = False,
    peers: Annotated[
        bool, typer.Option("--peers", help="Instead, compare FastV and VTC-CLS with how others read attention.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.json and bench.png, or peers.json.")] = None,
) -> None:
    """Measure seconds and bytes with and without compression, what would be possible, and what is in the way.

    A true shape with random weights: nothing is downloaded. In each round the unpruned model, each pruned one and the
    same model on natively short prompts take turns.

    Examples:

      vtc bench --methods vtc-cls,fastv --budgets 0.5,0.25

      vtc bench --model llava-1.5-7b --dtype bfloat16 --device cuda --batch 8 --budgets 192,128,64 --out out/bench

      vtc bench --peers --budgets 0.25
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"{dtype!r}: choose float32, bfloat16 or float16")
    if peers and compiled:
        raise typer.BadParameter("--compile and --peers do not go together")
    chosen, spend = _split(methods), parse_budgets(budgets)
    _check_methods(*chosen)
    _note_one(spend)
    if rounds == 1:
        _note("one round has no range, so nothing tells a gain from chance")
    _quiet()
    import torch

    from vtc.eval import bench as benchmark
    from vtc.eval import peers as compared
    from vtc.eval import shapes
    from vtc.eval.reader import pick_device

    where = pick_device(device)
    case = benchmark.Case(batch, prompt_tokens, new_tokens, rounds, pixels, compiled)
    with _status(f"making {model} with random weights"):
        loaded = shapes.load(model, getattr(torch, dtype), where, attention)
    name = torch.cuda.get_device_name(where) if where.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    title = f"{model}, batch {batch}, {dtype}, {attention}{', compiled' * compiled}, {name}"
    if peers:
        with _steps() as step:
            rows = compared.compare(loaded, spend, case, step)
        Console().print(compared.table(rows, title))
    else:
        arms = [(method, budget) for method in chosen for budget in spend]
        with _steps() as step:
            rows = benchmark.bench(loaded, arms, case, step)
        _note_above(spend, rows[0]["tokens"]["full"])
        for row in rows:
            tokens = f"{row['tokens']['average']:g} of {row['tokens']['full']} visual tokens"
            Console().print(benchmark.table(row, f"{row['method']}: {tokens}\n{title}"))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        described = {
            "model": model,
            "dtype": dtype,
            "attention": attention,
            "device": name,
            "case": asdict(case),
            "rows": rows,
        }
        (out / ("peers.json" if peers else "bench.json")).write_text(json.dumps(described, indent=2) + "\n")
        if not peers:
            benchmark.picture(rows, out / "bench.png", title)


@app.command()
def tune(
    method: Annotated[str, typer.Option(help="One that declares what can be tuned.")] = "vflowopt",
    budget: Annotated[str, typer.Option(help="0.25, 25% or 64 (tokens per image); it stays fixed.")] = "0.25",
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "reference",
    images: Annotated[
        str, typer.Option(help="A folder of images, or 'scenes' for the benchmark's training split.")
    ] = "scenes",
    question: Annotated[str, typer.Option(help="What is asked about the images of a folder.")] = "describe the image.",
    samples: Annotated[int, typer.Option(min=1, help="Images.")] = 30,
    trials: Annotated[int, typer.Option(min=1, help="Combinations to try.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the search and of the choice of images.")] = 0,
    out: Annotated[Path, typer.Option(help="The JSON file for vtc.Method.from_json.")] = Path("out/tuned.json"),
) -> None:
    """Find a method's hyper-parameters for a model and a budget, without labels.

    Bayesian optimisation of how little the last prompt token's final state changes when tokens leave.

    Example:

      vtc tune --method vflowopt --budget 0.11 --samples 60 --out out/vflowopt.json
    """
    spend = parse_budget(budget)
    _check_methods(method)
    _need("optuna", "scipy", extra="tune")
    if images == "scenes":
        _need("sklearn", extra="eval")
    _note_one([spend])
    _quiet()
    from vtc.eval import tune as tuning

    out.parent.mkdir(parents=True, exist_ok=True)
    search = tuning.Search(model, method, spend, images, (question,), samples, trials, seed)
    best, similarity, defaults = tuning.tune(search, out)
    typer.echo(f"{best}\nsimilarity {similarity:.4f}, with the defaults {defaults:.4f}; written to {out}")


@app.command()
def ask(
    image: Annotated[
        Path, typer.Argument(help="Any image file, up to 20 MB and 50 megapixels; or 'scene', for one that ships.")
    ],
    question: Annotated[str, typer.Argument(help="In the model's language; quote it.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "reference",
    method: Annotated[str, typer.Option(help="`vtc methods` lists them.")] = "vtc-cls",
    budget: Annotated[str, typer.Option(help="0.25, 25% or 64 (tokens per image).")] = "0.25",
    compare: Annotated[bool, typer.Option("--compare", help="Also ask the full model.")] = False,
    save_overlay: Annotated[Path | None, typer.Option(help="Write the image with dropped patches dark.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Ask a model about an image with fewer visual tokens.

    Examples:

      vtc ask scene 'what color is the word?' --compare

      vtc scene --out scene.png && vtc ask scene.png 'what word is it?' --save-overlay kept.png

      vtc ask photo.jpg 'What is this?' --model llava-hf/llava-1.5-7b-hf --budget 64
    """
    spend = parse_budget(budget)
    if not question.strip():
        raise typer.BadParameter("the question is empty")
    _check_methods(method)
    from vtc.eval import ask as asking
    from vtc.eval.images import check_picture_path
    from vtc.eval.reader import load, model_path, pick_device

    picture, path = _picture(image), model_path(model)
    if save_overlay:
        check_picture_path(save_overlay)
    _quiet()
    with _status(f"loading {model}"):
        reader = load(path, pick_device(device), max_new_tokens)
    with _status("asking"):
        answers = {f"{method}, {budget}": asking.ask(reader, picture, question, method, spend)}
        if compare:
            answers["full model"] = asking.ask(reader, picture, question, None, 1.0)
    _print_answers(answers)
    pruned = next(iter(answers.values()))
    if save_overlay:
        asking.save_overlay(reader, picture, pruned, save_overlay)
        typer.echo(f"{save_overlay}: written, dropped patches are dark", err=True)
    _note_one([spend])
    _note_above([spend], pruned.total)
    if model == "reference" and picture.size != (SIDE, SIDE):
        _note(
            "the shipped model knows only its own scenes (shapes, digits and words on 96 x 96 pixels), so this answer "
            "means nothing: try `vtc ask scene 'what color is the word?'`, or another --model"
        )


def _picture(image: Path) -> Any:
    from vtc.eval.images import open_image

    if str(image) != "scene" or image.exists():
        return open_image(image)
    _need("sklearn", extra="eval")
    from vtc.eval import scenes

    return scenes.example("test", 0, SCENE).image


@app.command()
def scene(
    out: Annotated[Path, typer.Option(help="An image file, for example scene.png.")],
    number: Annotated[int, typer.Option(min=0, help="Which question of the test split.")] = SCENE,
) -> None:
    """Write a picture of the kind that the shipped model knows, and print a question about it with the answer.

    Example:

      vtc scene --out scene.png --number 4
    """
    from vtc.eval.images import check_picture_path

    check_picture_path(out)
    _need("sklearn", extra="eval")
    from vtc.eval import scenes

    example = scenes.example("test", 0, number)
    example.image.save(out)
    typer.echo(f"{out}: written\nquestion: {example.question}\nanswer: {example.answer}")
    typer.echo(f"now try: vtc ask {shlex.quote(str(out))} {shlex.quote(example.question)} --compare", err=True)


def _print_answers(answers: dict[str, Any]) -> None:
    from rich.table import Table

    if len(answers) == 1:
        (answer,) = answers.values()
        typer.echo(answer.text or EMPTY)
        typer.echo(f"{_tokens(answer)} visual tokens, {answer.seconds:.3f} s", err=True)
        return
    table = Table("", "answer", "visual tokens", "seconds")
    for name, answer in answers.items():
        table.add_row(name, escape(answer.text or EMPTY), _tokens(answer), f"{answer.seconds:.3f}")
    Console().print(table)


def _tokens(answer: Any) -> str:
    text = f"{answer.tokens:g} of {answer.total}"
    return text if answer.tokens == len(answer.kept) else f"{text} (layer average; {len(answer.kept)} in the last)"


@train_app.command(name="reference")
def train_reference(
    out: Annotated[Path, typer.Option(help="Folder of checkpoints; the same command resumes.")] = Path("out/reference"),
    preset: Annotated[
        str, typer.Option(help="small: what ships, 2 CPU cores; both: reads pages, too; large: 336 pixels, for a GPU.")
    ] = "small",
    seed: Annotated[int, typer.Option(help="Of weights, images and subsets.")] = 0,
) -> None:
    """Train the reference model from nothing; model and processor end up in OUT/model.

    Example:

      vtc train reference --out out/reference && vtc eval --model out/reference/model
    """
    _need("matplotlib", "sklearn", extra="eval")
    _quiet()
    from vtc.eval.reference.train import train

    train(out, preset=preset, seed=seed)


@train_app.command(name="atp")
def train_atp(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "reference",
    budget: Annotated[float, typer.Option(min=0.0, max=1.0, help="Fraction of the image's tokens.")] = 0.25,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 300,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions a step.")] = 32,
    seed: Annotated[int, typer.Option(help="Of weights and scenes.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Default: beside the checkpoint, where vtc.wrap looks.")] = None,
) -> None:
    """Train ATP-LLaVA's thresholds for a frozen model and a budget, on the benchmark's training questions.

    Beside them lies report.json: how many tokens stay on unseen questions, how much that varies, and where they leave.

    Example:

      vtc train atp --budget 0.25 && vtc eval --methods atp,random --budgets 0.25 --out out/atp
    """
    _need("sklearn", extra="eval")
    _quiet()
    from vtc.eval import atp

    atp.train(atp.Recipe(model, budget, steps, batch_size, seed=seed), out)


@app.command()
def demo(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "reference",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where the page is served.")] = 7860,
    host: Annotated[
        str, typer.Option(help="127.0.0.1 serves this machine alone; 0.0.0.0 everyone who can reach it.")
    ] = "127.0.0.1",
    max_new_tokens: Annotated[int, typer.Option(min=1, max=512, help="Longest answer.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Look at it: a page with both answers, the patches that stayed and those that left, and what was measured.

    Examples:

      vtc demo

      vtc demo --model llava-hf/llava-1.5-7b-hf --port 8000
    """
    _need("gradio", "sklearn", extra="demo")
    from vtc.eval.reader import load, model_path, pick_device

    path = model_path(model)
    typer.echo(f"loading gradio, torch and {model}; the page's address follows", err=True)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    _quiet()
    from vtc.demo.app import launch

    launch(load(path, pick_device(device), max_new_tokens), model, host, port)


@app.command()
def methods() -> None:
    """List the methods with one line and the paper each."""
    from rich.table import Table

    from vtc.methods import described

    table = Table("method", "what it does", "paper")
    for name, (line, paper) in described().items():
        table.add_row(name, escape(line), escape(paper))
    Console().print(table)


@app.command(name="tasks")
def task_folder() -> None:
    """Say which of the field's usual benchmarks run here, and print the folder of vtc's own task for lmms-eval.

    The folder alone is written to stdout, for lmms-eval's --include_path.

    Example:

      python -m lmms_eval --model vtc --model_args pretrained=reference,method=vtc-cls,budget=0.25 --tasks vtc_scenes
      --include_path $(vtc tasks) --batch_size 32 --output_path out/lmms --log_samples

    More of --model_args: the method's hyper-parameters (method=transprune,alpha=0.3,layers=[2,3,4],budget=25%), dtype,
    attn_implementation, revision, device_map, min_pixels, max_pixels.
    """
    from vtc.eval import tasks
    from vtc.eval.tasks import field

    Console(stderr=True).print(field.table())
    typer.echo(tasks.PATH)


@app.command()
def env() -> None:
    """Print versions for a bug report."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    _quiet()
    import torch

    lines = {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()}
    lines["vtc"] = vtc.__version__
    for package in (
        "torch",
        "transformers",
        "tokenizers",
        "accelerate",
        "pillow",
        "matplotlib",
        "scikit-learn",
        "lmms-eval",
    ):
        try:
            lines[package] = version(package)
        except PackageNotFoundError:
            lines[package] = "not installed"
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    for name, value in (lines | {"torch threads": torch.get_num_threads(), "cuda device": cuda}).items():
        typer.echo(f"{name}: {value}")


def _check_methods(*names: str, also: Sequence[str] = ()) -> None:
    """Refuse a plain name that no method has; paths and other forms are for those who read them."""
    from vtc.methods import described

    known = (*described(), *also)
    for name in names:
        if re.fullmatch(r"[\w-]+", name) and name not in known:
            raise ValueError(f"unknown method {name!r}; vtc knows {', '.join(known)}")


def _need(*modules: str, extra: str) -> None:
    """Refuse before any work is done when an optional dependency is missing."""
    from importlib.util import find_spec

    if missing := [module for module in modules if find_spec(module) is None]:
        raise ModuleNotFoundError(f"this needs {', '.join(missing)}: {install_line(extra)}")


def _note(text: str) -> None:
    typer.echo(f"note: {text}", err=True)


def _note_one(budgets: Sequence[int | float]) -> None:
    if any(isinstance(budget, int) and budget == 1 for budget in budgets):
        _note("a budget of 1 is one visual token; 1.0 and 100% are all of them")


def _note_above(budgets: Sequence[int | float], tokens: float) -> None:
    if above := [budget for budget in budgets if isinstance(budget, int) and budget > tokens]:
        _note(
            f"a budget of {', '.join(map(str, above))} is above the image's {tokens:g} visual tokens: none are dropped"
        )


def _say(text: str) -> None:
    """A line on stderr for somebody who waits at a terminal."""
    console = Console(stderr=True)
    if console.is_terminal:
        console.print(text, style="dim", markup=False, highlight=False)


def _status(text: str) -> AbstractContextManager:
    """What goes on, with something that moves, at the bottom of a terminal; nothing elsewhere."""
    return Console(stderr=True).status(escape(text))


@contextmanager
def _steps() -> Iterator[Callable[[str], None]]:
    """Yields what shows the step that begins: `_status` on a terminal, a line on stderr elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: typer.echo(text, err=True)
        return
    with console.status("") as status:
        yield lambda text: status.update(escape(text))


def _quiet() -> None:
    """Load torch and transformers, and keep their notes, bars and warnings, and those of others, out of the output."""
    import logging
    import warnings

    with _status("loading torch and transformers"):
        import torch  # it sets its loggers' levels when it is imported
        from transformers.utils import logging as transformers_logging

    if not os.environ.get("VTC_DEBUG"):
        warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("torchao", torch.utils._pytree.__name__):  # transformers imports torchao wherever it is installed
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """The entry point: an error of the user's is one line on stderr and exit code 1 (2 for unusable arguments)."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("VTC_DEBUG"):
            raise
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
