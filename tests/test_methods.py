"""Each method's keep list against a slow reference written from the formula: full attention, loops."""

import pytest
import torch
from models import IMAGE, llava, prompt
from oracle import attentions, top

import vtc
from vtc.methods.fastv import FastV
from vtc.methods.random import Random
from vtc.methods.uniform import Uniform
from vtc.methods.vtc_cls import VtcCls
from vtc.observe import attention_row
from vtc.select import evenly_spaced
from vtc.stage import Shape

SEEDS = range(50)


@pytest.fixture(scope="module")
def models():
    return llava(), llava(attn="eager")


def kept_by(models, method, budget, inputs):
    """Keep lists of the SDPA model, and all attention matrices of its eager twin."""
    sdpa, eager = models
    with vtc.compressed(sdpa, method, budget) as trace:
        sdpa(**inputs)
    return trace, attentions(eager, inputs)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("layers", [1, 3])
def test_vtc_cls(models, seed, layers):
    inputs = prompt(models[0], (1, 2, 0), pad="left", seed=seed)
    trace, (tower, _) = kept_by(models, VtcCls(layers=layers), 7, inputs)
    expected = [[], [], []]
    for image, row in ((0, 0), (1, 1), (2, 1)):
        score = [0.0] * 36
        for layer in range(4 - layers, 4):  # 5 blocks; the projector reads the output of block 3
            for head in range(4):
                for patch in range(36):
                    score[patch] += tower[layer][image, head, 0, patch + 1].item() / 4
        expected[row] += [kept + 36 * (image == 2) for kept in top(score, 7)]
        ours = trace.scores()[row][36 * (image == 2) :][:36]
        torch.testing.assert_close(ours, torch.tensor(score), atol=1e-5, rtol=1e-4)
    assert [kept.tolist() for kept in trace.kept()] == expected


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("pad", ["left", "right"])
def test_fastv(models, seed, pad):
    inputs = prompt(models[0], (1, 0, 2), pad=pad, seed=seed)
    trace, (_, decoder) = kept_by(models, FastV(layer=2, ratio=0.75), None, inputs)
    for row in range(3):
        last = max(place for place in range(inputs["input_ids"].shape[1]) if inputs["attention_mask"][row, place])
        places = [p for p, token in enumerate(inputs["input_ids"][row].tolist()) if token == IMAGE]
        score = [sum(decoder[1][row, head, last, place].item() for head in range(4)) / 4 for place in places]
        images = [score[start : start + 36] for start in range(0, len(score), 36)]
        expected = [index + 36 * image for image, part in enumerate(images) for index in top(part, 9)]
        assert trace.kept()[row].tolist() == expected
        torch.testing.assert_close(trace.scores()[row], torch.tensor(score), atol=1e-5, rtol=1e-4)


def test_fastv_in_a_second_turn_looks_at_the_cached_keys(models):
    """The softmax of the scoring row runs over past and present keys, as the layer's own attention does."""
    first, second = prompt(models[0], (0,), seed=1), prompt(models[0], (1,), seed=2)
    mask = torch.cat((first["attention_mask"], second["attention_mask"]), dim=1)
    whole = {"input_ids": torch.cat((first["input_ids"], second["input_ids"]), dim=1), "attention_mask": mask}
    with vtc.compressed(models[0], FastV(layer=2), None) as trace, torch.no_grad():
        cache = models[0](**first).past_key_values
        models[0](**{**second, "attention_mask": mask}, past_key_values=cache)
    _, decoder = attentions(models[1], {**whole, "pixel_values": second["pixel_values"]})
    row = decoder[1][0, :, -1, whole["input_ids"][0] == IMAGE].mean(0)
    torch.testing.assert_close(trace.scores()[0], row, atol=1e-5, rtol=1e-4)


def test_random_depends_on_the_seed_alone(models):
    inputs = prompt(models[0], (1, 1), pad="left")
    kept = {}
    for seed in (0, 1):
        trace, _ = kept_by(models, Random(seed=seed), 9, inputs)
        kept[seed] = [row.tolist() for row in trace.kept()]
        assert kept[seed][0] == kept[seed][1]
    assert kept[0] != kept[1]


def test_random_is_uniform():
    """Over seeds every patch is kept equally often, to five standard deviations."""
    from vtc.methods.random import _draw

    hits = torch.zeros(36)
    for seed in range(2000):
        hits[_draw(seed)[:36].topk(9).indices] += 1
    assert ((hits - 500).abs() < 5 * (2000 * 0.25 * 0.75) ** 0.5).all()


@pytest.mark.parametrize(("height", "width"), [(6, 6), (12, 12), (24, 24), (3, 10), (10, 3)])
def test_uniform_is_an_even_grid(height, width):
    for count in range(height * width + 1):
        cells = evenly_spaced(height, width, count)
        assert len(set(cells)) == count
        assert cells == sorted(cells)
        assert all(0 <= cell < height * width for cell in cells)
    assert evenly_spaced(6, 6, 9) == [y * 6 + x for y in (1, 3, 5) for x in (1, 3, 5)]


def test_uniform_keeps_that_grid(models):
    trace, _ = kept_by(models, Uniform(), 9, prompt(models[0], (2,)))
    cells = evenly_spaced(6, 6, 9)
    assert trace.kept()[0].tolist() == cells + [cell + 36 for cell in cells]


def test_attention_row_is_the_row_of_the_matrix():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 9, 8, generator=generator), torch.randn(2, 2, 9, 8, generator=generator)
    visible = torch.rand(2, 9, generator=generator) > 0.3
    logits = query @ key.repeat_interleave(2, dim=1).transpose(2, 3) * 0.3
    full = logits.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
    for place in range(9):
        torch.testing.assert_close(attention_row(query[:, :, place], key, 0.3, visible), full[:, :, place])


def test_paper_layers_scale_with_the_depth():
    llava_7b, small = Shape(32, 23), Shape(8, 5)
    assert [stage.layer for stage in FastV().stages(llava_7b)] == [2]
    assert [stage.layer for stage in FastV().stages(small)] == [1]
    assert [need.layer for need in VtcCls().stages(llava_7b)[0].needs] == [20, 21, 22]
    assert [need.layer for need in VtcCls().stages(small)[0].needs] == [4]


def test_published_budgets():
    """FastV K=2 R=50 % averages 306 of 576 tokens over 32 layers, R=75 % 171 (METHODS.md B1)."""
    from vtc.stage import average_tokens

    shape = Shape(32, 23)
    for ratio, published in ((0.5, 306), (0.75, 171)):
        kept = FastV(ratio=ratio).keep(576, None, shape)
        assert average_tokens(576, kept, (2,), 32) == published
        assert FastV().keep(576, published, shape) == kept


def test_cls_needs_a_cls_token(models):
    config = models[0].config
    config.vision_feature_select_strategy = "full"
    try:
        with pytest.raises(ValueError, match="no CLS token"):
            vtc.wrap(models[0], "vtc-cls", 0.5)
    finally:
        config.vision_feature_select_strategy = "default"
