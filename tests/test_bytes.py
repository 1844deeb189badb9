"""Bytes in `vtc eval`, answers of 20 and more tokens, and the mark of what saves nothing before the first token."""

import json
from pathlib import Path

import pytest
import torch
from eval_fixtures import tiny  # noqa: F401
from models import FAMILIES, prompt, visual
from PIL import Image
from rich.console import Console
from test_cache_site import GREEDY

import vtc
from vtc.budget import counts
from vtc.demo import budgets
from vtc.eval import captions, memory, pareto, report, run, scenes
from vtc.methods.compose import with_budget

METHODS = ("vtc-cls", "fastv", "random-kv", "bits")


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):  # noqa: F811
    """A run over both axes, and one over tokens alone: the folders."""
    settings = run.Settings(str(tiny), METHODS, (0.5, 0.3), limit=4, batch_size=2, max_new_tokens=2, device="cpu")
    out = tmp_path_factory.mktemp("bytes")
    run.evaluate(settings, out / "both", per="bytes")
    run.evaluate(settings, out / "tokens")
    return out


@pytest.fixture
def model():
    yield FAMILIES["llava"].model
    vtc.unwrap(FAMILIES["llava"].model)


# -- bytes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, "vtc-cls+bits", "laq"])
def test_bytes_are_those_of_the_cache(model, method):
    """Held: those of its tensors without the text's. Peak: the most that they were between two layers."""
    inputs, seen = prompt(model), []
    text = int((~visual(inputs["input_ids"])).sum())
    unit = 2 * 2 * 8 * 4

    def held(cache):
        total = 0
        for layer in (layer for layer in cache.layers if layer.is_initialized):
            packed = hasattr(layer, "nbytes")
            own = layer.nbytes if packed else layer.keys.nbytes + layer.values.nbytes
            total += own - text * (unit + 2 * packed)
        return total

    attentions = [layer.self_attn for layer in model.model.language_model.layers]
    handles = [
        module.register_forward_hook(lambda m, args, kwargs, out: seen.append(held(kwargs["past_key_values"])),
                                     with_kwargs=True) for module in attentions
    ]  # fmt: skip
    vtc.wrap(model, method, 0.4)
    with torch.no_grad():
        cache = model(**inputs).past_key_values
    for handle in handles:
        handle.remove()
    (spent,) = memory.Spent.of(model.vtc.trace, vtc.adapter.find(model).shape().token_bytes)
    assert spent.held == pytest.approx(held(cache), abs=1e-2)
    assert spent.peak == pytest.approx(max(seen), abs=1e-2)
    assert spent.tokens == pytest.approx(spent.held / (6 * unit))
    copies = sum(unit * (len(layer.level[0, 0]) - text) for layer in cache.layers if hasattr(layer, "level"))
    assert spent.read == pytest.approx(spent.held + copies, abs=1e-2)
    vtc.unwrap(model)
    full = memory.Spent.alike(36, vtc.adapter.find(model).shape().token_bytes)
    assert full.held == full.read == full.peak == 36 * 6 * unit


def test_the_same_runs_over_another_axis(finished):
    """All that a run over tokens writes is the same; beside it the rows with their bytes."""
    for name in ("results.jsonl", "summary.json", "needs-image.json"):
        assert (finished / "both" / name).read_bytes() == (finished / "tokens" / name).read_bytes()
    assert not (finished / "tokens" / "bytes.json").exists()
    rows = json.loads((finished / "both" / "summary.json").read_text())
    priced = json.loads((finished / "both" / "bytes.json").read_text())
    lines = [json.loads(line) for line in (finished / "both" / "results.jsonl").read_text().splitlines()]
    for row, own in zip(rows, priced, strict=True):
        bytes_ = [own.pop(name) for name in ("held", "read", "peak")]
        assert own == row
        mine = [line for line in lines if (line["method"], line["budget"]) == (row["method"], row["budget"])]
        assert bytes_ == pytest.approx([sum(line[x] for line in mine) / 4 for x in ("held", "read", "peak")])
    assert {row["method"] for row in rows if row.get("after_prefill")} == {"random-kv", "bits"}
    assert Image.open(finished / "both" / "bytes.png").size == Image.open(finished / "both" / "curve.png").size


@pytest.mark.parametrize("table", [report.table, memory.table])
def test_what_saves_nothing_before_the_first_token_is_marked(finished, table):
    rows = json.loads((finished / "both" / "bytes.json").read_text())
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(rows))
    text = console.export_text()
    assert "† saves memory and decoding, not the first token" in text
    assert "random-kv †" in text
    assert "vtc-cls †" not in text
    console.print(table([row for row in rows if row["method"] in ("full", "blind", "vtc-cls")]))
    assert "†" not in console.export_text()


@pytest.mark.parametrize("table", [report.table, memory.table])
def test_what_saves_no_memory_either_has_a_mark_of_its_own(finished, table):
    rows = [row for row in json.loads((finished / "both" / "bytes.json").read_text()) if row["method"] == "vtc-cls"]
    rows = [{**row, "method": method} for row in rows for method in ("tokenselect", "vtc-cls+tokenselect")]
    memory.mark(rows)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(rows))
    text = console.export_text()
    assert "‡ saves bytes that a decoded token reads, neither memory nor the first token" in " ".join(text.split())
    assert "tokenselect ‡" in text
    assert "†" not in text


def test_the_legend_says_so_too(finished, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure.axes[0]))
    rows = json.loads((finished / "both" / "bytes.json").read_text())
    report.picture(rows, tmp_path / "x.png", "a title", per="bytes")
    (axes,) = drawn
    labels = axes.get_legend_handles_labels()[1]
    assert {"random-kv †", "bits †", "vtc-cls", "† saves memory and decoding,\nnot the first token"} <= {*labels}
    assert "KiB" in axes.get_xlabel()
    full = next(row for row in rows if row["method"] == "full")
    assert max(max(line.get_xdata(), default=0) for line in axes.lines[2:]) == pytest.approx(full["held"] / 1024)


# -- captions -----------------------------------------------------------------------------------------------------


def test_captions_are_long_and_drawn_by_their_number():
    examples = captions.load("test", 5)
    assert all(one == other for one, other in zip(examples, captions.load("test", 3), strict=False))
    assert len({example.question_id for example in examples}) == 5
    for example in examples:
        assert example.question == scenes.CAPTION
        assert len(example.answer.replace(",", " ,").split()) >= 20
        assert example.correct(example.answer) == 1.0
    with pytest.raises(ValueError, match="unknown split"):
        captions.example("all", 0, 0)


@pytest.mark.parametrize(
    ("said", "worth"),
    [
        ("red circle, blue digit 7, cyan dot", 1.0),
        ("Cyan dot,blue digit 7 , red circle.", 1.0),
        ("red circle", 2 * 1 / (1 + 3)),
        ("red circle, red circle", 2 * 1 / (2 + 3)),
        ("blue circle, blue digit 7", 2 * 1 / (2 + 3)),
        ("red circle, blue digit 7, cyan dot, red ring", 2 * 3 / (4 + 3)),
        ("", 0.0),
    ],
)
def test_a_caption_is_worth_the_f1_of_its_things(said, worth):
    assert captions.f1(said, "red circle, blue digit 7, cyan dot") == pytest.approx(worth)


def test_the_reference_model_lists_what_it_sees():
    """Full far above blind, on answers of 20 and more tokens."""
    from vtc.eval.reader import load, model_path

    reader, examples = load(model_path("reference"), "cpu", captions.LONGEST), captions.load("test", 6)
    inputs = reader.inputs([example.image for example in examples], [example.question for example in examples])
    full = sum(example.correct(said) for example, said in zip(examples, reader.answers(inputs), strict=True)) / 6
    assert reader.generate(inputs, max_new_tokens=captions.LONGEST).shape[1] >= 20
    with vtc.compressed(reader.model, "uniform", 0):
        blind = sum(example.correct(said) for example, said in zip(examples, reader.answers(inputs), strict=True)) / 6
    assert full > 0.75
    assert blind < 0.25


def test_the_demo_says_why_a_budget_has_a_floor(model):
    adapter, method = vtc.adapter.find(model), vtc.list_methods()["bits"]()
    offered = budgets.reachable(adapter, method)
    assert offered[0] == 15  # 5.6 of 36 tokens, less the half that budgets are met to
    said = budgets.note(adapter, method, 50, offered)
    assert "reaches down to 15 %: it drops no token, and keeps some at fewer bits" in said


# -- the Pareto ---------------------------------------------------------------------------------------------------


def test_mixtures_drop_half_and_hold_the_rest_at_their_bits(model, tmp_path):
    shape, inputs = vtc.adapter.find(model).shape(), prompt(model)
    for bits, file in zip((8, 4, 2), pareto.mixtures(tmp_path, shape, 36), strict=True):
        method, budget = with_budget(file)
        assert counts(method, 36, budget, shape)[0] == 18
        vtc.wrap(model, method, budget)
        model.generate(**inputs, **GREEDY)
        trace = model.vtc.trace
        assert trace.held_per_layer.tolist() == [[18] * 6]
        assert {*trace.stages[1].bits.unique().tolist()} == {bits}
        assert pareto.drawn_together({"method": file})["method"] == pareto.HALF
    assert Path(file).exists()
