"""`vtc eval --tasks`: a sweep, its files, resuming, what cannot be run, papers' figures beside."""

# ruff: noqa: F811 (fixtures are imported)

import functools
import json
import sys
from dataclasses import replace
from typing import get_type_hints

import pytest
from eval_fixtures import held, read_lines
from PIL import Image
from suite_fixtures import LIMIT, SETTINGS, TASKS, data, evaluated, model, start, swept, torchrun  # noqa: F401 (fixtures)

from vtc.eval import mis, published, report, run, suites, tasks
from vtc.eval import rows as rows_of

# -- vtc eval --tasks -----------------------------------------------------------------------------------------------


def test_scenes_through_lmms_eval_are_scenes(swept, tmp_path):
    """The same questions, replies, scores and measured tokens as `vtc eval` itself, to the last question."""
    out, rows = swept
    own = run.Settings("reference", SETTINGS.methods, SETTINGS.budgets, LIMIT, batch_size=4, device="cpu")
    expected = run.evaluate(own, tmp_path)
    kept = ("method", "budget", "tokens", "accuracy", "accuracy_low", "agreement", "n", "reachable")
    assert [[row[key] for key in kept] for row in rows["vtc_scenes"]] == [
        [row[key] for key in kept] for row in expected
    ]

    def lines(folder):
        keys = ("method", "budget", "tokens", "answer", "correct", "agrees")
        found = [(json.dumps([line[k] for k in keys]).replace(".0", ""), line["prediction"].strip()) for line in folder]
        return sorted(found)

    theirs = [{**line, "correct": bool(line["correct"])} for line in read_lines(out / "vtc_scenes")]
    ours = [line for line in read_lines(tmp_path) if line["method"] != mis.SWAPPED]  # a question that is ours alone
    assert lines(theirs) == lines(ours)


def test_files_of_a_sweep(swept):
    out, rows = swept
    assert list(rows) == list(SETTINGS.tasks)
    for task, found in rows.items():
        assert json.loads((out / task / "summary.json").read_text()) == found
        assert [(r["method"], r["budget"]) for r in found[:3]] == [("full", 1.0), ("blind", 0), ("vtc-cls", 0.25)]
        assert [r["tokens"] for r in found[:3]] == [144, 0, 36]
        ours = ("after_prefill", "holds_all", "held", "read", "peak")  # on benchmarks of vtc's own
        assert all(list(row) == [n for n in get_type_hints(rows_of.Row) if n not in ours] for row in found)
        assert len(read_lines(out / task)) == 6 * LIMIT
        with Image.open(out / task / "curve.png") as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 20
    below = [row for row in rows["pope"] if not row["reachable"]]
    assert [(row["method"], row["budget"]) for row in below] == [("fastv", 0.05)]
    assert below[0]["tokens"] > 0.1 * 144
    assert set(rows["pope"][0]["metrics"]) >= {"pope_accuracy,none", "pope_f1_score,none"}
    assert rows["vtc_scenes"][0]["metrics"]["accuracy,none"] == rows["vtc_scenes"][0]["accuracy"]
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["tasks"] == list(SETTINGS.tasks)
    assert config["versions"]["lmms-eval"] == "0.7.3"
    replies = map(json.loads, (out / "replies-0.jsonl").read_text().splitlines())
    assert all(set(reply) == set(get_type_hints(rows_of.Reply)) for reply in replies)


def test_two_processes_of_vtc_eval_answer_as_one(swept, tmp_path):
    done = torchrun(
        "vtc", "eval", "--tasks", TASKS, "--methods", "vtc-cls,fastv", "--budgets", "0.25,0.05", "--limit", LIMIT,
        "--batch-size", 4, "--device", "cpu", "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    shared = [len((tmp_path / "run" / f"replies-{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert shared == [6 * 3 * 4, 6 * 3 * 3]
    for task in SETTINGS.tasks:
        assert read_lines(tmp_path / "run" / task) == read_lines(swept[0] / task)
    assert done.stdout.count("as the benchmark counts") == 3  # one process speaks
    assert "arXiv 2412.05819" in done.stdout


def copy_of(swept, folder):
    out = folder / "run"
    out.mkdir()
    for name in ("config.json", "replies-0.jsonl"):
        (out / name).write_bytes((swept[0] / name).read_bytes())
    return out


def test_a_torn_run_goes_on(swept, tmp_path, monkeypatch):
    from vtc.eval.suite_model import Vtc

    out = copy_of(swept, tmp_path)
    whole = (out / "replies-0.jsonl").read_bytes()
    (out / "replies-0.jsonl").write_bytes(whole[: len(whole) * 2 // 3])
    asked, original = [], Vtc._answers

    @functools.wraps(original)
    def counting(self, requests):
        asked.extend(requests)
        return original(self, requests)

    monkeypatch.setattr(Vtc, "_answers", counting)
    rows = suites.evaluate(SETTINGS, out)
    lines = whole.count(b"\n")
    assert len(asked) == lines - whole[: len(whole) * 2 // 3].count(b"\n")
    assert rows == swept[1]
    for task in SETTINGS.tasks:
        assert read_lines(out / task) == read_lines(swept[0] / task)


def test_a_finished_run_asks_nothing_and_another_is_refused(swept, tmp_path, monkeypatch):
    from vtc.eval.suite_model import Vtc

    out = copy_of(swept, tmp_path)
    (out / "replies-0.jsonl").rename(out / "replies-5.jsonl")  # of a run with more processes
    monkeypatch.setattr(Vtc, "_answers", lambda self, requests: pytest.fail("asked again") if requests else [])
    assert suites.evaluate(SETTINGS, out) == swept[1]
    with pytest.raises(ValueError, match=r"another run \(limit 7 there, 6 here"):
        suites.evaluate(replace(SETTINGS, limit=6), out)
    with pytest.raises(ValueError, match=r"another run \(limit 7 there, 6 here"):
        suites.evaluate(replace(SETTINGS, limit=6), out, dry_run=True)
    before = (out / "config.json").read_bytes()
    assert suites.evaluate(replace(SETTINGS, limit=8), out, dry_run=True) == {}  # it would go on, and has not
    assert (out / "config.json").read_bytes() == before


def test_restart_throws_away_the_tasks_of_the_other_run(swept, tmp_path, monkeypatch):
    out = copy_of(swept, tmp_path)
    for name in ("pope", "own"):
        (out / name).mkdir()
        for file in ("results.jsonl", "summary.json", "curve.png", "mine.txt"):
            (out / name / file).write_text("{}\n")
    (out / "own" / "config.json").write_text("{}\n")  # another run, whose folder happens to lie here
    monkeypatch.setattr(suites, "_evaluate_tasks", lambda *_: {})
    suites.evaluate(replace(SETTINGS, tasks=("vtc_scenes",)), out, restart=True)
    assert [file.name for file in (out / "pope").iterdir()] == ["mine.txt"]
    assert len(list((out / "own").iterdir())) == 5
    (out / "config.json").write_text("")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        suites.evaluate(replace(SETTINGS, tasks=("vtc_scenes",)), out, dry_run=True)


def test_a_sweep_keeps_its_folder_to_itself(swept, tmp_path):
    out = copy_of(swept, tmp_path)
    with held(out), pytest.raises(ValueError, match="another process is at work in"):
        suites.evaluate(SETTINGS, out, restart=True)
    assert (out / "replies-0.jsonl").read_bytes() == (swept[0] / "replies-0.jsonl").read_bytes()


def test_a_dry_run_writes_nothing(tmp_path):
    assert suites.evaluate(SETTINGS, tmp_path / "run", dry_run=True) == {}
    assert run.evaluate(run.Settings(device="cpu"), tmp_path / "run", dry_run=True) == []
    assert not (tmp_path / "run").exists()


# -- what cannot be run ---------------------------------------------------------------------------------------------


def test_a_broken_evaluation_ends_with_its_true_error(tmp_path):
    done = start("vtc", "eval", "--tasks", "pope,mnist", "--dry-run", "--device", "cpu", "--out", tmp_path / "run")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: lmms-eval has no task 'mnist'; perhaps ")


def test_data_that_is_not_there(monkeypatch):
    from lmms_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask.download.retry, "sleep", lambda seconds: None)
    with pytest.raises(ValueError, match=r"task vizwiz_vqa_val: \w+Error: .*lmms-lab-encoder/VizWiz-VQA"):
        suites.load_tasks(("vizwiz_vqa_val",))


def test_a_task_that_cannot_score_says_so_before_the_work(tmp_path, monkeypatch):
    def broken(doc, answers):
        raise KeyError("no such column")

    monkeypatch.setattr(tasks, "score", broken)
    with pytest.raises(ValueError, match="task vtc_scenes: KeyError: 'no such column'"):
        suites.evaluate(replace(SETTINGS, tasks=("vtc_scenes",)), tmp_path / "run")
    monkeypatch.setattr(tasks, "score", lambda doc, answers: {"accuracy": {"prediction": answers[0]}})
    with pytest.raises(ValueError, match=r"task vtc_scenes: .*no score to a single question"):
        suites.evaluate(replace(SETTINGS, tasks=("vtc_scenes",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_errors_of_the_model_are_raised(model, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(model.reader), "generate", fails)
    loaded = suites.load_tasks(("vtc_scenes",))
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluated(model, loaded, limit=2)


def test_unknown_methods_name_the_known(tmp_path):
    for method in ("fast", "smaller-image"):
        with pytest.raises(ValueError, match=f"unknown method '{method}'.*vtc-cls"):
            suites.evaluate(replace(SETTINGS, methods=(method,)), tmp_path)


def test_without_lmms_eval_the_way_to_install_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", None)
    with pytest.raises(ImportError, match=r"visual-token-compression\[lmms-eval-lean\].*--no-deps lmms-eval==0\.7\.3"):
        suites.evaluate(SETTINGS, tmp_path)


# -- published figures ----------------------------------------------------------------------------------------------


def test_published_figures_are_those_of_the_papers():
    found = {(f.benchmark, f.model, f.method, f.tokens, f.unit): f for f in published.figures()}
    gqa = found["gqa", "llava-1.5-7b", "vtc-cls", 64, "percent"]
    assert (gqa.value, gqa.full) == (55.7, 62.0)
    assert gqa.source.startswith("arXiv 2412.05819")
    assert found["mme", "llava-1.5-7b", "transprune", 236, "points"].value == 1540
    assert found["mean of 7 (ATP-LLaVA's)", "llava-1.5-7b", "atp", 144, "percent of full"].value == 98.1
    assert all(f.source and f.unit and f.model for f in published.figures())


def test_published_points_lie_beside_the_same_model_only(swept, tmp_path):
    points = published.points("pope", "llava-hf/llava-1.5-7b-hf")
    assert [accuracy for *arm, accuracy in points if arm == ["vtc-cls", 64]] == [pytest.approx(0.788)]
    assert published.points("pope", "reference") == []
    rows = swept[1]["pope"]
    assert published.table("vtc_scenes", rows) is None
    beside = published.table("pope", rows)
    methods, models = (list(column.cells) for column in beside.columns[:2])
    lines = [models[row] for row, method in enumerate(methods) if method == "vtc-cls"]
    assert lines == ["this run", "this run"] + ["llava-1.5-7b"] * 3
    report.picture(rows, tmp_path / "beside.png", "t", points)
    report.picture(rows, tmp_path / "alone.png", "t")
    assert (tmp_path / "beside.png").read_bytes() != (tmp_path / "alone.png").read_bytes()
