"""Which decoder layers read the image: the probe against single questions and masked keys, and the command."""

import json

import oracle
import torch
from eval_fixtures import run_vtc, tiny  # noqa: F401

import vtc
from vtc.eval import layers, scenes, tune
from vtc.eval.reader import load
from vtc.methods.fastv import FastV
from vtc.methods.tally import Tally


@torch.no_grad()
def test_layers_are_asked_one_by_one(tiny):  # noqa: F811
    """Agreement of each layer from single answers of the full model whose keys are masked from there on."""
    reader, examples = load(str(tiny), "cpu", max_new_tokens=1), scenes.load("val", 6)
    rows = layers.read(reader, examples, batch_size=4)
    assert [row["layer"] for row in rows] == list(range(9))
    agree = [0] * 9
    for example in examples:
        inputs = reader.inputs([example.image], [example.question])
        full = reader.model(**inputs).logits[0, -1].argmax()
        places = (inputs["input_ids"][0] == reader.model.config.image_token_id).nonzero()[:, 0].tolist()
        for layer in range(9):
            visible = torch.ones(1, inputs["input_ids"].shape[1], dtype=torch.bool)
            gone = visible.clone()
            gone[0, [place for cell, place in enumerate(places) if cell != 10]] = (
                False  # of 4 x 4 cells row 2, column 2
            )
            with oracle.masked_layers(reader.model, [visible] * layer + [gone] * (8 - layer)):
                said = reader.model(**inputs, use_cache=False).logits[0, -1].argmax()
            agree[layer] += int(said == full)
    assert [row["agreement"] for row in rows] == [count / 6 for count in agree]
    assert rows[-1]["agreement"] == rows[-1]["agreement_low"] == 1
    assert min(agree) < 6
    right = [
        layers.marking.is_correct(*pair) for pair in zip(_answers(reader, examples), _wanted(examples), strict=True)
    ]
    assert rows[-1]["accuracy"] == sum(right) / 6


def _answers(reader, examples):
    return [reader.answers(reader.inputs([one.image], [one.question]))[0] for one in examples]


def _wanted(examples):
    return [one.answer for one in examples]


def test_a_few_tokens_may_stay(tiny):  # noqa: F811
    reader = load(str(tiny), "cpu")
    inputs = reader.inputs([scenes.load("val", 1)[0].image], ["what color is the word?"])
    with vtc.compressed(reader.model, layers.Leaving(3, 0.25)) as trace:
        reader.answers(inputs)
    assert trace.tokens_per_layer.tolist() == [[16] * 3 + [4] * 5]


def test_the_command_writes_picture_and_figures(tiny, tmp_path):  # noqa: F811
    done = run_vtc("layers", "--model", tiny, "--limit", 4, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "layers.json").read_text())
    assert [row["layer"] for row in found["rows"]] == list(range(9))
    assert found["rows"][-1]["agreement"] == 1
    assert (tmp_path / "layers.png").stat().st_size > 10_000
    assert "never" in done.stdout


def test_tune_searches_the_layers_that_there_are(tiny):  # noqa: F811
    reader = load(str(tiny), "cpu")
    assert tune.searched(reader, Tally()) == {"power": (1.0, 4.0), "layer": (1, 7)}
    assert tune.searched(reader, FastV()) == {"layer": (1, 7)}
    assert "vtc" not in vars(reader.model)
