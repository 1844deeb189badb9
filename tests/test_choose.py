"""`vtc choose`: the bound, the search, the promise on simulated images, a user's files, and the command."""

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from eval_fixtures import held, read_lines, run_vtc, start_vtc, tiny  # noqa: F401 (a fixture)
from PIL import Image

import vtc
from vtc.eval import album, choose, promise, run
from vtc.eval.choose import Candidate
from vtc.eval.reader import load
from vtc.methods.compose import with_budget

# -- the bound ------------------------------------------------------------------------------------------------------


def at_least(agreeing, images, share):
    """The chance of so many agreeing images or more, where each agrees with this chance: term by term."""
    return sum(math.comb(images, n) * share**n * (1 - share) ** (images - n) for n in range(agreeing, images + 1))


@pytest.mark.parametrize(("agreeing", "images"), [(149, 149), (1, 5), (90, 100), (290, 300)])
def test_below_the_bound_so_many_agree_in_one_of_twenty(agreeing, images):
    assert at_least(agreeing, images, choose.lower_bound(agreeing, images)) == pytest.approx(0.05, rel=1e-6)


def test_the_bound_of_none_is_zero():
    assert choose.lower_bound(0, 10) == 0


@pytest.mark.parametrize(("share", "images"), [(0.98, 149), (0.95, 59), (0.9, 29), (0.999, 2995)])
def test_how_many_images_a_promise_takes(share, images):
    assert choose.images_needed(share) == images
    assert choose.lower_bound(images, images) >= share > choose.lower_bound(images - 1, images - 1)


@pytest.mark.parametrize(("images", "share"), [(148, 0.98), (149, 0.98), (236, 0.98), (300, 0.9), (4, 0.01)])
def test_misses_allowed(images, share):
    keeps = [choose.lower_bound(images - misses, images) >= share for misses in range(images + 1)]
    assert choose.misses_allowed(images, share) == sum(keeps) - 1


def test_images_are_dealt_once():
    search, held = choose.deal(400, 0.9, seed=3)
    assert sorted(search + held) == list(range(400))
    assert len(search) == 100
    assert choose.deal(165, 0.98, seed=0)[1].__len__() == 149
    assert choose.deal(400, 0.9, seed=4)[0] != search


def test_too_few_images_say_how_many_it_takes():
    with pytest.raises(
        ValueError, match=r"120 images are too few: .*0\.98 .* 149 .* 165 in all; with these, 0\.971 is"
    ):
        choose.deal(120, 0.98, seed=0)
    with pytest.raises(ValueError, match=r"3 images are too few: .* in all$"):
        choose.deal(3, 0.98, seed=0)
    for share in (0.0, 1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="cannot be promised"):
            choose.deal(1000, share, seed=0)


# -- the search -----------------------------------------------------------------------------------------------------


class Fixed:
    """Candidates that agree on each image by a seeded coin; it counts what it is asked."""

    def __init__(self, chances, images=1000, seed=0):
        rng = np.random.default_rng(seed)
        self.answers = {candidate: rng.random(images) < chance for candidate, chance in chances.items()}
        self.asked = dict.fromkeys(chances, 0)

    def __call__(self, candidate, indices):
        if candidate not in self.answers:
            raise vtc.BudgetError("out of reach", floor=0.5)
        self.asked[candidate] += len(indices)
        return self.answers[candidate][list(indices)]


def test_halving_asks_the_better_half_about_twice_as_many():
    chances = {Candidate(name, 0.5): chance for name, chance in zip("abcd", (0.2, 0.9, 0.6, 0.1), strict=True)}
    agree = Fixed(chances)
    assert choose.halve(agree, "abcde", 0.5, range(100)) == "b"  # e cannot reach the budget
    assert [agree.asked[Candidate(name, 0.5)] for name in "abcd"] == [32, 64, 64, 16]
    assert choose.halve(agree, "e", 0.5, range(100)) is None


def test_among_equals_the_first_named_stays():
    agree = Fixed({Candidate(name, 0.5): 1.0 for name in "abc"})
    assert choose.halve(agree, "cab", 0.5, range(40)) == "c"


def test_rounds_double_and_end_with_one_method():
    assert list(choose.rounds(6, 100)) == [(range(16), 3), (range(16, 32), 2), (range(32, 64), 1)]
    assert list(choose.rounds(9, 40)) == [(range(16), 5), (range(16, 32), 3), (range(32, 40), 2)]


def test_the_cheapest_that_passes_is_taken_and_the_first_failure_ends_it():
    chances = {0.1: 1.0, 0.5: 0.97, 0.25: 0.7, 0.75: 1.0}
    agree = Fixed({Candidate("a", budget): chance for budget, chance in chances.items()})
    verdict = choose.choose(agree, list(agree.asked), 400, 0.9)
    assert verdict.chosen.candidate == Candidate("a", 0.5)
    assert [one.candidate.budget for one in verdict.tested] == [0.75, 0.5, 0.25]
    assert agree.asked[Candidate("a", 0.1)] == 0
    broken = verdict.tested[-1]
    assert not broken.passed
    assert broken.images < verdict.held  # it is not asked on when it has missed too many
    passed = verdict.tested[1]
    assert passed.images == verdict.held
    assert choose.lower_bound(passed.agreeing, verdict.held) >= 0.9
    *each, last = choose.sentences(verdict, 0.9)
    assert last == "take a at 50%: at least 90 % of images like these keep their answers, with 95% confidence"
    assert each[:2] == [
        f"a at {b}: {x.agreeing} of 300 as the full model"
        for b, x in zip(("75%", "50%"), verdict.tested[:2], strict=True)
    ]


def test_none_is_an_answer():
    candidates = [Candidate("a", 0.5)]
    verdict = choose.choose(Fixed({candidates[0]: 0.5}), candidates, 400, 0.9)
    assert verdict.chosen is None
    assert list(choose.sentences(verdict, 0.9))[-1].startswith("none: do not prune this, where 90 %")
    verdict = choose.choose(Fixed({}), candidates, 400, 0.9)
    assert (verdict.chosen, verdict.tested) == (None, [])
    assert list(choose.sentences(verdict, 0.9)) == ["none: no method reaches any of these budgets on this model"]


def test_a_candidate_that_cannot_be_run_on_a_held_out_image_has_not_passed():
    def agree(candidate, indices):
        if 39 in indices:
            raise vtc.BudgetError("out of reach", floor=0.5)
        return np.ones(len(indices), bool)

    found = choose.examine(agree, Candidate("a", 0.5), range(40), 0.8)
    assert not found.passed
    verdict = choose.Verdict(None, [found], 16, 40, 2)
    assert next(choose.sentences(verdict, 0.8)).endswith(
        "32 of 32 as the full model, and it cannot be run on all of them: out of reach"
    )


def test_fractions_and_numbers_of_tokens_have_no_order():
    with pytest.raises(ValueError, match="all fractions or all numbers"):
        choose.choose(Fixed({}), [Candidate("a", 0.5), Candidate("a", 64)], 400, 0.9)
    with pytest.raises(ValueError, match="all fractions or all numbers"):  # though 1 == 1.0
        choose.choose(Fixed({}), [Candidate("a", 1.0), Candidate("a", 1)], 400, 0.9)


# -- the promise ----------------------------------------------------------------------------------------------------


def test_a_promise_is_broken_in_at_most_one_of_twenty_sets():
    """The hardest case: every candidate is just below the promise, and there are many of them."""
    chances = {Candidate(name, budget): 0.899 for name in "abcd" for budget in (0.7, 0.5, 0.3, 0.1)}
    broken = 0
    for seed in range(400):
        verdict = choose.choose(Fixed(chances, 200, seed), list(chances), 200, 0.9, seed)
        broken += verdict.chosen is not None
    assert 4 <= broken <= 30  # 20 are expected at the most; more than 30 have a chance of 1 in 100


def test_the_simulation_counts_what_was_promised():
    rng = np.random.default_rng(0)
    found = {Candidate("a", 0.5): rng.random(600) < 0.99, Candidate("a", 0.25): rng.random(600) < 0.5}
    easy = promise.simulate(found, 0.9, 200, trials=20)
    assert (easy["pruned"], easy["kept"], easy["kept_unseen"]) == (1.0, 1.0, 1.0)
    assert easy["budget"] == 0.5
    hard = promise.simulate(found, 0.99, 400, trials=5)
    assert (hard["pruned"], hard["kept"], hard["budget"]) == (0.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="leave none unseen"):
        promise.simulate(found, 0.9, 600, trials=1)
    with pytest.raises(ValueError, match="shares of the tokens"):
        promise.simulate({Candidate("a", 64): found[Candidate("a", 0.5)]}, 0.9, 200, trials=1)


def test_the_simulation_takes_runs_of_one_model_and_benchmark(tiny, tmp_path):  # noqa: F811
    asked = run.Settings(str(tiny), ("uniform", "fastv"), (0.5, 0.05), limit=4, max_new_tokens=2, device="cpu")
    run.evaluate(asked, tmp_path / "a")
    assert list(promise.agreements(tmp_path / "a")) == [
        Candidate("uniform", 0.5),
        Candidate("uniform", 0.05),
        Candidate("fastv", 0.5),
    ]
    run.evaluate(replace(asked, benchmark="pages", methods=("random",)), tmp_path / "b")
    with pytest.raises(ValueError, match="several models or benchmarks"):
        promise.agreements(tmp_path / "a", tmp_path / "b")
    run.evaluate(replace(asked, methods=("fastv",), budgets=(0.05,)), tmp_path / "c")
    with pytest.raises(ValueError, match="no method reached"):
        promise.agreements(tmp_path / "c")


# -- a user's files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(24):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((32, 32)).save(
            folder / f"{number:02d}.png"
        )
    (folder / "copy.png").write_bytes((folder / "03.png").read_bytes())
    (folder / "notes.txt").write_text("no image")
    return folder


def test_a_copy_is_no_image_of_its_own(photos):
    files, digests = album.find_images(photos)
    assert [file.name for file in files] == [f"{number:02d}.png" for number in range(24)]
    assert len(set(digests)) == 24


def test_images_that_cannot_be_read_are_all_named(tmp_path):
    with pytest.raises(ValueError, match=r"no image \(\.bmp, .*\.webp\) in"):
        album.find_images(tmp_path)
    for name in ("b.png", "a.jpg"):
        (tmp_path / name).write_text("not an image")
    Image.new("RGB", (8, 8)).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"a\.jpg is not an image .*; .*b\.png is not an image .*: take them out"):
        album.find_images(tmp_path)


def test_questions_in_turn_and_by_image(photos, tmp_path):
    files, _ = album.find_images(photos)
    assert album.find_questions(None, files)[:5] == [(question,) for question in (*album.QUESTIONS, album.QUESTIONS[0])]
    (tmp_path / "q.txt").write_text("what?\n\n  why? \n")
    assert album.find_questions(tmp_path / "q.txt", files)[:3] == [("what?",), ("why?",), ("what?",)]
    (tmp_path / "q.jsonl").write_text(
        '{"image": "01.png", "question": "what?"}\n{"image": "01.png", "question": "why?"}\n'
    )
    assert album.find_questions(tmp_path / "q.jsonl", files)[:3] == [(), ("what?", "why?"), ()]


def test_questions_as_other_systems_write_them(photos, tmp_path):
    """A mark at the beginning, lines that end in CR LF, an extension in capitals, and U+2028, which ends no line."""
    files, _ = album.find_images(photos)
    (tmp_path / "q.txt").write_bytes(b"\xef\xbb\xbfwhat?\r\nwhy?\r\n")
    assert album.find_questions(tmp_path / "q.txt", files)[:2] == [("what?",), ("why?",)]
    (tmp_path / "Q.JSONL").write_bytes('\ufeff{"image": "00.png", "question": "a\u2028b"}\r\n'.encode())
    assert album.find_questions(tmp_path / "Q.JSONL", files)[:2] == [("a\u2028b",), ()]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.txt", b"\n \n", "holds no question"),
        ("q.txt", b"\xff\xfe", "no text in UTF-8"),
        ("q.jsonl", b'{"image": "01.png", "question": "a"}\nb', "line 2: not"),
        ("q.jsonl", b'{"image": "01.png"}', "line 1: not"),
        ("q.json", b'[{"image": "01.png", "question": "a"}]', "looks like JSON .* name it .jsonl"),
        ("q.jsonl", b'{"image": "01.png", "question": " "}', "line 1: not"),
        ("q.jsonl", b'{"image": "99.png", "question": "a"}', r"no image '99\.png' in the folder"),
    ],
)
def test_questions_that_cannot_be_read(photos, tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        album.find_questions(tmp_path / name, album.find_images(photos)[0])


def test_there_is_no_such_file_of_questions(tmp_path):
    with pytest.raises(ValueError, match=r"no such file of questions: .*none\.txt"):
        album.find_questions(tmp_path / "none.txt", [])


# -- method and budget in one file ----------------------------------------------------------------------------------


def test_a_file_names_method_and_budget(tmp_path, tiny):  # noqa: F811
    file = tmp_path / "choice.json"
    vtc.FastV(layer=3).to_json(file, 0.5, {"agree": 0.98})
    assert with_budget(file) == (vtc.FastV(layer=3), 0.5)
    assert vtc.find_method(file) == vtc.FastV(layer=3)
    assert with_budget("fastv") == (vtc.FastV(), None)
    model = load(str(tiny), "cpu").model
    assert vtc.wrap(model, file).vtc.compression.budget == 0.5
    assert vtc.wrap(model, file, budget=0.75).vtc.compression.budget == 0.75
    file.write_text('{"method": "fastv", "budget": 1.5}')
    with pytest.raises(ValueError, match=r"choice\.json: a fractional budget lies in \(0, 1\], got 1\.5"):
        vtc.wrap(model, file)
    file.write_text('{"method": "fastv", "budget": "much"}')
    with pytest.raises(ValueError, match=r"choice\.json: budget must be a number"):
        vtc.wrap(model, file)


def test_no_hyper_parameter_has_the_name_of_something_else_in_the_file():
    for method in vtc.list_methods().values():
        assert not {"method", "budget", "evidence"} & {field.name for field in fields(method)}, method.name


def test_eval_runs_a_file_at_its_own_budget(tmp_path, tiny):  # noqa: F811
    vtc.Uniform().to_json(tmp_path / "choice.json", 0.25)
    methods = (str(tmp_path / "choice.json"), "uniform")
    settings = run.Settings(str(tiny), methods, (0.5, 0.25), limit=2, max_new_tokens=2, device="cpu")
    rows = {(row["method"], row["budget"]): row["tokens"] for row in run.evaluate(settings, tmp_path / "run")}
    assert list(rows)[2:] == [(methods[0], 0.25), ("uniform", 0.5), ("uniform", 0.25)]
    assert rows[methods[0], 0.25] == 4


# -- the command ----------------------------------------------------------------------------------------------------


def choose_on(photos, tiny, out, *more, by=run_vtc):  # noqa: F811
    asked = ("--methods", "uniform,random", "--budgets", "1.0,0.5", "--max-new-tokens", 2, "--device", "cpu")
    return by("choose", "--model", tiny, "--images", photos, "--out", out, *asked, *more)


@pytest.fixture(scope="module")
def chosen(photos, tiny, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("choose") / "out"
    done = choose_on(photos, tiny, out, "--agree", 0.5, by=start_vtc)
    assert done.returncode == 0, done.stderr
    return out, done


def test_choose_as_a_process(chosen, tiny):  # noqa: F811
    out, done = chosen
    assert "note: no --questions: asking in turn what is the main thing" in done.stderr
    assert "25/25" in done.stderr  # files were read
    found = json.loads((out / "choice.json").read_text())
    assert found["evidence"]["kept"] is True
    assert found["evidence"]["searched"] + found["evidence"]["held"] == 24
    assert f"take {found['method']} at {100 * found['budget']:g}%" in done.stdout
    model = load(str(tiny), "cpu").model
    assert vtc.wrap(model, out / "choice.json").vtc.compression.budget == found["budget"]


def test_what_was_counted_is_what_was_said(chosen):
    out, _ = chosen
    said = {}
    for line in read_lines(out):
        said.setdefault((line["method"], line["budget"]), {})[line["question_id"]] = line["prediction"]
    full = said["full", 1.0]
    assert all(set(answers) <= set(full) for answers in said.values())
    for one in json.loads((out / "choice.json").read_text())["evidence"]["tested"]:
        answers = said[one["candidate"]["method"], one["candidate"]["budget"]]
        assert sum(answers[name] == full[name] for name in answers) >= one["agreeing"]
        assert one["tokens"] == 16 * one["candidate"]["budget"]


def test_another_promise_goes_on_with_the_answers_that_are_there(chosen, photos, tiny):  # noqa: F811
    out, _ = chosen
    before = (out / "results.jsonl").read_bytes()
    done = choose_on(photos, tiny, out, "--agree", 0.4)
    assert done.returncode == 0, done.stderr
    assert (out / "results.jsonl").read_bytes().startswith(before)
    evidence = json.loads((out / "choice.json").read_text())["evidence"]
    assert (evidence["agree"], evidence["tried"]) == (0.4, [0.5])  # several promises on the same images: it is said
    assert "tried here before: 0.5" in done.stderr


def test_other_budgets_go_on_with_the_answers_that_are_there(photos, tiny, tmp_path):  # noqa: F811
    file, out = tmp_path / "mine.json", tmp_path / "out"
    vtc.FastV(layer=1).to_json(file)
    first = choose.Settings(str(photos), str(tiny), None, 0.1, (str(file),), (1.0,), max_new_tokens=2, device="cpu")
    choose.run(first, out)
    before = (out / "results.jsonl").read_bytes()
    verdict, _ = choose.run(replace(first, budgets=(0.75, 0.5)), out)
    assert (out / "results.jsonl").read_bytes().startswith(before)
    assert verdict.tried == [0.1]  # of the same images: it is said
    choose.run(replace(first, budgets=(1.0, 0.75, 0.5)), out)
    vtc.FastV(layer=2).to_json(file)
    with pytest.raises(ValueError, match=r"another run \(method .*mine\.json at 0\.5 \w+ there, \w+ here\)"):
        choose.run(replace(first, budgets=(0.5, 0.6)), out)


def test_a_folder_that_another_process_chooses_in_is_left_to_it(photos, tiny, tmp_path):  # noqa: F811
    with held(tmp_path / "out"):
        done = choose_on(photos, tiny, tmp_path / "out", "--agree", 0.5)
    assert done.returncode == 1
    assert "error: another process is at work in" in done.stderr
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_nothing_to_prune_is_a_file_that_prunes_nothing(photos, tiny, tmp_path):  # noqa: F811
    """The tiny model's answers are noise, and hang on every token."""
    done = choose_on(photos, tiny, tmp_path / "out", "--agree", 0.6, "--budgets", "1")  # one token
    assert done.returncode == 0, done.stderr
    assert "none: do not prune this, where 60 % of the answers have to stay" in done.stdout
    reader = load(str(tiny), "cpu", 2)
    inputs = reader.inputs([Image.open(photos / "00.png")], ["what is the color"])
    with torch.inference_mode():
        before = reader.model(**inputs).logits
        vtc.wrap(reader.model, tmp_path / "out" / "choice.json")
        assert torch.equal(reader.model(**inputs).logits, before)


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--agree", "0.98"], 1, "error: 24 images are too few"),
        (["--agree", "1"], 1, "error: an agreement of 1 cannot be promised"),
        (["--methods", "fast"], 1, "unknown method 'fast'"),
        (["--questions", "none.txt"], 1, "no such file of questions"),
        (["--images", "nowhere"], 1, "no such folder of images: nowhere"),
        (["--model", "./nothing"], 1, "is not a model folder"),
    ],
)
def test_errors_come_before_the_work(photos, tiny, tmp_path, more, code, message):  # noqa: F811
    done = choose_on(photos, tiny, tmp_path / "out", *more)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_images_that_changed_are_another_run(chosen, photos, tiny, tmp_path):  # noqa: F811
    out, _ = chosen
    folder = tmp_path / "photos"
    folder.mkdir()
    for file in photos.glob("*.png"):
        (folder / file.name).write_bytes(file.read_bytes())
    Image.new("RGB", (32, 32), "red").save(folder / "05.png")
    done = choose_on(folder, tiny, out, "--agree", 0.5)
    assert done.returncode == 1
    assert "holds another run (images and questions" in done.stderr
    (folder / "05.png").write_bytes((photos / "05.png").read_bytes())
    for file in sorted(folder.glob("*.png"), reverse=True):  # answers are kept by name
        file.rename(folder / f"{file.stem}-later.png")
    done = choose_on(folder, tiny, out, "--agree", 0.5)
    assert "holds another run (images and questions" in done.stderr


def test_a_method_stays_what_it_was_when_the_run_began(photos, tiny, tmp_path, monkeypatch):  # noqa: F811
    file = tmp_path / "mine.json"
    vtc.FastV(layer=1).to_json(file)
    asked, compressed = [], vtc.compressed

    def rewrites(model, method, budget):
        vtc.FastV(layer=2).to_json(file)
        asked.append(vtc.find_method(method).layer)
        return compressed(model, method, budget)

    monkeypatch.setattr(vtc, "compressed", rewrites)
    settings = choose.Settings(str(photos), str(tiny), None, 0.1, (str(file),), (1.0,), max_new_tokens=2, device="cpu")
    choose.run(settings, tmp_path / "out")
    assert set(asked) == {1}
    assert json.loads((tmp_path / "out" / "choice.json").read_text())["layer"] == 1


def test_what_the_model_refuses_is_left_out_with_the_reason(tiny):  # noqa: F811
    reader = load(str(tiny), "cpu")
    candidates, refused = choose.working(reader, choose.resolve(["uniform", "atp", "fastv"]), [0.5, 0.05])
    assert candidates == [Candidate(name, budget) for name in ("uniform", "fastv") for budget in (0.5, 0.05)]
    assert list(refused) == ["atp at 50%", "atp at 5%"]  # not trained for it
    with pytest.raises(ValueError, match="no method works on this model: atp is trained"):
        choose.working(reader, choose.resolve(["atp"]), [0.5])


def test_a_file_with_a_budget_is_no_candidate(tiny, tmp_path):  # noqa: F811
    vtc.Uniform().to_json(tmp_path / "choice.json", 0.25)
    with pytest.raises(ValueError, match=r"choice\.json names a budget"):
        choose.resolve([str(tmp_path / "choice.json")])


def test_ask_runs_a_file_at_its_own_budget(photos, tiny, tmp_path):  # noqa: F811
    vtc.Uniform().to_json(tmp_path / "choice.json", 0.5)
    asked = ("ask", photos / "00.png", "what", "--model", tiny, "--method", tmp_path / "choice.json")
    assert "8 of 16 visual tokens" in run_vtc(*asked, "--max-new-tokens", 2).stderr
    assert "4 of 16 visual tokens" in run_vtc(*asked, "--max-new-tokens", 2, "--budget", 4).stderr


def test_the_demo_opens_with_a_file(tmp_path):
    page = pytest.importorskip("vtc.demo.page")
    from vtc.demo import link
    from vtc.demo.inspector import Inspector
    from vtc.eval.reader import model_path

    vtc.FastV(layer=3, ratio=0.75).to_json(tmp_path / "choice.json", 72, {"agree": 0.98})
    inspector = Inspector(load(model_path("reference"), "cpu"), "reference")
    first = link.chosen(str(tmp_path / "choice.json"), inspector.tokens)
    opened = page.Page(inspector, first)
    assert (opened.method.value, opened.budget.value) == ("fastv", 50)
    assert {name: box.value for name, box in opened.fields["fastv"].items()} == {"layer": 3, "ratio": 0.75}
    assert opened.groups["fastv"].visible
    assert not opened.groups["vtc-cls"].visible
    with pytest.raises(ValueError, match="the page has single methods"):
        link.chosen("vtc-cls+fastv", inspector.tokens)


def test_a_server_runs_a_file_at_its_own_budget(tiny, tmp_path):  # noqa: F811
    app = pytest.importorskip("vtc.serve.app")
    vtc.Uniform().to_json(file := tmp_path / "choice.json", 0.5)
    reader = load(str(tiny), "cpu")
    assert app.Server(reader.model, reader.processor, "tiny", str(file)).spends == [(str(file), 0.5)]
    assert app.Server(reader.model, reader.processor, "tiny", str(file), (4,)).spends == [(str(file), 4)]
    assert app.Server(reader.model, reader.processor, "tiny", "uniform").spends == [("uniform", 0.25)]
