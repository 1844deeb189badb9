"""The benchmark of what a choice costs: which methods it takes, and that its figures are those of the traces."""

import io
import json

import pytest
import torch
from eval_fixtures import run_vtc, tiny  # noqa: F401
from models import FAMILIES, llava
from rich.console import Console
from typer.testing import CliRunner

import vtc
from vtc import cli
from vtc.eval import selection
from vtc.eval.bench import Case


def test_all_takes_what_the_model_takes_and_says_what_it_leaves_out():
    said, model = [], FAMILIES["gemma3"].model
    found = selection.arms(model, ["all", "uniform"], [0.02, 9], said.append)
    assert len(found) == len({*found})
    names = {name for name, _ in found}
    left_out = {line.split(" is left out")[0] for line in said if "is left out" in line}
    assert names | left_out == {*vtc.list_methods()}
    assert {"atp", "tokenbutler", "tally-adaptive", "tome", "random-kv"} <= left_out
    (floor,) = [budget for name, budget in found if name == "fastv" and budget not in (0.02, 9)]
    assert any(line.startswith(f"fastv runs at its floor, {floor:.3g} of the tokens, instead of 0.02") for line in said)
    assert "vtc" not in vars(model)
    with pytest.raises(ValueError, match="trained for one model"):
        selection.arms(model, ["atp"], [9], said.append)


def test_a_file_is_run_at_its_own_budget_unless_another_is_typed(tiny, tmp_path):  # noqa: F811
    vtc.Uniform().to_json(file := tmp_path / "choice.json", 0.5)
    for command in ("selection", "bench"):
        for more, budgets in (((), [0.5]), (("--budgets", "4,8"), [4, 8])):
            asked = ("--model", tiny, "--methods", file, "--batch", 1, "--rounds", 1, "--out", tmp_path)
            done = run_vtc(command, *asked, *more)
            assert done.returncode == 0, done.stderr
            rows = json.loads((tmp_path / f"{command}.json").read_text())["rows"]
            assert sorted(row["budget"] for row in rows) == budgets


def test_the_range_is_whole_at_80_columns():
    own = dict.fromkeys(("score", "select", "compact"), 0.1)
    row = {"method": "a-method-of-a-long-name", "tokens": 64.0, "own": own, "prefill": 1.0, "share": 1.2345}
    rows = [{**row, "range": (1.1111, 1.2222)}]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(selection.table(rows, "t"))
    assert "123.45% (111.11%–122.22%)" in console.export_text()


def test_shares_are_of_the_unpruned_prefill():
    model = llava()
    rows = selection.measure(model, [("vtc-cls", 9), ("fastv", 0.5)], Case(batch=2, prompt_tokens=12, rounds=2))
    assert {row["method"]: row["tokens"] for row in rows} == {"vtc-cls": 9, "fastv": pytest.approx(18, abs=0.5)}
    assert [row["share"] for row in rows] == sorted((row["share"] for row in rows), reverse=True)
    for row in rows:
        low, high = row["range"]
        assert 0 < low <= row["share"] <= high
        assert all(seconds > 0 for seconds in row["own"].values())
        assert row["prefill"] > 0
    assert "vtc" not in vars(model)
    assert not torch.is_inference_mode_enabled()


def test_the_command_writes_a_table_and_a_picture(tiny, tmp_path):  # noqa: F811
    done = CliRunner().invoke(
        cli.app,
        ["selection", "--model", str(tiny), "--batch", "2", "--budgets", "4", "--rounds", "1", "--out", str(tmp_path)],
        env={"COLUMNS": "200", "TERM": "dumb"},
    )
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "selection.json").read_text())
    left_out = {"atp", "tokenbutler", "msdg", "tally-adaptive"}
    assert {row["method"] for row in found["rows"]} == {*vtc.list_methods()} - left_out
    assert all(row["method"] in done.output for row in found["rows"])
    assert "note: atp is left out" in done.output
    assert "note: msdg is left out" in done.output  # it compares two blocks of a tower that has two
    assert (tmp_path / "selection.png").stat().st_size > 10_000
