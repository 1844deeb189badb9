"""`vtc compare`: the difference of two methods over the same questions, and how sure it is."""

import json
from fractions import Fraction
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
    assert rows[1]["p"] == 0.5  # two questions differ, both for a: two coins fall alike half of the time
    cumulated, draws = 0.0, [comb(6, k) * (2 / 6) ** k * (4 / 6) ** (6 - k) for k in range(7)]
    ends = []
    for k, share in enumerate(draws):
        ends += [k / 6 for end in (0.025, 0.975) if cumulated <= end < cumulated + share]
        cumulated += share
    assert [rows[1]["difference_low"], rows[1]["difference_high"]] == pytest.approx(ends)


@pytest.mark.parametrize(("more", "less"), [(3, 0), (0, 5), (4, 4), (7, 2), (1500, 1400)])
def test_p_of_right_and_wrong_is_the_sign_test(tmp_path, more, less):
    marks = {("full", 1.0): [0] * more + [1] * less + [1, 0], ("a", 0.5): [1] * more + [0] * less + [1, 0]}
    (row,) = paired.compare(written(tmp_path, marks), "a")
    n = more + less
    exact = Fraction(2 * sum(comb(n, k) for k in range(min(more, less) + 1)), 2**n)
    assert row["p"] == pytest.approx(min(1.0, float(exact)), rel=1e-12)


def test_p_of_shares_of_a_point_is_of_resampled_questions(tmp_path):
    """Two questions of six differ: none of them is drawn (4 / 6) ** 6 of the time."""
    folder = written(tmp_path, {("full", 1.0): [0] * 6, ("a", 0.5): [0] * 6})
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for line in lines:
        line["correct"] = 0.5 * (line["method"] == "a" and line["question_id"] in "01")
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (row,) = paired.compare(folder, "a")
    assert row["p"] == pytest.approx(2 * (4 / 6) ** 6, abs=0.02)


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
