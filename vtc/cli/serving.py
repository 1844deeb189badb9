"""`vtc serve` and `vtc load`: many clients at once."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vtc.cli.arguments import Device, Model, check_address, need, parse_budgets, parse_counts, parse_rates, refuse
from vtc.cli.terminal import note, note_one, quiet, status, steps
from vtc.methods import check_names

PACKAGES = ("fastapi", "uvicorn", "openai", "prometheus_client")
Megabytes = Annotated[float, typer.Option(min=0.01, help="Largest request, with its images in base64.")]


def serve(
    context: typer.Context,
    model: Model = "reference",
    method: Annotated[
        str, typer.Option(help="Of requests that name none; `vtc methods` lists them. 'none': all visual tokens.")
    ] = "vtc-cls",
    budget: Annotated[
        str | None,
        typer.Option(help="0.25, 25% or 64 (tokens per image); unless given what a JSON file says, or 0.25."),
    ] = None,
    adapt: Annotated[
        str | None, typer.Option(help="Budgets instead of one: the more requests wait, the later in the list.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="127.0.0.1 serves this machine alone; 0.0.0.0 everyone who can reach it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model. Default: as --model.")] = None,
    waiting: Annotated[int, typer.Option(min=1, help="Requests inside at once; one more gets 429.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    megabytes: Megabytes = 16,
    megapixels: Annotated[float, typer.Option(min=0.01, help="Of all images of a request.")] = 16,
    images: Annotated[int, typer.Option(min=1, help="Of a request.")] = 8,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch images from public addresses.")] = False,
    cache_tokens: Annotated[int, typer.Option(min=256, help="Of the KV cache.")] = 16_384,
    batch_tokens: Annotated[int, typer.Option(min=16, help="Of one step of the decoder.")] = 1024,
    remember: Annotated[int, typer.Option(min=256, help="Visual tokens of images that may come again.")] = 16_384,
    device: Device = "auto",
) -> None:
    """Serve a model with fewer visual tokens to many clients at once, by OpenAI's API.

    Requests are packed into common batches, and their answers are those that they would get alone. A request may name
    its own: extra_body={"vtc": {"method": "vtc-cls", "budget": 64}}. Its reply tells the visual tokens that it read.

    Examples:

      vtc serve

      vtc serve --model llava-hf/llava-1.5-7b-hf --adapt 0.5,0.25,0.11 --waiting 32
    """
    if method == "none":
        refuse(context, "budget", "adapt", why="--method none reads all visual tokens, and a request names its own")
    if adapt:
        refuse(context, "budget", why="--adapt names the budgets")
    budgets = parse_budgets(adapt or budget or "") if adapt or budget else None
    need(*PACKAGES, extra="serve")
    if method != "none":
        check_names(method)
    host = check_address(host, port)
    note_one(budgets or ())
    from vtc.eval.reader import load, model_path, pick_device

    path = model_path(model)
    quiet()
    with status(f"loading {model}"):
        import asyncio

        from vtc.serve.app import Server
        from vtc.serve.limits import Limits, Sizes

        reader = load(path, pick_device(device))
        limits = Limits(int(megabytes * 2**20), int(megapixels * 1e6), images, max_new_tokens, waiting, urls=allow_urls)
        sizes = Sizes(cache=cache_tokens, batch=batch_tokens, remembered=remember)
        chosen = None if method == "none" else method
        server = Server(reader.model, reader.processor, name or model, chosen, budgets, limits, sizes)
    if server.chat.why_alone:
        note(f"requests are answered one after the other: {server.chat.why_alone}")
    shown = f"[{host}]" if ":" in host else host
    typer.echo(f"http://{shown}:{port}/v1 serves {name or model}", err=True)
    server.start()
    try:
        asyncio.run(server.serve(host, port))
    except RuntimeError as error:
        raise OSError(str(error)) from None
    finally:
        server.stop()


def load(
    model: Annotated[
        str,
        typer.Option(help="'reference', a model folder, a hub id, or a LLaVA shape of `vtc bench`."),
    ] = "reference",
    method: Annotated[str, typer.Option(help="`vtc methods` lists them.")] = "vtc-cls",
    budgets: Annotated[str, typer.Option(help="0.25,0.11 or 25% or 64; the first one also one by one.")] = "0.25,0.11",
    clients: Annotated[str, typer.Option(help="Closed loop: how many ask at once.")] = "1,4,12",
    rates: Annotated[str | None, typer.Option(help="Open loop: requests a second that arrive by chance.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Of each load, arm and round.")] = 24,
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Arms take turns; the table has medians.")] = 3,
    dtype: Annotated[str, typer.Option(help="Of a shape's weights.")] = "float32",
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for load.json and load.png.")] = None,
) -> None:
    """Measure served speed: requests a second and seconds to the first token, for clients x budgets.

    In one run: transformers' own server, which answers one by one, with the full model and with the pruned one; and
    `vtc serve`, unpruned and at each budget. Each request has an image of its own. At the end what a repeated image and
    a next turn save.

    Examples:

      vtc load --requests 12 --rounds 1

      vtc load --model llava-qwen2-0.5b --clients 1,4,12 --out out/load
    """
    spend, counts, arrivals = parse_budgets(budgets), parse_counts(clients), parse_rates(rates) if rates else ()
    need(*PACKAGES, extra="serve")
    check_names(method)
    if out:
        need("matplotlib", extra="eval")
    from vtc.eval import clients as asking
    from vtc.eval.arms import Case, arms, shown
    from vtc.eval.reader import pick_device

    quiet()
    case = Case(model, method, counts, arrivals, requests, new_tokens, rounds, dtype, pick_device(device))
    compared = arms(spend)
    with steps() as step:
        rows = asking.run(case, compared, step)
        step("a repeated image")
        seconds = asking.again(case, compared[-1])
    title = f"{model}, {method}, {new_tokens} tokens, {case.device}"
    Console().print(asking.table(rows, title))
    ratios = ", ".join(f"{name} {seconds[name] / seconds['first']:.2f}" for name in ("again", "next turn"))
    Console().print(f"seconds to the first token at {shown(spend[-1])}, of those of a new image: {ratios}")
    if out:
        out.mkdir(parents=True, exist_ok=True)
        from vtc.stage import write_json

        write_json(out / "load.json", {"case": asdict(case), "rows": rows, "repeated": seconds})
        asking.picture(rows, out / "load.png", title)
