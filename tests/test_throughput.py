"""The throughput benchmark does the work that it names."""

import pytest
import torch
from models import llava

import vtc
from vtc.eval import shapes, throughput


def test_rows_keep_what_they_are_said_to_keep():
    model = llava()
    with torch.no_grad(), vtc.compressed(model, throughput.Uneven(), 0.25) as trace:
        model(**shapes.prompt(model, 4, 12))
    assert trace.average_tokens.tolist() == [4, 9, 13, 18]  # of 36; on average a bit more than 9, and 18 * row / 4


@pytest.mark.parametrize("pad", [0, 2])
def test_shared_questions_are_the_separate_ones(monkeypatch, pad):
    """Also of a model that pads with what the prompts are made of, as the shipped one does."""
    model, texts = llava(), []
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, pad
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: texts.append(generate(**inputs)))
    work = throughput.questions(model, 0.25, 3, 2)
    seconds = throughput.measure(model, work, rounds=1)
    assert list(seconds) == ["full, each alone", "pruned, each alone", "pruned, one shared image"]
    assert all(value > 0 for value in seconds.values())
    _, *pruned = [texts[start : start + 3] for start in (0, 3, 6)]
    assert all(torch.equal(a, b) for a, b in zip(*pruned, strict=True))


@pytest.mark.parametrize("budget", [64, 1, 0.51, 0.0])
def test_a_budget_that_no_row_can_keep_twice_is_refused(budget):
    with pytest.raises(ValueError, match=r"use a fraction up to 0\.5"):
        throughput.compare(llava(), budget, 2, 1, 1)
