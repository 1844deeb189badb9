"""What the list of methods says of each, against what each does."""

import methods_table
import pytest
import torch
from bare import logits
from models import prompt
from table import HARD, METHODS, merges

import vtc
from vtc.methods.fastv import FastV
from vtc.methods.overview import FILE, Overview, of, overview
from vtc.methods.tome import ToMe


@pytest.mark.parametrize("setting", METHODS)
def test_whether_a_method_sees_the_question_is_what_its_needs_say(llava, setting):
    """The same image before another text: what is kept differs, or never does."""
    method, budget = METHODS[setting]
    question = of(method).question
    assert question == any(differs(llava, method, budget, seed) for seed in range(20 if question else 3))


def differs(model, method, budget, seed) -> bool:
    """Whether another text makes another choice of the same image's tokens, in any layer."""
    inputs, kept = prompt(model, (1,), seed=seed), []
    for text in range(2):
        inputs["input_ids"][0, -6:] = torch.randint(7, 90, (6,), generator=torch.Generator().manual_seed(text))
        with vtc.compressed(model, method, budget) as trace:
            logits(model, inputs)
        kept.append([trace.held(layer)[0] for layer in range(6)])
    return not all(map(torch.equal, *kept))


def test_the_file_that_ships_is_what_the_methods_say():
    """`python tests/methods_table.py` writes it."""
    assert methods_table.written() == FILE.read_text()
    assert overview() == {name: of(kind()) for name, kind in vtc.list_methods().items()}
    assert {name for name, one in overview().items() if one.trained} == {"atp", "tokenbutler"}
    for name, one in overview().items():
        assert one.merges == any(merges(setting) for setting in METHODS if METHODS[setting][0].name == name)


def test_a_method_that_the_file_does_not_know_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("vtc.methods.overview.FILE", tmp_path / "overview.json")
    (tmp_path / "overview.json").write_text("{}")
    assert overview()["fastv"] == of(FastV())


def test_where_tokens_leave():
    def where(spec):
        return of(vtc.find_method(spec)).where

    assert where("vtc-cls") == "before the decoder"
    assert where("tome") == "inside the vision tower"
    assert where("fastv") == "layer 2 of 32"
    assert where("vflowopt") == "before the decoder; layers 10, 21 of 32"
    assert where("random-kv") == "the cache of each layer"
    assert where("tokenselect") == "the cache of each layer, of which each token reads a part"
    assert where("vtc-cls+fastv+random-kv") == "before the decoder; layer 2 of 32; the cache of each layer"


def test_what_is_composed_is_described_too():
    chain = vtc.Chain(ToMe(), "fastv@debias")
    assert of(chain) == Overview("inside the vision tower; layer 2 of 32", False, True, True)
    assert chain.paper == "ToMe, arXiv 2210.09461; FastV, arXiv 2403.06764; attention debiasing, arXiv 2508.17807"
    assert not of(vtc.find_method("vtc-cls@sinks")).question
    assert of(HARD["atp"][0]).trained
