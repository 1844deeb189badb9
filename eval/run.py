"""`vtc eval`: accuracy against visual-token budget, one result line a question, resumable.

Batches are the outer loop and arms (a method at a budget) the inner one: an image is prepared once for all arms, the
full model answers first, and a batch holds the same questions in every run, so that a resumed run repeats an
uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vtc
from vtc.eval import report
from vtc.eval.reader import Reader, load, model_path, pick_device

if TYPE_CHECKING:
    from rich.console import Console

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


@dataclass
class Arm:
    """A method at a budget. `spend` is the budget it runs at: an image's floor where `budget` is out of reach."""

    method: str
    budget: int | float
    spend: int | float
    reachable: bool = True

    def key(self, question_id: Any) -> str:
        return json.dumps([self.method, self.budget, question_id])  # JSON tells 1 token from 1.0 of the tokens


class Store:
    """The result lines of one run in a file: append-only, flushed a batch at a time."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        whole = self.path.read_bytes()
        complete = whole[: whole.rfind(b"\n") + 1]
        if complete != whole:  # killed while writing: the torn line is asked again
            os.truncate(self.path, len(complete))
        for number, text in enumerate(complete.splitlines(), 1):
            try:
                line = json.loads(text)
                json.dumps(line, allow_nan=False)  # raises for NaN, which json.loads takes for a number
                self.lines[_key(line)] = line
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"{self.path} is damaged at line {number}: start over with --restart") from None

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        new = [line for line in lines if _key(line) not in self.lines]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in new))
            file.flush()
            os.fsync(file.fileno())
        self.lines.update((_key(line), line) for line in new)


def _key(line: dict[str, Any]) -> str:
    return json.dumps([line["method"], line["budget"], line["question_id"]])


def evaluate(
    settings: Settings, out: Path, restart: bool = False, dry_run: bool = False, console: Console | None = None
) -> list[dict[str, Any]]:
    """Run what is missing of `settings` in the folder `out`, write the summary, the configuration and the picture.

    With `dry_run` it writes nothing and ends when every arm answered one question.

    Returns the summary rows, of a dry run none. Raises ValueError for unknown methods and for a folder that holds
    another run.
    """
    from vtc.eval import scenes

    _check(settings)
    path, device = model_path(settings.model), pick_device(settings.device)
    if dry_run:
        plan(load(path, device), settings, scenes.example("test", settings.seed, 0))
        return []
    open_folder(out, configuration(settings, path, device), restart)
    store = Store(out / "results.jsonl")
    examples = scenes.load(split="test", limit=settings.limit, seed=settings.seed)
    reader = load(path, device, settings.max_new_tokens)
    arms = plan(reader, settings, examples[0])
    with _progress(console, len(examples) * len(arms)) as tick:
        for batch in _batches(examples, settings.batch_size):
            _run_batch(reader, arms, batch, store, settings.suffix, tick)
    groups = []
    for arm in arms:
        lines = [store.lines[arm.key(example.question_id)] for example in examples]
        groups.append((arm.method, arm.budget, not any(line["at_floor"] for line in lines), lines))
    rows = report.summarise(groups, settings.seed)
    write_json(out / "summary.json", rows)
    report.picture(rows, out / "curve.png", f"{settings.model}: accuracy over {len(examples)} questions of scenes")
    return rows


def plan(reader: Reader, settings: Settings, example: Example) -> list[Arm]:
    """All arms, the full and the blind model first, each tried on one question."""
    arms = [Arm("full", 1.0, 1.0), Arm("blind", 0, 0)]
    inputs = reader.inputs([example.image], [example.question + settings.suffix])
    for method in dict.fromkeys(m for m in settings.methods if m not in report.ALWAYS):
        if method == SMALLER:
            _check_smaller(reader, inputs)
        for budget in dict.fromkeys(settings.budgets):
            arms.append(Arm(method, budget, budget))
            list(_reached(reader, arms[-1], [example], inputs, settings.suffix))
    return arms


def _run_batch(reader: Reader, arms: list[Arm], batch: list[Example], store: Store, suffix: str, tick: Any) -> None:
    inputs = None
    for arm in arms:
        if any(arm.key(example.question_id) not in store.lines for example in batch):
            inputs = inputs or _inputs(reader, batch, suffix)
            answers = _reached(reader, arm, batch, inputs, suffix)
            store.add(list(_lines(answers, store)))
        tick(len(batch))


def _reached(
    reader: Reader, arm: Arm, batch: list[Example], inputs: dict[str, Tensor], suffix: str
) -> Iterator[tuple[Arm, Example, str, float]]:
    """Each question with its prediction and its visual tokens, and the arm as it was run: at the image's floor where
    the budget is out of reach, which depends on the image's size."""
    try:
        answers = _answer(reader, arm, inputs)
    except vtc.BudgetError as error:
        sizes = reader.visual_tokens(inputs).tolist()
        if len(set(sizes)) == 1:
            yield from _reached(reader, replace(arm, spend=error.floor, reachable=False), batch, inputs, suffix)
            return
        for size in sorted(set(sizes)):
            alike = [example for example, tokens in zip(batch, sizes, strict=True) if tokens == size]
            yield from _reached(reader, arm, alike, _inputs(reader, alike, suffix), suffix)
        return
    for example, *answer in zip(batch, *answers, strict=True):
        yield arm, example, *answer


def _inputs(reader: Reader, batch: list[Example], suffix: str) -> dict[str, Tensor]:
    return reader.inputs([example.image for example in batch], [example.question + suffix for example in batch])


def _lines(answers: Iterator[tuple[Arm, Example, str, float]], store: Store) -> Iterator[dict[str, Any]]:
    full = Arm("full", 1.0, 1.0)
    for arm, example, prediction, count in answers:
        reference = prediction if arm.method == "full" else store.lines[full.key(example.question_id)]["prediction"]
        yield {
            "question_id": example.question_id,
            "task": example.task,
            "method": arm.method,
            "budget": arm.budget,
            "tokens": count,
            "at_floor": not arm.reachable,
            "prediction": prediction,
            "answer": example.answer,
            "correct": report.is_correct(prediction, example.answer),
            "agrees": report.is_correct(prediction, reference),
        }


def _answer(
    reader: Reader, arm: Arm, inputs: dict[str, Tensor], max_new_tokens: int | None = None
) -> tuple[list[str], list[float]]:
    """Predictions and measured visual tokens (layer average) of a batch of prompts with one image each."""
    if arm.method == "full":
        return reader.answers(inputs, max_new_tokens), reader.visual_tokens(inputs).float().tolist()
    if arm.method == SMALLER:
        small, tokens = _shrink(reader, inputs, arm.spend)
        return reader.answers(small, max_new_tokens), [tokens] * len(small["input_ids"])
    method = BLIND if arm.method == "blind" else resolve(arm.method)
    with vtc.compressed(reader.model, method, arm.spend) as trace:
        predictions = reader.answers(inputs, max_new_tokens)
        return predictions, trace.average_tokens.tolist()


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


def resolve(method: str) -> str | vtc.Method:
    """A name as it stands; a path to a JSON file, as `vtc tune` writes it, as the method that it describes."""
    return vtc.find_method(method) if method.endswith(".json") else method


def _check(settings: Settings) -> None:
    check_methods(settings.methods, [*vtc.list_methods(), SMALLER])
    for name in ("limit", "batch_size", "max_new_tokens"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name.replace('_', ' ')} must be at least 1, got {getattr(settings, name)}")


def check_methods(methods: Sequence[str], known: Sequence[str]) -> None:
    for method in methods:
        if method not in known and method not in report.ALWAYS and not isinstance(resolve(method), vtc.Method):
            raise ValueError(f"unknown method {method!r}; the methods are {', '.join(known)}")


def configuration(settings: Any, path: str, device: str) -> dict[str, Any]:
    """All that a run depends on, as it is written to config.json; `settings` is a dataclass."""
    packages = ("torch", "transformers")
    return {
        "settings": json.loads(json.dumps(asdict(settings))),
        "model_path": path,
        "model_digest": _model_digest(path),
        "source_digest": _source_digest(),
        "device": device,
        "versions": {
            "python": platform.python_version(),
            "vtc": vtc.__version__,
            **{name: version(name) for name in packages},
        },
        "git_commit": git_commit(),
    }


def _model_digest(path: str) -> str | None:
    """Tells two states of one model apart: sizes and times of a folder's files, or the hub's commit."""
    if not Path(path).is_dir():
        from transformers import AutoConfig

        return getattr(AutoConfig.from_pretrained(path), "_commit_hash", None)
    files = sorted(file for file in Path(path).iterdir() if file.is_file())
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]


def _source_digest() -> str:
    """Tells two states of the code apart, as far as answers depend on it: the library, the adapters, this harness."""
    from vtc import integrations

    library = Path(vtc.__file__).parent
    files = {*library.glob("*.py"), *library.glob("methods/*.py"), *Path(integrations.__path__[0]).glob("*.py")}
    harness = ("run", "reader", "scenes", "suites", "suite_model")
    files |= {file for file in Path(__file__).parent.glob("*.py") if file.stem in harness}
    digest = hashlib.sha256()
    for file in sorted(files - {library / "cli.py"}):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def git_commit() -> str | None:
    """The commit of the checkout that this file is tracked in, "-dirty" with local changes; None when installed."""
    try:
        for command in (
            ["git", "ls-files", "--error-unmatch", Path(__file__).name],
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        ):
            done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20)
            if done.returncode:
                return None
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip()


def open_folder(out: Path, config: dict[str, Any], restart: bool, results: str = "results.jsonl") -> None:
    """Make `out` the folder of the run `config`: new, the same run resumed, or with `restart` emptied of another.

    `results` is the name, or the pattern of the names, of the files that tell that something was run there.
    """
    found, settings = list(out.glob(results)), out / "config.json"
    if restart:
        for file in found:
            file.unlink()
    elif found:
        differing = _differences(json.loads(settings.read_text()) if settings.exists() else {}, config)
        if differing:
            raise ValueError(
                f"{out} holds another run ({'; '.join(differing)}): "
                "choose another --out to keep it, or start over with --restart"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    write_json(settings, config)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    def flat(config: dict[str, Any]) -> dict[str, Any]:
        nested = {k: v for name in ("settings", "versions") for k, v in config.get(name, {}).items()}
        # the digest of the sources says what the commit would, and stays put when only the README changes
        return nested | {k: v for k, v in config.items() if k not in ("settings", "versions", "git_commit")}

    old, new = flat(old), flat(new)
    names = [name for name in {**new, **old} if json.dumps(old.get(name)) != json.dumps(new.get(name))]
    return [f"{name} {old.get(name, 'unknown')} there, {new.get(name, 'unknown')} here" for name in names]


def write_json(path: Path, value: Any) -> None:
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    draft.replace(path)  # whole or not at all


def _batches(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    for start in range(0, len(examples), size):
        yield list(examples[start : start + size])


def _progress(console: Console | None, total: int) -> Any:
    """A context that gives a function to call with each number of questions done."""
    if console is None:
        return nullcontext(lambda done: None)
    return _Bar(console, total)


class _Bar:
    def __init__(self, console: Console, total: int):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("questions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.progress, self.total = Progress(*columns, console=console), total

    def __enter__(self) -> Any:
        task = self.progress.__enter__().add_task("", total=self.total)
        return lambda done: self.progress.advance(task, done)

    def __exit__(self, *error: Any) -> None:
        self.progress.__exit__(*error)
