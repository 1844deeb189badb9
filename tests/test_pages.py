"""The dense benchmark: deterministic, disjoint splits, right answers, no answer without looking, ink everywhere."""

from __future__ import annotations

import json
import re
from collections import Counter
from random import Random
from statistics import mean, pstdev

import pytest

from vtc.eval import pages, scenes, tasks
from vtc.eval.pages import KINDS, LEVELS, SIDE, TASKS, Page, content
from vtc.eval.pages.content import MARKERS, WORDS, Fact
from vtc.eval.reference import data
from vtc.eval.reference.model import PRESETS
from vtc.eval.scenes import COLORS, SHAPES, Example


@pytest.fixture(scope="module")
def test_set() -> list[Example]:
    return pages.load("test", limit=144)


def pixels(example: Example) -> bytes:
    return example.image.tobytes()


def test_the_same_twice_and_whatever_the_limit(test_set):
    again = pages.load("test", limit=14)
    assert [(e.question_id, e.question, e.answer) for e in again] == [
        (e.question_id, e.question, e.answer) for e in test_set[:14]
    ]
    assert [pixels(e) for e in again] == [pixels(e) for e in test_set[:14]]


def test_seeds_and_splits_share_no_image(test_set):
    others = [*pages.load("train", limit=36), *pages.load("val", limit=36), *pages.load("test", limit=36, seed=1)]
    assert not {pixels(e) for e in test_set} & {pixels(e) for e in others}
    assert not {e.question_id for e in test_set} & {e.question_id for e in others}


def test_what_a_page_says_belongs_to_one_split_alone():
    """The rule that `write` follows is asked of the text alone, whatever was drawn around it."""
    shares = {split: set() for split in ("train", "val", "test")}
    for split, share in shares.items():
        for index in range(60):
            page = pages.write(split, KINDS[index % 6], LEVELS[index % 3], Random(index))
            share.add(content.share(page.facts))
    assert set.union(*shares.values()) <= set(range(10))
    assert not shares["train"] & shares["test"]
    assert not shares["train"] & shares["val"]
    assert not shares["val"] & shares["test"]


@pytest.mark.parametrize("benchmark", [pages, scenes])
def test_lmms_eval_scores_every_task(benchmark):
    name = benchmark.__name__.rpartition(".")[2]
    (source,) = [json.loads(line) for line in (tasks.PATH / f"vtc_{name}.json").read_text().splitlines()]
    doc = {**source, "index": 5}
    expected = benchmark.example("test", 0, 5)
    assert (tasks.question(doc), tasks.answer(doc)) == (expected.question, expected.answer)
    assert tasks.images(doc)[0].tobytes() == expected.image.tobytes()
    assert tasks.score(doc, [expected.answer]) == {"accuracy": 1, f"accuracy_{expected.task}": 1}
    metrics = re.findall(r"metric: (\w+)", (tasks.PATH / f"vtc_{name}.yaml").read_text())
    assert metrics == ["accuracy", *(f"accuracy_{task}" for task in benchmark.TASKS)]


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train, val, test"):
        pages.load("dev", limit=1)


def test_tasks_and_levels_take_turns_and_answers_are_single_words(test_set):
    assert [e.task for e in test_set[: len(TASKS)]] == list(TASKS)
    assert len({e.question_id for e in test_set}) == len(test_set)
    for example in test_set:
        assert example.image.size == (SIDE, SIDE)
        assert example.image.mode == "RGB"
        assert re.fullmatch(r"[a-z]+|\d", example.answer), example


def test_a_denser_level_says_more_and_any_page_more_than_scenes(test_set):
    at = {level: test_set[12 * i : 12 * i + 12] for i, level in enumerate(LEVELS)}
    for sparse, dense in ((1, 2), (2, 3)):
        for one, other in zip(at[sparse], at[dense], strict=True):
            assert one.task == other.task
            assert one.density < other.density
    sparse_scenes = mean(example.density for example in scenes.load("test", limit=60))
    assert mean(example.density for example in at[3]) > 3 * sparse_scenes


def test_the_words_are_those_of_matplotlibs_list():
    from matplotlib.colors import XKCD_COLORS

    shipped = {word for name in XKCD_COLORS for word in re.split(r"\W", name.removeprefix("xkcd:"))}
    assert set(WORDS) <= shipped
    assert len(set(WORDS)) == len(WORDS)
    assert not set(WORDS) & {*COLORS, *SHAPES}, "a word that is an answer of another kind"


def test_the_best_blind_guess_is_poor():
    """The most frequent answer to each form of question, known beforehand, is near the prior of its answers."""
    names = "|".join(rf"\b{name}\b" for name in [*WORDS, *COLORS, *SHAPES, *MARKERS, r"\d"])
    answers: dict[str, Counter[str]] = {}
    for index in range(3600):
        task = TASKS[index % len(TASKS)]
        random = Random(f"blind {index}")
        page = pages.write("test", content.kind_of(task), LEVELS[index // len(TASKS) % 3], random)
        question, answer = content.ask(page, task, random)
        answers.setdefault(task + re.sub(names, "_", question), Counter())[answer] += 1
    best = {form: count.most_common(1)[0][1] / count.total() for form, count in answers.items()}
    assert len(best) == len(TASKS), best
    prior = {"count": 1 / 4, "cell": 0.075, "price": 1 / 10, "bar": 1 / 8, "odd": 1 / 6, "side": 1 / 2}
    for form, part in best.items():
        task = next(task for task in TASKS if form.startswith(task))
        assert part < prior.get(task, 1 / len(WORDS)) + 0.08, form
    half = {form: 0.5 for form in best if form.startswith("north")}  # of the two that the question names
    assert mean((best | half).values()) < 0.2


def test_the_wording_of_a_comparison_says_nothing():
    """Neither of the two that are compared is more often the answer."""
    first = []
    for index in range(300):
        random = Random(f"order {index}")
        page = pages.write("test", "map", LEVELS[index % 3], random)
        question, answer = content.ask(page, "north", random)
        first.append(re.search(r"north, (\w+) or", question)[1] == answer)
    assert 0.4 < mean(first) < 0.6


def in_row(page: Page, kind: str, fact: Fact) -> list[Fact]:
    """Facts of a kind whose ink stands beside a fact's, from left to right."""
    beside = [f for f in page.facts if f.kind == kind and abs(f.center[1] - fact.center[1]) < 5]
    return sorted(beside, key=lambda f: f.center[0])


def only(page: Page, kind: str, name: str) -> Fact:
    (fact,) = [f for f in page.facts if f.kind == kind and f.name == name]
    return fact


def after(page: Page, fact: Fact, kind: str) -> Fact:
    return next(f for f in in_row(page, kind, fact) if f.center[0] > fact.center[0])


def in_table(page: Page) -> dict[tuple[str, str], Fact]:
    """Cells by their head and label, by where the ink stands."""
    top = min(fact.center[1] for fact in page.facts)
    heads = sorted((f for f in page.facts if f.center[1] < top + 5), key=lambda f: f.center[0])
    labels = [f for f in page.facts if f.center[0] < 3 + 116 / (len(heads) + 1) and f not in heads]
    cells = {}
    for label in labels:
        beside = sorted([*in_row(page, "word", label), *in_row(page, "digit", label)], key=lambda f: f.center[0])
        assert beside.pop(0) == label
        cells |= {(head.name, label.name): cell for head, cell in zip(heads, beside, strict=True)}
    return cells


def checked(page: Page, question: str) -> str:
    """The answer, worked out from where the ink of each fact stands."""
    if found := re.fullmatch(r"which word comes after (\w+)\?", question):
        return after(page, only(page, "word", found[1]), "word").name
    if found := re.fullmatch(r"how many times is the word (\w+) there\?", question):
        return ("", "one", "two", "three", "four")[sum(f.name == found[1] for f in page.facts)]
    if found := re.fullmatch(r"what is the (\w+) of (\w+)\?", question):
        return in_table(page)[found[1], found[2]].name
    if found := re.fullmatch(r"which row has the most (\w+)\?", question):
        column = {label: int(cell.name) for (head, label), cell in in_table(page).items() if head == found[1]}
        (best,) = [label for label, value in column.items() if value == max(column.values())]
        return best
    if found := re.fullmatch(r"what does the (\w+) cost\?", question):
        return after(page, only(page, "word", found[1]), "digit").name
    if found := re.fullmatch(r"which item costs (\d)\?", question):
        price = only(page, "digit", found[1])
        return [f for f in in_row(page, "word", price) if f.center[0] < price.center[0]][-1].name
    if found := re.fullmatch(r"what color is the bar of (\w+)\?", question):
        return after(page, only(page, "word", found[1]), "bar").name
    if question == "which bar is the longest?":
        longest = max((f for f in page.facts if f.kind == "bar"), key=lambda f: f.box[2] - f.box[0])
        return in_row(page, "word", longest)[0].name
    if found := re.fullmatch(r"what is at the (\w+) (\w+)\?", question):
        (marker,) = [f for f in page.facts if f.kind == "place" and (f.of[0], f.name) == found.groups()]
        return after(page, marker, "word").name
    if found := re.fullmatch(r"which is further north, (\w+) or (\w+)\?", question):
        return min(found.groups(), key=lambda name: only(page, "word", name).center[1])
    times = Counter(f.name for f in page.facts)
    if question == "which shape is there only once?":
        (once,) = [name for name, count in times.items() if count == 1]
        return once
    found = re.fullmatch(r"is the (\w+) on the left or right\?", question)
    return "left" if only(page, "shape", found[1]).center[0] < SIDE / 2 else "right"


def test_answers_are_right():
    seen = Counter()
    for index in range(90):
        _, page, asked = pages.training_page("train", 0, index)
        for task, question, answer in asked:
            assert checked(page, question) == answer, (question, page)
            seen[task, page.level] += 1
    assert set(seen) == {(task, level) for task in TASKS for level in LEVELS}


def test_ink_is_in_sight_and_in_its_own_place():
    for index in range(60):
        image, page, _ = pages.training_page("train", 1, index)
        grey = image.convert("L")
        taken = set()
        for fact in page.facts:
            left, top, right, bottom = fact.box
            assert 0 <= left < right <= SIDE, fact
            assert 0 <= top < bottom <= SIDE, fact
            cells = {(x, y) for x in range(left, right) for y in range(top, bottom)}
            assert not cells & taken, fact
            taken |= cells
            low, high = grey.crop(fact.box).getextrema()
            assert high - low >= (20 if fact.kind == "shape" else 60 if fact.kind in ("word", "digit") else 0), fact


def test_paper_has_a_grain_up_to_the_edge():
    """There is no border to throw away: every edge of a page is as bright and as rough as the page's ground."""
    for index in range(24):
        image, _, _ = pages.training_page("test", 2, index)
        grey = image.convert("L")
        edges = [(0, 0, SIDE, 8), (0, SIDE - 8, SIDE, SIDE), (0, 0, 8, SIDE), (SIDE - 8, 0, SIDE, SIDE)]
        assert all(pstdev(grey.crop(edge).tobytes()) > 1 for edge in edges), index


def test_pages_scale():
    small, large = (pages.draw(pages.write("train", "table", 3, Random(0)), "train", Random(1), s) for s in (120, 336))
    assert large[0].size == (336, 336)
    for one, other in zip(small[1].facts, large[1].facts, strict=True):
        assert (one.name, one.of) == (other.name, other.of)
        assert all(abs(2.8 * a - b) < 14 for a, b in zip(one.center, other.center, strict=True))


def test_training_asks_for_the_letters_where_they_stand():
    """Each letter of a word on the patches that it reaches with a third of their height, from left to right: so none of
    a word of four pixels' height that two rows of patches share."""
    preset = PRESETS["both"]
    for index in range(6):
        sample = data._sample("train", 0, "pages", index)
        for fact in (fact for fact in sample.things if fact.kind == "word"):
            left, top, right, bottom = fact.box
            width, found = (right - left) / len(fact.name), set()
            for patch in fact.patches(8, 15):
                said = data._letters(sample, fact, patch, preset)
                x, y = patch % 15 * 8, patch // 15 * 8
                reached = [
                    (number, letter)
                    for number, letter in enumerate(fact.name)
                    if left + number * width < x + 8 and left + (number + 1) * width > x
                ]
                high = sum(top <= row < bottom for row in range(y, y + 8)) >= 3
                assert said == [data.encode(letter, preset.benchmarks)[0] for _, letter in reached if high]
                found |= {number for number, _ in reached if high}
            assert len(found) == (0 if bottom - top == 4 and top % 8 == 6 else len(fact.name))


def test_a_caption_lists_facts_in_reading_order():
    facts = (Fact("word", "egg", (0, 0, 8, 8)), Fact("digit", "4", (40, 0, 48, 8), ("egg",)))
    assert pages.caption(facts) == "word egg, egg digit 4"
    assert pages.caption(()) == "nothing"
