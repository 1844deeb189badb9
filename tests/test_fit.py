"""`vtc fit`: the schedule of least loss, against a walk through the full model with masks, layer by layer."""

import json
from dataclasses import replace

import oracle
import pytest
import torch
from models import IMAGE, llava, prompt
from test_peers_attention import images_of, masses, text_after, whole

import vtc
from vtc.budget import average_tokens, counts
from vtc.eval import fit as fitting
from vtc.eval.tune import Search
from vtc.methods.fitprune import FitPrune
from vtc.methods.pyramiddrop import PyramidDrop
from vtc.stage import Shape

DEPTH = 6


@pytest.fixture(scope="module")
def models():
    return llava(), llava(attn="eager")


def last_row(out, layer, row, alive, text):
    """The one criterion of a method that scores by one: here the attention of the prompt's last token."""
    return [out.attentions[layer][row].mean(0)[text[-1], alive].tolist()]


def prefix(mass, least):
    """The tokens of least mass, as many as leave the others `least`, and then one fewer: indices."""
    order = sorted(range(len(mass)), key=lambda token: mass[token])
    longest = 0
    for number in range(1, len(order) + 1):
        if sum(mass[token] for token in order[number:]) >= least:
            longest = number
    return set(order[: max(0, longest - 1)])


def walked(model, inputs, criteria, ahead, alpha, target, reference):
    """How many tokens of each image enter each layer, where each may lose `alpha` of its reference, until `target`."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    left, visible, entered = [list(range(36)) for _ in range(3)], [], [[36, 36, 36]]
    for layer in range(DEPTH):
        keys = real & (ids != IMAGE)
        for (row, where), alive in zip(images_of(inputs), left, strict=True):
            keys[row, [where[token] for token in alive]] = True
        visible.append(keys)
        if layer == 0 if ahead else layer == DEPTH - 1:
            continue  # nothing leaves before the first layer, nor after the last
        with oracle.masked_layers(model, [*visible, *[keys] * (DEPTH - len(visible))]):
            out = whole(model, inputs)
        for image, (row, where) in enumerate(images_of(inputs)):
            mass = criteria(out, layer, row, [where[t] for t in left[image]], text_after(inputs, row, where))
            spent = sum(counts[image] for counts in entered)
            if (spent + entered[-1][image] * (DEPTH - len(entered))) / (DEPTH * 36) <= target:
                continue
            spare = set.intersection(
                *(prefix(own, (1 - alpha[image]) * r) for own, r in zip(mass, reference[image][layer], strict=True))
            )
            left[image] = [token for number, token in enumerate(left[image]) if number not in spare]
        entered.append([len(alive) for alive in left])
        if ahead:  # what leaves before a layer is not seen in it
            visible.pop()
            keys = real & (ids != IMAGE)
            for (row, where), alive in zip(images_of(inputs), left, strict=True):
                keys[row, [where[token] for token in alive]] = True
            visible.append(keys)
    return entered


@pytest.mark.parametrize(
    ("method", "criteria", "ahead"),
    [(FitPrune(), masses, False), (PyramidDrop(), last_row, True)],
    ids=["fitprune", "pyramiddrop"],
)
def test_schedules_are_those_of_loops(models, method, criteria, ahead):
    """One tolerance an image; bisection until it is known to a hundredth."""
    inputs, target = prompt(models[0], (1, 0, 2), seed=1), 0.5
    full, reference = whole(models[1], inputs), []
    for row, where in images_of(inputs):
        text = text_after(inputs, row, where)
        reference.append([[sum(m) for m in criteria(full, layer, row, where, text)] for layer in range(DEPTH)])

    def average(entered):
        return [sum(counts[image] for counts in entered) / (DEPTH * 36) for image in range(3)]

    low, high = [0.0] * 3, [1.0] * 3
    best = [*zip(*walked(models[1], inputs, criteria, ahead, high, target, reference), strict=True)]
    while max(b - a for a, b in zip(low, high, strict=True)) > 0.01:
        middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        entered = walked(models[1], inputs, criteria, ahead, middle, target, reference)
        for image, reached in enumerate(average(entered)):
            if reached <= target:
                high[image], best[image] = middle[image], [counts[image] for counts in entered]
            else:
                low[image] = middle[image]
    every = replace(method, layers=tuple(range(1, DEPTH)), keep_ratios=(1.0,) * (DEPTH - 1))
    found = fitting.schedules(models[0], inputs, every, target) * 36
    assert found.round().long().tolist() == [list(counts[1:]) for counts in best]
    assert all(count[-1] < 36 for count in best)


def test_no_layer_drops_all():
    mass = torch.tensor([[[3.0, 1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]], [[5.0, 0.0, 0.0, 9.0]] * 2])
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    assert fitting.spare(mass, valid, torch.zeros(2, 2)).tolist() == [
        [False, True, True, False],
        [False, True, False, False],
    ]
    assert not fitting.spare(mass, valid, mass.masked_fill(~valid[:, None], 0).sum(2) + 1).any()


def test_stages_without_a_loss_are_left_out():
    method = fitting.thinned(PyramidDrop(layers=(1, 2, 3, 4), keep_ratios=(1.0,) * 4), [1.0, 0.75, 0.75, 0.1])
    assert method == PyramidDrop(layers=(2, 4), keep_ratios=(0.75, 0.1))


def test_what_is_fitted_is_a_method(models, tmp_path, monkeypatch):
    """A JSON file that meets its budget, for any method of several stages; others, and odd budgets, are refused."""
    reader = type("Reader", (), {"model": models[0]})()
    monkeypatch.setattr(fitting, "load", lambda *_: reader)
    monkeypatch.setattr(fitting, "batches", lambda *_: [prompt(models[0], (1, 2), seed=seed) for seed in (0, 1)])
    for name in ("fitprune", "sparsevlm"):
        fitted = fitting.fit(Search(method=name, budget=0.5), tmp_path / "fitted.json")
        assert vtc.find_method(tmp_path / "fitted.json") == fitted
        assert json.loads((tmp_path / "fitted.json").read_text())["method"] == name
        shape = Shape(DEPTH, 4)
        native = average_tokens(36, counts(fitted, 36, None, shape), fitted.layers, DEPTH)
        assert 0.3 * 36 < native <= 0.5 * 36 + 0.5
        assert average_tokens(36, counts(fitted, 36, 0.6, shape), fitted.layers, DEPTH) == pytest.approx(21.6, abs=0.5)
    for search, message in (
        (Search(method="random"), "random has no schedule to fit; fitprune, pyramiddrop, sparsevlm, v2drop have"),
        (Search(method="fitprune", budget=1.0), "not to 1.0"),
        (Search(method="fitprune", budget=36), "not to 36"),
    ):
        with pytest.raises(ValueError, match=message):
            fitting.fit(search, tmp_path / "no.json")
    with pytest.raises(vtc.BudgetError):
        fitting.fit(Search(method="fitprune", budget=1), tmp_path / "no.json")
    assert not (tmp_path / "no.json").exists()
