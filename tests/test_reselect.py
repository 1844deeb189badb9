"""Re-selection from kept scores, against a run at the other budget."""

import pytest
import torch
from models import FAMILIES, prompt

import vtc
from vtc.demo.reselect import reselect
from vtc.methods.tome import ToMe


def run(model, inputs, method, budget):
    with vtc.compressed(model, method, budget) as live, torch.inference_mode():
        model(**inputs)
        return live.record


@pytest.mark.parametrize("name", ["vtc-cls", "fastv", "vflowopt", "random", "uniform"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("other", [0.2, 0.5, 0.8, 1.0, 33])
def test_as_a_run_at_the_other_budget(family, name, other):
    model, method = FAMILIES[family].model, vtc.list_methods()[name]()
    inputs = prompt(model, (2, 1))
    shape = vtc.adapter.find(model).shape()
    again = reselect(run(model, inputs, method, 0.4), method, 0.4, other, shape)
    expected = run(model, inputs, method, other)
    for layer in range(expected.depth):
        for mine, theirs in zip(again.alive(layer), expected.alive(layer), strict=True):
            assert mine.tolist() == theirs.tolist()
    for mine, theirs in zip(again.stages, expected.stages, strict=False):
        if theirs.into is None:
            assert mine.into is None
        else:
            assert mine.into[mine.valid].tolist() == theirs.into[theirs.valid].tolist()


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("transprune", "scores anew"),
        ("tome", "differently at each budget"),
        ("atp", "decides by what it sees"),
        ("visionzip", "compares what it sees"),
    ],
)
def test_where_the_scores_would_be_others(method, reason):
    model = FAMILIES["llava"].model
    trace = run(model, prompt(model, (1,)), "vtc-cls", 0.4)
    with pytest.raises(ValueError, match=reason):
        reselect(trace, vtc.list_methods()[method](), 0.4, 0.5, vtc.adapter.find(model).shape())


def test_a_full_budget_scored_nothing():
    model, method = FAMILIES["llava"].model, vtc.list_methods()["vtc-cls"]()
    trace = run(model, prompt(model, (1,)), method, 1.0)
    with pytest.raises(ValueError, match="nothing was scored"):
        reselect(trace, method, 1.0, 0.5, vtc.adapter.find(model).shape())


def test_a_budget_out_of_reach():
    model, method = FAMILIES["llava"].model, vtc.list_methods()["fastv"]()
    trace = run(model, prompt(model, (1,)), method, 0.5)
    with pytest.raises(vtc.BudgetError):
        reselect(trace, method, 0.5, 0.05, vtc.adapter.find(model).shape())


def test_the_groups_of_tome_are_in_the_trace():
    """Every patch that left is in the group of one that stayed, as long as all groups do."""
    model = FAMILIES["llava"].model
    stage = run(model, prompt(model, (2,)), ToMe(share=0.5), 0.5).stages[0]
    place = torch.arange(stage.into.shape[1]).expand_as(stage.into)
    assert (stage.into.gather(1, stage.into.clamp(min=0))[stage.into >= 0] == stage.into[stage.into >= 0]).all()
    assert stage.kept.gather(1, stage.into).all()
    assert (stage.into[stage.kept] == place[stage.kept]).all()
    sizes = torch.zeros_like(stage.scores).scatter_add(1, stage.into, torch.ones_like(stage.scores))
    assert torch.equal(sizes, stage.scores)
