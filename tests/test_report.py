"""Marks, intervals and summaries of a run, by hand."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from vtc.eval import marking, report, run


@pytest.mark.parametrize(
    ("prediction", "answer", "correct"),
    [
        (" Red. ", "red", True),
        ("red .", "Red", True),
        ("red", "reddish", False),
        ("3.5", "35", False),
        ("", "no", False),
        ("yes..", "yes", False),
    ],
)
def test_exact_match(prediction, answer, correct):
    assert marking.is_correct(prediction, answer) is correct


def test_interval_is_the_known_one_of_a_proportion():
    values = np.array([[0.0], [1.0]] * 200)
    low, high = report.interval(report.bootstrap(values, seed=0)[:, 0])
    known = 1.96 * np.sqrt(0.25 / 400)
    assert low == pytest.approx(0.5 - known, abs=0.006)
    assert high == pytest.approx(0.5 + known, abs=0.006)


def test_bootstrap_is_paired_and_seeded():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2, 300).astype(float)
    draws = report.bootstrap(np.stack([first, first, 1 - first], 1), seed=3)
    assert np.array_equal(draws[:, 0], draws[:, 1])
    assert np.allclose(draws[:, 0] + draws[:, 2], 1)
    assert np.array_equal(draws, report.bootstrap(np.stack([first, first, 1 - first], 1), seed=3))
    assert not np.array_equal(draws, report.bootstrap(np.stack([first, first, 1 - first], 1), seed=4))


def group(method, budget, correct, agrees=None, tokens=4.0, reachable=True):
    marks = zip(correct, agrees or correct, strict=True)
    lines = [
        {"correct": bool(c), "agrees": bool(a), "tokens": tokens, "task": "ab"[i % 2]} for i, (c, a) in enumerate(marks)
    ]
    return method, budget, reachable, lines


def test_summary_by_hand():
    rows = report.summarise(
        [
            group("full", 1.0, [1, 1, 1, 0], tokens=16.0),
            group("blind", 0, [0, 0, 0, 1], tokens=0.0),
            group("fastv", 0.5, [1, 1, 0, 0], agrees=[1, 1, 1, 0]),
            group("fastv", 1, [1, 1, 0, 0], reachable=False),
            group("random", 0.5, [1, 0, 0, 0]),
            group("random", 1, [1, 0, 0, 0]),
            group("random", 1.0, [1, 1, 1, 0]),
        ],
        seed=0,
    )
    full, blind, fastv, floored, random, one, all_tokens = rows
    assert (full["accuracy"], blind["accuracy"], fastv["accuracy"]) == (0.75, 0.25, 0.5)
    assert (fastv["agreement"], fastv["tokens"], fastv["n"]) == (0.75, 4.0, 4)
    assert fastv["by_task"] == {"a": 0.5, "b": 0.5}
    assert fastv["versus_random"] == 0.25
    assert (
        fastv["versus_random_low"] == 0.0
    )  # the one question that differs may be drawn never, and never against fastv
    assert fastv["versus_random_high"] > 0.25
    assert floored["reachable"] is False
    for row in (full, blind, floored, random, one, all_tokens):
        assert row["versus_random"] is None
        assert row["versus_random_low"] is None
    json.dumps(rows, allow_nan=False)


def test_files_of_one_name_are_told_apart_by_their_folders():
    methods = ("out/p1/choice.json", "out/p2/choice.json", "tuned.json", "uniform", "uniform.json")
    rows = [{"method": method} for method in methods]
    assert [report.named(row, rows) for row in rows] == ["p1/choice", "p2/choice", "tuned", "uniform", "uniform.json"]
    assert report.named({"method": "a/x/b.json"}, [{"method": "c/x/b.json"}, *rows]) == "a/x/b"
    summary = report.summarise([group(method, 0.5, [1, 0], tokens=9.0) for method in methods[:2]], seed=0)
    shown = [str(cell) for cell in report.table(summary).columns[0].cells]
    assert shown == ["p1/choice", "p2/choice"]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_every_number_by_task_is_whole(width):
    names = ("full", "blind", "tally-adaptive", "a" * 40, *(f"method-{n}" for n in range(9)))
    marks = {f"a task of name {n}": (n + 1) / 9 for n in range(9)}
    rows = [
        {"method": name, "budget": 0.25, "reachable": True, "by_task": {task: x for task, x in marks.items()}}
        for name in names
    ]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(*report.task_tables(rows, width))
    text = console.export_text()
    for share in marks.values():
        assert text.count(f" {100 * share:.1f} ") == len(names)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_one_token_is_not_all_tokens():
    keys = {run.Arm("random", budget, budget).key("q") for budget in (1, 1.0)}
    assert len(keys) == 2
