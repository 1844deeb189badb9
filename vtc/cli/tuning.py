"""`vtc tune`, `fit` and `layers`: what suits a model, found without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from vtc.cli.arguments import BatchSize, Device, Model, Questions, check_file, check_folder, need, parse_budget, refuse
from vtc.cli.terminal import note_one, note_questions, quiet, say
from vtc.eval.benchmarks import NAMES
from vtc.methods import check_names

Images = Annotated[
    str,
    typer.Option(help="A folder of images, or the training split of a benchmark, with its questions: scenes, pages."),
]
Samples = Annotated[int, typer.Option(min=1, help="Images.")]


def _begin(context: typer.Context, images: str, questions: Path | None) -> None:
    """Refuse what a benchmark does not read, load what all need, and say what a folder is asked by default."""
    if images in NAMES:
        refuse(context, "questions", why=f"{images} bring their own; name a folder with --images")
        need("sklearn", extra="eval")
    quiet()
    from vtc.eval.album import QUESTIONS

    if images not in NAMES and questions is None:
        note_questions(QUESTIONS)


def tune(
    context: typer.Context,
    method: Annotated[str, typer.Option(help="One that declares what can be tuned.")] = "vflowopt",
    budget: Annotated[str, typer.Option(help="0.25, 25% or 64 (tokens per image); it stays fixed.")] = "0.25",
    model: Model = "reference",
    images: Images = "scenes",
    questions: Questions = None,
    samples: Samples = 30,
    trials: Annotated[int, typer.Option(min=1, help="Combinations to try.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Of the search and of the choice of images.")] = 0,
    out: Annotated[Path, typer.Option(help="The JSON file, to be named as a method.")] = Path("out/tuned.json"),
) -> None:
    """Find a method's hyper-parameters for a model and a budget, without labels.

    Bayesian optimisation of how little the last prompt token's final state changes when tokens leave.

    Examples:

      vtc tune --method vflowopt --budget 0.11 --samples 60 --out out/vflowopt.json

      vtc tune --method tally --model llava-hf/llava-1.5-7b-hf --images photos --questions questions.jsonl
    """
    spend = parse_budget(budget)
    check_names(method)
    check_file(out)
    need("optuna", "scipy", extra="tune")
    note_one([spend])
    _begin(context, images, questions)
    from vtc.eval import tune as tuning

    out.parent.mkdir(parents=True, exist_ok=True)
    search = tuning.Search(model, method, spend, images, questions, samples, trials, seed)
    best, similarity, defaults = tuning.tune(search, out)
    typer.echo(f"{best}\nsimilarity {similarity:.4f}, with the defaults {defaults:.4f}; written to {out}")


def fit(
    context: typer.Context,
    method: Annotated[
        str, typer.Option(help="One that prunes at several layers of the decoder, or tally-adaptive.")
    ] = "fitprune",
    budget: Annotated[
        str, typer.Option(help="0.25, 25% or 64 (tokens per image); tally-adaptive is fitted to all.")
    ] = "0.25",
    model: Model = "reference",
    images: Images = "scenes",
    questions: Questions = None,
    samples: Samples = 65,
    seed: Annotated[int, typer.Option(help="Of the choice of images.")] = 0,
    out: Annotated[Path, typer.Option(help="The JSON file, to be named as a method.")] = Path("out/fitted.json"),
) -> None:
    """Fit how many tokens leave before which decoder layer to a model and a budget, without labels.

    Each layer drops what its scores can do without, up to a tolerance that meets the budget (FitPrune). Of
    tally-adaptive, whose images keep as many tokens as they need, it is measured how many these are on average.

    Examples:

      vtc fit --method pyramiddrop --budget 0.25 --out out/fitted.json

      vtc fit --method tally-adaptive --images photos --out out/adaptive.json
    """
    spend = parse_budget(budget)
    check_names(method)
    check_file(out)
    note_one([spend])
    _begin(context, images, questions)
    from vtc.eval import fit as fitting
    from vtc.eval.tune import Search

    if fitting.is_measured(method):
        refuse(context, "budget", why=f"{method} is fitted to all budgets, and the file takes any")

    out.parent.mkdir(parents=True, exist_ok=True)
    search = Search(model, method, spend, images, questions, samples, seed=seed)
    typer.echo(f"{fitting.fit(search, out)}\nwritten to {out}")


def layers(
    model: Model = "reference",
    benchmark: Annotated[str, typer.Option(help="scenes or pages.")] = "scenes",
    left: Annotated[float, typer.Option(min=0, max=1, help="Share of the tokens that stays, evenly spaced.")] = 0.0,
    limit: Annotated[int, typer.Option(min=1, help="Questions of the benchmark's validation split.")] = 450,
    seed: Annotated[int, typer.Option(min=0, help="Of the questions and of the intervals.")] = 0,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="Folder for layers.json and layers.png.")] = Path("out/layers"),
) -> None:
    """Draw which decoder layers read the image: what is lost when it leaves before each of them.

    Agreement with the full model needs no labels; accuracy says nothing of a model that cannot read the benchmark.

    Examples:

      vtc layers --limit 200 --out out/layers

      vtc layers --model reference-pages --benchmark pages --out out/layers-pages
    """
    need("matplotlib", "sklearn", extra="eval")
    check_folder(out)
    quiet()
    from vtc.eval import benchmarks
    from vtc.eval import layers as probe
    from vtc.eval.reader import load, model_path, pick_device
    from vtc.stage import write_json

    try:
        benchmarks.check_one_word(benchmark)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    examples = benchmarks.find(benchmark).load("val", limit, seed)
    say(f"loading {model}")
    reader = load(model_path(model), pick_device(device))
    rows = probe.read(reader, examples, left, batch_size, seed)
    out.mkdir(parents=True, exist_ok=True)
    asked = {"model": model, "benchmark": benchmark, "left": left, "limit": limit, "seed": seed}
    write_json(out / "layers.json", asked | {"rows": rows})
    probe.picture(rows, out / "layers.png", f"{model}, {limit} questions of {benchmark} (validation)")
    Console().print(probe.table(rows), f"{escape(str(out))}: layers.png, layers.json")
