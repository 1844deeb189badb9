"""lmms-eval with vtc inside: its own command, one process and two, its own wrapper beside."""

# ruff: noqa: F811 (fixtures are imported)

import importlib
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from PIL import Image
from suite_fixtures import (  # noqa: F401 (fixtures)
    LIMIT,
    SETTINGS,
    data,
    evaluated,
    model,
    one,
    replies,
    reply,
    tiny_llava_next,
    two,
)

import vtc
from vtc import adapter
from vtc.cli import about
from vtc.eval import marking, scenes, suites, tasks
from vtc.eval.reference import SHIPPED

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
    about.tasks()
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
    right = [marking.is_correct(reply(s), scenes.example("test", 0, s["doc_id"]).answer) for s in samples["vtc_scenes"]]
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
    from lmms_eval.models.chat.llava_hf import LlavaHf

    theirs = LlavaHf(str(SHIPPED["reference"]), device="cpu", device_map="cpu", dtype="float32", batch_size=1)
    found = [evaluated(lm, suites.load_tasks(SETTINGS.tasks)) for lm in (theirs, model)]
    given = [{task: [reply(s) for s in run["samples"][task]] for task in SETTINGS.tasks} for run in found]
    assert len({text for texts in given[0].values() for text in texts}) > 5
    assert given[0] == given[1]
    assert found[0]["results"] == found[1]["results"]


# -- built-in tasks, and what may come in a document ----------------------------------------------------------------


def test_an_oracle_gets_full_marks_of_the_true_metrics(model, monkeypatch):
    """And one wrong answer costs what the benchmark says it costs."""
    from lmms_eval.api.instance import GenerationResult

    def answers(self, requests):
        return [GenerationResult(truth(request), None) for request in requests]

    def truth(request):
        *_, number, task, split = request.args
        doc = model.task_dict[task][split][number]
        if number == 0 and not task.startswith("vtc_"):
            return "no idea"
        if task in ("ai2d", "scienceqa_img"):
            return "ABCDEF"[int(doc["answer"])] + "."
        if task == "textvqa_val":
            return doc["answers"][0]
        return tasks.answer(doc) if task.startswith("vtc_") else doc["answer"]

    monkeypatch.setattr(type(model), "_answers", answers)
    monkeypatch.setattr(type(model), "_report", lambda *_: None)
    loaded = suites.load_tasks(
        ("vtc_scenes", "vtc_pages", "pope", "mme", "gqa", "textvqa_val", "scienceqa_img", "ai2d")
    )
    found = evaluated(model, loaded, limit=8)["results"]
    assert found["vtc_scenes"]["accuracy,none"] == found["vtc_pages"]["accuracy,none"] == 1
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


def test_sounds_are_refused():
    from vtc.eval.suite_model import document

    with pytest.raises(NotImplementedError, match="no sound"):
        document([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}], 4)


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
