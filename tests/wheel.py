"""The wheel in clean environments, by hand: `python tests/wheel.py [EXTRA ...]`. Some minutes, no network.

Builds the wheel from the tracked files and installs it, with none and with each of the extras, into a virtual
environment that holds exactly what its metadata asks for: links to the packages of the environment that runs this,
which has to have them all. Every command then has to work, or to name the line to type. Prints what loading costs as
ratios to `import torch`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
NAME = "visual-token-compression"
EXTRAS = ("", "eval", "tune", "demo", "serve", "lmms-eval-lean")
COMMANDS = {
    "--version": set(),
    "--help": set(),
    "methods": set(),
    "env": set(),
    "tasks": set(),
    "ask photo.png what": set(),
    "bench --model REFERENCE --rounds 1 --new-tokens 1": set(),
    "selection --model REFERENCE --methods vtc-cls --rounds 1": set(),
    "peers --model REFERENCE --budgets 0.5 --rounds 1": set(),
    "throughput --model REFERENCE --count 2 --rounds 1 --new-tokens 1": set(),
    "scene --out scene.png": {"eval"},
    "ask scene 'what word is it?'": {"eval"},
    "eval --limit 2 --methods random --budgets 0.5 --out out/eval": {"eval"},
    "faithfulness --limit 2 --methods random --out out/faithful": {"eval"},
    "train atp --steps 1 --batch-size 2 --out out/atp": {"eval"},
    "train tokenbutler --steps 1 --batch-size 2 --out out/tokenbutler": {"eval"},
    "tune --samples 2 --trials 2 --out out/tuned.json": {"eval", "tune"},
    "demo --port 7999": {"demo"},
    "serve --port 7998": {"serve"},
    "eval --tasks vtc_scenes --limit 1 --out out/suites": {"eval", "lmms-eval"},
}
"""What each command needs."""


def build(folder: Path) -> Path:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name, follow_symlinks=False)
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source")
    (wheel,) = folder.glob("*.whl")
    return wheel


def pip(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "pip", *map(str, arguments)], check=True)


def needed(requirements: list[str], extra: str) -> dict[str, set[str]]:
    """What a list of requirements pulls in: the extras that are asked of each distribution, by its name."""
    found: dict[str, set[str]] = {}
    todo = [(text, extra) for text in requirements]
    while todo:
        text, active = todo.pop()
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": active}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in {"", *requirement.extras} - found.get(name, set()):
            found.setdefault(name, set()).add(wanted)
            below = requirements if name == NAME else distribution(name).requires or []
            todo += [(line, wanted) for line in below]
    return found


def environment(folder: Path, wheel: Path, extra: str) -> Path:
    """The interpreter of a new environment with the wheel and what it needs."""
    home = folder / (extra or "bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / "bin" / "python"
    pip("--python", python, "install", "-q", "--no-deps", wheel)
    (site,) = home.glob("lib/python*/site-packages")
    (metadata,) = site.glob("*.dist-info/METADATA")
    requirements = re.findall(r"^Requires-Dist: (.*)$", metadata.read_text(), re.MULTILINE)
    for name in needed(requirements, extra):
        if name == NAME:
            continue
        try:
            files = distribution(name).files
        except PackageNotFoundError:
            sys.exit(f"{name} is not installed here, and {NAME}[{extra}] needs it")
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution(name).locate_file(top))
    if extra:
        pip("--python", python, "install", "-q", "--no-index", f"{NAME}[{extra}]")  # what the hints say to type
    return python


def run(python: Path, command: str, folder: Path) -> tuple[bool, str]:
    """Whether it worked, and the last line of what it said."""
    reference = next(python.parents[1].glob("lib/python*/site-packages/vtc/eval/reference/weights"))
    process = subprocess.Popen(
        ["bash", "-c", f"exec {python.parent}/vtc {command.replace('REFERENCE', str(reference))}"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    said = []
    for line in process.stdout:
        said.append(line.strip())
        if address := re.search(r"vtc inspector: (http\S+)|(http\S+)/v1 serves", line):  # until it is stopped
            answers = answered(address[1] or f"{address[2]}/health")
            process.terminate()
            process.wait()
            return answers, line.strip()
    assert not any("Traceback" in line for line in said), "\n".join(said)
    return process.wait() == 0, (said or [""])[-1]


def answered(url: str) -> bool:
    """Whether a server that has just said its address answers there within a minute."""
    for _ in range(120):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return True
        except OSError:
            time.sleep(0.5)
    return False


def seconds(python: Path, *arguments: str) -> float:
    """The shortest of five."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([python, *arguments], check=True, capture_output=True, cwd="/")
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder)
        print(wheel.name)
        for extra in sys.argv[1:] or EXTRAS:
            python = environment(folder, wheel, extra)
            work = python.parents[1] / "work"
            work.mkdir()
            shutil.copy(ROOT / "demo/screenshot.png", work / "photo.png")
            has = {extra, "eval"} if extra == "demo" else {extra}
            print(f"\n{NAME}{f'[{extra}]' * bool(extra)}")
            for command, needs in COMMANDS.items():
                if extra and not needs:
                    continue
                worked, last = run(python, command, work)
                named = re.search(rf"pip install '{NAME}\[([\w-]+)\]'", last)
                right = worked if needs <= has else bool(named) and named[1] in needs - has
                failed += not right
                print(f"  {'ok   ' if right else 'WRONG'} vtc {command}: {'works' if worked else last}", flush=True)
            if not extra:
                torch = seconds(python, "-c", "import torch")
                for what in (["-c", "import vtc"], ["-m", "vtc", "--help"], ["-m", "vtc", "methods"]):
                    print(f"  {' '.join(what)}: {seconds(python, *what) / torch:.2f} of `import torch`")
    sys.exit(failed)


if __name__ == "__main__":
    main()
