"""The harness: what a run writes, and that one which is killed loses and doubles nothing."""

import json
import math
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from typing import NotRequired, get_origin, get_type_hints
from unittest.mock import Mock

import pytest
import torch
from eval_fixtures import command, held, read_lines, tiny  # noqa: F401 (a fixture)
from huggingface_hub.errors import RepositoryNotFoundError
from models import FAMILIES, batch, rows, visual
from PIL import Image
from rich.console import Console

import vtc
from vtc.eval import folder, marking, pages, progress, report, run, scenes
from vtc.eval.reader import Reader, load, model_path
from vtc.eval.rows import Line, Row
from vtc.eval.store import DamagedError, Store

METHODS = ("vtc-cls", "fastv", "random", "uniform", "smaller-image")
LINE = {"question_id", "task", "method", "budget", "tokens", "at_floor", "prediction", "answer", "correct", "agrees"}
LINE |= {"density", "held", "read", "peak"}


# -- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(tiny):  # noqa: F811
    return run.Settings(
        str(tiny), METHODS, (1.0, 0.5, 0.1, 4), limit=6, seed=1, batch_size=4, max_new_tokens=3, device="cpu"
    )


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval") / "run"
    return out, {(row["method"], json.dumps(row["budget"])): row for row in run.evaluate(settings, out)}


def test_every_question_once_in_every_arm(finished, settings):
    out, _ = finished
    lines = read_lines(out)
    assert all(set(line) == LINE for line in lines)
    keys = [(line["method"], json.dumps(line["budget"]), line["question_id"]) for line in lines]
    assert len(keys) == len(set(keys)) == 6 * (3 + len(METHODS) * len(settings.budgets))


def test_lines_and_rows_are_of_their_types(finished):
    out, rows = finished
    hints = get_type_hints(Row, include_extras=True)
    always = [name for name, kind in hints.items() if get_origin(kind) is not NotRequired]
    assert all(set(line) == set(get_type_hints(Line)) for line in read_lines(out))
    assert all(list(row) == always for row in rows.values())


def test_tokens_are_the_measured_ones(finished):
    _, rows = finished
    measured = {key: row["tokens"] for key, row in rows.items()}
    assert measured["full", "1.0"] == 16
    assert measured["blind", "0"] == 0
    for method in ("vtc-cls", "random", "uniform"):
        assert measured[method, "0.5"] == 8
        assert measured[method, "4"] == 4
    assert measured["fastv", "0.5"] == pytest.approx(8, abs=0.5)
    assert measured["smaller-image", "0.5"] == 9  # 3 x 3 is the nearest square to 8
    assert measured["smaller-image", "4"] == 4


def test_a_budget_below_the_floor_is_run_at_the_floor_and_says_so(finished, tiny):  # noqa: F811
    _, rows = finished
    with pytest.raises(vtc.BudgetError) as error:
        vtc.wrap(load(str(tiny), "cpu").model, "fastv", 0.1)
    row = rows["fastv", "0.1"]
    assert row["reachable"] is False
    assert row["budget"] == 0.1
    assert row["tokens"] == pytest.approx(16 * error.value.floor)
    assert [key for key, row in rows.items() if not row["reachable"]] == [("fastv", "0.1")]
    assert {key: row["at_floor"] for key, row in rows.items() if row["at_floor"]} == {("fastv", "0.1"): 6}


def test_the_questions_are_those_of_the_benchmark(settings, tmp_path):
    asked = replace(settings, benchmark="pages", methods=("uniform",), budgets=(0.5,), limit=12, seed=0)
    run.evaluate(asked, tmp_path / "pages")
    expected = {e.question_id: (e.task, e.answer, e.density) for e in pages.load("test", limit=12)}
    for line in read_lines(tmp_path / "pages"):
        assert (line["task"], line["answer"], line["density"]) == expected[line["question_id"]]
    with pytest.raises(ValueError, match="scenes, pages"):
        run.evaluate(replace(settings, benchmark="photographs"), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_each_image_is_at_its_own_floor(monkeypatch, tmp_path):
    """Images of three sizes and a budget that the smallest can be read with: the run goes on, and says how many not."""
    model = FAMILIES["llava_next"].model

    class Numbered(Reader):
        def inputs(self, images, questions):
            return batch(model, [row for image in images for row in rows(model, (1,), seed=image)])

        def visual_tokens(self, inputs):
            return visual(inputs["input_ids"]).sum(1)

        def answers(self, inputs, max_new_tokens=None):
            new = model.generate(**inputs, max_new_tokens=2, do_sample=False)[:, -2:]
            return [" ".join(map(str, row)) for row in new.tolist()]

    examples = [scenes.Example(str(image), "size", image, "what", "yes") for image in range(9)]
    monkeypatch.setattr(run, "load", lambda *_: Numbered(model, None))
    monkeypatch.setattr(scenes, "load", lambda **_: examples)
    settings = run.Settings(methods=("fastv", "uniform"), budgets=(16,), batch_size=4, device="cpu")
    summary = {row["method"]: row for row in run.evaluate(settings, tmp_path)}
    sizes = [len(rows(model, (1,), seed=image)[0].items[0].ids) for image in range(3)]
    floors = [(size + 5) / 6 for size in sizes]  # all in the first of 6 layers, then one
    assert min(floors) < 16.5 < max(floors)
    for line in read_lines(tmp_path):
        floor = floors[int(line["question_id"]) % 3]
        assert line["at_floor"] is (line["method"] == "fastv" and floor > 16.5)
        if line["method"] in ("fastv", "uniform"):
            assert line["tokens"] == pytest.approx(floor if line["at_floor"] else 16, abs=0.5)
    below = 3 * sum(floor > 16.5 for floor in floors)
    assert (summary["fastv"]["at_floor"], summary["fastv"]["reachable"]) == (below, False)
    assert (summary["uniform"]["at_floor"], summary["uniform"]["reachable"]) == (0, True)
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report.table(list(summary.values())))
    assert f"fastv at 16: {below} images" in console.export_text()


def test_agreement_is_with_the_full_model(finished):
    out, rows = finished
    lines = read_lines(out)
    full = {line["question_id"]: line["prediction"] for line in lines if line["method"] == "full"}
    assert any(not line["agrees"] for line in lines)
    for line in lines:
        same = marking.normalise(line["prediction"]) == marking.normalise(full[line["question_id"]])
        assert line["agrees"] is same
    assert rows["full", "1.0"]["agreement"] == 1.0


@pytest.mark.parametrize("method", METHODS)
def test_all_tokens_is_the_full_model(finished, method):
    assert finished[1][method, "1.0"]["agreement"] == 1.0


def test_full_answers_are_those_of_transformers_one_by_one(finished, settings):
    reader = load(settings.model, "cpu")
    for example in scenes.load(split="test", limit=6, seed=1):
        content = [{"type": "image"}, {"type": "text", "text": example.question}]
        text = reader.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = reader.processor(images=example.image, text=text, return_tensors="pt")
        tokens = reader.model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected = reader.processor.decode(tokens, skip_special_tokens=True).strip()
        (line,) = [
            line
            for line in read_lines(finished[0])
            if line["method"] == "full" and line["question_id"] == example.question_id
        ]
        assert (line["prediction"], line["answer"], line["task"]) == (expected, example.answer, example.task)


def test_files_of_a_run(finished):
    out, rows = finished
    summary = json.loads((out / "summary.json").read_text())
    assert summary == list(rows.values())
    assert [row["method"] for row in summary[:2]] == ["full", "blind"]
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["budgets"] == [1.0, 0.5, 0.1, 4]
    assert {"python", "torch", "transformers", "vtc"} <= set(config["versions"])
    with Image.open(out / "curve.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(2**24)) > 20


def test_the_picture_marks_what_is_below_the_floor(finished, tmp_path):
    rows = list(finished[1].values())
    report.picture(rows, tmp_path / "marked.png", "t")
    report.picture([{**row, "reachable": True} for row in rows], tmp_path / "plain.png", "t")
    assert (tmp_path / "marked.png").read_bytes() != (tmp_path / "plain.png").read_bytes()


def test_a_picture_of_many_colours_the_best_and_the_baseline(finished, tmp_path):
    full = finished[1]["full", "1.0"]
    methods = ["random", *(f"method-{n}" for n in range(16))]
    rows = [full, *({**full, "method": m, "tokens": 9.0, "accuracy": n / 20} for n, m in enumerate(methods))]
    curves = report._curves(rows)
    assert report._coloured(curves) == {"random", *methods[-6:]}
    assert report._coloured({name: curves[name] for name in methods[:16]}) == set(methods[:16])
    report.picture(rows, tmp_path / "many.png", "t")
    with Image.open(tmp_path / "many.png") as picture:
        colours = {"#{:02X}{:02X}{:02X}".format(*colour) for _, colour in picture.convert("RGB").getcolors(2**24)}
    assert colours >= {*report.COLOURS[:-1], "#CCCCCC"}


def test_the_table_fits_80_columns_and_marks_what_is_below_the_floor(finished):
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report.table(list(finished[1].values())))
    text = console.export_text()
    assert "10% *" in text
    assert "…" not in text


# -- resuming -------------------------------------------------------------------------------------------------------


def copy_of(finished, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for name in ("results.jsonl", "config.json"):
        (out / name).write_bytes((finished[0] / name).read_bytes())
    return out


def test_a_torn_last_line_is_asked_again(finished, settings, tmp_path):
    out = copy_of(finished, tmp_path)
    whole = (out / "results.jsonl").read_bytes()
    (out / "results.jsonl").write_bytes(whole[: len(whole) * 2 // 3])
    assert not whole[: len(whole) * 2 // 3].endswith(b"\n")
    rows = run.evaluate(settings, out)
    assert (out / "results.jsonl").read_bytes() == whole
    assert rows == list(finished[1].values())


def test_a_finished_run_asks_nothing(finished, settings, tmp_path, monkeypatch):
    out = copy_of(finished, tmp_path)
    monkeypatch.setattr(run, "plan", lambda *_: [run.Arm("full", 1.0, 1.0), run.Arm("blind", 0, 0)])
    monkeypatch.setattr(run, "_answer", lambda *_: pytest.fail("asked again"))
    assert [row["method"] for row in run.evaluate(settings, out)] == ["full", "blind"]


def test_a_damaged_line_in_the_middle_is_an_error(finished, settings, tmp_path):
    out = copy_of(finished, tmp_path)
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join([*lines[:3], "{broken\n", *lines[4:]]))
    with pytest.raises(ValueError, match="line 4"):
        run.evaluate(settings, out)


@pytest.mark.parametrize(
    "damage", ["[" * 100_000, '{"a":' * 100_000, '{"method": "full", "budget": 1.0, "question_id": "x", "tokens": NaN}']
)
def test_lines_that_are_no_results_are_damage(finished, settings, tmp_path, damage):
    out = copy_of(finished, tmp_path)
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join([*lines[:3], damage + "\n", *lines[3:]]))
    with pytest.raises(ValueError, match="damaged at line 4: delete it to start over"):
        run.evaluate(settings, out)


@pytest.mark.parametrize(("name", "value"), [("seed", 2), ("budgets", (0.5,)), ("limit", 7), ("suffix", " x")])
def test_a_folder_of_another_run_is_refused(finished, settings, tmp_path, name, value):
    out = copy_of(finished, tmp_path)
    before = (out / "results.jsonl").read_bytes()
    with pytest.raises(ValueError, match=rf"another run \({name} .*--restart"):
        run.evaluate(replace(settings, **{name: value}), out)
    assert (out / "results.jsonl").read_bytes() == before


def test_a_method_whose_file_says_something_else_is_refused(settings, tmp_path):
    file = tmp_path / "tuned.json"
    few = replace(settings, methods=(str(file),), budgets=(0.5,), limit=2)
    vtc.list_methods()["fastv"](layer=1).to_json(file)
    run.evaluate(few, tmp_path / "run")
    file.write_text(file.read_text() + " ")  # the same method
    run.evaluate(few, tmp_path / "run")
    vtc.list_methods()["fastv"](layer=3).to_json(file)
    with pytest.raises(ValueError, match=r"another run \(method .*tuned\.json \w+ there, \w+ here\)"):
        run.evaluate(few, tmp_path / "run")
    file.write_text('{"method": "fas')
    with pytest.raises(ValueError, match=r"tuned\.json"):
        run.evaluate(few, tmp_path / "run")


def test_modules_that_were_trained_anew_are_refused(settings, tmp_path):
    shutil.copytree(settings.model, tmp_path / "model")
    few = replace(settings, model=str(tmp_path / "model"), methods=("atp",), budgets=(0.5, 0.25), limit=2)

    def train(budget, seed):
        torch.manual_seed(seed)
        modules = vtc.list_methods()["atp"]().untrained(vtc.Shape(8, 2), width=4)
        modules.save_pretrained(tmp_path / "model" / "atp" / str(budget))

    train(0.5, seed=0)  # 0.25 is below what was trained for, and runs at the floor
    run.evaluate(few, tmp_path / "run")
    train(0.75, seed=0)  # nobody asks for these
    run.evaluate(few, tmp_path / "run")
    train(0.5, seed=1)
    with pytest.raises(ValueError, match=r"another run \(method atp \w+ there, \w+ here\)"):
        run.evaluate(few, tmp_path / "run")


def test_a_dry_run_looks_at_the_folder_and_leaves_it(finished, settings, tmp_path):
    out = copy_of(finished, tmp_path)
    other = replace(settings, methods=("uniform",), budgets=(0.5,), limit=2)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(ValueError, match=r"another run \(methods .*--restart"):
        run.evaluate(other, out, dry_run=True)
    assert run.evaluate(other, out, dry_run=True, restart=True) == []
    assert run.evaluate(settings, out, dry_run=True) == []
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


@pytest.mark.parametrize("damage", ["", "[]", '{"settings": 3}', "{", "\0\udcff"])
def test_a_damaged_configuration_is_named(finished, settings, tmp_path, damage):
    out = copy_of(finished, tmp_path)
    (out / "config.json").write_bytes(damage.encode(errors="surrogateescape"))
    with pytest.raises(DamagedError, match=r"config\.json is damaged, .*: delete it to start over"):
        folder.check(out, {"settings": {}}, restart=False)
    assert folder.check(out, {"settings": {}}, restart=True) is False


def test_restart_throws_the_other_run_away(finished, settings, tmp_path):
    out = copy_of(finished, tmp_path)
    few = replace(settings, methods=("uniform",), budgets=(0.5,), limit=2)
    rows = run.evaluate(few, out, restart=True)
    assert len(rows) == 3
    assert len(read_lines(out)) == 8  # with another question's image, too


def test_a_new_run_begins_without_what_the_other_one_found(tmp_path):
    for name in ("results.jsonl", "summary.json", "choice.json", "curve.png", "mine.txt", "mine.json"):
        (tmp_path / name).write_text("{}\n")
    folder.open_folder(tmp_path, {"settings": {}}, restart=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "mine.json", "mine.txt"]


def test_reading_the_results_of_a_run_that_goes_on_cuts_nothing(tmp_path):
    file, line = tmp_path / "results.jsonl", {"method": "a", "budget": 1.0, "question_id": "x"}
    torn = json.dumps(line) + '\n{"method": "a", "bud'
    file.write_text(torn)
    store = Store(file)
    assert list(store.lines.values()) == [line]
    assert file.read_text() == torn
    store.add([{**line, "question_id": "caf\udce9.png"}])  # of a file whose name is no UTF-8
    assert list(Store(file).lines.values()) == [line, {**line, "question_id": "caf\udce9.png"}]


def test_a_write_that_fails_half_way_damages_nothing(tmp_path, monkeypatch):
    """As on a full disk, which has room again later."""
    store, lines = Store(tmp_path / "results.jsonl"), [asked_line(number) for number in range(4)]
    store.add(lines[:1])
    fsync = os.fsync

    def full(file):
        os.ftruncate(file, os.fstat(file).st_size - 5)
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        store.add(lines[1:3])
    monkeypatch.setattr(os, "fsync", fsync)
    assert list(Store(store.path).lines.values()) == lines[:2]  # what is torn is no line
    store.add(lines[3:])
    assert list(Store(store.path).lines.values()) == [lines[0], lines[3]]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_could_not_be_read_again_is_not_written(tmp_path, number):
    store = Store(tmp_path / "results.jsonl")
    with pytest.raises(ValueError, match=r"a at 1\.0 has no finite number for question 1"):
        store.add([asked_line(0), {**asked_line(1), "tokens": number}])
    assert not store.path.exists()
    assert store.lines == {}


def asked_line(number):
    return {"method": "a", "budget": 1.0, "question_id": str(number)}


def test_a_folder_has_one_process_at_a_time(finished, settings, tmp_path):
    out = copy_of(finished, tmp_path)
    before = (out / "results.jsonl").read_bytes()
    with held(out):
        for restart in (False, True):
            with pytest.raises(folder.BusyError, match=r"another process is at work in .*run: wait .* another --out"):
                run.evaluate(settings, out, restart)
        assert (out / "results.jsonl").read_bytes() == before
    assert run.evaluate(settings, out) == list(finished[1].values())


def test_a_method_whose_file_is_gone_at_the_end_costs_nothing(settings, tmp_path, monkeypatch):
    vtc.list_methods()["random-kv"]().to_json(file := tmp_path / "late.json")
    batches = run._batches
    monkeypatch.setattr(run, "_batches", lambda *given: file.unlink() or batches(*given))
    rows = run.evaluate(replace(settings, methods=(str(file),), budgets=(0.5,), limit=2), tmp_path / "run")
    assert rows[-1]["after_prefill"] is True


def test_one_token_and_all_tokens_are_two_budgets():
    assert run.budgets_of("uniform", (1.0, 1, 0.5, 1.0)) == [1.0, 1, 0.5]
    assert [type(budget) for budget in run.budgets_of("uniform", (1, 1.0))] == [int, float]


def test_a_method_stays_what_it_was_when_the_run_began(settings, tmp_path, monkeypatch):
    file, answer, compressed, asked, used = tmp_path / "mine.json", run._answer, vtc.compressed, [], []
    vtc.FastV(layer=1).to_json(file)

    def rewrites(reader, arm, inputs, max_new_tokens=None):
        vtc.FastV(layer=2).to_json(file)
        found = answer(reader, arm, inputs, max_new_tokens)
        if arm.method == str(file):
            asked.append(used[-1])
        return found

    def watched(model, method, budget):
        used.append(vtc.find_method(method).settings().get("layer"))
        return compressed(model, method, budget)

    monkeypatch.setattr(run, "_answer", rewrites)
    monkeypatch.setattr(vtc, "compressed", watched)
    run.evaluate(replace(settings, methods=(str(file),), budgets=(0.5,), limit=2), tmp_path / "run")
    assert set(asked) == {1}


def test_killed_and_run_again_is_the_run_that_was_not_killed(tiny, tmp_path):  # noqa: F811
    settings = run.Settings(
        str(tiny), ("random", "uniform"), (0.5, 0.25), limit=40, batch_size=2, max_new_tokens=3, device="cpu"
    )
    asked = "--methods random,uniform --budgets 0.5,0.25 --limit 40 --batch-size 2 --max-new-tokens 3 --device cpu"
    killed = subprocess.Popen(
        command("eval", "--model", tiny, *asked.split(), "--out", tmp_path / "killed"), stdout=subprocess.DEVNULL
    )
    results = tmp_path / "killed" / "results.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (results.exists() and results.read_bytes().count(b"\n") >= 20):
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert 20 <= results.read_bytes().count(b"\n") < 6 * 40
    resumed = run.evaluate(settings, tmp_path / "killed")
    assert resumed == run.evaluate(settings, tmp_path / "whole")
    assert results.read_bytes() == (tmp_path / "whole" / "results.jsonl").read_bytes()


# -- what cannot be run ---------------------------------------------------------------------------------------------


def test_unknown_methods_name_the_known(settings, tmp_path):
    with pytest.raises(ValueError, match=r"unknown method 'fast'.*fastv.*smaller-image"):
        run.evaluate(replace(settings, methods=("fast",)), tmp_path)


def test_smaller_image_refuses_a_tower_that_cannot(settings, tmp_path, monkeypatch):
    from transformers import CLIPVisionModel

    original = CLIPVisionModel.forward

    def fixed(self, pixel_values, **kwargs):
        if "interpolate_pos_encoding" in kwargs:
            raise TypeError("unexpected keyword")
        return original(self, pixel_values, **kwargs)

    monkeypatch.setattr(CLIPVisionModel, "forward", fixed)
    with pytest.raises(ValueError, match="smaller-image works for"):
        run.evaluate(replace(settings, methods=("smaller-image",)), tmp_path / "out")


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        model_path(str(tmp_path))


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (ConnectionError("no way out"), r"cannot be asked \(no way out\)"),
        (TimeoutError(), r"cannot be asked \(TimeoutError\)"),
        (RepositoryNotFoundError("404", response=Mock()), "shows no model of that name"),
    ],
)
def test_an_unknown_model_is_asked_for_once(monkeypatch, failure, reason):
    asked = Mock(side_effect=failure)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", asked)
    with pytest.raises(OSError, match=rf"'nobody/nothing': there is no such folder, .* reference-pages, .*{reason}"):
        model_path("nobody/nothing")
    asked.assert_called_once()


def test_a_model_on_the_hub_is_its_name(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", Mock())
    assert model_path("nobody/nothing") == "nobody/nothing"


def test_load(tiny):  # noqa: F811
    model, processor = vtc.eval.load(str(tiny), device="cpu")
    assert (model.training, processor.tokenizer.padding_side) == (False, "left")
    shipped, _ = vtc.eval.load(device="cpu")
    assert shipped.config._name_or_path == model_path("reference")


def test_the_bar_writes_names_as_they_are(capsys):
    with progress.bar("transprune(layers=[2]) 0.5", 3, done=1) as tick:
        tick()
        tick(1, say="[bold]")
    with progress.bar("hidden", 1, shown=False) as tick:
        tick()
    written = capsys.readouterr()
    assert "[bold] ━" in written.err
    assert "3/3" in written.err
    assert "hidden" not in written.err
    assert written.out == ""
