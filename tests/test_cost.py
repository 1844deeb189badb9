"""The arithmetic of cost, against published and derived figures for LLaVA-1.5-7B, and the benchmark's bookkeeping."""

import io
from dataclasses import replace
from functools import partialmethod
from typing import get_type_hints

import pytest
import torch
from models import FAMILIES, llava
from rich.console import Console
from transformers import AutoModelForImageTextToText, LlamaConfig

import vtc
from vtc.eval import bench, cost, peers, shapes
from vtc.methods.fastv import FastV

VICUNA = LlamaConfig()  # 7B: 4096 wide, 11008 inner, 32 layers, 32 heads


@pytest.mark.parametrize(
    ("visual", "text", "tera_macs"),
    [
        ([576] * 32, 0, 3.817),
        ([576] * 2 + [288] * 30, 0, 2.007),  # FastV K=2 R=50 %
        ([576] * 2 + [144] * 30, 0, 1.118),
        ([576] * 8 + [288] * 8 + [144] * 8 + [72] * 8, 0, 1.777),  # PyramidDrop
        ([64] * 32, 0, 0.416),
        ([576] * 32, 64, 4.252),
        ([192] * 32, 64, 1.675),
    ],
)
def test_prefill_flops(visual, text, tera_macs):
    assert cost.prefill_flops(visual, text, VICUNA) / 2e12 == pytest.approx(tera_macs, abs=1e-3)


def test_grouped_queries_need_smaller_projections():
    grouped = LlamaConfig(num_key_value_heads=8)
    saved = 2 * 2 * 100 * 4096**2 * (1 - 8 / 32)
    assert cost.layer_flops(100, VICUNA) - cost.layer_flops(100, grouped) == pytest.approx(saved)


def test_kv_bytes_of_an_image():
    """LLaVA-1.5-7B in 16 bits: 288 MiB for 576 tokens."""
    assert cost.kv_bytes([576] * 32, 0, VICUNA, element=2) == 288 * 2**20


def test_the_limit_is_linear_in_tokens_at_most():
    limit = cost.speed_up_limit([64] * 32, 576, 60, VICUNA)
    linear = (576 + 60) / (64 + 60)
    assert linear < limit < 1.03 * linear  # attention itself is a small, quadratic part
    assert cost.speed_up_limit([64] * 32, 576, 60, VICUNA, fixed=1e15) == pytest.approx(1, abs=0.01)


def test_bench_measures_what_it_says():
    model = llava()
    case = bench.Case(batch=2, prompt_tokens=12, new_tokens=3, rounds=1)
    arms = [("vtc-cls", 4), (FastV(layer=2), 0.5)]
    config = model.config.text_config
    for arm, row in zip(arms, bench.bench(model, arms, case), strict=True):
        with vtc.compressed(model, *arm) as trace:
            model(**shapes.prompt(model, 2, 12))
        visual = trace.tokens_per_layer[0].tolist()
        for kind, counts in (("full", [36] * 6), ("pruned", visual), ("limit", visual)):
            assert row[kind]["kv_bytes"] == pytest.approx(2 * cost.kv_bytes(counts, 12, config, element=4))
            assert all(value > 0 for value in row[kind].values())
            assert row[kind]["first"] == pytest.approx(row[kind]["vision"] + row[kind]["prefill"], rel=0.5)
        assert all(0 < row["own"][part] < row["pruned"]["first"] for part in bench.OWN)
        assert row["tokens"] == {"full": 36, "average": sum(visual) / 6, "last": visual[-1], "text": 12}
        assert " bind" in row["binds"]
        assert list(row) == list(get_type_hints(bench.Row))
    assert "vtc" not in vars(model)
    assert "get_image_features" not in vars(model.base_model)


def test_works_take_turns_and_the_rest_is_estimated_by_their_last_time(monkeypatch):
    """Each takes 2 seconds, 4 in the last round: 3 works, 2 rounds after the one that warms up."""
    now, order, told = [0.0], [], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def work(name):
        def run():
            order.append(name)
            now[0] += 2 if len(order) <= 6 else 4
            return {"first": now[0]}

        return run

    rounds = bench.take_turns({name: work(name) for name in "abc"}, 2, told.append)
    assert [sorted(order[start : start + 3]) for start in (0, 3, 6)] == [["a", "b", "c"]] * 3
    assert rounds == [
        {name: {"first": 2.0 * (4 + index)} for index, name in enumerate(order[3:6])},
        {name: {"first": 12.0 + 4 * (1 + index)} for index, name in enumerate(order[6:])},
    ]
    assert told[:3] == [f"warming up, {n} of 3" for n in (1, 2, 3)]
    assert [int(text.split("about ")[1].split()[0]) for text in told[3:]] == [12, 10, 8, 6, 4, 2]


def test_bench_gives_ranges_and_says_noisy(monkeypatch):
    """Full takes 4 seconds in all rounds; pruned and natively short 2, but for one round in which they take 1 and 3."""
    model, case = llava(), bench.Case(prompt_tokens=12, new_tokens=1, rounds=3)
    times = {"full": [4.0, 4.0, 4.0], ("pruned", 0): [2.0, 2.0, 1.0], 48 - 36 + 18: [2.0, 2.0, 2.0]}

    def parts(seconds):
        return {"vision": 1.0, "prefill": seconds - 1 or 0.5, "first": seconds, "decode": 1.0, "kv_bytes": 8}

    def turns(works, rounds, step):
        assert set(works) == set(times)
        return [{name: parts(seconds[n]) for name, seconds in times.items()} for n in range(rounds)]

    monkeypatch.setattr(bench, "take_turns", turns)
    (row,) = bench.bench(model, [("vtc-cls", 0.5)], case)
    assert row["range"]["gain"]["first"] == (2.0, 4.0)
    assert row["range"]["possible"]["first"] == (2.0, 2.0)
    assert row["noisy"] == ["prefill", "first"]
    text = render(bench.table(row, "t"))
    assert "2.00–4.00" in text
    assert text.count(" noisy │") == 2
    assert "Too noisy to conclude anything about prefill, first token" in " ".join(text.split())
    assert row["binds"] not in " ".join(text.split())
    times["pruned", 0] = [1.95, 2.0, 2.05]
    (row,) = bench.bench(model, [("vtc-cls", 0.5)], case)
    assert row["noisy"] == []
    assert row["binds"] in " ".join(render(bench.table(row, "t")).split())
    times["pruned", 0] = [1.4, 1.4, 1.4]
    (row,) = bench.bench(model, [("vtc-cls", 0.5)], case)
    text = " ".join(render(bench.table(row, "t")).split())
    assert "143%" in text
    assert "Over 100 %" in text


def render(table):
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


@pytest.mark.parametrize(
    ("vision", "prefill", "words"),
    [(9.0, 1.0, "vision tower binds: 90%"), (0.1, 1.0, "Weights and launches bind"), (0.1, 0.1, "Compute binds")],
)
def test_bench_says_what_binds(vision, prefill, words):
    """The full prefill takes a second; natively short, `prefill` of one."""
    row = {
        "full": {"prefill": 1.0},
        "limit": {"vision": vision, "prefill": prefill, "first": vision + prefill},
        "tokens": {"full": 36, "average": 2.0, "text": 2},
    }
    assert words in bench.what_binds(llava(), row, [2] * 6)


@pytest.mark.parametrize(("method", "at_most"), [("random-kv", 18 + 12), ("bits", 18 + 13)])
def test_the_limit_of_the_cache_reads_all_and_holds_less(method, at_most):
    """Half of 36 tokens is held, whatever the prefill read: of packed ones as many as have their bytes."""
    model, case = llava(), bench.Case(prompt_tokens=12, new_tokens=1, rounds=1)
    (row,) = bench.bench(model, [(method, 0.5)], case)
    assert row["tokens"]["last"] == 36
    assert row["tokens"]["average"] <= 18
    assert row["limit"]["prefill"] > 0
    token = cost.kv_bytes([1] * 6, 0, model.config.text_config, element=4)
    assert row["limit"]["kv_bytes"] <= at_most * token
    assert row["limit"]["kv_bytes"] == pytest.approx(row["pruned"]["kv_bytes"], rel=0.1)
    assert "never the first token" in row["binds"]


@pytest.mark.parametrize(
    ("family", "tokens"), [("llava_next", 36 + 144 + 12), ("llava_onevision", 36 + 64 + 8), ("qwen2_5_vl", 36)]
)
def test_bench_of_tiles_and_of_native_resolutions(family, tokens):
    """An overview and 2 x 2 tiles with a newline a row; in OneVision shrunk to the area of 2 tiles, here to 8 x 8."""
    case = bench.Case(batch=2, prompt_tokens=12, new_tokens=1, rounds=1, pixels=96 if "llava" in family else 48)
    (row,) = bench.bench(FAMILIES[family].model, [("vtc-cls", 0.25)], case)
    assert row["tokens"] == {"full": tokens, "average": tokens // 4, "last": tokens // 4, "text": 12}
    assert row["pruned"]["kv_bytes"] == row["limit"]["kv_bytes"] < row["full"]["kv_bytes"]


def test_pixels_are_for_families_that_read_several_sizes():
    with pytest.raises(ValueError, match=r"llava sees every image at \d+ pixels: leave --pixels out"):
        shapes.prompt(llava(), 1, 12, pixels=336)


def test_bench_names_the_families_that_it_knows():
    with pytest.raises(ValueError, match=r"paligemma.*Qwen-VL"):
        shapes.prompt(FAMILIES["paligemma"].model, 1, 12)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llava-1.5-7b", 7.06e9),
        ("llava-next-7b", 7.06e9),
        ("onevision-0.5b", 0.894e9),
        ("onevision-7b", 8.03e9),
        ("qwen2.5-vl-3b", 3.75e9),
    ],
)
def test_shapes_have_the_parameters_of_their_models(name, parameters):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shapes.SHAPES[name]())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)


def test_an_unknown_shape_is_named():
    with pytest.raises(ValueError, match=r"llava-1\.5-7b"):
        shapes.load("llava-9", torch.float32, "cpu")


@torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit)  # which `bench` raises
def test_compiled_layers_keep_as_many_tokens(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    model, arms = llava(layers=2), [("vtc-cls", 0.4)]
    case = bench.Case(prompt_tokens=12, new_tokens=2, rounds=1)
    (plain,) = bench.bench(model, arms, case)
    (row,) = bench.bench(model, arms, replace(case, compiled=True))
    assert all(layer._compiled_call_impl is not None for layer in model.model.language_model.layers)
    assert (row["tokens"], row["pruned"]["kv_bytes"]) == (plain["tokens"], plain["pruned"]["kv_bytes"])
    assert row["pruned"]["kv_bytes"] < row["full"]["kv_bytes"]


def test_the_peers_keep_the_same_tokens():
    model = llava()
    rows = peers.compare(model, [0.4, 0.5], bench.Case(batch=2, prompt_tokens=12, rounds=1))
    assert [(row["method"], row["budget"]) for row in rows] == [
        (m, b) for m in ("vtc-cls", "fastv") for b in (0.4, 0.5)
    ]
    assert all(row[way]["agreement"] == 1 for row in rows for way in peers.WAYS)
    assert all(row[way]["seconds"] > 0 for row in rows for way in ("vtc", *peers.WAYS))
    for row in rows:
        assert list(row) == list(get_type_hints(peers.Row))
        for way in peers.WAYS:  # one round: its ratio is the range
            assert row[way]["range"] == pytest.approx([row[way]["seconds"] / row["vtc"]["seconds"]] * 2)
    assert model.config.text_config._attn_implementation == model.config.vision_config._attn_implementation == "sdpa"
    assert not model.config.text_config.output_attentions


@pytest.mark.parametrize("way", peers.WAYS)
@pytest.mark.parametrize("method", peers.ATTENTION)
def test_the_peers_ways_are_materialised(way, method):
    """The matrices are there at all, and the layer that is run again changes nothing."""
    model, matrices = llava(), {}
    inputs = shapes.prompt(model, 1, 12)
    with vtc.compressed(model, method, 0.5):
        expected = model(**inputs).logits
        with peers.WAYS[way](model, matrices.__setitem__):
            out = model(**inputs)
        assert list(matrices) == list(model.vtc.compression.needs)
    assert all(matrix.ndim == 4 and matrix.shape[2] == matrix.shape[3] > 36 for matrix in matrices.values())
    torch.testing.assert_close(out.logits, expected)


def test_the_peers_need_single_crops():
    with pytest.raises(ValueError, match="single crops"):
        peers.compare(FAMILIES["llava_next"].model, [0.5], bench.Case())
