"""Which questions need the image: whose image is shown instead, who counts, and what a run says of it."""

import json
from dataclasses import replace
from random import Random

import pytest
from eval_fixtures import read_lines, run_vtc, tiny  # noqa: F401 (a fixture)
from PIL import Image

from vtc.eval import mis, run, scenes


def example(number, task, answer):
    return scenes.Example(str(number), task, Image.new("L", (1, 1), number), "what", answer)


def shown(examples, seed=0):
    """The number of the question whose image each one is shown."""
    return {key: image.getpixel((0, 0)) for key, image in mis.others(examples, seed).items()}


def test_another_image_is_of_the_same_task_and_another_answer():
    examples = [example(i, "ab"[i % 2], "xyz"[i % 3]) for i in range(30)]
    for key, other in shown(examples).items():
        assert examples[other].task == examples[int(key)].task
        assert examples[other].answer != examples[int(key)].answer
    assert shown(examples) == shown(examples)
    assert shown(examples, seed=1) != shown(examples)


def test_another_image_where_there_is_little_choice():
    alone_in_its_task = [example(0, "a", "x"), example(1, "b", "x"), example(2, "b", "y")]
    assert shown(alone_in_its_task)["0"] == 2
    same_answer = [example(0, "a", "x"), example(1, "a", "x")]
    assert shown(same_answer) == {"0": 1, "1": 0}
    assert shown(same_answer[:1]) == {}


def slowly(examples, seed):
    """By its definition: all that may be shown are looked at for each question."""
    found = {}
    for one in examples:
        rest = [other for other in examples if other.question_id != one.question_id]
        unlike = [other for other in rest if other.answer != one.answer] or rest
        akin = [other for other in unlike if other.task == one.task] or unlike
        drawn = Random(f"{seed}/{one.question_id}").choice(akin)
        found[one.question_id] = drawn.image.getpixel((0, 0))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_another_image_is_drawn_of_all_that_may_be_shown(seed):
    rng = Random(seed)
    tasks, answers = ["abcd"[: rng.randint(1, 4)] for _ in "ab"]
    examples = [example(i, rng.choice(tasks), rng.choice(answers)) for i in range(rng.randint(2, 40))]
    assert shown(examples, seed) == slowly(examples, seed)


def test_not_every_answer_is_compared_with_every_other():
    compared = []

    class Answer(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            compared.append(other)
            return str.__eq__(self, other)

        def __ne__(self, other):
            compared.append(other)
            return str.__ne__(self, other)

    examples = [example(i % 256, "ab"[i % 2], Answer(i % 5)) for i in range(300)]
    examples = [replace(one, question_id=str(i)) for i, one in enumerate(examples)]
    assert len(mis.others(examples, seed=0)) == 300
    assert len(compared) < 10 * 300


def line(correct, task="a", agrees=True, tokens=4.0):
    return {"correct": correct, "agrees": agrees, "tokens": tokens, "task": task, "at_floor": False}


def test_what_needs_the_image():
    assert mis.needs_image(line(True), line(False))
    assert not mis.needs_image(line(True), line(True))
    assert not mis.needs_image(line(False), line(False))
    assert mis.needs_image(line(0.6), line(0.3))
    assert not mis.needs_image(line(None), line(None))


def test_the_curve_on_those_that_need_it_by_hand():
    marks = {  # five questions: full right on four, blind right on one of these
        ("full", 1.0): [1, 1, 1, 1, 0],
        ("blind", 0): [1, 0, 0, 0, 1],
        (mis.SWAPPED, 1.0): [1, 1, 0, 0, 0],
        ("uniform", 0.5): [0, 1, 1, 0, 1],
    }
    groups = [
        (*arm, True, [line(bool(mark), task="abbbb"[i]) for i, mark in enumerate(row)]) for arm, row in marks.items()
    ]
    found = mis.needing(groups, seed=0)
    assert (found["questions"], found["needing"], found["by_task"]) == (5, 3, {"b": 3})
    assert (found["swapped"], found["swapped_needing"]) == (2 / 5, 1 / 3)
    assert {row["method"]: (row["accuracy"], row["n"]) for row in found["rows"]} == {
        "full": (1.0, 3), "blind": (0.0, 3), "uniform": (2 / 3, 3),
    }  # fmt: skip
    assert found["rows"][2]["accuracy_low"] < 2 / 3


def test_where_no_question_needs_the_image():
    groups = [("full", 1.0, True, [line(False)]), ("blind", 0, True, [line(False)])]
    found = mis.needing(groups, seed=0)
    assert (found["needing"], found["rows"], found["swapped"]) == (0, [], None)


@pytest.fixture(scope="module")
def ran(tiny, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("mis") / "run"
    done = run_vtc(
        *("eval", "--model", tiny, "--methods", "uniform", "--budgets", "0.5", "--limit", 8, "--batch-size", 3),
        *("--max-new-tokens", 3, "--device", "cpu", "--out", out),
    )
    assert done.returncode == 0, done.stderr
    return out, done


def test_the_swapped_question_is_asked_about_the_other_image(ran, tiny):  # noqa: F811
    from vtc.eval.reader import load

    reader, examples = load(str(tiny), "cpu", 3), scenes.load("test", 8)
    images = mis.others(examples, seed=0)
    said = {line["question_id"]: line["prediction"] for line in read_lines(ran[0]) if line["method"] == mis.SWAPPED}
    for example in examples:
        inputs = reader.inputs([images[example.question_id]], [example.question])
        assert reader.answers(inputs) == [said[example.question_id]]


def test_a_run_says_how_many_need_the_image_and_keeps_its_summary(ran):
    out, done = ran
    found = json.loads((out / "needs-image.json").read_text())
    assert f"{found['needing']} of 8 questions need the image" in done.stdout
    assert [row["method"] for row in json.loads((out / "summary.json").read_text())] == ["full", "blind", "uniform"]
    marks = {}
    for answered in read_lines(out):
        marks.setdefault(answered["method"], []).append(answered["correct"])
    needing = [full and not blind for full, blind in zip(marks["full"], marks["blind"], strict=True)]
    assert found["needing"] == sum(needing)
    assert found["swapped"] == sum(marks[mis.SWAPPED]) / 8


def test_the_shipped_model_needs_the_image_for_most(tmp_path):
    settings = run.Settings(methods=("uniform",), budgets=(0.25,), limit=27, device="cpu")
    run.evaluate(settings, tmp_path)
    found = json.loads((tmp_path / "needs-image.json").read_text())
    assert found["needing"] >= 14
    assert found["swapped_needing"] < 0.5
    assert (tmp_path / "needs-image.png").exists()
    assert found["rows"][2]["accuracy"] < 1 == found["rows"][0]["accuracy"]
