"""`vtc eval`: accuracy against visual-token budget, one result line a question, resumable.

Batches are the outer loop and arms (a method at a budget) the inner one: an image is prepared once for all arms, the
full model answers first, and a batch holds the same questions in every run, so that a resumed run repeats an
uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vtc
from vtc.adapter import find
from vtc.eval import benchmarks, folder, marking, memory, mis, progress, report
from vtc.eval.memory import Spent
from vtc.eval.reader import Reader, load, model_path, pick_device
from vtc.eval.rows import Group, Line, Row
from vtc.eval.store import Store, key
from vtc.methods import check_names
from vtc.methods.compose import with_budget
from vtc.stage import write_json

if TYPE_CHECKING:
    from PIL.Image import Image

    from vtc.eval.scenes import Example

SMALLER = "smaller-image"
BLIND = "uniform"
"""The method that takes the visual tokens away for the blind row: at a budget of 0 they all do the same."""


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do. Budgets: tokens per image averaged over the layers (int), or a fraction (float)."""

    model: str = "reference"
    methods: tuple[str, ...] = ("vtc-cls", "fastv", "random", "uniform")
    budgets: tuple[int | float, ...] = (0.5, 0.25, 0.11)
    limit: int = 1000
    seed: int = 0
    batch_size: int = 32
    max_new_tokens: int = 8
    suffix: str = ""
    device: str = "auto"
    benchmark: str = "scenes"
    dtype: str = "auto"


@dataclass
class Arm:
    """A method at a budget. `spend` is the budget it runs at: an image's floor where `budget` is out of reach."""

    method: str
    budget: int | float
    spend: int | float
    reachable: bool = True
    found: vtc.Method | None = None
    """The method as it was when the run began: its file may be written anew while it goes on."""

    def key(self, question_id: str) -> str:
        return key(self.method, self.budget, question_id)


@dataclass(frozen=True)
class Shared:
    """What runs of one model on one benchmark have in common."""

    reader: Reader
    examples: Sequence[Example]
    lines: Mapping[str, Line] = field(default_factory=dict)
    """By key what one of them was answered that none has to ask again."""


def evaluate(
    settings: Settings,
    out: Path,
    restart: bool = False,
    dry_run: bool = False,
    bar: bool = False,
    shared: Shared | None = None,
    per: str = "tokens",
) -> list[Row]:
    """Run what is missing of `settings` in the folder `out`, write the summaries, the configuration and the pictures.

    With `dry_run` it writes nothing and ends when `out` is known to be free, or this run's, and every arm answered one
    question. With `bar` stderr shows how far it is. `shared` stands for what would be loaded by `settings`; who gives
    it keeps others out of `out`. `per` "bytes" also writes bytes.json, the rows with their bytes, and bytes.png: the
    same runs over another axis.

    Returns the summary rows, of a dry run none. Raises ValueError for unknown methods and benchmarks and for a
    folder that holds another run, or that another process is at work in.
    """
    _check(settings)
    benchmark = benchmarks.find(settings.benchmark)
    path, device = model_path(settings.model), pick_device(settings.device)
    reader = shared.reader if shared else load(path, device, settings.max_new_tokens, settings.dtype)
    config = configuration(settings, reader)
    if dry_run:
        folder.check(out, config, restart)
        plan(reader, settings, benchmark.example("test", settings.seed, 0))
        return []
    with nullcontext() if shared else folder.alone(out):
        folder.open_folder(out, config, restart)
        arms, groups = _ask(settings, out, reader, benchmark, bar, shared)
        return _write(settings, out, arms, groups, benchmark, per)


def _ask(
    settings: Settings, out: Path, reader: Reader, benchmark: Any, bar: bool, shared: Shared | None
) -> tuple[list[Arm], list[Group]]:
    """Ask what is missing; gives all arms, and of each the lines of all questions."""
    store: Store[Line] = Store(out / "results.jsonl")
    if shared:
        store.lines = {**shared.lines, **store.lines}
        examples = shared.examples
    else:
        examples = benchmark.load(split="test", limit=settings.limit, seed=settings.seed)
    arms = plan(reader, settings, examples[0])
    if others := mis.others(examples, settings.seed):
        arms.insert(2, Arm(mis.SWAPPED, 1.0, 1.0))
    with progress.bar("questions", len(examples) * len(arms), shown=bar) as tick:
        for batch in _batches(examples, settings.batch_size):
            _run_batch(reader, arms, batch, others, store, settings.suffix, tick)
    groups: list[Group] = []
    for arm in arms:
        lines = [store.lines[arm.key(example.question_id)] for example in examples]
        groups.append((arm.method, arm.budget, not any(line["at_floor"] for line in lines), lines))
    return arms, groups


def _write(
    settings: Settings, out: Path, arms: Sequence[Arm], groups: Sequence[Group], benchmark: Any, per: str
) -> list[Row]:
    """The summaries and the pictures; gives the summary rows."""
    rows, needing = (
        report.summarise([g for g in groups if g[0] != mis.SWAPPED], settings.seed),
        mis.needing(groups, settings.seed),
    )
    memory.mark([*rows, *needing["rows"]], {arm.method: arm.found for arm in arms if arm.found})
    write_json(out / "needs-image.json", needing)
    measure = getattr(benchmark, "MEASURE", "accuracy")
    title = f"{settings.model}: {measure} over {{}} questions of {settings.benchmark}"
    report.picture(rows, out / "curve.png", title.format(rows[0]["n"]))
    if needing["rows"]:
        few = f"{title} that need the image".format(needing["needing"])
        report.picture(needing["rows"], out / "needs-image.png", few)
    if per == "bytes":
        priced = memory.priced(rows, groups)
        write_json(out / "bytes.json", priced)
        report.picture(priced, out / "bytes.png", title.format(rows[0]["n"]), per="bytes")
    write_json(out / "summary.json", rows)  # last: where it is, the run is whole
    return rows


def configuration(settings: Settings, reader: Reader) -> dict[str, Any]:
    """All that the run's answers depend on."""
    methods = {name: name for name in settings.methods if name not in (*report.ALWAYS, SMALLER)}
    digests = folder.method_digests(reader.model, methods, settings.budgets)
    return folder.configuration(settings, model_path(settings.model), pick_device(settings.device), digests)


def plan(reader: Reader, settings: Settings, example: Example) -> list[Arm]:
    """All arms, the full and the blind model first, each tried on one question."""
    arms = [Arm("full", 1.0, 1.0), Arm("blind", 0, 0)]
    inputs = reader.inputs([example.image], [example.question + settings.suffix])
    for method in dict.fromkeys(m for m in settings.methods if m not in report.ALWAYS):
        if method == SMALLER:
            _check_smaller(reader, inputs)
        found = None if method == SMALLER else with_budget(method)[0]
        for budget in budgets_of(method, settings.budgets):
            arms.append(Arm(method, budget, budget, found=found))
            list(_reached(reader, arms[-1], [example], inputs, settings.suffix))
    return arms


def budgets_of(method: str | vtc.Method, budgets: Sequence[int | float]) -> list[int | float]:
    """What a method is run at: the budget that its JSON file names, else all of `budgets`."""
    own = None if method == SMALLER else with_budget(method)[1]
    return [own] if own is not None else report.distinct(budgets)


def _run_batch(
    reader: Reader,
    arms: list[Arm],
    batch: list[Example],
    others: Mapping[str, Image],
    store: Store[Line],
    suffix: str,
    tick: progress.Tick,
) -> None:
    inputs: dict[bool, dict[str, Tensor]] = {}
    for arm in arms:
        if any(arm.key(example.question_id) not in store.lines for example in batch):
            swapped = arm.method == mis.SWAPPED
            shown = [replace(example, image=others[example.question_id]) for example in batch] if swapped else batch
            if swapped not in inputs:
                inputs[swapped] = _inputs(reader, shown, suffix)
            answers = _reached(reader, arm, shown, inputs[swapped], suffix)
            store.add(list(_lines(answers, store)))
        tick(len(batch))


def _reached(
    reader: Reader, arm: Arm, batch: list[Example], inputs: dict[str, Tensor], suffix: str
) -> Iterator[tuple[Arm, Example, str, Spent]]:
    """Each question with its prediction and what its visual tokens cost, and the arm as it was run: at the image's
    floor where the budget is out of reach, which depends on the image's size."""
    try:
        predictions, costs = _answer(reader, arm, inputs)
    except vtc.BudgetError as error:
        sizes = reader.visual_tokens(inputs).tolist()
        if len(set(sizes)) == 1:
            yield from _reached(reader, replace(arm, spend=error.floor, reachable=False), batch, inputs, suffix)
            return
        for size in sorted(set(sizes)):
            alike = [example for example, tokens in zip(batch, sizes, strict=True) if tokens == size]
            yield from _reached(reader, arm, alike, _inputs(reader, alike, suffix), suffix)
        return
    for example, prediction, cost in zip(batch, predictions, costs, strict=True):
        yield arm, example, prediction, cost


def _inputs(reader: Reader, batch: list[Example], suffix: str) -> dict[str, Tensor]:
    return reader.inputs([example.image for example in batch], [example.question + suffix for example in batch])


def _lines(answers: Iterator[tuple[Arm, Example, str, Spent]], store: Store[Line]) -> Iterator[Line]:
    full = Arm("full", 1.0, 1.0)
    for arm, example, prediction, cost in answers:
        reference = prediction if arm.method == "full" else store.lines[full.key(example.question_id)]["prediction"]
        yield {
            "question_id": example.question_id,
            "task": example.task,
            "density": example.density,
            "method": arm.method,
            "budget": arm.budget,
            "tokens": cost.tokens,
            "at_floor": not arm.reachable,
            "prediction": prediction,
            "answer": example.answer,
            "correct": example.correct(prediction),
            "agrees": marking.is_correct(prediction, reference),
            "held": cost.held,
            "read": cost.read,
            "peak": cost.peak,
        }


def _answer(
    reader: Reader, arm: Arm, inputs: dict[str, Tensor], max_new_tokens: int | None = None
) -> tuple[list[str], list[Spent]]:
    """Predictions and what the visual tokens cost, measured, of a batch of prompts with one image each."""
    each = find(reader.model).shape().token_bytes
    if arm.method in ("full", mis.SWAPPED):
        costs = [Spent.alike(count, each) for count in reader.visual_tokens(inputs).float().tolist()]
        return reader.answers(inputs, max_new_tokens), costs
    if arm.method == SMALLER:
        small, tokens = _shrink(reader, inputs, arm.spend)
        return reader.answers(small, max_new_tokens), [Spent.alike(tokens, each)] * len(small["input_ids"])
    method = BLIND if arm.method == "blind" else arm.found or arm.method
    with vtc.compressed(reader.model, method, arm.spend) as trace:
        predictions = reader.answers(inputs, max_new_tokens)
        return predictions, Spent.of(trace, each)


def _shrink(reader: Reader, inputs: dict[str, Tensor], budget: int | float) -> tuple[dict[str, Any], float]:
    """The same prompts about a resized image of g x g patches, g = round(sqrt(tokens)), and the tokens that it has."""
    pixels, count = inputs["pixel_values"], int(reader.visual_tokens(inputs)[0])
    patch = pixels.shape[-1] // math.isqrt(count)
    side = max(1, round(math.sqrt(budget * count if isinstance(budget, float) else budget))) * patch
    small = F.interpolate(pixels.float(), size=(side, side), mode="bicubic", antialias=True).to(pixels.dtype)
    with torch.inference_mode():
        encoded = reader.model.model.get_image_features(small, interpolate_pos_encoding=True, return_dict=True)
    tokens = len(encoded.pooler_output[0])
    images = inputs["input_ids"] == reader.model.config.image_token_id
    keep = ~images | (images.cumsum(dim=1) <= tokens)  # the same number goes in every row: it stays rectangular
    rows = len(keep)
    shorter = {name: inputs[name][keep].view(rows, -1) for name in ("input_ids", "attention_mask")}
    return {**shorter, "mm_encoder_outputs": {"image": encoded}}, float(tokens)


def _check_smaller(reader: Reader, inputs: dict[str, Tensor]) -> None:
    pixels, count = inputs.get("pixel_values"), int(reader.visual_tokens(inputs)[0])
    one_square = pixels is not None and pixels.ndim == 4 and len(pixels) == 1 and pixels.shape[-1] == pixels.shape[-2]
    try:
        if not one_square or math.isqrt(count) ** 2 != count:
            raise TypeError("its images are not one square of patches")
        _answer(reader, Arm(SMALLER, 0.5, 0.5), inputs, max_new_tokens=1)
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"{SMALLER} works for models that encode one square image and interpolate its position embeddings "
            f"(LLaVA-1.5 with CLIP or SigLIP), not for this {type(reader.model).__name__}: {error}"
        ) from error


def _check(settings: Settings) -> None:
    check_names(*(method for method in settings.methods if method not in report.ALWAYS), also=(SMALLER,))
    check_methods([method for method in settings.methods if method != SMALLER])
    for name in ("limit", "batch_size", "max_new_tokens"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name.replace('_', ' ')} must be at least 1, got {getattr(settings, name)}")


def check_methods(methods: Sequence[str]) -> None:
    """Raises what `vtc.find_method` raises, for any that is not always there."""
    for method in methods:
        if method not in report.ALWAYS:
            vtc.find_method(method)


def _batches(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    for start in range(0, len(examples), size):
        yield list(examples[start : start + size])
