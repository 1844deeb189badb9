"""`vtc tune`, `choose` and `table`: which hyper-parameters, which method and budget, and how all of them compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vtc.cli.arguments import BatchSize, Budgets, Device, Model, Questions, need, parse_budgets, split
from vtc.cli.terminal import note, note_one, note_questions, quiet, say
from vtc.methods import check_names


def choose(
    images: Annotated[Path, typer.Option(help="A folder of your images; copies of a file count once.")],
    model: Model = "reference",
    questions: Questions = None,
    agree: Annotated[float, typer.Option(help="The share of images whose answers have to stay as they are.")] = 0.98,
    methods: Annotated[
        str, typer.Option(help="Comma-separated; `vtc methods` lists them.")
    ] = "tally,tome,vflowopt,vtc-cls,fastv,uniform",
    budgets: Budgets = "0.75,0.5,0.35,0.25,0.16,0.11",
    seed: Annotated[int, typer.Option(help="Of the split into images to search on and held-out ones.")] = 0,
    batch_size: BatchSize = 8,
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
    check_names(*chosen)
    need("scipy", extra="tune")
    note_one(spend)
    from vtc.eval.reader import model_path

    model_path(model)
    quiet()
    from vtc.eval import album
    from vtc.eval import choose as choosing

    asked = choosing.Settings(
        str(images), model, str(questions) if questions else None, agree, chosen, spend, seed, batch_size,
        max_new_tokens, device,
    )  # fmt: skip
    if questions is None:
        note_questions(album.QUESTIONS)
    say(f"loading {model}")
    verdict, refused = choosing.run(asked, out, restart, bar=True)
    for name, reason in refused.items():
        note(f"without {name}: {reason}")
    if verdict.tried:
        note(
            f"tried here before: {', '.join(f'{one:g}' for one in verdict.tried)}; the confidence is that of a promise "
            "which was fixed before any answer was known"
        )
    console = Console()
    for sentence in choosing.sentences(verdict, agree):
        console.print(sentence, markup=False, highlight=False)
    console.print(str(out / "choice.json"), markup=False, highlight=False)


def table(
    models: Annotated[
        str, typer.Option("--models", "--model", help="Comma-separated: 'reference', folders, Hugging Face ids.")
    ] = "reference",
    benchmarks: Annotated[str, typer.Option(help="Comma-separated: scenes, pages.")] = "scenes,pages",
    methods: Annotated[
        str, typer.Option(help="Comma-separated; unless given all that drop before the first word of an answer.")
    ] = "",
    budgets: Budgets = "0.5,0.25,0.11,0.05",
    limit: Annotated[int, typer.Option(min=2, help="Questions of each benchmark.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the questions and of the bootstrap.")] = 0,
    against: Annotated[
        str, typer.Option(help="The method that paired intervals compare all others with, or 'full': the whole model.")
    ] = "random",
    bench: Annotated[
        str, typer.Option(help="Comma-separated JSON files of `vtc bench` or `vtc selection`: what choosing costs.")
    ] = "",
    batch_size: BatchSize = 32,
    device: Device = "auto",
    out: Annotated[
        Path, typer.Option(help="Folder of the table and its pieces; the same command goes on with it.")
    ] = Path("out/table"),
) -> None:
    """Compare all methods: benchmarks by budgets by models, with paired intervals, ranks and costs.

    Writes table.json, table.md and density.png to --out; into its folders, model/benchmark, the summary.json and
    curve.png of all methods; and below a folder each piece (a method), as of `vtc eval`. A second process with the same
    --out takes the pieces that the first one is not at.

    Examples:

      vtc table --limit 20 --methods tome,uniform,random --out out/try

      for core in 1 2; do OMP_NUM_THREADS=1 vtc table --out out/table & done; wait; vtc table --out out/table
    """
    chosen, spend = split(methods) if methods else None, parse_budgets(budgets)
    check_names(*(chosen or ()))
    check_names(against, also=("full",))
    if chosen and against not in (*chosen, "full"):
        chosen = (*chosen, against)
        note(f"{against} is run, too: it is what the others are compared with (--against)")
    need("matplotlib", "sklearn", "scipy", extra="eval")
    note_one(spend)
    quiet()
    from vtc.eval import density, standings
    from vtc.eval import table as tables
    from vtc.stage import write_json

    costs = standings.shares([Path(name) for name in split(bench)]) if bench else {}
    asked = tables.Settings(split(models), split(benchmarks), chosen, spend, limit, seed, batch_size, device)
    found, elsewhere = tables.evaluate(asked, out, bar=True)
    if elsewhere:
        note(f"{elsewhere} pieces are with another process: the table is without them, run this again when it is done")
    for answers in found:
        tables.write_curve(answers, out, seed)
    names = list(chosen or tables.comparable())
    standing, means = standings.stand(found, names, against, seed, costs)
    write_json(out / "table.json", standing)
    (out / "table.md").write_text(text := standings.markdown(standing, means, seed), encoding="utf-8")
    density.picture(means, list(standing["ranks"][standings.ALL]["mean_rank"]), against, out / "density.png")
    typer.echo(text + f"{out}: table.json, table.md, density.png")
