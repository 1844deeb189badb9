"""`vtc eval`, `compare` and `faithfulness`: what is lost in answers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from vtc.cli.arguments import BatchSize, Budgets, Device, Model, check_folder, need, parse_budgets, refuse, split
from vtc.cli.terminal import note_above, note_one, quiet, say
from vtc.methods import check_names

if TYPE_CHECKING:
    from vtc.eval.rows import Row


def _per(axis: str) -> str:
    if axis not in ("tokens", "bytes"):
        raise typer.BadParameter(f"{axis!r} is neither tokens nor bytes")
    return axis


REHEARSED = "dry run: the model answers with every method and budget, or at the method's floor, and all data is there"


def evaluate(
    context: typer.Context,
    model: Model = "reference",
    methods: Annotated[
        str,
        typer.Option(help="Comma-separated; `vtc methods` lists them, and smaller-image is one more baseline."),
    ] = "vtc-cls,fastv,random,uniform",
    budgets: Budgets = "0.5,0.25,0.11",
    benchmark: Annotated[
        str,
        typer.Option(
            help="scenes, a few small things on a photograph; captions, all of them listed; or pages, full of words, "
            "digits and shapes."
        ),
    ] = "scenes",
    tasks: Annotated[
        str,
        typer.Option(
            help="Benchmarks of lmms-eval instead, comma-separated: pope,mme,gqa,... Their own prompts, metrics and "
            "lengths count."
        ),
    ] = "",
    include_path: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="With --tasks: a folder with more task files."),
    ] = None,
    gen_kwargs: Annotated[
        str, typer.Option(help="With --tasks: over what task files ask of generation, such as max_new_tokens=16.")
    ] = "",
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Questions of each task; unless given 1000, or with --tasks all of a benchmark."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the questions and of the bootstrap.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the run; the same command resumes it.")] = Path("out/eval"),
    batch_size: BatchSize = 32,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer; unless given 8, for captions 48.")
    ] = None,
    suffix: Annotated[
        str,
        typer.Option(help="Put after each question, for models that answer in sentences when not told otherwise."),
    ] = "",
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="bfloat16, float16 or float32; bytes depend on it. auto is the checkpoint's own.")
    ] = "auto",
    per: Annotated[
        str,
        typer.Option(callback=_per, help="bytes: draw accuracy against those of the cache, too, the peak beside."),
    ] = "tokens",
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what --out holds of an earlier run.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check model, methods, tasks and data on one question each, and --out, and stop."
        ),
    ] = False,
    by_task: Annotated[bool, typer.Option("--by-task", help="Also print accuracy by task.")] = False,
) -> None:
    """Measure accuracy against token budget on scenes or pages, or with --tasks on benchmarks of lmms-eval.

    Always runs the full and the blind model beside the methods, and the full one with another question's image. Writes
    results.jsonl (a line a question), summary.json, config.json and curve.png to --out, and to needs-image.json and
    needs-image.png the same over the questions that need the image: full right, blind wrong. Killed and run again, it
    goes on where it was. With --tasks it may be started as many processes, by torchrun or accelerate launch.

    Examples:

      vtc eval --limit 200 --out out/first

      vtc eval --methods vtc-cls,random,smaller-image --budgets 50%,25%,16 --out out/mine --by-task

      vtc eval --benchmark pages --model reference-pages --out out/pages --by-task

      vtc eval --model llava-hf/llava-1.5-7b-hf --suffix ' Answer with a single word.' --out out/llava

      vtc eval --model llava-hf/llava-1.5-7b-hf --tasks pope,gqa --batch-size 8 --out out/suites
    """
    chosen, spend = split(methods), parse_budgets(budgets)
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if tasks:
        chosen_here = ("suffix", "max_new_tokens", "by_task", "benchmark", "dtype", "per")
        refuse(context, *chosen_here, why="for vtc's own benchmarks, not for --tasks")
    else:
        refuse(context, "include_path", "gen_kwargs", why="for --tasks, not for vtc's own benchmarks")
    if dry_run:
        refuse(context, "by_task", why="a dry run counts nothing")
    if several and ":" in device:
        refuse(context, "device", why="each of several processes takes a device of its own")
    check_names(*chosen, also=("smaller-image", "full", "blind"))
    need("matplotlib", "sklearn", extra="eval")
    note_one(spend)
    if several and not tasks:
        raise ValueError("many processes share the questions of a benchmark only with --tasks, such as vtc_scenes")
    quiet()
    from vtc.eval import benchmarks, memory, mis, report, run, suites

    console = Console()
    if tasks:
        more = str(include_path.absolute()) if include_path else None
        asked = suites.Settings(split(tasks), model, chosen, spend, limit, seed, batch_size, device, more, gen_kwargs)
        suites.evaluate(asked, out, restart, dry_run, lambda task, rows: _show(task, rows, out / task))
        if dry_run:
            console.print(REHEARSED)
        return
    longest = getattr(benchmarks.find(benchmark), "LONGEST", 8)
    settings = run.Settings(
        model,
        chosen,
        spend,
        limit or 1000,
        seed,
        batch_size,
        max_new_tokens or longest,
        suffix,
        device,
        benchmark,
        dtype,
    )
    say(f"loading {model}")
    rows = run.evaluate(settings, out, restart, dry_run, bar=True, per=per)
    if dry_run:
        console.print(REHEARSED)
        return
    note_above(spend, next(row["tokens"] for row in rows if row["method"] == "full"))
    console.print(report.table(rows))
    if per == "bytes":
        console.print(
            memory.table(json.loads((out / "bytes.json").read_text())), f"{escape(str(out))}: bytes.png, bytes.json"
        )
    if by_task:
        console.print(*report.task_tables(rows, console.width))
    console.print(*mis.shown(out), f"{escape(str(out))}: curve.png, summary.json, results.jsonl, config.json")


def _show(task: str, rows: list[Row], where: Path) -> None:
    from vtc.eval import mis, published, report

    console = Console()
    console.print(f"[bold]{escape(task)}[/]", report.table(rows), report.metrics_table(rows))
    if figures := published.table(task, rows):
        console.print(figures)
    console.print(*mis.shown(where), f"{escape(str(where))}: curve.png, summary.json, results.jsonl")


def compare(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="What `vtc eval` got as --out.")],
    method: Annotated[str, typer.Argument(help="One of its methods, as it was named there.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
) -> None:
    """Compare one method of a run with each other one and the full model: paired differences, question by question.

    Writes compare.json to the folder.

    Example:

      vtc compare out/eval vtc-cls
    """
    from vtc.eval import paired
    from vtc.stage import write_json

    rows = paired.compare(folder, method, seed)
    write_json(folder / "compare.json", rows)
    Console().print(paired.table(rows))


def faithfulness(
    model: Model = "reference",
    methods: Annotated[
        str, typer.Option(help="Comma-separated, of those with a score map; `vtc methods` lists all.")
    ] = "vtc-cls,fastv,random",
    benchmark: Annotated[
        str,
        typer.Option(help="scenes, a few small things on a photograph, or pages, full of words, digits and shapes."),
    ] = "scenes",
    limit: Annotated[int, typer.Option(min=1, help="Questions.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the questions.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for faithfulness.json.")] = Path("out/faithfulness"),
    device: Device = "auto",
) -> None:
    """Compare score maps with occlusion: do methods keep the tokens that the answer hangs on?

    Each visual token is hidden from the full model by itself, which takes a forward an image of as many rows as tokens.

    Example:

      vtc faithfulness --limit 100 --methods vtc-cls,fastv,random --out out/faithful
    """
    chosen = tuple(dict.fromkeys(split(methods)))
    check_names(*chosen)
    need("sklearn", "scipy", extra="eval")
    check_folder(out)
    quiet()
    from vtc.eval import benchmarks
    from vtc.eval import faithfulness as compared
    from vtc.eval.reader import load, model_path, pick_device
    from vtc.stage import write_json

    examples = benchmarks.find(benchmark).load("test", limit, seed)
    say(f"loading {model}")
    reader = load(model_path(model), pick_device(device))
    rows = compared.faithfulness(reader, examples, chosen, bar=True)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "faithfulness.json", rows)
    Console().print(compared.table(rows))
