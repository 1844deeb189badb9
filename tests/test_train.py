"""What learns or searches: ATP's modules, the tuning, and the measure of score maps; on a tiny checkpoint."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from eval_fixtures import run_vtc, save_tiny
from models import FAMILIES
from PIL import Image

import vtc
from vtc.eval import atp, faithfulness, lessons, pages, scenes, tune
from vtc.eval.album import QUESTIONS
from vtc.eval.reader import Reader, load
from vtc.methods.vflowopt import VFlowOpt


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train") / "model"
    save_tiny(folder)
    return folder


def recipe(checkpoint, **changes):
    return replace(atp.Recipe(model=str(checkpoint), budget=0.4, steps=60, batch_size=4), **changes)


def test_atp_learns_its_budget_and_wrap_finds_it(checkpoint):
    trained = atp.train(recipe(checkpoint))
    reader = load(str(checkpoint), "cpu")
    assert torch.equal(
        vtc.wrap(reader.model, "atp", 0.4).vtc.method.modules[0].mix.weight, trained.modules[0].mix.weight
    )
    examples = scenes.load("test", 32)
    reader.answers(reader.inputs([e.image for e in examples], [e.question for e in examples]), 1)
    assert reader.model.vtc.trace.average_tokens.mean().item() / 16 == pytest.approx(0.4, abs=0.08)
    with pytest.raises(vtc.BudgetError, match=r"not for 0\.3") as error:
        vtc.wrap(reader.model, "atp", 0.3)
    assert error.value.floor == 0.4
    with pytest.raises(ValueError, match=r"not for 0\.6: train them"):
        vtc.wrap(reader.model, "atp", 0.6)
    report = json.loads((checkpoint / "atp" / "0.4" / "report.json").read_text())["spread"]
    assert report["average"]["mean"] == pytest.approx(0.4, abs=0.08)
    assert report["questions"] == 256
    shutil.rmtree(checkpoint / "atp")


@pytest.mark.parametrize("budget", [0.35, 0.7])
def test_thresholds_are_moved_to_the_budget_and_left_alone_where_they_meet_it(checkpoint, budget):
    reader = load(str(checkpoint), "cpu")
    asked = recipe(checkpoint, budget=budget, batch_size=8)
    torch.manual_seed(0)
    method = atp.Atp().untrained(vtc.adapter.find(reader.model).shape(), 8)
    bias = method.modules.eval()[0].redundant.bias.clone()
    moved = atp.calibrated(reader, method, asked)
    prompts = (lessons.questions(reader, asked, asked.steps + n)[1] for n in range(atp.CALIBRATING))
    assert atp.shares(reader, moved, prompts).mean().item() == pytest.approx(budget, abs=0.01)
    assert torch.equal(method.modules[0].redundant.bias, bias)
    assert atp.calibrated(reader, moved, asked) is moved


def test_atp_training_resumes_as_if_it_had_never_stopped(checkpoint, tmp_path, monkeypatch):
    whole = atp.train(recipe(checkpoint, steps=52), tmp_path / "whole")
    calls, loss = [], atp._loss

    def killed(*args):
        calls.append(args)
        if len(calls) == 51:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(atp, "_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        atp.train(recipe(checkpoint, steps=52), tmp_path / "torn")
    with pytest.raises(ValueError, match="another recipe"):
        atp.train(recipe(checkpoint, steps=53), tmp_path / "torn")
    again = atp.train(recipe(checkpoint, steps=52), tmp_path / "torn")
    assert len(calls) == 53  # 50 saved, one torn, two after it
    for a, b in zip(whole.modules.parameters(), again.modules.parameters(), strict=True):
        assert torch.equal(a, b)


def test_soft_tokens_count_as_the_trace_does(checkpoint):
    """Hard gates make the soft count the layer average of the trace."""
    reader = load(str(checkpoint), "cpu")
    inputs, _ = atp._batch(reader, recipe(checkpoint), 0)
    torch.manual_seed(0)
    method = atp.Atp().untrained(vtc.adapter.find(reader.model).shape(), 8)
    with torch.no_grad():
        with vtc.compressed(reader.model, replace(method, sharpness=1e6, modules=method.modules.train())) as soft:
            reader.model(**inputs)
        average, _ = atp.soft_tokens(soft.record)
        with vtc.compressed(reader.model, replace(method, modules=method.modules.eval())) as hard:
            reader.model(**inputs)
    assert average.item() == pytest.approx(hard.average_tokens.mean().item() / 16, abs=1e-4)


def test_atp_trains_on_the_gates_of_the_question_alone(checkpoint, monkeypatch):
    """The answers that the loss is of do not change what the modules see."""
    reader, seen, soft_tokens = load(str(checkpoint), "cpu"), [], atp.soft_tokens
    inputs, answered = atp._batch(reader, recipe(checkpoint), 0)
    del inputs["labels"]
    question = {name: x[:, :-answered] if name in ("input_ids", "attention_mask") else x for name, x in inputs.items()}
    torch.manual_seed(0)
    method = atp.Atp().untrained(vtc.adapter.find(reader.model).shape(), 8)
    method.modules.train()
    monkeypatch.setattr(atp, "soft_tokens", lambda trace: (seen.append(trace), soft_tokens(trace))[1])
    atp._loss(reader, method, recipe(checkpoint), 0)
    with vtc.compressed(reader.model, method) as trace:
        reader.model(**question)
    for trained, used in zip(seen[0].stages, trace.stages, strict=True):
        torch.testing.assert_close(trained.gate, used.gate, atol=1e-5, rtol=1e-5)


def test_tune_finds_no_worse_than_the_defaults_and_writes_a_method(checkpoint, tmp_path):
    for number in range(5):
        Image.effect_noise((40, 40), 90 + number).convert("RGB").save(tmp_path / f"{number}.png")
    (tmp_path / "asked.txt").write_text("what color?")
    search = tune.Search(str(checkpoint), "vflowopt", 0.25, str(tmp_path), tmp_path / "asked.txt", samples=4, trials=12)
    best, similarity, defaults = tune.tune(search, tmp_path / "best.json")
    assert similarity >= defaults - 1e-6
    assert best != VFlowOpt()
    model = load(str(checkpoint), "cpu").model
    assert vtc.wrap(model, vtc.find_method(tmp_path / "best.json"), 0.25).vtc.method == best


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "gemma3"])
def test_tune_searches_what_the_model_can_do(family, capsys):
    reader = Reader(FAMILIES[family].model, None)
    left_out = {"alpha"} if family.startswith("qwen") else set()
    assert set(tune.searched(reader, VFlowOpt())) == set(VFlowOpt.space) - left_out
    assert ("alpha stays as it is: this method looks at the pixels" in capsys.readouterr().err) is bool(left_out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "fastv", "budget": 0.01}, "none of 1 combinations"),
        ({"method": "random"}, "nothing to tune"),
        ({"method": "magic"}, "unknown method"),
        ({"images": "."}, "no image"),
    ],
)
def test_tune_says_what_is_wrong(checkpoint, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        tune.tune(
            replace(tune.Search(str(checkpoint), images="scenes", samples=2, trials=1), **changes), tmp_path / "x"
        )


def test_what_is_asked_about_a_folder(tmp_path):
    """As `vtc choose` reads it: images without a question are left out, and one may have several."""
    for number in range(4):
        scenes.example("val", 0, number).image.save(tmp_path / f"{number}.png")
    lines = [{"image": f"{n}.png", "question": f"{text} {n}?"} for n in (0, 2, 3) for text in ("what", "where")]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    search = tune.Search(images=str(tmp_path), questions=tmp_path / "asked.jsonl", samples=2)
    images, questions = tune._folder(search)
    asked = [int(question[-2]) for question in questions]
    assert [question.split()[0] for question in questions] == ["what", "where"] * 2
    assert asked[0] == asked[1] != asked[2] == asked[3]
    assert 1 not in asked
    assert all(scenes.example("val", 0, n).image == image for n, image in zip(asked, images, strict=True))
    assert len(tune._folder(replace(search, samples=9))[1]) == 6
    assert set(tune._folder(replace(search, questions=None, samples=9))[1]) == set(QUESTIONS)


def test_a_benchmark_searches_on_its_training_split():
    images, questions = tune._benchmark(tune.Search(images="pages", samples=3, seed=5))
    expected = [pages.example("train", 5, number) for number in range(3)]
    assert list(zip(images, questions, strict=True)) == [(one.image, one.question) for one in expected]


def test_benchmarks_teach_in_turn(checkpoint):
    reader = load(str(checkpoint), "cpu")
    recipe = lessons.Recipe(batch_size=2, seed=7, benchmarks=("scenes", "pages"))
    read = [[one.question for one in lessons.questions(reader, recipe, step)[0]] for step in range(4)]
    for step, (benchmark, first) in enumerate([(scenes, 0), (pages, 0), (scenes, 2), (pages, 2)]):
        assert read[step] == [benchmark.example("train", 7, first + n).question for n in range(2)]
    held = [(one.question_id, one.question) for one in lessons.unseen(recipe, 6)]
    expected = [one for benchmark in (scenes, pages) for one in benchmark.load("val", 3, 7)]
    assert held == [(one.question_id, one.question) for one in expected]


class Occlusion(vtc.Method):
    """The ground truth itself as a method: its scores are the losses, or their opposite."""

    name = "occlusion"

    def __init__(self, losses, sign):
        self.losses, self.sign = losses, sign

    def stages(self, shape):
        return (vtc.Stage(0, lambda seen: self.sign * self.losses[None]),)


def test_the_ground_truth_is_perfectly_faithful_and_its_opposite_is_not(checkpoint):
    reader = load(str(checkpoint), "cpu")
    example = scenes.load("test", 1)[0]
    inputs = reader.inputs([example.image], [example.question])
    places = (inputs["input_ids"][0] == reader.model.config.image_token_id).nonzero()[:, 0]
    every = torch.ones(1, 16, dtype=torch.bool)
    answer = faithfulness._next_log_probabilities(reader, inputs, every, places).argmax()
    losses = -faithfulness._answer(reader, inputs, ~torch.eye(16, dtype=torch.bool), places, answer)
    rows = []
    for sign in (1, -1):
        method = Occlusion(losses, sign)
        method.ratios = lambda: (0.5,)
        rows += faithfulness.faithfulness(reader, [example], [method])
    assert [row["spearman"] for row in rows] == pytest.approx([1, -1])
    assert rows[0]["deletion"] < rows[1]["deletion"]
    assert rows[0]["insertion"] > rows[1]["insertion"]


def test_hiding_tokens_is_dropping_them(checkpoint):
    reader = load(str(checkpoint), "cpu")
    examples = scenes.load("test", 1)
    inputs = reader.inputs([examples[0].image], [examples[0].question])
    places = (inputs["input_ids"][0] == reader.model.config.image_token_id).nonzero()[:, 0]
    every = torch.ones(1, 16, dtype=torch.bool)
    plain = reader.model(**inputs).logits[:, -1].log_softmax(-1)
    torch.testing.assert_close(faithfulness._next_log_probabilities(reader, inputs, every, places), plain)
    vtc.wrap(reader.model, "random", 4)  # hiding the tokens that a method drops is what the method does
    pruned = reader.model(**inputs).logits[:, -1].log_softmax(-1)
    keep = torch.zeros(1, 16, dtype=torch.bool)
    keep[0, reader.model.vtc.trace.kept()[0]] = True
    vtc.unwrap(reader.model)
    hidden = faithfulness._next_log_probabilities(reader, inputs, keep, places)
    torch.testing.assert_close(hidden, pruned, atol=1e-4, rtol=1e-4)


# -- the commands -----------------------------------------------------------------------------------------------------


def succeeded(*arguments):
    done = run_vtc(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bench_prints_ratios_and_writes_them(checkpoint, tmp_path):
    options = ("--shape", checkpoint, "--budgets", "4", "--rounds", "1", "--new-tokens", "2", "--out", tmp_path)
    printed = succeeded("bench", *options)
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert row["tokens"] == {"full": 16, "average": 4.0, "last": 4, "text": 60}
    assert f"{row['full']['kv_bytes'] / row['pruned']['kv_bytes']:.2f}x" in printed
    assert row["full"]["kv_bytes"] / row["pruned"]["kv_bytes"] == pytest.approx(76 / 64)
    assert Image.open(tmp_path / "bench.png").width > 100


def test_train_tune_and_compare_from_the_command_line(checkpoint, tmp_path):
    modules, tuned, out = tmp_path / "atp", tmp_path / "tuned.json", tmp_path / "out"
    succeeded("train", "atp", "--model", checkpoint, "--budget", "0.5", "--steps", "2", "--out", modules)
    assert {file.name for file in modules.iterdir()} == {"config.json", "model.safetensors", "report.json"}
    sizes = ("--samples", "2", "--trials", "2")
    succeeded("tune", "--model", checkpoint, "--method", "transprune", "--budget", "0.5", *sizes, "--out", tuned)
    succeeded("eval", "--model", checkpoint, "--methods", tuned, "--budgets", "0.5", "--limit", "2", "--out", out)
    assert {row["method"] for row in json.loads((out / "summary.json").read_text())} == {"full", "blind", str(tuned)}
    faithful = ("--methods", "vtc-cls,random", "--limit", "2", "--out", out)
    assert "spearman" in succeeded("faithfulness", "--model", checkpoint, *faithful)
    rows = json.loads((out / "faithfulness.json").read_text())
    assert [(row["method"], row["n"]) for row in rows] == [("vtc-cls", 2), ("random", 2)]
