"""The folder of a run: what it was answered, what that depended on, and whether a later run is the same one."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

import vtc
from vtc.adapter import find
from vtc.eval.store import START_OVER, DamagedError
from vtc.methods.compose import with_budget
from vtc.stage import write_json

FINDINGS = (
    *(f"{name}.json" for name in ("summary", "needs-image", "bytes", "compare", "choice")),
    *(f"{name}.png" for name in ("curve", "needs-image", "bytes", "pareto")),
)
"""What is made of a run's results: a new run in the folder begins without."""


NESTED = ("settings", "digests", "versions")
"""The parts of a configuration that have parts themselves."""
LOCK = ".lock"
"""The file by which a process keeps others out of a folder; it stays there."""


class BusyError(ValueError):
    """A folder that another process is at work in."""


class OtherRunError(ValueError):
    """A folder that holds the results of another run."""


def configuration(settings: Any, path: str, device: str, digests: Mapping[str, str]) -> dict[str, Any]:
    """All that a run's answers depend on, as it is written to config.json.

    `settings` is a dataclass; `digests` tells two states apart of what only has a name there: methods, data.
    """
    packages = ("torch", "transformers", "pillow", "numpy")
    return {
        "settings": json.loads(json.dumps(vars(settings), default=str)),
        "model_path": path,
        "model_digest": _model_digest(path),
        "source_digest": _source_digest(),
        "device": device,
        "digests": dict(digests),
        "versions": {
            "python": platform.python_version(),
            "vtc": vtc.__version__,
            **{name: version(name) for name in packages},
        },
        "git_commit": git_commit(),
    }


def method_digests(
    model: nn.Module, methods: Mapping[str, str | vtc.Method], budgets: Sequence[vtc.Budget]
) -> dict[str, str]:
    """For a run's configuration: a name stays the same when its JSON file is written anew, or its modules trained."""
    found = {name: with_budget(method) for name, method in methods.items()}
    return {
        f"method {name}": _method_digest(model, method, budgets if own is None else (own,))
        for name, (method, own) in found.items()
    }


def _method_digest(model: nn.Module, method: vtc.Method, budgets: Sequence[vtc.Budget]) -> str:
    """Tells two states of a method apart: its hyper-parameters, and the trained parts that it finds for this model.

    A budget below what was trained for is bound at the floor, as it will be run.
    """
    adapter = find(model)
    digest, tokens = hashlib.sha256(), adapter.tokens_per_image()
    for kind in (*map(type, _with_parts(method)), type(adapter)):  # they may live in other packages
        if file := getattr(sys.modules[kind.__module__], "__file__", None):
            digest.update(Path(file).read_bytes())
    for budget in budgets:
        try:
            bound = method.bind(model, budget, tokens)
        except vtc.BudgetError as error:
            bound = method.bind(model, error.floor, tokens)
        digest.update(repr(bound).encode())  # without the modules
        for part in _with_parts(bound):
            for field in fields(part):
                if isinstance(trained := getattr(part, field.name), nn.Module):
                    for name, weight in trained.state_dict().items():
                        digest.update(name.encode() + weight.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _with_parts(method: vtc.Method) -> Iterator[vtc.Method]:
    """A method, and those that it is made of: of a chain, under a modifier."""
    yield method
    for field in fields(method):
        value = getattr(method, field.name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, vtc.Method):
                yield from _with_parts(part)


def _model_digest(path: str) -> str | None:
    """Tells two states of one model apart: sizes and times of a folder's files, or the hub's commit."""
    if not Path(path).is_dir():
        from transformers import AutoConfig

        return getattr(AutoConfig.from_pretrained(path), "_commit_hash", None)
    files = sorted(file for file in Path(path).iterdir() if file.is_file())
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]


def sources() -> set[Path]:
    """The code that answers depend on: the library, the adapters, this harness."""
    from vtc import integrations

    library, here = Path(vtc.__file__).parent, Path(__file__).parent
    folders = [*(library / room for room in (".", "core", "cache", "methods")), *map(Path, integrations.__path__)]
    harness = ("run", "folder", "reader", "benchmarks", "material", "scenes", "captions", "marking", "memory", "mis")
    harness = (*harness, "store", "album", "images", "suites", "suite_model", "arguments", "video")
    files = {file for folder in (*folders, here / "pages") for file in folder.glob("*.py")}
    return files | {here / f"{name}.py" for name in harness}


@cache
def _source_digest() -> str:
    """Tells two states of `sources` apart: as they were when this process first asked, near enough what it runs."""
    digest = hashlib.sha256()
    for file in sorted(sources()):
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


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Make `out`, and keep other processes out of it until the context ends, or this process does.

    Raises BusyError where another one is at work there.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(
            f"another process is at work in {out}: wait until it is done, or choose another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def open_folder(
    out: Path, config: dict[str, Any], restart: bool, results: str = "results.jsonl", parts: Sequence[Path] = ()
) -> None:
    """Make `out` the folder of the run `config`: new, the same run resumed, or with `restart` emptied of another.

    `parts` are folders in it that hold what was found in parts of the other run.
    """
    if check(out, config, restart, results):
        return
    stale = [*out.glob(results), *(part / "results.jsonl" for part in parts)]
    for file in [*stale, *(where / name for where in (out, *parts) for name in FINDINGS)]:
        file.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", config)


def check(out: Path, config: dict[str, Any], restart: bool, results: str = "results.jsonl") -> bool:
    """Whether the run `config` goes on in `out`; nothing is written. Raises OtherRunError where `out` holds another.

    `results` is the name, or the pattern of the names, of the files that tell that something was run there.
    """
    if restart or not any(out.glob(results)):
        return False
    if differing := differences(read_config(out), config):
        raise OtherRunError(
            f"{out} holds another run ({'; '.join(differing)}): choose another --out to keep it, or {START_OVER}"
        )
    return True


def read_config(out: Path) -> dict[str, Any]:
    """What config.json in `out` says of its run; nothing where there is none. Raises DamagedError with the file."""
    file = out / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        whole = all(isinstance(part, dict) for part in (config, *(config.get(name, {}) for name in NESTED)))
    except (ValueError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise DamagedError(f"{file} is damaged, so that nobody knows whose {out} is: {START_OVER}")
    return config


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What two configurations do not have in common, in words; where a commit differs the sources need not."""

    def flat(config: dict[str, Any]) -> dict[str, Any]:
        nested = {k: v for name in NESTED for k, v in config.get(name, {}).items()}
        return nested | {k: v for k, v in config.items() if k not in (*NESTED, "git_commit")}

    old, new = flat(old), flat(new)
    names = [name for name in {**new, **old} if json.dumps(old.get(name)) != json.dumps(new.get(name))]
    return [f"{name} {old.get(name, 'unknown')} there, {new.get(name, 'unknown')} here" for name in names]
