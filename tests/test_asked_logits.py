"""What is pruned does not depend on which logits a call wants."""

import pytest
import torch
from bare import SHORT, logits
from models import prompt
from table import METHODS, SITES, each_site
from table import parametrize as pytest_generate_tests  # noqa: F401

import vtc


@each_site
def test_the_logits_of_a_call_do_not_decide_what_is_pruned(model, method):
    inputs = prompt(model, (2, 1))
    length = inputs["input_ids"].shape[1]
    vtc.wrap(model, *method)
    whole, kept = logits(model, inputs), model.vtc.trace.kept()
    for wanted in (1, 2, 6, length - 1, length, length + 5, torch.tensor([3, length - 2])):
        some = logits(model, inputs, logits_to_keep=wanted)
        assert all(map(torch.equal, model.vtc.trace.kept(), kept))
        asked = whole[:, wanted if isinstance(wanted, torch.Tensor) else slice(-wanted, None)]
        torch.testing.assert_close(some, asked, atol=1e-6, rtol=1e-5)  # a smaller product may round otherwise


@each_site
def test_the_logits_of_a_generation_do_not_either(model, method):
    inputs = prompt(model, (2, 1))
    vtc.wrap(model, *method)
    expected = model.generate(**inputs, **SHORT)
    assert torch.equal(model.generate(**inputs, **SHORT, logits_to_keep=5), expected)


@pytest.mark.parametrize("setting", SITES)
def test_guesses_after_a_prompt_without_a_mask(llava, setting):
    """The end of the prompt is known in every way in which generate() is given it."""
    inputs = prompt(llava)
    inputs["input_ids"][0, -6:-3] = inputs["input_ids"][0, -3:]  # an n-gram to guess from
    vtc.wrap(llava, *METHODS[setting])
    expected = llava.generate(**inputs, **SHORT)
    inputs.pop("attention_mask")
    ids = inputs.pop("input_ids")
    for given in ({"input_ids": ids}, {"inputs": ids}):
        assert torch.equal(llava.generate(**given, **inputs, **SHORT, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(llava.generate(ids, **inputs, **SHORT, prompt_lookup_num_tokens=3), expected)
