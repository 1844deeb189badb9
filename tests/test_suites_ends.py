"""How a sweep over benchmarks ends: what changed since, what is missing, what fails, what goes on."""

# ruff: noqa: F811 (fixtures are imported)

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec

import pytest
from eval_fixtures import read_lines
from suite_fixtures import SETTINGS, data, start, tiny_llava_next  # noqa: F401 (fixtures)

import vtc
from vtc.eval import scenes, suites, tasks
from vtc.eval.reference import SHIPPED
from vtc.eval.tasks import field

SMALL = replace(SETTINGS, tasks=("pope",), methods=("uniform",), budgets=(0.25,), limit=4)


# -- what changed since ---------------------------------------------------------------------------------------------


def test_other_data_under_the_same_name_is_refused(data, tmp_path):
    """Its questions, its pictures, and what the task asks of generation."""
    folder = own_task(tmp_path)
    settings = replace(SMALL, tasks=("own",), include_path=str(folder))
    suites.evaluate(settings, tmp_path / "run")
    suites.evaluate(settings, tmp_path / "run")

    def refused():
        suites._manager.cache_clear()
        with pytest.raises(ValueError, match=r"another run \(data of own \w+ there, \w+ here\)"):
            suites.evaluate(settings, tmp_path / "run")

    first, rows, task = ((folder / name).read_bytes() for name in ("0.png", "rows.json", "own.yaml"))
    scenes.example("test", 1, 0).image.save(folder / "0.png")
    refused()
    (folder / "0.png").write_bytes(first)
    (folder / "rows.json").write_bytes(rows.replace(b"3.png", b"1.png"))
    refused()
    (folder / "rows.json").write_bytes(rows)
    (folder / "own.yaml").write_bytes(task.replace(b"max_new_tokens: 3", b"max_new_tokens: 4"))
    refused()


def test_a_method_that_was_written_anew_is_refused(data, tmp_path):
    file = tmp_path / "tuned.json"
    vtc.list_methods()["fastv"](layer=1).to_json(file)
    settings = replace(SMALL, methods=(str(file),), budgets=(0.5,))
    suites.evaluate(settings, tmp_path / "run")
    vtc.list_methods()["fastv"](layer=2).to_json(file)
    with pytest.raises(ValueError, match=r"another run \(method .*tuned\.json \w+ there, \w+ here\)"):
        suites.evaluate(settings, tmp_path / "run")


def test_methods_may_be_objects(data, tmp_path):
    method = vtc.list_methods()["fastv"](layer=1)
    rows = suites.evaluate(replace(SMALL, methods=(method, "fastv"), budgets=(0.5,)), tmp_path / "run")["pope"]
    assert [row["method"] for row in rows] == ["full", "blind", str(method), "fastv"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["methods"] == [str(method), "fastv"]


# -- a raised limit, another folder's tasks -------------------------------------------------------------------------


def test_a_raised_limit_goes_on_in_the_same_folder(data, tmp_path, monkeypatch):
    from vtc.eval.suite_model import Vtc

    suites.evaluate(SMALL, tmp_path / "run")
    asked, original = [], Vtc._answers
    monkeypatch.setattr(Vtc, "_answers", lambda self, requests: asked.extend(requests) or original(self, requests))
    rows = suites.evaluate(replace(SMALL, limit=6), tmp_path / "run")["pope"]
    stored = [request for request in asked if request.args[2].get("max_new_tokens") != 1]
    assert len(stored) == 3 * 2
    assert rows == suites.evaluate(replace(SMALL, limit=6), tmp_path / "whole")["pope"]
    with pytest.raises(ValueError, match="limit 6 there, 4 here"):
        suites.evaluate(SMALL, tmp_path / "run")


def test_tasks_of_a_folder(data, tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    text = (tasks.PATH / "vtc_scenes.yaml").read_text().replace("task: vtc_scenes", "task: my_scenes")
    (folder / "my_scenes.yaml").write_text(text)
    shutil.copy(tasks.PATH / "vtc_scenes.json", folder)
    settings = replace(SMALL, tasks=("my_scenes",), include_path=str(folder))
    assert [row["n"] for row in suites.evaluate(settings, tmp_path / "run")["my_scenes"]] == [4, 4, 4]


# -- what is missing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tasks": ("mme",), "limit": 7}, "mme asks two questions about each image: --limit has to be even, not 7"),
        ({"tasks": ("mmvet", "pope")}, "mmvet needs a judge's key in OPENAI_API_KEY"),
        ({"methods": ("smaller-image",)}, "smaller-image.*it is for scenes"),
        ({"gen_kwargs": "num_return_sequences=3"}, "takes no num_return_sequences"),
        ({"tasks": ("seedbench_ppl",), "gen_kwargs": "max_new_tokens=3"}, "nothing is generated for seedbench_ppl"),
    ],
)
def test_refused_before_the_first_answer(data, tmp_path, monkeypatch, change, match):
    for key in field.KEYS:
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(ValueError, match=match):
        suites.evaluate(replace(SMALL, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_packages_that_a_task_needs_are_named_first(data, tmp_path, monkeypatch):
    monkeypatch.setattr(field, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"mmbench_en_dev_static needs openpyxl: pip install 'visual-token-compression\[suites\]'"
    ):
        suites.evaluate(replace(SMALL, tasks=("pope", "mmbench_en_dev_static")), tmp_path, dry_run=True)


def test_the_index_of_tasks_is_lmms_evals_own(data):
    """Parsed in C it is the same, to the last task and its settings; and nothing stays patched."""
    import yaml
    from lmms_eval.tasks import TaskManager

    slow = yaml.full_load
    ours, theirs = suites._manager(), TaskManager("ERROR", include_path=[str(tasks.PATH)], model_name="vtc")
    assert yaml.full_load is slow
    assert ours.all_tasks == theirs.all_tasks
    assert ours.task_index == theirs.task_index


def test_the_field(data, monkeypatch, capsys):
    from vtc.cli import about

    assert len(field.FIELD) == 20
    known = suites._manager().all_tasks
    assert not [b.task for b in field.FIELD if not any(name.startswith(b.task) for name in known)]
    monkeypatch.setenv("COLUMNS", "200")
    for key in field.KEYS:
        monkeypatch.delenv(key, raising=False)
    about.tasks()
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if "mmvet" in line]
    assert "a judge's key" in line
    (line,) = [line for line in said.splitlines() if " gqa " in line]
    assert "it runs" in line
    assert ("torchvision" in " ".join(field.lacking("videomme"))) is (find_spec("torchvision") is None)


# -- what fails -----------------------------------------------------------------------------------------------------


def test_one_bad_picture_costs_its_question_alone(data, tmp_path):
    settings = replace(SMALL, tasks=("broken", "pope"), include_path=str(broken_task(tmp_path)))
    shown = []
    with pytest.raises(ValueError, match=r"^broken, question 2: \w*Error: .*$"):
        suites.evaluate(settings, tmp_path / "run", show=lambda task, rows: shown.append((task, rows)))
    assert [task for task, _ in shown] == ["broken", "pope"]
    assert [row["n"] for row in shown[0][1]] == [3, 3, 3]
    assert {line["question_id"] for line in read_lines(tmp_path / "run" / "broken")} == {
        "broken-00000", "broken-00001", "broken-00003",
    }  # fmt: skip
    stored = (tmp_path / "run" / "replies-0.jsonl").read_text()
    assert "broken/2" not in stored
    assert stored.count('"broken/') == 3 * 3


def own_task(tmp_path, name="own"):
    """A folder with a task of four questions."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for number in range(4):
        scenes.example("test", 0, number).image.save(folder / f"{number}.png")
    rows = [{"path": str(folder / f"{n}.png"), "answer": scenes.example("test", 0, n).answer} for n in range(4)]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "utils.py").write_text(
        "from PIL import Image\n\n\ndef visual(doc):\n    return [Image.open(doc['path']).convert('RGB')]\n\n\n"
        "def text(doc):\n    return 'what is it?'\n\n\n"
        "def score(doc, replies):\n    return {'acc': float(replies[0] == doc['answer'])}\n"
    )
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: rows.json}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_visual: !function utils.visual\ndoc_to_text: !function utils.text\n"
        "doc_to_target: answer\nprocess_results: !function utils.score\ngeneration_kwargs: {max_new_tokens: 3}\n"
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    return folder


def broken_task(tmp_path):
    """The same under another name, with a third picture that is none."""
    folder = own_task(tmp_path, "broken")
    (folder / "2.png").write_bytes(b"no picture")
    return folder


def test_one_bad_task_does_not_cost_the_others(data, tmp_path, monkeypatch):
    from lmms_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask.download.retry, "sleep", lambda seconds: None)
    settings = replace(SMALL, tasks=("vizwiz_vqa_val", "pope"))
    with pytest.raises(ValueError, match=r"task vizwiz_vqa_val: \w+Error: .*VizWiz-VQA"):
        suites.evaluate(settings, tmp_path / "run")
    assert len(read_lines(tmp_path / "run" / "pope")) == 3 * 4
    with pytest.raises(ValueError, match="task vizwiz_vqa_val"):
        suites.evaluate(settings, tmp_path / "dry", dry_run=True)
    assert not (tmp_path / "dry").exists()


def test_the_exit_code_says_that_something_failed(data, tmp_path):
    done = start(
        "vtc", "eval", "--tasks", "broken,pope", "--include-path", broken_task(tmp_path), "--methods", "uniform",
        "--budgets", "25%", "--limit", 4, "--device", "cpu", "--gen-kwargs", "max_new_tokens=2",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: broken, question 2: ")
    assert "pope_f1_score" in done.stdout


def test_each_image_is_decided_by_itself(data, tmp_path, monkeypatch):
    """LLaVA-NeXT: 8 tokens are within fastv's reach on a small image and not on a large one."""
    from lmms_eval.api.instance import Instance
    from PIL import Image

    from vtc.eval.reader import Reader
    from vtc.eval.store import Store
    from vtc.eval.suite_model import Vtc

    model = Vtc("reference", batch_size=2, device="cpu")
    monkeypatch.setattr(model, "reader", Reader(*tiny_llava_next()))
    images = [Image.new("RGB", (64, 64), "red"), Image.new("RGB", (90, 30), "blue")]
    full = [model.reader.visual_tokens(model.reader.inputs([image], ["what"])).item() for image in images]
    model.use("fastv", 8)
    model.replies = Store(tmp_path / "replies-0.jsonl")
    model.task_dict["own"] = {"test": images}

    def messages(doc):
        return [{"role": "user", "content": [{"type": "image", "url": doc}, {"type": "text", "text": "what color"}]}]

    requests = [
        Instance("generate_until", ("", messages, {"max_new_tokens": 2}, n, "own", "test"), 0, {
            "task": "own", "doc_id": n, "repeats": 1,
        })
        for n in range(2)
    ]  # fmt: skip
    counts = [reply.token_counts for reply in model.generate_until(requests)]
    floors = [(tokens + 7) / 8 for tokens in full]  # all of them in layer 0 of 8, one in the others
    assert [count.at_floor for count in counts] == [floor > 8.5 for floor in floors] == [True, False]
    assert counts[0].visual_tokens == pytest.approx(floors[0])
    assert counts[1].visual_tokens == pytest.approx(8, abs=0.5)
    assert model.reader.model.vtc.compression.budget == 8


# -- damaged files --------------------------------------------------------------------------------------------------


def test_damaged_files_are_named(data, tmp_path):
    shutil.copytree(SHIPPED["reference"], tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        suites.evaluate(replace(SMALL, model=str(tmp_path / "model")), tmp_path / "run")
    (tmp_path / "torn.json").write_text('{"method": "fastv", "la')
    with pytest.raises(ValueError, match=r"torn\.json"):
        suites.evaluate(replace(SMALL, methods=(str(tmp_path / "torn.json"),)), tmp_path / "run")
