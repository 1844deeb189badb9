"""`vtc tune`, `choose` and `table`: which hyper-parameters, which method and budget, and how all of them compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vtc.cli.arguments import Device, Model, check_methods, need, parse_budget, parse_budgets, refuse, split
from vtc.cli.terminal import note, note_one, quiet, say


def tune(
    context: typer.Context,
    method: Annotated[str, typer.Option(help="One that declares what can be tuned.")] = "vflowopt",
    budget: Annotated[str, typer.Option(help="0.25, 25% or 64 (tokens per image); it stays fixed.")] = "0.25",
    model: Model = "reference",
    images: Annotated[
        str, typer.Option(help="A folder of images, or 'scenes' for the benchmark's training split with its questions.")
    ] = "scenes",
    question: Annotated[str, typer.Option(help="What is asked about the images of a folder.")] = "describe the image.",
    samples: Annotated[int, typer.Option(min=1, help="Images.")] = 30,
    trials: Annotated[int, typer.Option(min=1, help="Combinations to try.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the search and of the choice of images.")] = 0,
    out: Annotated[Path, typer.Option(help="The JSON file, to be named as a method.")] = Path("out/tuned.json"),
) -> None:
    """Find a method's hyper-parameters for a model and a budget, without labels.

    Bayesian optimisation of how little the last prompt token's final state changes when tokens leave.

    Example:

      vtc tune --method vflowopt --budget 0.11 --samples 60 --out out/vflowopt.json
    """
    spend = parse_budget(budget)
    check_methods(method)
    need("optuna", "scipy", extra="tune")
    if images == "scenes":
        refuse(context, "question", why="scenes bring their own; name a folder with --images")
        need("sklearn", extra="eval")
    note_one([spend])
    quiet()
    from vtc.eval import tune as tuning

    out.parent.mkdir(parents=True, exist_ok=True)
    search = tuning.Search(model, method, spend, images, (question,), samples, trials, seed)
    best, similarity, defaults = tuning.tune(search, out)
    typer.echo(f"{best}\nsimilarity {similarity:.4f}, with the defaults {defaults:.4f}; written to {out}")


def choose(
    images: Annotated[Path, typer.Option(exists=True, file_okay=False, help="A folder of your images, copies aside.")],
    model: Model = "reference",
    questions: Annotated[
        Path | None,
        typer.Option(
            help='Text, a question a line, asked in turn; or .jsonl: {"image": "a.jpg", "question": "..."} a line. '
            "Without it four short ones that fit any picture."
        ),
    ] = None,
    agree: Annotated[float, typer.Option(help="The share of images whose answers have to stay as they are.")] = 0.98,
    methods: Annotated[
        str, typer.Option(help="Comma-separated; `vtc methods` lists them.")
    ] = "tally,tome,vflowopt,vtc-cls,fastv,uniform",
    budgets: Annotated[
        str, typer.Option(help="Comma-separated: fractions (0.25), percentages (25%) or tokens per image (64).")
    ] = "0.75,0.5,0.35,0.25,0.16,0.11",
    seed: Annotated[int, typer.Option(help="Of the split into images to search on and held-out ones.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions a forward.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 16,
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="Folder for choice.json and the answers; the same command resumes.")] = Path(
        "out/choose"
    ),
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what --out holds of an earlier run.")] = False,
) -> None:
    """Find the cheapest method and budget that keep a model's answers on your images: a promise with a bound, or none.

    No labels: what counts is that the full model says the same. One part of the images is for the search, the rest is
    held out, and the promise is kept on images like these with 95 % confidence. OUT/choice.json is named wherever a
    method is; where nothing is to be pruned, it leaves the model as it is.

    Examples:

      vtc choose --model llava-hf/llava-1.5-7b-hf --images photos --questions questions.txt --out out/photos

      vtc eval --model llava-hf/llava-1.5-7b-hf --methods out/photos/choice.json,random --out out/check
    """
    chosen, spend = split(methods), parse_budgets(budgets)
    check_methods(*chosen)
    need("scipy", extra="tune")
    note_one(spend)
    from vtc.eval.reader import model_path

    model_path(model)
    quiet()
    from vtc.eval import choose as choosing

    asked = choosing.Settings(
        str(images), model, str(questions) if questions else None, agree, chosen, spend, seed, batch_size,
        max_new_tokens, device,
    )  # fmt: skip
    if questions is None:
        note(f"no --questions: asking in turn {'; '.join(choosing.QUESTIONS)}")
    say(f"loading {model}")
    verdict, refused = choosing.run(asked, out, restart, bar=True)
    for name, reason in refused.items():
        note(f"without {name}: {reason}")
    console = Console()
    for sentence in choosing.sentences(verdict, agree):
        console.print(sentence, markup=False, highlight=False)
    console.print(str(out / "choice.json"), markup=False, highlight=False)
