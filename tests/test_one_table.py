"""`vtc table`: pieces that processes share, figures by hand, ranks against loops, and what is written."""

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from subprocess import PIPE

import numpy as np
import pytest
from eval_fixtures import read_lines, run_vtc, tiny  # noqa: F401 (a fixture)
from PIL import Image

import vtc
from vtc.eval import density, run, standings, table
from vtc.eval.folder import DamagedError, OtherRunError
from vtc.eval.standings import ALL, Scores
from vtc.eval.table import BASE, LOCK

ASKED = ("--methods", "uniform,random,fastv,atp", "--budgets", "0.5,0.1", "--limit", 6, "--batch-size", 4)


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("table") / "out"
    ran = run_vtc("table", "--models", tiny, "--benchmarks", "scenes", *ASKED, "--device", "cpu", "--out", out)
    assert ran.returncode == 0, ran.stderr
    return out, ran


@pytest.fixture(scope="module")
def settings(tiny):  # noqa: F811
    methods = ("uniform", "random", "fastv", "atp")
    return table.Settings((str(tiny),), ("scenes",), methods, (0.5, 0.1), limit=6, batch_size=4, device="cpu")


def pieces(out):
    return {file.parent.name: file.parent for file in out.glob("*/*/*/results.jsonl")}


def test_a_piece_is_what_vtc_eval_writes(done, settings, tiny, tmp_path):  # noqa: F811
    out, _ = done
    found = pieces(out)
    assert set(found) == {BASE, "uniform", "random", "fastv"}
    alone = settings.piece(str(tiny), "scenes", "uniform")
    assert run.evaluate(alone, tmp_path / "alone") == json.loads((found["uniform"] / "summary.json").read_text())
    assert read_lines(found[BASE]) + read_lines(found["uniform"]) != []
    whole = {json.dumps(line) for line in read_lines(tmp_path / "alone")}
    assert {json.dumps(line) for line in read_lines(found[BASE]) + read_lines(found["uniform"])} == whole


def test_the_table_says_what_was_found(done):
    out, ran = done
    found = json.loads((out / "table.json").read_text())
    assert {(cell["method"], cell["budget"]) for cell in found["cells"]} == {
        ("full", 1.0), ("blind", 0), ("swapped", 1.0), *itertools.product(("uniform", "random", "fastv"), (0.5, 0.1)),
    }  # fmt: skip
    assert list(found["left_out"]) == ["atp"]
    assert "trained for one model" in found["left_out"]["atp"]
    text = (out / "table.md").read_text()
    assert text in ran.stdout
    assert text.count("\n| `") == 3
    assert "floor: " in next(line for line in text.splitlines() if line.startswith("| `fastv`"))
    assert "Left out: atp: " in text
    with Image.open(out / "density.png") as picture:
        assert picture.format == "PNG"


def test_the_curve_is_that_of_one_run_over_all_methods(done, settings, tmp_path):
    (summary,) = done[0].glob("*/scenes/summary.json")
    together = replace(settings.piece(settings.models[0], "scenes", None), methods=("uniform", "random", "fastv"))
    assert run.evaluate(together, tmp_path / "together") == json.loads(summary.read_text())
    assert (tmp_path / "together" / "curve.png").read_bytes() == (summary.parent / "curve.png").read_bytes()


def test_what_is_done_is_not_run_again(done, settings, monkeypatch):
    out, _ = done
    monkeypatch.setattr(run, "evaluate", lambda *_, **__: pytest.fail("run again"))
    found, elsewhere = table.evaluate(settings, out)
    assert (elsewhere, len(found)) == (0, 1)


def test_a_piece_of_another_process_is_left_to_it(settings, tmp_path):
    piece = tmp_path / table._named(settings.models[0]) / "scenes" / "uniform"
    piece.mkdir(parents=True)
    holds = f"from filelock import FileLock\nwith FileLock({str(piece / LOCK)!r}): print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", holds], stdin=PIPE, stdout=PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        found, elsewhere = table.evaluate(settings, tmp_path)
        other.communicate("\n")
    assert elsewhere == 1
    assert {method for method, _ in found[0].lines} == {"full", "blind", "swapped", "random", "fastv"}
    standing, _ = standings.stand(found, settings.methods, "random", 0, {})
    assert standing["left_out"]["uniform"] == "not done"
    assert set(standing["ranks"][ALL]["mean_rank"]) == {"random", "fastv"}


def test_a_damaged_piece_is_no_method_that_was_refused(settings, tmp_path):
    piece = tmp_path / table._named(settings.models[0]) / "scenes" / "uniform"
    table.evaluate(replace(settings, methods=("uniform",)), tmp_path)
    (piece / "summary.json").unlink()
    (piece / "results.jsonl").write_text("{broken\n")
    with pytest.raises(DamagedError, match=r"damaged at line 1: delete it .*\(--restart of `vtc eval`"):
        table.evaluate(settings, tmp_path)


def test_another_run_in_the_folder_is_refused(done, settings):
    with pytest.raises(OtherRunError, match="holds another run"):
        table.evaluate(table.Settings(**{**vars(settings), "limit": 7}), done[0])


def test_what_has_no_place_in_one_table_is_refused(settings, tmp_path):
    with pytest.raises(ValueError, match="all fractions or all numbers"):
        table.evaluate(table.Settings(budgets=(0.5, 64)), tmp_path)
    with pytest.raises(ValueError, match=r"captions are long, and not right or wrong: .*vtc eval --benchmark captions"):
        table.evaluate(table.Settings(benchmarks=("scenes", "captions")), tmp_path)
    vtc.Uniform().to_json(tmp_path / "choice.json", 0.5)
    with pytest.raises(ValueError, match=r"choice\.json names a budget"):
        table.evaluate(table.Settings(methods=(str(tmp_path / "choice.json"),)), tmp_path)


def test_what_leaves_after_prefill_is_not_compared():
    assert "random-kv" not in table.comparable()
    assert {"random", "tome", "fastv", "tally"} <= set(table.comparable())


# -- figures --------------------------------------------------------------------------------------------------------


def scores(correct, tasks, arms=None, floor=(), density=None, benchmark="scenes", model="m"):
    """`correct`: by (method, budget) a list of 0 and 1; the full model is always right and the blind one never."""
    count = len(tasks)
    columns = {("full", 1.0): [1] * count, ("blind", 0): [0] * count, **correct}
    values = np.array(list(columns.values()), float).T
    at_floor = np.array([[arm in floor for arm in columns]] * count, float)
    return Scores(
        model, benchmark, list(columns), np.array(tasks), np.array(density or [1.0] * count), np.ones(count, bool),
        values, values, values, at_floor,
    )  # fmt: skip


def test_cells_by_hand():
    one = scores({("a", 0.5): [1, 1, 0, 1], ("random", 0.5): [1, 0, 0, 1]}, [*"xxyy"])
    one.needs[:2] = False
    found = {cell["method"]: cell for cell in standings.cells(one, "random", seed=0)}
    assert (found["a"]["accuracy"], found["a"]["versus"], found["a"]["needing"]) == (0.75, 0.25, 0.5)
    assert found["a"]["versus_low"] == 0.0 < found["a"]["versus_high"]  # the one that differs may be drawn never
    assert found["a"]["accuracy_low"] < 0.75
    assert [found[name]["versus"] for name in ("full", "blind", "random")] == [None] * 3


def test_the_whole_model_is_compared_with_at_every_budget():
    one = scores(
        {("a", 0.5): [1, 1, 0, 1], ("a", 0.1): [0, 1, 0, 0], ("b", 0.1): [1] * 4}, [*"xxyy"], floor={("b", 0.1)}
    )
    found = standings.cells(one, "full", seed=0)
    assert [cell["versus"] for cell in found] == [None, None, -0.25, -0.75, None]
    assert found[2]["versus_low"] < -0.25 < found[2]["versus_high"] == 0.0


@pytest.mark.parametrize(
    ("budget", "tokens", "reached", "shown"),
    [
        (0.5, 70.0, True, "90.0 ± 2.0 (95)"),
        (0.5, 40.0, True, "90.0 ± 2.0 (95) at 28%"),
        (72, 70.0, True, "90.0 ± 2.0 (95)"),
        (72, 100.0, True, "90.0 ± 2.0 (95) at 69%"),
        (0.05, 23.0, False, "floor: 90.0 ± 2.0 (95) at 16%"),
    ],
)
def test_what_is_not_at_its_budget_says_so(budget, tokens, reached, shown):
    cell = {"budget": budget, "tokens": tokens, "reached": reached, "agreement": 0.95}
    cell |= {"accuracy": 0.9, "accuracy_low": 0.88, "accuracy_high": 0.92}
    assert standings._figure(cell, {"tokens": 144.0}) == shown


@pytest.mark.parametrize("floor", ["a", "random"])
def test_above_the_budget_nothing_is_compared(floor):
    marks = {("a", 0.5): [1, 1, 0, 1], ("random", 0.5): [1, 0, 0, 1]}
    found = standings.cells(scores(marks, [*"xxyy"], floor={(floor, 0.5)}), "random", seed=0)
    assert [cell["versus"] for cell in found] == [None] * 4


def test_the_mean_of_models_is_question_by_question():
    first, second = (scores({("a", 0.5): row}, [*"xy"], model=name) for name, row in (("m", [1, 0]), ("n", [1, 1])))
    both = standings.mean([first, second])
    assert both.model == "m, n"
    assert both.correct[:, both.column(("a", 0.5))].tolist() == [1.0, 0.5]


def test_equals_over_several_models_are_equal():
    """However the thirds are added up."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = {name: rng.permutation([1] * 20 + [0] * 19) for name in "ab"}
        models = [
            scores({(name, 0.5): row[i::3] for name, row in rows.items()}, ["x"] * 13, model=str(i)) for i in range(3)
        ]
        assert standings.ranks([standings.mean(models)], "ab", [0.5])["mean_rank"] == {"a": 1.5, "b": 1.5}


def slow_rank(row, i):
    """1 for the best; equals share the mean of their places."""
    better = sum(other > row[i] for other in row)
    return better + (1 + sum(other == row[i] for other in row)) / 2


def test_ranks_against_loops():
    rng = np.random.default_rng(0)
    names, tasks = "abcd", ["xyz"[i % 3] for i in range(60)]
    one = scores({(name, 0.5): rng.integers(0, 2, 60) for name in names}, tasks, floor={("d", 0.5)})
    found = standings.ranks([one], names, [0.5])
    expected = np.zeros(4)
    for task in "xyz":
        row = [np.mean([c for c, t in zip(one.correct[:, 2 + i], tasks, strict=True) if t == task]) for i in range(3)]
        row.append(-1)  # its budget is out of reach: last
        expected += [slow_rank(row, i) / 3 for i in range(4)]
    assert {name: pytest.approx(rank) for name, rank in zip(names, expected, strict=True)} == found["mean_rank"]
    assert list(found["mean_rank"])[-1] == "d"
    assert found["mean_rank"]["d"] == 4
    assert found["tasks"] == 3
    assert found["by_budget"] == {"50%": found["mean_rank"]}


@pytest.mark.parametrize(("count", "q"), [(2, 1.960), (5, 2.728), (10, 3.164)])
def test_the_critical_difference_is_that_of_the_tables(count, q):
    """q of Demsar, table 5 (a)."""
    names = [f"m{n}" for n in range(count)]
    rng = np.random.default_rng(0)
    one = scores({(name, 0.5): rng.integers(0, 2, 40) for name in names}, [str(i % 8) for i in range(40)])
    found = standings.ranks([one], names, [0.5])
    assert found["critical_difference"] == pytest.approx(q * math.sqrt(count * (count + 1) / (6 * 8)), rel=1e-3)
    assert (found["p"] is None) is (count < 3)


def test_over_budgets_a_task_has_one_vote():
    marks = {"a": ([1, 1], [0, 1]), "b": ([0, 0], [1, 0]), "c": ([0, 0], [0, 0])}
    one = scores(
        {(name, budget): row for name, rows in marks.items() for budget, row in zip((0.5, 0.1), rows, strict=True)},
        [*"xy"],
    )
    found = standings.ranks([one], "abc", [0.5, 0.1])
    assert found["tasks"] == 2
    assert list(found["mean_rank"]) == ["a", "b", "c"]


def test_shares_of_both_commands(tmp_path):
    bench = {"rows": [{"method": "a", "own": {"score": 1.0, "select": 2.0}, "full": {"prefill": 60.0}}]}
    selection = {"rows": [{"method": "a", "share": 0.01, "own": {}}, {"method": "b", "share": 0.02, "own": {}}]}
    for name, found in (("bench", bench), ("selection", selection), ("other", {"rows": [1]})):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    assert standings.shares([tmp_path / "bench.json", tmp_path / "selection.json"]) == {"a": 0.05, "b": 0.02}
    with pytest.raises(ValueError, match=r"other\.json is not what"):
        standings.shares([tmp_path / "other.json"])


# -- the picture ----------------------------------------------------------------------------------------------------


def test_those_that_win_most_bins_are_coloured():
    lost = {("a", 0.5): [0, -1, -5], ("b", 0.5): [-1, -2, -1], ("c", 0.5): [-3, -3, -3], ("a", 0.1): [-1, -1, -1]}
    assert density.winners(lost, "abc") == ["a", "b"]
    many = {(f"m{n}", 0.5): [0.0 if i == n else -1.0 for i in range(10)] for n in range(10)}
    assert len(density.winners(many, [name for name, _ in many])) == density.SHOWN


def test_bins_hold_what_was_lost_there():
    dense = list(range(1, 13))
    one = scores({("a", 0.5): [1] * 6 + [0] * 6}, ["x"] * 12, density=dense)
    bins = [np.array(dense) <= 6, np.array(dense) > 6]
    assert density._lost([one], ("a", 0.5), bins) == [0.0, -100.0]


@pytest.mark.parametrize("dense", [[1.0, 2.0], [1.0], [0.5, math.nan, 2.0, 2.0, 3.0, math.nan], [2.0] * 9])
def test_no_bin_is_empty_and_none_has_what_nobody_knows(dense):
    bins = density.binned(np.array(dense))
    assert 1 <= len(bins) <= density.BINS
    assert all(inside.any() for inside in bins)
    assert sum(bins).tolist() == [int(not math.isnan(value)) for value in dense]


def test_the_picture_hangs_on_the_figures(tmp_path):
    rng = np.random.default_rng(0)
    arms = {(name, budget): rng.integers(0, 2, 60) for name in ("a", "b", "random") for budget in (0.5, 0.1)}
    one = scores(arms, ["x"] * 60, density=list(rng.uniform(0.1, 3, 60)))
    density.picture([one], ["a", "b", "random"], "random", tmp_path / "one.png")
    one.correct[:, one.column(("a", 0.1))] = 1
    density.picture([one], ["a", "b", "random"], "random", tmp_path / "two.png")
    density.picture([one], ["a", "b", "random"], "full", tmp_path / "three.png")
    assert len({path.read_bytes() for path in tmp_path.glob("*.png")}) == 3
