"""The benchmark: deterministic, disjoint splits, right answers, no answer to be had without looking."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from vtc.eval import material, scenes
from vtc.eval.scenes import COLORS, COUNTS, SHAPES, TASKS, Scene, Thing


@pytest.fixture(scope="module")
def test_set() -> list[scenes.Example]:
    return scenes.load("test", limit=360)


def pixels(example: scenes.Example) -> bytes:
    return example.image.tobytes()


def test_the_same_twice_and_whatever_the_limit(test_set):
    again = scenes.load("test", limit=20)
    assert [(e.question_id, e.question, e.answer) for e in again] == [
        (e.question_id, e.question, e.answer) for e in test_set[:20]
    ]
    assert [pixels(e) for e in again] == [pixels(e) for e in test_set[:20]]


def test_seeds_and_splits_share_no_image(test_set):
    others = [*scenes.load("train", limit=60), *scenes.load("val", limit=60), *scenes.load("test", limit=60, seed=1)]
    assert not {pixels(e) for e in test_set} & {pixels(e) for e in others}
    assert not {e.question_id for e in test_set} & {e.question_id for e in others}


def test_splits_share_no_real_material():
    digits = {split: [mask.tobytes() for _, mask in material.digits(split)] for split in ("train", "val", "test")}
    assert sum(map(len, digits.values())) == 1797
    assert not set(digits["train"]) & set(digits["test"])
    assert not set(digits["train"]) & set(digits["val"])
    columns = sorted(material.COLUMNS.values())
    assert all(end <= start for (_, end), (start, _) in pairwise(columns))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train, val, test"):
        scenes.load("dev", limit=1)


def test_tasks_take_turns_and_answers_are_single_words(test_set):
    assert [e.task for e in test_set[: len(TASKS)]] == list(TASKS)
    assert len({e.question_id for e in test_set}) == len(test_set)
    for example in test_set:
        assert example.image.size == (96, 96)
        assert example.image.mode == "RGB"
        assert re.fullmatch(r"[a-z]+|\d", example.answer), example


def test_the_best_blind_guess_is_poor():
    """The most frequent answer to each question, known beforehand, is right in far less than half of the cases."""
    answers: dict[str, Counter[str]] = {}
    tasks: dict[str, Counter[str]] = {}
    for index in range(900):
        _, asked = scenes.training_scene("test", 0, index)
        for task, question, answer in asked:
            form = re.sub(rf"(?<=the )(\w+)|{'|'.join([*COLORS, *SHAPES])}", "_", question)
            answers.setdefault(form, Counter())[answer] += 1
            tasks.setdefault(task, Counter())[answer] += 1
    best = {form: count.most_common(1)[0][1] / count.total() for form, count in answers.items()}
    assert max(best.values()) < 0.62, best
    majority = {task: count.most_common(1)[0][1] / count.total() for task, count in tasks.items()}
    assert sum(majority.values()) / len(majority) < 0.35, majority
    assert set(majority) == set(TASKS)


def checked(scene: Scene, question: str) -> str:
    """The answer, worked out from the things by rules of its own."""
    named = {thing.noun: [t for t in scene.things if t.noun == thing.noun] for thing in scene.things}

    def only(noun: str) -> Thing:
        (thing,) = named[noun]
        return thing

    if found := re.fullmatch(r"what color is the (\w+)\?", question):
        return only(found[1]).color
    if found := re.fullmatch(r"which shape is (\w+)\?", question):
        (thing,) = [t for t in scene.things if t.kind == "shape" and t.color == found[1]]
        return thing.name
    if found := re.fullmatch(r"is there a (\w+) (\w+)\?", question):
        return "yes" if any((t.color, t.name) == found.groups() for t in scene.things) else "no"
    if question == "how many shapes are there?":
        return COUNTS[sum(t.kind == "shape" for t in scene.things)]
    if found := re.fullmatch(r"what (digit|word) is it\?", question):
        return only(found[1]).name
    if found := re.fullmatch(r"is the (\w+) left or right of the (\w+)\?", question):
        one, other = only(found[1]).box, only(found[2]).box
        return "left" if one[0] + one[2] < other[0] + other[2] else "right"
    found = re.fullmatch(r"is the (\w+) on the (left|top) or (right|bottom)\?", question)
    left, top, right, bottom = only(found[1]).box
    near = (left + right if found[2] == "left" else top + bottom) < scene.image.width
    return found[2] if near else found[3]


def test_answers_are_right():
    for index in range(200):
        scene, asked = scenes.training_scene("train", 0, index)
        assert len(asked) >= 5
        for _, question, answer in asked:
            assert checked(scene, question) == answer, (question, scene.things)


def test_things_are_small_apart_and_in_sight():
    for index in range(100):
        scene, _ = scenes.training_scene("train", 1, index)
        size = scene.image.width
        covered = [set(thing.patches(8, 12)) for thing in scene.things]
        assert all(1 <= len(cells) <= 6 for cells in covered)
        assert sum(map(len, covered)) == len(set().union(*covered)), "two things on one patch"
        for thing in scene.things:
            assert 0 <= thing.box[0] < thing.box[2] <= size
            assert 0 <= thing.box[1] < thing.box[3] <= size
        for thing in (t for t in scene.shapes if t.name != "ring"):
            x, y = (round(c) for c in thing.center)
            far = max(abs(a - b) for a, b in zip(scene.image.getpixel((x, y)), COLORS[thing.color], strict=True))
            assert far <= 13, thing


def test_scenes_scale():
    scene = scenes.draw("train", Random(0), size=336)
    small = scenes.draw("train", Random(0), size=96)
    assert scene.image.size == (336, 336)
    assert Counter(t.kind for t in scene.things) == Counter(t.kind for t in small.things)
    assert max(t.box[2] - t.box[0] for t in scene.things) > 28


def test_a_caption_lists_things_in_reading_order():
    things = (
        Thing("shape", "circle", "red", (0, 0, 8, 8)),
        Thing("word", "cat", "blue", (40, 0, 60, 9)),
        Thing("dot", "dot", "cyan", (0, 40, 4, 44)),
    )
    assert scenes.caption(things) == "red circle, blue word cat, cyan dot"
    assert scenes.caption(()) == "nothing"
