"""`vtc eval --tasks`: accuracy against visual-token budget on the benchmarks of lmms-eval, on one process or many.

One model is loaded, and each task once; then lmms-eval evaluates each arm (a method at a budget) with its own prompts,
filters and metrics, and shares the questions among the processes. Each process appends its replies to a file, so that
a second run asks only what is missing.
"""

from __future__ import annotations

import difflib
import inspect
import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vtc
from vtc.eval import published, report, run
from vtc.eval.reader import model_path, pick_device
from vtc.eval.run import Arm, Store
from vtc.install import install_line

if TYPE_CHECKING:
    from lmms_eval.api.task import Task

    from vtc.eval.suite_model import Vtc

REPLIES = "replies-{}.jsonl"
"""What one process was answered, in the folder of the run."""


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do. `limit`: questions of each task, None for all; budgets as in `run.Settings`."""

    tasks: tuple[str, ...]
    model: str = "reference"
    methods: tuple[str, ...] = ("vtc-cls", "fastv", "random", "uniform")
    budgets: tuple[int | float, ...] = (0.5, 0.25, 0.11)
    limit: int | None = None
    seed: int = 0
    batch_size: int = 8
    device: str = "auto"


def evaluate(
    settings: Settings, out: Path, restart: bool = False, dry_run: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Run what is missing of `settings` in the folder `out`; write each task's results, summary and picture there.

    With `dry_run` nothing is written and it ends before the long work: the model is loaded, the first question of each
    task was asked in every arm, and the task scored the reply.

    Returns the summary rows of each task; nothing from a dry run or in any process but the first.

    Raises:
        ValueError: unknown methods or tasks; a task whose data or code fails, with its own error; a folder of another
            run.
        ImportError: lmms-eval is missing, or cannot be imported.
    """
    run.check_methods(settings.methods, list(vtc.list_methods()))
    _import_lmms_eval()
    from vtc.eval.suite_model import Vtc

    lm = Vtc(settings.model, batch_size=settings.batch_size, device=settings.device)
    with lm.accelerator.main_process_first():  # the others find the data in the cache
        tasks = load_tasks(settings.tasks)
    arms = plan(lm, settings, tasks)
    if dry_run:
        return {}
    if lm.accelerator.is_main_process:
        run.open_folder(out, _configuration(settings), restart, REPLIES.format("*"))
    lm.accelerator.wait_for_everyone()
    lm.replies = _replies(out, lm.accelerator.process_index)
    found = []
    for arm in arms:
        _use(lm, arm)
        found.append(_simple_evaluate(lm, settings, tasks, out))
    if not lm.accelerator.is_main_process:
        return {}
    return {name: _write(settings, out / name, task, arms, found) for name, task in tasks.items()}


def load_tasks(names: Sequence[str]) -> dict[str, Task]:
    """The tasks, and those of groups, by name, with their data. Raises ValueError with what went wrong, and where."""
    from lmms_eval.evaluator_utils import get_task_list
    from lmms_eval.tasks import get_task_dict

    known, tasks = _manager().all_tasks, {}
    for name in names:
        if name not in known:
            close = ", ".join(difflib.get_close_matches(name, known)) or "see `python -m lmms_eval --tasks list`"
            raise ValueError(f"lmms-eval has no task {name!r}; perhaps {close}")
        with _blaming(name):
            found = get_task_list(get_task_dict([name], _manager(), "chat"))
        tasks |= {output.task_name: output.task for output in found}
    return tasks


def plan(lm: Vtc, settings: Settings, tasks: dict[str, Task]) -> list[Arm]:
    """All arms, the full and the blind model first, each tried on the first question of each task.

    Budgets out of reach show themselves there and become the method's floor.
    """
    from vtc.eval.suite_model import chat

    arms, documents = [Arm("full", 1.0, 1.0), Arm("blind", 0, 0)], []
    for method in dict.fromkeys(method for method in settings.methods if method not in report.ALWAYS):
        arms += [Arm(method, budget, budget) for budget in dict.fromkeys(settings.budgets)]
    for name, task in tasks.items():
        with _blaming(name):
            if task.OUTPUT_TYPE != "generate_until":
                raise TypeError(f"it is of type {task.OUTPUT_TYPE}, and vtc answers by generating")
            documents.append(chat(task.doc_to_messages(task.eval_docs[0])))
        (reply,) = lm.ask([documents[-1]], max_new_tokens=1)
        with _blaming(name):
            process_results = inspect.unwrap(type(task).process_results)  # lmms-eval tries five times, 2 s apart
            _score(task, process_results(task, task.eval_docs[0], [reply.text]))
    return [_reachable(lm, arm, documents) for arm in arms]


def _reachable(lm: Vtc, arm: Arm, documents: list[Any]) -> Arm:
    try:
        _use(lm, arm)
        for document in documents:
            lm.ask([document], max_new_tokens=1)
    except vtc.BudgetError as error:
        return Arm(arm.method, arm.budget, error.floor, reachable=False)
    return arm


def _use(lm: Vtc, arm: Arm) -> None:
    from vtc.eval.suite_model import FULL

    if arm.method == "full":
        lm.use(*FULL)
    else:
        lm.use(run.BLIND if arm.method == "blind" else arm.method, arm.spend)


def _replies(out: Path, process: int) -> Store:
    """This process's store, with what any process of an earlier run was answered. No process writes meanwhile."""
    out.mkdir(parents=True, exist_ok=True)  # the folder of another machine need not be the first one's
    store = Store(out / REPLIES.format(process))
    for path in sorted(set(out.glob(REPLIES.format("*"))) - {store.path}):
        store.lines = Store(path).lines | store.lines
    return store


def _simple_evaluate(lm: Vtc, settings: Settings, tasks: dict[str, Task], out: Path) -> dict[str, Any] | None:
    """What lmms-eval found in the first process, None in the others; `out` is where tasks put files for submission."""
    from lmms_eval import evaluator
    from tenacity import RetryError

    try:
        return evaluator.simple_evaluate(
            model=lm,
            tasks=list(tasks.values()),
            batch_size=settings.batch_size,
            limit=settings.limit,
            bootstrap_iters=0,
            task_manager=_manager(),
            cli_args=Namespace(output_path=str(out), process_with_media=False),
        )
    except RetryError as error:
        raise _true_error(", ".join(tasks), error) from error


def _write(settings: Settings, folder: Path, task: Task, arms: list[Arm], found: list[Any]) -> list[dict[str, Any]]:
    """results.jsonl, summary.json and curve.png of one task; gives the summary rows."""
    name = task.config.task
    groups = [(arm.method, arm.budget, arm.reachable, lines) for arm, lines in _lines(task, arms, found)]
    rows = report.summarise(groups, settings.seed)
    for row, results in zip(rows, found, strict=True):
        row["metrics"] = _metrics(results["results"][name])
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for *_, lines in groups for line in lines)
    (folder / "results.jsonl").write_text(text, encoding="utf-8")
    run.write_json(folder / "summary.json", rows)
    title = f"{settings.model}: {name}, {rows[0]['n']} questions"
    report.picture(rows, folder / "curve.png", title, published.points(name, settings.model))
    return rows


def _lines(task: Task, arms: list[Arm], found: list[Any]) -> Iterator[tuple[Arm, list[dict[str, Any]]]]:
    """Each arm with a line for each question, in the order of the questions."""
    name, full = task.config.task, {}
    for arm, results in zip(arms, found, strict=True):
        samples: dict[int, dict[str, Any]] = {}
        for sample in results["samples"][name]:
            samples.setdefault(sample["doc_id"], sample)  # there is one for each filter: the first filter's counts
        predictions = {number: sample["resps"][0][0] for number, sample in samples.items()}
        full = full or predictions
        yield (
            arm,
            [
                {
                    "question_id": f"{name}-{number:05d}",
                    "task": name,
                    "method": arm.method,
                    "budget": arm.budget,
                    "tokens": samples[number]["token_counts"][0]["visual_tokens"],
                    "prediction": predictions[number],
                    "answer": str(samples[number]["target"]),
                    "correct": _score(task, samples[number]),
                    "agrees": report.is_correct(predictions[number], full[number]),
                }
                for number in sorted(samples)
            ],
        )


def _score(task: Task, sample: dict[str, Any]) -> float:
    """What the task's first metric that knows single questions gave this one, 0 to 1."""
    for metric in task.higher_is_better():
        value = sample.get(metric)
        value = value.get("score") if isinstance(value, dict) else value
        if isinstance(value, Real):
            return float(value)
    raise ValueError(
        "it gives no score to a single question, so that there is no curve to draw: "
        "run it with `python -m lmms_eval --model vtc`"
    )


def _metrics(results: dict[str, Any]) -> dict[str, float]:
    """The task's own figures over all questions, by "metric,filter"."""
    found = {name: value for name, value in results.items() if "," in name and "_stderr" not in name}
    return {name: float(value) for name, value in found.items() if isinstance(value, Real)}


@contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Whatever goes wrong in a task's own data or code is a ValueError with the task's name and the true error."""
    try:
        yield
    except Exception as error:
        raise _true_error(name, error) from error


def _true_error(name: str, error: Exception) -> ValueError:
    attempt = getattr(error, "last_attempt", None)  # lmms-eval tries five times, and then says only that
    cause = attempt.exception() if attempt else error
    return ValueError(f"task {name}: {type(cause).__name__}: {cause}")


@cache
def _manager() -> Any:
    """lmms-eval's index of tasks, with vtc's own."""
    from lmms_eval.tasks import TaskManager

    from vtc.eval import tasks

    return TaskManager("WARNING", include_path=str(tasks.PATH), model_name="vtc")


def _configuration(settings: Settings) -> dict[str, Any]:
    config = run.configuration(settings, model_path(settings.model), pick_device(settings.device))
    config["versions"]["lmms-eval"] = version("lmms-eval")
    return config


def _import_lmms_eval() -> None:
    """Raises ImportError with the ways out. Keeps lmms-eval's notes, but not its warnings, out of the output."""
    try:
        import lmms_eval.evaluator  # noqa: F401
        from loguru import logger
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
        raise ImportError(
            f"lmms-eval cannot be imported ({error}): {install_line('lmms-eval')}. Where torchvision does not fit "
            f"torch, as beside a torch for CPUs: pip uninstall torchvision timm; {install_line('lmms-eval-lean')}; "
            "pip install --no-deps lmms-eval==0.7.3"
        ) from error
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
