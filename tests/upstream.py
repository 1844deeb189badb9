"""transformers' own tests of each family, on bare models and on models wrapped at a full budget.

    python tests/upstream.py CHECKOUT [--families llava,gemma3] [--method vtc-cls]

CHECKOUT is a folder with transformers' `tests` and `src`. Its source distribution has of `tests` the top folder only:
take the others from the repository, of a version near the installed one. They need `parameterized`. Prints for each
family how many tests pass bare and wrapped, and the names of those that pass bare only. Not a part of the suite.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "gemma3", "paligemma", "internvl", "idefics3")


def pytest_configure(config) -> None:
    """As a plugin of the inner pytest: wrap every model that the tests build."""
    import transformers

    import vtc

    def wrapped(init):
        @functools.wraps(init)
        def build(self, *args, **kwargs):
            init(self, *args, **kwargs)
            vtc.wrap(self, os.environ["VTC_UPSTREAM_METHOD"], 1.0)

        return build

    for name in dir(transformers):
        if name.endswith("ForConditionalGeneration"):
            model_class = getattr(transformers, name)
            if getattr(model_class.config_class, "model_type", None) in FAMILIES:
                model_class.__init__ = wrapped(model_class.__init__)


def outcomes(checkout: Path, family: str, method: str | None) -> dict[str, str]:
    """ "passed", "failed" or "skipped" by name of the family's tests, wrapped with `method` or bare."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"tests/models/{family}/test_modeling_{family}.py", "-q"]
        command += ["-p", "no:cacheprovider", "--import-mode=importlib", f"--junitxml={report}", "--tb=short"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(checkout), folder])}
        if method is not None:
            command += ["-p", "upstream"]
            environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parent)
            environment["VTC_UPSTREAM_METHOD"] = method
        log = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if not report.exists():
            raise SystemExit(f"pytest made no report for {family}:\n{log.stdout[-4000:]}{log.stderr[-4000:]}")
        if method is not None and "VTC_UPSTREAM_LOGS" in os.environ:
            (Path(os.environ["VTC_UPSTREAM_LOGS"]) / f"{family}.log").write_text(log.stdout)
        cases = ElementTree.parse(report).iter("testcase")
        return {f"{case.get('classname').split('.')[-1]}.{case.get('name')}": _outcome(case) for case in cases}


def _outcome(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    return "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--method", default="vtc-cls")
    given, worse = parser.parse_args(), 0
    for family in given.families.split(","):
        bare, wrapped = (outcomes(given.checkout.resolve(), family, method) for method in (None, given.method))
        counts = [sum(outcome == "passed" for outcome in found.values()) for found in (bare, wrapped)]
        print(f"{family}: {counts[0]} pass bare, {counts[1]} wrapped, of {len(bare)}", flush=True)
        for name, outcome in bare.items():
            if outcome == "passed" and wrapped.get(name) != "passed":
                worse += 1
                print(f"  {wrapped.get(name, 'missing')} when wrapped: {name}", flush=True)
    sys.exit(bool(worse))


if __name__ == "__main__":
    main()
