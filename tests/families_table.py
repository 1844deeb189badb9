"""The table of docs/families.md, from the tests' results: `python tests/families_table.py`.

Runs the behaviour table and prints Markdown. A cell is "yes" where all of its tests pass, "no" where one fails, and "-"
where the family has no such thing or transformers itself cannot do it (the tests say why they skip).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

COLUMNS = {  # what is claimed: the tests that show it, and the methods that they are run with
    "before the decoder": ("test_dropping_is_masking", "uniform|vtc-cls"),
    "within it": ("test_dropping_is_masking", "fastv|atp|transprune"),
    "recycling": ("test_padded_batch_equals_single_runs|test_unwrapped", "vflowopt"),
    "tower scores": ("test_the_scores_of_the_tower_reach_their_tokens", ""),
    "video": ("test_dropping_is_masking|test_the_trace_is_true", "video"),
    "full budget, unwrap": ("test_full_budget|test_unwrapped", ""),
    "padded batches": ("test_padded_batch|test_dropping_is_masking", "mixed|fastv|vtc-cls"),
    "beams, samples": ("test_beams_and_samples", ""),
    "next turn": ("test_second_turn_continues", ""),
    "assisted": ("test_guesses_from_the_prompt", ""),
    "static cache": ("test_a_static_cache", ""),
    "quantised cache": ("test_a_quantised_cache", ""),
    "sliding windows": ("test_dropping_is_masking", ""),
    "half precision": ("test_half_precision", ""),
    "int8 weights": ("test_int8_weights", ""),
    "on disk": ("test_layers_on_disk", ""),
}
FILES = ("test_promises.py", "test_families.py", "test_generation.py")


class Results:
    """A pytest plugin: the outcomes of each test by its name and parameters."""

    def __init__(self):
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report) -> None:
        name = report.nodeid.split("::")[-1]
        if report.failed or report.skipped or report.when == "call":
            self.outcomes[name] = "failed" if "failed" in (report.outcome, self.outcomes.get(name)) else report.outcome


def cell(outcomes: dict[str, str], family: str, tests: str, methods: str) -> str:
    """What the results say about one family and one claim."""
    pattern = re.compile(rf"({tests}).*\[(.*-)?{family}(-.*)?\]")
    found = {
        outcome
        for name, outcome in outcomes.items()
        if pattern.search(name) and re.search(methods, name.split("[")[-1])
    }
    if "failed" in found:
        return "no"
    return "yes" if "passed" in found else "-"


def table(outcomes: dict[str, str], families: dict[str, bool]) -> str:
    """Markdown; `families` tells which have sliding windows."""
    rows = [["family", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    for family, slides in families.items():
        cells = {title: cell(outcomes, family, *shown) for title, shown in COLUMNS.items()}
        if not slides:
            cells["sliding windows"] = "-"
        rows.append([f"`{family}`", *cells.values()])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    here = Path(__file__).parent
    sys.path.insert(0, str(here))
    from models import FAMILIES
    from oracle import windows

    results = Results()
    code = pytest.main(["-q", "-n", "2", "--no-header", *(str(here / name) for name in FILES)], plugins=[results])
    slides = {name: any(window is not None for window in windows(family.model)) for name, family in FAMILIES.items()}
    print(table(results.outcomes, slides))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
