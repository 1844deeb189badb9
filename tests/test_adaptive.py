"""Budgets in the mean: how many groups an image keeps, against loops; what a budget hides; what `vtc fit` measures."""

import json
import math

import oracle
import pytest
import torch
from eval_fixtures import read_lines, run_vtc, start_vtc, tiny  # noqa: F401 (a fixture)
from models import FAMILIES, prompt, visual
from PIL import Image
from table import SHAPE
from test_promises import accounts_for_every_token
from test_tally import pairs

import vtc
from vtc.choice import Seen
from vtc.demo import budgets
from vtc.eval import fit as fitting
from vtc.methods import ward as clustering
from vtc.methods.compose import with_budget
from vtc.methods.tally_adaptive import TallyAdaptive, variation
from vtc.methods.ward import ward

FITTED = TallyAdaptive(shares=(0.1, 0.3, 0.7), hides=(0.5, 0.2, 0.1))

# -- the rule -------------------------------------------------------------------------------------------------------


def grouped(states, tokens, count, allowance):
    """The source map of one image: in each round its cheapest pairs are joined, as long as the allowance pays them."""
    groups = [[token] for token in tokens]
    while True:
        near, joined = pairs(states, groups), 0
        for cost, i, j in near[: min((len(near) + 1) // 2, len(groups) - max(1, count))]:
            if cost > allowance:
                break
            groups[i], groups[j], allowance, joined = groups[i] + groups[j], [], allowance - cost, joined + 1
        groups = [group for group in groups if group]
        if not joined:
            break
    into = [-1] * len(states)
    for group in groups:
        for token in group:
            into[token] = min(group)
    return into


def within(states, into):
    """The sum of squares of one image's tokens about the means of their groups."""
    groups = [states[into == first].double() for first in into.unique() if first >= 0]
    return sum(float((group - group.mean(0)).square().sum()) for group in groups)


@pytest.mark.parametrize("seed", range(20))
def test_the_allowance_ends_it_as_in_loops(seed, monkeypatch):
    """Images of different lengths, with holes, also held up by a count; and where not all are clustered at once."""
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(1, 40, (1,), generator=generator))
    states = torch.randn(4, length, 5, generator=generator)
    valid = torch.rand(4, length, generator=generator) > 0.2
    count = torch.randint(0, length // 4 + 2, (4,), generator=generator)
    allowance = variation(states, valid) * torch.tensor([0.05, 0.3, 0.8, 0])
    allowance[3] = torch.inf
    tokens = [image.nonzero()[:, 0].tolist() for image in valid]
    expected = [grouped(*image) for image in zip(states, tokens, count.tolist(), allowance.tolist(), strict=True)]
    found = ward(states, valid, count, allowance)
    assert found.tolist() == expected
    assert found[3].tolist() == ward(states, valid, count)[3].tolist()
    for image, into, most in zip(states, found, allowance.tolist(), strict=True):
        assert within(image, into) <= most * (1 + 1e-5)
    monkeypatch.setattr(clustering, "ENTRIES", 1)
    assert ward(states, valid, count, allowance).tolist() == expected


def test_variation_is_the_cost_of_one_group():
    generator = torch.Generator().manual_seed(0)
    states, valid = torch.randn(3, 20, 6, generator=generator) + 9, torch.rand(3, 20, generator=generator) > 0.3
    valid[2] = False
    into = ward(states, valid, torch.ones(3, dtype=torch.long))
    found = variation(states.masked_fill(~valid[..., None], torch.nan), valid)
    assert found.tolist() == pytest.approx([within(*image) for image in zip(states, into, strict=True)], rel=1e-4)


# -- how many stay of an image --------------------------------------------------------------------------------------


def merged(states, valid, hidden):
    """What the first stage makes of states (images, 36 tokens, width)."""
    (stage, _) = TallyAdaptive(hidden=hidden).stages(SHAPE)
    index = torch.arange(36).expand_as(valid)
    seen = Seen({stage.needs[0]: states.transpose(1, 2)}, valid, index, [[(6, 6)]] * len(states))
    return stage.select(stage.score(seen), seen, valid.any(1).long())


def test_more_stay_of_an_image_that_is_less_alike():
    """Three patterns, and noise on top of them: from none, which is three groups, to noise alone."""
    generator, noise = torch.Generator().manual_seed(0), [0, 0.1, 0.3, 1, 3]
    patterns, each = torch.eye(3, 8).repeat(12, 1), torch.randn(36, 8, generator=generator)
    states = torch.stack([patterns + level * each for level in noise])
    choice = merged(states, torch.ones(5, 36, dtype=torch.bool), 0.1)
    kept = choice.keep.sum(1).tolist()
    assert kept[0] == 3
    assert kept == sorted(kept)
    assert kept[-1] > 10
    assert choice.weight.where(choice.keep, 0).sum(1).tolist() == [36] * 5


def test_at_least_one_stays_and_nothing_of_what_is_hidden():
    states, valid = torch.randn(4, 36, 8, generator=torch.Generator().manual_seed(0)), torch.ones(4, 36).bool()
    states[1], valid[2], states[3] = 7.0, False, torch.nan
    for hidden in (0.001, 0.999):
        choice = merged(states, valid, hidden)
        assert choice.keep.sum(1).tolist()[1:] == [1, 0, 1]
        assert (choice.into[2] == -1).all()
    assert choice.keep.sum(1)[0] <= 2


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
@torch.no_grad()
def test_the_cut_is_the_power_of_the_share(power):
    model = FAMILIES["llava"].model
    with vtc.compressed(model, TallyAdaptive(hidden=0.2, power=power, layer=2), None) as trace:
        model(**prompt(model, (1, 2, 1), pad="left"))
    accounts_for_every_token(trace)
    first, *rest = trace.stages
    kept = first.kept.sum(1).tolist()
    assert len(set(kept)) > 1
    if power == 1:
        assert not rest
        return
    (second,) = rest
    for image, count in enumerate(kept):
        scores = second.scores[image][second.valid[image]].tolist()
        expected = oracle.top(scores, max(1, round(36 * (count / 36) ** power)))
        assert second.kept[image].nonzero()[:, 0].tolist() == expected


@torch.no_grad()
def test_the_cut_counts_the_tokens_that_are_shown():
    model = FAMILIES["llava"].model
    inputs = prompt(model, (1, 1))
    places = visual(inputs["input_ids"])[1].nonzero()[:, 0]
    inputs["attention_mask"][1, places[::2]] = 0
    with vtc.compressed(model, TallyAdaptive(hidden=0.2, layer=2), None) as trace:
        model(**inputs)
    (whole, half), cut = (stage.kept.sum(1).tolist() for stage in trace.stages)
    assert cut == [round(36 * (whole / 36) ** 2), round(18 * (half / 18) ** 2)]
    assert cut[1] > round(36 * (half / 36) ** 2)


@pytest.mark.parametrize("pad", ["left", "right"])
@torch.no_grad()
def test_a_ragged_batch_is_each_prompt_alone(pad):
    model, method = FAMILIES["llava"].model, TallyAdaptive(hidden=0.2, layer=2)
    whole = prompt(model, (1, 0, 2), pad=pad)
    with vtc.compressed(model, method, None) as trace:
        logits = model(**whole).logits
        kept, images = [trace.kept(stage) for stage in (0, 1)], iter(whole["pixel_values"])
        for row, count in enumerate((1, 0, 2)):
            real = whole["attention_mask"][row].bool()
            alone = {name: whole[name][row][real][None] for name in ("input_ids", "attention_mask")}
            if count:
                alone["pixel_values"] = torch.stack([next(images) for _ in range(count)])
            torch.testing.assert_close(model(**alone).logits[0], logits[row][real], atol=1e-4, rtol=1e-4)
            if count:
                assert [trace.kept(stage)[0].tolist() for stage in (0, 1)] == [part[row].tolist() for part in kept]


# -- a budget -------------------------------------------------------------------------------------------------------


def test_a_budget_is_read_off_straight_lines():
    def hidden(budget, tokens=None):
        return FITTED.bind(None, budget, tokens).hidden

    for budget, expected in ((0.1, 0.5), (0.2, 0.35), (0.3, 0.2), (0.6, 0.125), (0.85, 0.05)):
        assert hidden(budget) == pytest.approx(expected)
        assert hidden(round(1000 * budget), 1000) == pytest.approx(expected)
    assert FITTED.bind(None, None, None) == FITTED.bind(None, 1.0, None) == FITTED.bind(None, 36, 36) == FITTED


def test_budgets_out_of_reach_say_what_to_do():
    with pytest.raises(vtc.BudgetError, match=r"down to 0\.1 of the tokens, and 0\.05 is less.*vtc fit") as error:
        FITTED.bind(None, 0.05, None)
    assert error.value.floor == 0.1
    assert FITTED.bind(None, error.value.floor, None).hidden == 0.5
    with pytest.raises(vtc.BudgetError):
        FITTED.bind(None, 3, 36)
    with pytest.raises(ValueError, match="give tally-adaptive a fraction, not 9 tokens"):
        FITTED.bind(None, 9, None)
    with pytest.raises(ValueError, match=r"what a budget of 0\.25 hides .* `vtc fit --method tally-adaptive`"):
        vtc.wrap(FAMILIES["llava"].model, "tally-adaptive", 0.25)


def test_the_demo_offers_what_was_measured():
    adapter = vtc.adapter.find(FAMILIES["llava"].model)
    offered = budgets.reachable(adapter, FITTED)
    assert offered == [*range(10, 101)]
    assert budgets.note(adapter, FITTED, 25, offered).endswith("reaches down to 10 %: it was measured no further.")
    assert budgets.reachable(adapter, TallyAdaptive()) == [100]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": 1.0}, "hidden"),
        ({"hides": (0.5,)}, "as many of each"),
        ({"shares": (0.1, 0.1), "hides": (0.5, 0.2)}, "shares have to ascend"),
        ({"shares": (0.1, 0.2), "hides": (0.2, 0.2)}, "hides to descend"),
        ({"shares": (0.1, 1.0), "hides": (0.5, 0.2)}, r"shares\.1"),
    ],
)
def test_what_cannot_be_a_curve(fields, message):
    with pytest.raises(ValueError, match=message):
        TallyAdaptive(**fields)


@pytest.mark.parametrize("budget", [1.0, 36, 40])
@torch.no_grad()
def test_a_full_budget_is_the_model_itself(budget):
    model = FAMILIES["llava"].model
    inputs = prompt(model, (1, 2))
    expected = model(**inputs).logits
    for method in (FITTED, TallyAdaptive()):
        with vtc.compressed(model, method, budget):
            assert torch.equal(model(**inputs).logits, expected)


# -- what is measured -----------------------------------------------------------------------------------------------


def test_what_was_measured_is_what_a_budget_gives(tmp_path):
    """On the prompts that it was measured on: between two points the mean leaves the straight line by little."""
    model = FAMILIES["llava"].model
    asked = [prompt(model, (1, 2, 1), seed=seed) for seed in range(3)]
    fitted = fitting.measure(model, asked, TallyAdaptive(layer=2))
    assert len(fitted.shares) > 10
    assert set(fitted.hides) <= set(fitting.HIDDEN)
    for budget in (0.2, 0.4, 0.6, 0.8, 9, 18):
        left = whole = 0
        for inputs in asked:
            with torch.no_grad(), vtc.compressed(model, fitted, budget) as trace:
                model(**inputs)
            left, whole = left + trace.average_tokens.sum(), whole + sum(trace.sizes)
        assert left / whole == pytest.approx(budget if isinstance(budget, float) else budget / 36, abs=0.02)
    fitted.to_json(tmp_path / "fitted.json")
    assert with_budget(tmp_path / "fitted.json") == (fitted, None)


def test_what_changes_nothing_is_no_point_of_the_curve(monkeypatch):
    """Shares that stay as they were, or fall by a rounding, and those of all tokens."""
    shares = iter([0.1, 0.1, 0.2, 0.19999, 0.19, 0.3, *[1.0] * 10])
    monkeypatch.setattr(fitting, "_mean_share", lambda *_: next(shares))
    fitted = fitting.measure(None, [], TallyAdaptive(shares=(0.9,), hides=(0.1,), power=1.5))
    assert fitted == TallyAdaptive(shares=(0.1, 0.2, 0.3), hides=tuple(fitting.HIDDEN[n] for n in (0, 2, 5)), power=1.5)


def test_images_that_give_no_curve_are_refused(monkeypatch):
    monkeypatch.setattr(fitting, "_mean_share", lambda *_: 0.0044)
    with pytest.raises(ValueError, match="not on plain ones"):
        fitting.measure(None, [], TallyAdaptive())


@pytest.fixture(scope="module")
def fitted(tiny, tmp_path_factory):  # noqa: F811
    """What `vtc fit` as a process writes of a folder of pictures."""
    folder = tmp_path_factory.mktemp("adaptive")
    (folder / "photos").mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(24):
        pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "photos" / f"{number:02}.png")
    done = start_vtc(
        "fit", "--method", "tally-adaptive", "--model", tiny, "--images", folder / "photos", "--out", folder / "a.json"
    )
    assert done.returncode == 0, done.stderr
    return folder, done


def test_fit_as_a_process(fitted):
    folder, done = fitted
    method = vtc.find_method(folder / "a.json")
    assert method.name == "tally-adaptive"
    assert len(method.shares) > 3
    assert f"written to {folder / 'a.json'}" in done.stdout


def test_eval_takes_what_was_fitted(fitted, tiny):  # noqa: F811
    folder, _ = fitted
    done = run_vtc(
        "eval", "--model", tiny, "--methods", folder / "a.json", "--budgets", "0.5,0.001", "--limit", 4,
        "--max-new-tokens", 2, "--device", "cpu", "--out", folder / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    floor = vtc.find_method(folder / "a.json").shares[0]
    lines = [line for line in read_lines(folder / "run") if line["method"] == str(folder / "a.json")]
    assert len(lines) == 8
    assert all(1 <= line["tokens"] < 16 and line["at_floor"] == (line["budget"] == 0.001) for line in lines)
    least = sum(line["tokens"] for line in lines if line["at_floor"]) / 4
    assert least < sum(line["tokens"] for line in lines if not line["at_floor"]) / 4
    assert 16 * floor / 2 < least < 16 * floor * 2


def test_choose_takes_what_was_fitted(fitted, tiny):  # noqa: F811
    folder, _ = fitted
    done = run_vtc(
        "choose", "--model", tiny, "--images", folder / "photos", "--methods", folder / "a.json", "--budgets",
        "0.9,0.5", "--agree", 0.05, "--max-new-tokens", 2, "--device", "cpu", "--out", folder / "choice",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "a.json at 90%" in done.stdout
    found = json.loads((folder / "choice" / "choice.json").read_text())
    method, budget = with_budget(folder / "choice" / "choice.json")
    assert found["evidence"]["tested"][0]["tokens"] == pytest.approx(0.9 * 16, abs=1.5)
    if found["evidence"]["kept"]:
        assert (method, budget) == (vtc.find_method(folder / "a.json"), found["budget"])


def test_a_budget_is_refused_where_all_are_measured(tiny, tmp_path):  # noqa: F811
    done = run_vtc(
        "fit", "--method", "tally-adaptive", "--model", tiny, "--budget", "0.5", "--out", tmp_path / "a.json"
    )
    assert done.returncode == 2
    assert "--budget: tally-adaptive is fitted to all budgets" in " ".join(done.stderr.split())
    assert not (tmp_path / "a.json").exists()


def test_the_ladder_descends():
    assert list(fitting.HIDDEN) == sorted(fitting.HIDDEN, reverse=True)
    assert all(
        math.isclose(a / b, 4 / 3, rel_tol=0.01) for a, b in zip(fitting.HIDDEN, fitting.HIDDEN[1:], strict=False)
    )
