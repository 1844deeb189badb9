"""`vtc eval --tasks`: accuracy against visual-token budget on the benchmarks of lmms-eval, on one process or many.

One model is loaded, and each task once; then lmms-eval evaluates each arm (a method at a budget) with its own prompts,
filters and metrics, and shares the questions among the processes. Each process appends its replies to a file, so that
a second run asks only what is missing.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vtc
from vtc.eval import folder, marking, measure, memory, mis, published, report, run
from vtc.eval.reader import model_path, pick_device
from vtc.eval.rows import Group, Line, Reply, Row
from vtc.eval.run import Arm
from vtc.eval.store import Store
from vtc.install import install_line
from vtc.methods.compose import with_budget
from vtc.stage import write_json

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from lmms_eval.api.task import Task

    from vtc.eval.suite_model import Vtc

REPLIES = "replies-{}.jsonl"
"""What one process was answered, in the folder of the run."""
SHOWN = 5
"""Failures that the last error names; the others are counted."""


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do.

    `methods` are names, JSON files or `vtc.Method`s, budgets as in `run.Settings`; `limit`: questions of each task,
    None for all; `include_path`: a folder with more task files; `gen_kwargs`: as lmms-eval's --gen_kwargs, over what
    the task files say.
    """

    tasks: tuple[str, ...]
    model: str = "reference"
    methods: tuple[str | vtc.Method, ...] = ("vtc-cls", "fastv", "random", "uniform")
    budgets: tuple[int | float, ...] = (0.5, 0.25, 0.11)
    limit: int | None = None
    seed: int = 0
    batch_size: int = 8
    device: str = "auto"
    include_path: str | None = None
    gen_kwargs: str = ""

    @property
    def named(self) -> dict[str, str | vtc.Method]:
        """The methods by the name that rows and lines have; the full and the blind model come of themselves."""
        return {str(method): method for method in self.methods if method not in report.ALWAYS}


def evaluate(
    settings: Settings,
    out: Path,
    restart: bool = False,
    dry_run: bool = False,
    show: Callable[[str, list[Row]], None] = lambda task, rows: None,
) -> dict[str, list[Row]]:
    """Run what is missing of `settings` in the folder `out`; write each task's results, summary and picture there.

    A task is written, and given to `show`, when it is done. A question that cannot be read and, on one process, a task
    that fails do not cost the others. With `dry_run` nothing is written and it ends before the long work: the model is
    loaded, the first question of each task was asked in every arm, and the task scored the reply.

    Returns the summary rows of each task; nothing from a dry run or in any process but the first.

    Raises:
        ValueError: unknown methods or tasks; a task that lacks a package or a judge's key; a folder of another run, or
            that another process is at work in; in the end, for what could not be asked or scored, with its own error.
        ImportError: lmms-eval is missing, or cannot be imported.
    """
    _check(settings)
    _import_lmms_eval()
    from vtc.eval.suite_model import Vtc

    known = _manager(settings.include_path).all_tasks
    for name in settings.tasks:
        _check_known(name, known)
    lm = Vtc(settings.model, batch_size=settings.batch_size, device=settings.device)
    failures: dict[str, str] = {}
    with lm.accelerator.main_process_first():  # the others find the data in the cache
        tasks = _loaded(settings, failures)
    tasks = {name: task for name, task in tasks.items() if _tried(lm, name, task, failures)}
    arms = plan(lm, settings, tasks)
    if dry_run or not tasks:
        _raise(failures)
    main = lm.accelerator.is_main_process
    with folder.alone(out) if main and not dry_run else nullcontext():
        if main:
            _open(settings, out, restart, lm, tasks, dry_run)
        return {} if dry_run else _evaluate_tasks(lm, settings, tasks, arms, out, failures, show)


def _evaluate_tasks(
    lm: Vtc,
    settings: Settings,
    tasks: dict[str, Task],
    arms: list[Arm],
    out: Path,
    failures: dict[str, str],
    show: Callable[[str, list[Row]], None],
) -> dict[str, list[Row]]:
    """The rows of each task, in the first process; it raises in the end what failed."""
    lm.accelerator.wait_for_everyone()
    lm.replies = _replies(out, lm.accelerator.process_index)
    done = {}
    for name, task in tasks.items():
        with _noting(name, failures, several=lm.accelerator.num_processes > 1):
            rows = _evaluate_task(lm, settings, task, arms, out, failures)
            if lm.accelerator.is_main_process:
                done[name] = rows
                show(name, rows)
    if lm.accelerator.is_main_process:
        _raise(failures)
    return done


def _evaluate_task(
    lm: Vtc, settings: Settings, task: Task, arms: list[Arm], out: Path, failures: dict[str, str]
) -> list[Row]:
    from accelerate.utils import gather_object

    found = []
    for arm in arms:
        _use(lm, arm)
        found.append(_simple_evaluate(lm, settings, task, out))
    unread = dict(gather_object(list(lm.failed.items())))
    lm.failed.clear()
    failures |= {f"{name}, question {number}": message for (name, number), message in unread.items()}
    if not lm.accelerator.is_main_process:
        return []
    return _write(settings, out / task.config.task, task, arms, found, {number for _, number in unread})


def _check(settings: Settings) -> None:
    """Refuse, before the model is loaded, what cannot be run."""
    from vtc.eval.tasks import field

    names = [method for method in settings.methods if isinstance(method, str)]
    if run.SMALLER in names:
        raise ValueError(
            f"unknown method {run.SMALLER!r} with --tasks: it is for scenes, whose images it shrinks; the methods of "
            f"benchmarks are {', '.join(vtc.list_methods())}"
        )
    run.check_methods(names)
    if len(settings.named) < len({*settings.methods} - {*report.ALWAYS}):
        raise ValueError("two methods have the same hyper-parameters, and so the same name")
    if lacking := [sentence for name in settings.tasks for sentence in field.lacking(name)]:
        raise ValueError("; ".join(lacking))
    if settings.limit is not None and settings.limit % 2 and "mme" in settings.tasks:
        raise ValueError(f"mme asks two questions about each image: --limit has to be even, not {settings.limit}")


def _open(settings: Settings, out: Path, restart: bool, lm: Vtc, tasks: dict[str, Task], dry_run: bool) -> None:
    """Make `out` this run's folder, or see with `dry_run` whether it can be. A run with a higher limit goes on: it is
    the same one up to the old limit."""
    file, there, replies = out / "config.json", settings.limit, REPLIES.format("*")
    if not restart:
        there = folder.read_config(out).get("settings", {}).get("limit", there)
    more = there is not None and (settings.limit is None or settings.limit > there)
    as_it_was = replace(settings, limit=there) if more else settings
    config = _configuration(as_it_was, lm, tasks)
    if dry_run:
        folder.check(out, config, restart, replies)
        return
    parts = [part for part in out.glob("*/") if not (part / "config.json").exists()]  # else a run of its own
    folder.open_folder(out, config, restart, replies, parts)
    if more:
        write_json(file, _configuration(settings, lm, tasks))


def _configuration(settings: Settings, lm: Vtc, tasks: dict[str, Task]) -> dict[str, Any]:
    digests = folder.method_digests(lm.reader.model, settings.named, settings.budgets)
    digests |= {f"data of {name}": _digest(task, settings.limit) for name, task in tasks.items()}
    where = model_path(settings.model), pick_device(settings.device)
    config = folder.configuration(settings, *where, digests)
    config["versions"]["lmms-eval"] = version("lmms-eval")
    return config


def _digest(task: Task, limit: int | None) -> str:
    """Tells two states of a task apart: its questions up to `limit`, how the first one is put, and its options."""
    import pyarrow as pa

    digest, documents = hashlib.sha256(), task.eval_docs
    documents = documents.select(range(min(limit or len(documents), len(documents)))).with_format("arrow")
    for batch in documents.iter(100):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_table(batch.combine_chunks())
        digest.update(sink.getvalue())
    request = _first(task)[0]
    asked = [value for value in request.args if isinstance(value, str | dict)]
    messages = task.doc_to_messages(task.eval_docs[0]) if hasattr(task, "doc_to_messages") else []
    for part in [part for message in messages for part in message["content"]]:
        shown = part.get("url")
        digest.update(shown.tobytes() if hasattr(shown, "tobytes") else json.dumps(part, default=str).encode())
    digest.update(json.dumps([asked, task.config.generation_kwargs], default=str).encode())
    return digest.hexdigest()[:16]


@contextmanager
def _noting(name: str, failures: dict[str, str], several: bool = False) -> Iterator[None]:
    """A task that fails does not cost the others: `failures` says why it did. Several processes have to keep in step,
    so that there it ends the run."""
    try:
        yield
    except Exception as error:
        if several:
            raise _true_error(name, error) from error
        failures[name] = str(_true_error(name, error))


def _raise(failures: dict[str, str]) -> None:
    if failures:
        more = f"; and {len(failures) - SHOWN} more" if len(failures) > SHOWN else ""
        raise ValueError("; ".join(list(failures.values())[:SHOWN]) + more)


def load_tasks(names: Sequence[str], include_path: str | None = None) -> dict[str, Task]:
    """The tasks, and those of groups, by name, with their data. Raises ValueError with what went wrong, and where."""
    from lmms_eval.evaluator_utils import get_task_list
    from lmms_eval.tasks import get_task_dict

    manager = _manager(include_path)
    tasks: dict[str, Task] = {}
    for name in names:
        _check_known(name, manager.all_tasks)
        with _blaming(name):
            found = get_task_list(get_task_dict([name], manager, _worded_for(name, manager)))
        tasks |= {output.task_name: output.task for output in found}
    return tasks


def _worded_for(name: str, manager: Any) -> str:
    """lmms-eval words multiple choice by likelihood for its "simple" models only."""
    config = manager._get_config(name) if manager._name_is_task(name) else {}
    return "simple" if config.get("output_type") in ("multiple_choice", "loglikelihood") else "chat"


def _check_known(name: str, known: Sequence[str]) -> None:
    if name not in known:
        close = ", ".join(difflib.get_close_matches(name, known)) or "see `python -m lmms_eval --tasks list`"
        raise ValueError(f"lmms-eval has no task {name!r}; perhaps {close}")


def _loaded(settings: Settings, failures: dict[str, str]) -> dict[str, Task]:
    from lmms_eval.utils import simple_parse_args_string

    from vtc.eval import arguments

    over = simple_parse_args_string(settings.gen_kwargs)
    tasks: dict[str, Task] = {}
    arguments.generation(over)
    for name in settings.tasks:
        with _noting(name, failures):
            tasks |= load_tasks([name], settings.include_path)
    generating = [task for task in tasks.values() if "generate" in task.OUTPUT_TYPE]
    if over and tasks and not generating:
        raise ValueError(f"nothing is generated for {', '.join(tasks)}, which rate choices: leave --gen-kwargs out")
    for task in generating:
        task.set_config("generation_kwargs", over, update=True)
    return tasks


def _tried(lm: Vtc, name: str, task: Task, failures: dict[str, str]) -> bool:
    """Whether the first question can be asked, and the task scores the reply."""
    from vtc.eval import arguments

    with _noting(name, failures):
        arguments.generation(task.config.generation_kwargs or {})
        replies = _try(lm, task)
        process_results = inspect.unwrap(type(task).process_results)  # lmms-eval tries five times, 2 s apart
        _check_scores(task, process_results(task, task.eval_docs[0], replies))
        return True
    return False


def _first(task: Task) -> list[Instance]:
    """What lmms-eval asks about the first question."""
    split = task.config.test_split if task.has_test_docs() else task.config.validation_split
    about = {"task": task.config.task, "doc_id": 0, "repeats": 1, "split": split}
    text = task.doc_to_text(task.eval_docs[0]) if task.OUTPUT_TYPE == "multiple_choice" else ""
    found = task.construct_requests(doc_id=0, ctx=text, metadata=about)
    return found if isinstance(found, list) else [found]


def _try(lm: Vtc, task: Task) -> list[Any]:
    """The replies to the first question, one token long."""
    lm.task_dict[task.config.task] = task.dataset
    return lm.try_out(_first(task))


def plan(lm: Vtc, settings: Settings, tasks: dict[str, Task]) -> list[Arm]:
    """All arms, the full and the blind model first, each tried on the first question of each task.

    Where all images have one size, a budget out of reach shows itself here and becomes the method's floor; else each
    image is decided by itself.
    """
    arms = [Arm("full", 1.0, 1.0), Arm("blind", 0, 0)]
    for name, method in settings.named.items():
        found, _ = with_budget(method)
        budgets = run.budgets_of(method, settings.budgets)
        arms += [_reachable(lm, Arm(name, budget, budget, found=found)) for budget in budgets]
    for arm in arms:
        _use(lm, arm)
        for task in tasks.values():
            with suppress(vtc.BudgetError):
                _try(lm, task)
    return arms


def _reachable(lm: Vtc, arm: Arm) -> Arm:
    try:
        _use(lm, arm)
    except vtc.BudgetError as error:
        return replace(arm, spend=error.floor, reachable=False)
    return arm


def _use(lm: Vtc, arm: Arm) -> None:
    from vtc.eval.suite_model import FULL

    if arm.method == "full":
        lm.use(*FULL)
    else:
        lm.use(run.BLIND if arm.method == "blind" else arm.found or arm.method, arm.spend)


def _replies(out: Path, process: int) -> Store[Reply]:
    """This process's store, with what any process of an earlier run was answered. No process writes meanwhile."""
    out.mkdir(parents=True, exist_ok=True)  # the folder of another machine need not be the first one's
    store: Store[Reply] = Store(out / REPLIES.format(process))
    for path in sorted(set(out.glob(REPLIES.format("*"))) - {store.path}):
        store.lines = Store(path).lines | store.lines
    return store


def _simple_evaluate(lm: Vtc, settings: Settings, task: Task, out: Path) -> dict[str, Any] | None:
    """What lmms-eval found in the first process, None in the others; `out` is where tasks put files for submission."""
    from lmms_eval import evaluator

    lm.is_simple = not hasattr(task, "doc_to_messages")
    return evaluator.simple_evaluate(
        model=lm,
        tasks=[task],
        batch_size=settings.batch_size,
        limit=settings.limit,
        bootstrap_iters=0,
        task_manager=_manager(settings.include_path),
        cli_args=Namespace(output_path=str(out), process_with_media=False),
    )


def _write(
    settings: Settings, where: Path, task: Task, arms: list[Arm], found: list[Any], unread: set[int]
) -> list[Row]:
    """results.jsonl, summary.json and curve.png of one task; gives the summary rows.

    Questions in `unread` could not be asked, in some arm, and count in none.
    """
    name = task.config.task
    samples = [_samples(results["samples"][name], unread) for results in found]
    groups: list[Group] = [
        (arm.method, arm.budget, not any(line["at_floor"] for line in lines), lines)
        for arm, lines in _lines(task, arms, samples)
    ]
    own = measure.own_metric(task, samples, settings.seed)
    rows = report.summarise(groups, settings.seed, own)
    memory.mark(rows, {arm.method: arm.found for arm in arms if arm.found})
    for row, results, asked in zip(rows, found, samples, strict=True):
        row["metrics"] = measure.metrics(task, asked) if unread else _metrics(results["results"][name])
    where.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for *_, lines in groups for line in lines)
    (where / "results.jsonl").write_text(text, encoding="utf-8")
    write_json(where / "summary.json", rows)
    if rows[0]["accuracy"] is not None:
        write_json(where / "needs-image.json", mis.needing(groups, settings.seed))
    title = f"{settings.model}: {name}, {rows[0]['n']} questions"
    points = published.points(name, settings.model, percent=own.percent)
    report.picture(rows, where / "curve.png", title, points)
    return rows


def _samples(found: list[dict[str, Any]], unread: set[int]) -> list[dict[str, Any]]:
    """One for each question that was asked, in their order."""
    first: dict[int, dict[str, Any]] = {}
    for sample in found:
        first.setdefault(sample["doc_id"], sample)  # there is one for each filter: the first filter's counts
    return [first[number] for number in sorted(first) if number not in unread]


def _lines(task: Task, arms: list[Arm], samples: list[list[dict[str, Any]]]) -> Iterator[tuple[Arm, list[Line]]]:
    """Each arm with a line for each question, in the order of the questions."""
    name, full = task.config.task, [_prediction(sample) for sample in samples[0]]
    for arm, asked in zip(arms, samples, strict=True):
        yield (
            arm,
            [
                {
                    "question_id": f"{name}-{sample['doc_id']:05d}",
                    "task": name,
                    "method": arm.method,
                    "budget": arm.budget,
                    "tokens": sample["token_counts"][0]["visual_tokens"],
                    "at_floor": not arm.reachable or sample["token_counts"][0]["at_floor"],
                    "prediction": _prediction(sample),
                    "answer": str(sample["target"]),
                    "correct": _score(task, sample),
                    "agrees": marking.is_correct(_prediction(sample), by_full),
                }
                for sample, by_full in zip(asked, full, strict=True)
            ],
        )


def _prediction(sample: dict[str, Any]) -> str:
    """The reply; of several rounds all of them; of choices rated by likelihood the number of the best."""
    replies = [reply[0] for reply in sample["resps"]]
    if isinstance(replies[0], tuple | list) and isinstance(replies[0][0], float):
        return str(min(range(len(replies)), key=lambda choice: replies[choice][0]))
    return replies[0] if isinstance(replies[0], str) else "\n".join(replies[0])


def _score(task: Task, sample: dict[str, Any]) -> float | None:
    """What the first metric of the task that knows single questions gave this one, 0 to 1; None where none does.

    Metrics of which less is better, such as error rates, are passed over.
    """
    for metric in (name for name, better in task.higher_is_better().items() if better):
        value = sample.get(metric)
        value = value.get("score") if isinstance(value, dict) else value
        if isinstance(value, Real):
            return float(value)
    return None


def _check_scores(task: Task, given: dict[str, Any]) -> None:
    if _score(task, given) is None:
        try:
            measure.own_metric(task, [[given]], seed=0)
        except Exception as error:
            raise ValueError(
                f"it gives no score to a single question, and its aggregation none to several ({error}), so that there "
                "is no curve to draw: run it with `python -m lmms_eval --model vtc`"
            ) from error


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
def _manager(include_path: str | None = None) -> Any:
    """lmms-eval's index of tasks, with vtc's own and those of a folder."""
    from lmms_eval.tasks import TaskManager

    from vtc.eval import tasks

    folders = [str(tasks.PATH), *([include_path] if include_path else [])]
    with _yaml_in_c():
        return TaskManager("WARNING", include_path=folders, model_name="vtc")


@contextmanager
def _yaml_in_c() -> Iterator[None]:
    """Let `yaml.full_load` parse in C where PyYAML can: lmms-eval reads thousands of files, for seconds otherwise."""
    import yaml

    if not yaml.__with_libyaml__:
        yield
        return

    class Loader(yaml.cyaml.CParser, yaml.FullLoader):  # with the constructors that lmms-eval gives to FullLoader
        def __init__(self, stream: Any):
            yaml.cyaml.CParser.__init__(self, stream)
            yaml.constructor.FullConstructor.__init__(self)
            yaml.resolver.Resolver.__init__(self)

    slow, yaml.full_load = yaml.full_load, lambda stream: yaml.load(stream, Loader)
    try:
        yield
    finally:
        yaml.full_load = slow


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
