"""`vtc compare`: the difference of two methods over the same questions, and how sure it is."""

import json
from itertools import product
from math import comb

import pytest
from eval_fixtures import run_vtc

from vtc.eval import paired


def written(folder, marks, floor=()):
    """A folder of results, from {(method, budget): which questions were right}."""
    lines = [
        {"question_id": str(i), "method": method, "budget": budget, "correct": bool(right), "at_floor": method in floor}
        for (method, budget), answers in marks.items()
        for i, right in enumerate(answers)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_differences_are_of_the_same_questions(tmp_path):
    """Against every resample of six questions, each counted as often as it is drawn."""
    mine, yours = [1, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 1]
    marks = {("full", 1.0): [1] * 6, ("a", 0.5): mine, ("b", 0.5): yours, ("a", 0.25): yours, ("b", 1): mine}
    rows = paired.compare(written(tmp_path, marks), "a")
    assert [(row["budget"], row["other"]) for row in rows] == [(0.5, "full"), (0.5, "b"), (0.25, "full")]
    assert [round(row["difference"], 9) for row in rows] == [round(x / 6, 9) for x in (-1, 2, -3)]
    # two questions of six differ, both for a: none of them is drawn (4 / 6) ** 6 of the time
    assert rows[1]["p"] == pytest.approx(2 * (4 / 6) ** 6, abs=0.02)
    cumulated, draws = 0.0, [comb(6, k) * (2 / 6) ** k * (4 / 6) ** (6 - k) for k in range(7)]
    ends = []
    for k, share in enumerate(draws):
        ends += [k / 6 for end in (0.025, 0.975) if cumulated <= end < cumulated + share]
        cumulated += share
    assert [rows[1]["difference_low"], rows[1]["difference_high"]] == pytest.approx(ends)


def test_questions_that_one_was_not_asked_do_not_count(tmp_path):
    marks = {("full", 1.0): [1, 1, 1], ("a", 0.5): [1, 1], ("b", 0.5): [1, 0, 0]}
    full, other = paired.compare(written(tmp_path, marks, floor=("b",)), "a")
    assert (full["n"], other["n"], other["difference"]) == (2, 2, 0.5)
    assert (full["other_at_floor"], other["other_at_floor"]) == (0, 2)
    full, other = paired.compare(written(tmp_path, marks, floor=("a",)), "a")
    assert [(row["at_floor"], row["other_at_floor"]) for row in (full, other)] == [(2, 0), (2, 0)]
    assert full["p"] == 1


def test_the_command(tmp_path):
    folder = written(tmp_path / "run", {key: [1, 0] * 9 for key in product(("full", "a"), (1.0, 0.25))}, floor=("a",))
    done = run_vtc("compare", folder, "a")
    assert done.returncode == 0, done.stderr
    assert "less another" in done.stdout
    assert "+0.0" in done.stdout
    assert [row["budget"] for row in json.loads((folder / "compare.json").read_text())] == [1.0, 0.25]
    missing = run_vtc("compare", folder, "c")
    assert missing.returncode == 1
    assert "holds answers of full, a: nothing to compare c with" in missing.stderr
    nobody = run_vtc("compare", written(tmp_path / "empty", {}), "a")
    assert nobody.returncode == 1
    assert "nobody" in nobody.stderr
