"""lmms-eval with vtc inside: its own command, ours, one process and two, its own wrapper beside."""

import functools
import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before anything imports datasets

import pytest
import suite_data
from eval_fixtures import TEMPLATE, WORDS, _tokenizer, read_lines
from PIL import Image, ImageFile

import vtc
from vtc import adapter, cli
from vtc.eval import published, report, run, scenes, suites, tasks
from vtc.eval.reference import PATH

TASKS = "vtc_scenes,pope,ai2d"
LIMIT = 7
"""Questions of each task: two processes do not get equally many."""
SETTINGS = suites.Settings(
    tasks=tuple(TASKS.split(",")),
    methods=("vtc-cls", "fastv"),
    budgets=(0.25, 0.05),
    limit=LIMIT,
    batch_size=4,
    device="cpu",
)


# -- fixtures -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    """The working folder with the local data, for this process and the commands that it starts."""
    folder = tmp_path_factory.mktemp("suites")
    suite_data.save_all(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        # importing lmms-eval makes Pillow take damaged images; other tests shall find it as it was
        patch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES)
        yield folder


def start(*command, **environment):
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    return done


def torchrun(*command):
    return start(
        "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", *command, ACCELERATE_USE_CPU="true"
    )


def lmms_eval(launch, out, budget):
    """`python -m lmms_eval --model vtc`: (results, samples by task in the order of their questions)."""
    done = launch(
        "lmms_eval", "--model", "vtc", "--model_args", f"pretrained={PATH},method=vtc-cls,budget={budget}",
        "--tasks", TASKS, "--include_path", tasks.PATH, "--limit", LIMIT, "--batch_size", 4, "--device", "cpu",
        "--output_path", out, "--log_samples",
    )  # fmt: skip
    assert list(out.glob("*/*_results.json")), done.stderr[-3000:]
    (results,) = out.glob("*/*_results.json")
    samples = {}
    for task in TASKS.split(","):
        (file,) = out.glob(f"*/*_samples_{task}.jsonl")
        samples[task] = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return results, json.loads(results.read_text()), samples


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return lmms_eval(start, tmp_path_factory.mktemp("one"), 36)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return lmms_eval(torchrun, tmp_path_factory.mktemp("two"), 36)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep in this process: the folder and the summary rows of each task."""
    out = tmp_path_factory.mktemp("swept") / "run"
    return out, suites.evaluate(SETTINGS, out)


@pytest.fixture(scope="module")
def model(data):
    from vtc.eval.suite_model import Vtc

    return Vtc("reference", batch_size=4, device="cpu")


def replies(samples):
    """By task, the answers as the model gave them."""
    return {task: [(s["doc_id"], reply(s)) for s in found] for task, found in samples.items()}


def reply(sample):
    """lmms-eval leaves `resps` out of its file where no filter changed anything."""
    found = sample.get("resps", sample["filtered_resps"])
    return found[0][0] if isinstance(found, list) else found


# -- lmms-eval's own command ----------------------------------------------------------------------------------------


def test_the_model_is_registered():
    (point,) = {(point.name, point.value) for point in entry_points(group="lmms_eval.models") if point.name == "vtc"}
    assert point == ("vtc", "vtc.integrations.lmms_eval:manifests")


def test_it_loads_without_lmms_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.delitem(sys.modules, "vtc.integrations.lmms_eval", raising=False)
    importlib.import_module("vtc.integrations.lmms_eval")
    with pytest.raises(TypeError, match="no adapter"):
        adapter.find(object())


def test_the_folder_of_the_task_is_printed(capsys):
    cli.task_folder()
    (folder,) = capsys.readouterr().out.splitlines()
    assert folder == str(tasks.PATH)
    assert (Path(folder) / "vtc_scenes.yaml").is_file()


def test_results_hold_what_was_measured(one):
    _, results, samples = one
    measured = results["throughput"]
    assert measured["avg_processes"] == 1
    for task, found in samples.items():
        assert len(found) == LIMIT
        counts = [sample["token_counts"][0] for sample in found]
        assert measured[f"avg_{task}/visual_tokens"] == 36
        assert [count["visual_tokens"] for count in counts] == [36] * LIMIT
        # 8 layers of 2 x 128 numbers of 4 bytes a token: 36 of 144 visual tokens stay, and all text
        for count in counts:
            assert count["kv_bytes"] == 8 * 2 * 128 * 4 * (count["input_tokens"] - 144 + 36)
            assert 0 < count["prefill_ms"] < 10_000
        assert measured[f"avg_{task}/kv_bytes"] == pytest.approx(sum(c["kv_bytes"] for c in counts) / LIMIT)
        assert measured[f"avg_{task}/prefill_ms"] == pytest.approx(sum(c["prefill_ms"] for c in counts) / LIMIT)
    assert results["config"]["model_args"].endswith("method=vtc-cls,budget=36")


def test_scores_are_those_of_the_replies(one):
    _, results, samples = one
    right = [report.is_correct(reply(s), scenes.example("test", 0, s["doc_id"]).answer) for s in samples["vtc_scenes"]]
    assert 0 < sum(right) < LIMIT
    assert results["results"]["vtc_scenes"]["accuracy,none"] == pytest.approx(sum(right) / LIMIT)
    assert [sample["accuracy"] for sample in samples["vtc_scenes"]] == right


def test_the_prompts_are_the_benchmarks(one):
    _, _, samples = one
    pope, ai2d = samples["pope"][0]["input"], samples["ai2d"][0]["input"]
    assert pope.endswith("?\nAnswer the question using a single word or phrase.")
    assert "\nC. triangle\n" in ai2d
    assert ai2d.endswith("Answer with the option's letter from the given choices directly.")


def test_the_folder_tells_method_and_budget(one):
    assert one[0].parent.name.endswith("weights__vtc-cls__36")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("pretrained=a/b/,method=fastv,budget=0.5", "a/b__fastv__0.5"),
        ("pretrained=a/b,method=out/tuned.json,budget=64", "a/b__tuned__64"),
        ("pretrained=a/b,method=transprune", "a/b__transprune"),
        ("pretrained=a/b", "a/b"),
    ],
)
def test_names_of_folders(arguments, name):
    from vtc.eval.suite_model import folder_name

    assert folder_name(arguments) == name


def test_two_processes_answer_as_one(one, two):
    assert two[1]["throughput"]["avg_processes"] == 2
    assert replies(two[2]) == replies(one[2])
    for task in SETTINGS.tasks:
        scores = [{k: v for k, v in found[1]["results"][task].items() if isinstance(v, float)} for found in (one, two)]
        assert len(scores[0]) > 1
        assert scores[0] == pytest.approx(scores[1])  # sums in another order
    tokens = [key for key in one[1]["throughput"] if key.endswith(("visual_tokens", "kv_bytes"))]
    assert len(tokens) == 6
    assert [two[1]["throughput"][key] for key in tokens] == [one[1]["throughput"][key] for key in tokens]


# -- the built-in wrapper -------------------------------------------------------------------------------------------


def test_full_answers_are_those_of_the_built_in_wrapper(model):
    pytest.importorskip("decord", reason="lmms-eval's llava_hf imports it, and it is not built for this machine")
    from lmms_eval import evaluator
    from lmms_eval.models.chat.llava_hf import LlavaHf

    theirs = LlavaHf(str(PATH), device="cpu", device_map="cpu", dtype="float32", batch_size=1)
    found = []
    for lm in (theirs, model):
        loaded = list(suites.load_tasks(SETTINGS.tasks).values())
        found.append(evaluator.simple_evaluate(model=lm, tasks=loaded, limit=LIMIT, bootstrap_iters=0))
    given = [{task: [reply(s) for s in run["samples"][task]] for task in SETTINGS.tasks} for run in found]
    assert len({text for texts in given[0].values() for text in texts}) > 5
    assert given[0] == given[1]
    assert found[0]["results"] == found[1]["results"]


# -- built-in tasks, and what may come in a document ----------------------------------------------------------------


def test_an_oracle_gets_full_marks_of_the_true_metrics(model, monkeypatch):
    """And one wrong answer costs what the benchmark says it costs."""
    from lmms_eval import evaluator
    from lmms_eval.api.instance import GenerationResult

    def answers(self, requests):
        return [GenerationResult(truth(request), None) for request in requests]

    def truth(request):
        *_, number, task, split = request.args
        doc = model.task_dict[task][split][number]
        if number == 0 and task != "vtc_scenes":
            return "no idea"
        if task in ("ai2d", "scienceqa_img"):
            return "ABCDEF"[int(doc["answer"])] + "."
        if task == "textvqa_val":
            return doc["answers"][0]
        return tasks.answer(doc) if task == "vtc_scenes" else doc["answer"]

    monkeypatch.setattr(type(model), "_answers", answers)
    monkeypatch.setattr(type(model), "_report", lambda *_: None)
    loaded = suites.load_tasks(("vtc_scenes", "pope", "mme", "gqa", "textvqa_val", "scienceqa_img", "ai2d"))
    found = evaluator.simple_evaluate(model=model, tasks=list(loaded.values()), limit=8, bootstrap_iters=0)["results"]
    assert found["vtc_scenes"]["accuracy,none"] == 1
    assert found["pope"]["pope_accuracy,none"] == 7 / 8
    assert found["ai2d"]["exact_match,flexible-extract"] == 7 / 8
    for task in ("gqa", "textvqa_val", "scienceqa_img"):
        assert found[task]["exact_match,none"] == 7 / 8
    # of one category: percent of questions, and percent of images with both questions right
    assert found["mme"]["mme_perception_score,none"] == pytest.approx(100 * 7 / 8 + 100 * 3 / 4)


def test_questions_with_two_images_and_with_none(model):
    """In one call, in the order of the questions, as each alone."""
    images = [scenes.example("test", 0, index).image for index in range(3)]
    question = {"type": "text", "text": "what color is the word?"}

    def document(*pictures):
        return [{"role": "user", "content": [{"type": "image"} for _ in pictures] + [question]}], list(pictures)

    pair = [document(images[0], images[1]), document(images[2])]
    together = model.ask(pair, max_new_tokens=3)
    assert [r.text for r in together] == [model.ask([d], max_new_tokens=3)[0].text for d in pair]
    assert [r.token_counts.visual_tokens for r in together] == [288, 144]
    (alone,) = model.ask([document()], max_new_tokens=3)
    assert alone.token_counts.visual_tokens == 0
    assert alone.token_counts.prefill_ms is None


def test_images_that_become_different_numbers_of_tokens(model, monkeypatch):
    """LLaVA-NeXT: a batch is answered as each alone, and each row's tokens are counted."""
    from vtc.eval.reader import Reader

    documents = [
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color"}]}], [image])
        for image in (Image.new("RGB", (40, 60), "red"), Image.new("RGB", (90, 30), "blue"))
    ]
    monkeypatch.setattr(model, "reader", Reader(*tiny_llava_next()))
    counts = {}
    for method, budget in (("uniform", 1.0), ("vtc-cls", 0.25), ("random", 8)):
        model.use(method, budget)
        together = model.ask(documents, max_new_tokens=3)
        alone = [model.ask([document], max_new_tokens=3)[0] for document in documents]
        assert [reply.text for reply in together] == [reply.text for reply in alone]
        counts[method] = [reply.token_counts.visual_tokens for reply in together]
        assert counts[method] == [reply.token_counts.visual_tokens for reply in alone]
    full = counts["uniform"]
    assert full[0] != full[1]
    assert counts == {"uniform": full, "vtc-cls": [tokens // 4 for tokens in full], "random": [8, 8]}


def tiny_llava_next():
    """A random model and its processor: images of 32 pixels, cut into up to 4 tiles."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    tiles = [[32, 64], [64, 32], [64, 64]]
    tokenizer = _tokenizer()
    tokenizer.padding_side = "left"
    processor = LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=tiles
        ),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=32, patch_size=8),
        text_config=LlamaConfig(
            **sizes, **tokens, num_hidden_layers=8, vocab_size=len(tokenizer), initializer_range=0.3
        ),
        image_token_id=WORDS.index("<image>"),
        image_seq_length=16,
        image_grid_pinpoints=tiles,
    )
    torch.manual_seed(0)
    return LlavaNextForConditionalGeneration(config).eval(), processor


def test_videos_are_refused():
    from vtc.eval.suite_model import chat

    with pytest.raises(NotImplementedError, match="no video"):
        chat([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}])


def test_options_of_task_files():
    from vtc.eval.suite_model import _options

    greedy = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False, "until": ["\n"]}
    assert _options(greedy) == {"max_new_tokens": 16, "num_beams": 1}
    assert _options({}) == {"max_new_tokens": 1024, "num_beams": 1}
    sampled = {"temperature": 0.7, "top_p": 0.9, "num_beams": 2}
    assert _options(sampled) == {"max_new_tokens": 1024, "do_sample": True, **sampled}


def test_a_model_spread_over_devices_answers_the_same(model):
    from vtc.eval.suite_model import Vtc

    example = scenes.example("test", 0, 0)
    document = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.question}]}]
    spread = Vtc("reference", device="cpu", device_map="auto")
    answers = [lm.ask([(document, [example.image])], max_new_tokens=4)[0].text for lm in (spread, model)]
    assert answers[0] == answers[1] != ""


def test_arguments_that_make_no_model():
    from vtc.eval.suite_model import Vtc

    with pytest.raises(ValueError, match="needs a method"):
        Vtc("reference", budget=64, device="cpu")
    with pytest.raises(vtc.BudgetError):
        Vtc("reference", method="fastv", budget=0.01, device="cpu")
    with pytest.raises(ValueError, match="unknown method"):
        Vtc("reference", method="fast", budget=0.5, device="cpu")
    with pytest.raises(TypeError, match="layers"):
        Vtc.create_from_arg_string("pretrained=reference,layers=3", {"device": "cpu"})


def test_processes_that_do_not_see_each_other(monkeypatch):
    from vtc.eval.suite_model import Vtc

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="ACCELERATE_USE_CPU"):
        Vtc("reference", device="cpu")


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
    assert lines(theirs) == lines(read_lines(tmp_path))


def test_files_of_a_sweep(swept):
    out, rows = swept
    assert list(rows) == list(SETTINGS.tasks)
    for task, found in rows.items():
        assert json.loads((out / task / "summary.json").read_text()) == found
        assert [(r["method"], r["budget"]) for r in found[:3]] == [("full", 1.0), ("blind", 0), ("vtc-cls", 0.25)]
        assert [r["tokens"] for r in found[:3]] == [144, 0, 36]
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
    from lmms_eval import evaluator

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(model.reader), "generate", fails)
    loaded = list(suites.load_tasks(("vtc_scenes",)).values())
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluator.simple_evaluate(model=model, tasks=loaded, limit=2, bootstrap_iters=0)


def test_unknown_methods_name_the_known(tmp_path):
    for method in ("fast", "smaller-image"):
        with pytest.raises(ValueError, match=f"unknown method '{method}'.*vtc-cls"):
            suites.evaluate(replace(SETTINGS, methods=(method,)), tmp_path)


def test_without_lmms_eval_the_way_to_install_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", None)
    with pytest.raises(ImportError, match=r"vtc\[lmms-eval-lean\].*--no-deps lmms-eval==0\.7\.3"):
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
