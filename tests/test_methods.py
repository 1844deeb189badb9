"""Each method's keep list against a slow reference written from the formula: full attention, loops."""

import math
import random
import re
from dataclasses import replace
from functools import lru_cache, partial

import oracle
import pytest
import torch
from models import IMAGE, MEAN, STD, llava, prompt
from oracle import attentions, top
from PIL import Image
from transformers import CLIPImageProcessor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import vtc
from vtc.attention import attention_rows
from vtc.budget import average_tokens, counts
from vtc.choice import Seen
from vtc.grids import evenly_spaced
from vtc.methods.atp import Atp
from vtc.methods.fastv import FastV
from vtc.methods.random import Random
from vtc.methods.random_kv import drawn
from vtc.methods.tally import Tally
from vtc.methods.tome import ToMe
from vtc.methods.transprune import TransPrune
from vtc.methods.uniform import Uniform
from vtc.methods.vflowopt import VFlowOpt
from vtc.methods.vtc_cls import VtcCls
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
            paid = tower[layer][image, :, 0].tolist()
            for head in range(4):
                for patch in range(36):
                    score[patch] += paid[head][patch + 1] / 4
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
        paid = decoder[1][row, :, last].tolist()
        score = [sum(paid[head][place] for head in range(4)) / 4 for place in places]
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


def recorded(model, inputs):
    """Normed input and output of both modules of every decoder layer: {(layer, "self_attn" | "mlp"): (in, out)}."""
    seen, handles = {}, []
    norms = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
    for number, layer in enumerate(model.base_model.language_model.layers):
        for module, norm in norms.items():

            def keep(m, args, output, key=(number, module)):
                seen.setdefault(key, []).append(output[0] if isinstance(output, tuple) else output)

            handles += [getattr(layer, name).register_forward_hook(keep) for name in (norm, module)]
    _, decoder = attentions(model, inputs)
    for handle in handles:
        handle.remove()
    return seen, decoder


def transitions(seen, layer, row, places):
    """TTV of one layer for the tokens at `places`, from the formula."""
    total = [0.0] * len(places)
    for module in ("self_attn", "mlp"):
        before, after = (states[row] for states in seen[layer, module])
        ratios, angles = [], []
        for place in places:
            x, y = before[place].tolist(), after[place].tolist()
            norm_x, norm_y = math.sqrt(sum(v * v for v in x)), math.sqrt(sum(v * v for v in y))
            ratios.append(norm_y / norm_x)
            angles.append(1 - sum(a * b for a, b in zip(x, y, strict=True)) / norm_x / norm_y)
        partition = sum(math.exp(angle) for angle in angles)
        total = [t + math.exp(a) / partition * r for t, a, r in zip(total, angles, ratios, strict=True)]
    return total


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_transprune(models, seed, alpha):
    """Stage by stage: what the next stage sees is the full model with the dropped keys masked."""
    inputs, layers, ratios = prompt(models[0], (1, 0, 2), pad="left", seed=seed), (2, 3, 5), (0.75, 0.5, 0.25)
    method = TransPrune(keep_ratios=ratios, alpha=alpha, layers=layers)
    with vtc.compressed(models[0], method) as trace:
        models[0](**inputs)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    places = {row: (ids[row] == IMAGE).nonzero()[:, 0].tolist() for row in range(3)}
    images = [(0, places[0]), (2, places[2][:36]), (2, places[2][36:])]
    left = [list(range(36)) for _ in images]
    total = [[0.0] * 36 for _ in images]
    for stage, (layer, ratio) in enumerate(zip(layers, ratios, strict=True)):
        keys = real & (ids != IMAGE)
        for (row, where), alive in zip(images, left, strict=True):
            keys[row, [where[index] for index in alive]] = True
        past = [oracle.visible_keys(models[1], trace, inputs)[before] for before in range(layer)]
        with oracle.masked_layers(models[1], [*past, *[keys] * (6 - layer)]):
            seen, decoder = recorded(models[1], inputs)
        for image, (row, where) in enumerate(images):
            alive = [where[index] for index in left[image]]
            for before in range(max(layers[stage - 1] if stage else 1, 1), layer):
                for index, value in zip(left[image], transitions(seen, before, row, alive), strict=True):
                    total[image][index] += value
            text = [p for p in range(where[-1] + 1, ids.shape[1]) if real[row, p] and ids[row, p] != IMAGE]
            matrix = decoder[layer][row].mean(0).tolist()
            guided = [sum(matrix[query][place] for query in text) / len(text) for place in alive]
            transition = [total[image][index] for index in left[image]]
            score = [
                alpha * t / sum(transition) + (1 - alpha) * g / sum(guided)
                for t, g in zip(transition, guided, strict=True)
            ]
            left[image] = [left[image][index] for index in top(score, round(36 * ratio))]
        expected = [left[0], [], left[1] + [36 + index for index in left[2]]]
        assert [kept.tolist() for kept in trace.kept(stage)] == expected


def importance(models, tower, pixels, image, threshold, alpha):
    """VFlowOpt's map of one image, from the formula."""
    matrix = tower[3][image].mean(0)[1:, 1:].tolist()
    received = [sum(matrix[i][j] for i in range(36)) / 36 for j in range(36)]
    relevant = [j for j in range(36) if received[j] > threshold * sum(received) / 36] or list(range(36))
    result = [sum(matrix[k][j] for k in relevant) / len(relevant) for j in range(36)]
    entropies, pixels = [], pixels[image].tolist()
    for row in range(6):
        for column in range(6):
            counts = {}
            for y in range(8):
                for x in range(8):
                    r, g, b = ((pixels[c][8 * row + y][8 * column + x] * STD[c] + MEAN[c]) * 255 for c in range(3))
                    grey = min(255, max(0, round((r + g + b) / 3)))
                    counts[grey] = counts.get(grey, 0) + 1
            entropies.append(-sum(n / 64 * math.log2(n / 64) for n in counts.values()))
    partition = sum(math.exp(entropy) for entropy in entropies)
    return [a + alpha * math.exp(e) / partition for a, e in zip(result, entropies, strict=True)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_vflowopt(models, seed, alpha):
    """What stays at all three sites, which token took in which, and the merged features themselves."""
    inputs = prompt(models[0], (1, 0, 2), pad="left", seed=seed)
    method = VFlowOpt(retain=(0.5, 0.75, 0.5), threshold=1.1, cell=0.5, alpha=alpha)
    entering = []
    decoder = models[0].base_model.language_model
    handle = decoder.layers[0].register_forward_pre_hook(lambda m, args: entering.append(args[0]))
    trace, (tower, _) = kept_by(models, method, None, inputs)
    handle.remove()
    with torch.no_grad():
        features = models[0].get_image_features(inputs["pixel_values"]).pooler_output
    for image, (row, offset) in enumerate(((0, 0), (2, 0), (2, 36))):
        score = importance(models, tower, inputs["pixel_values"], image, 1.1, alpha)
        best = top(score, 18 - 4)  # cells of 3 x 3 patches: four
        cells = {}
        for index in range(36):
            if index not in best:
                cells.setdefault((index // 6 // 3, index % 6 // 3), []).append(index)
        leaders = {max(group, key=lambda i: score[i]): group for group in cells.values()}
        assert len(leaders) == 4
        first = sorted([*best, *leaders])
        kept = [index - offset for index in trace.kept(0)[row].tolist() if 0 <= index - offset < 36]
        assert kept == first
        into = trace.stages[0].into[image].tolist()
        assert into == [
            index if index in first else next(lead for lead, group in leaders.items() if index in group)
            for index in range(36)
        ]
        states = entering[0][row]
        for group in leaders.values():
            mass = sum(score[i] for i in group)
            expected = sum(features[image][i] * (score[i] / mass) for i in group)
            assert torch.isclose(states, expected, atol=1e-5, rtol=1e-4).all(1).any()
        for index in best:
            assert (states == features[image][index]).all(1).any()
        second = top([score[i] for i in first], round(36 * 0.375))
        third = top([score[first[i]] for i in second], round(36 * 0.1875))
        last = [index - offset for index in trace.kept(2)[row].tolist() if 0 <= index - offset < 36]
        assert last == [first[second[i]] for i in third]


def entropy_of(grey):
    """Bits of a histogram of grey levels."""
    counts = [grey.count(level) for level in set(grey)]
    return -sum(n / len(grey) * math.log2(n / len(grey)) for n in counts)


@pytest.mark.parametrize("cls", [True, False])
def test_entropy_is_of_the_pixels_that_the_processor_was_given(cls, tmp_path):
    """Whatever the checkpoint's own processor normalises by, and whichever tower reads it."""
    processor = CLIPImageProcessor(
        size={"height": 48, "width": 48},
        do_center_crop=False,
        do_resize=False,
        image_mean=[0.1, 0.6, 0.9],
        image_std=[0.7] * 3,
    )
    processor.save_pretrained(tmp_path)
    model = llava(cls=cls)
    model.config._name_or_path = str(tmp_path)
    levels = torch.randint(0, 256, (48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs = {**prompt(model), **processor(Image.fromarray(levels.numpy()), return_tensors="pt")}
    with vtc.compressed(model, VFlowOpt(alpha=1000.0), 0.5) as trace:
        model(**inputs)
    means = levels.float().mean(2).round().int()
    patches = [means[y : y + 8, x : x + 8].flatten().tolist() for y in range(0, 48, 8) for x in range(0, 48, 8)]
    expected = 1000 * torch.tensor([entropy_of(patch) for patch in patches]).softmax(0)
    torch.testing.assert_close(trace.scores(0)[0], expected, atol=1.0, rtol=0)


def test_entropy_is_refused_where_the_processor_is_not_known(tmp_path):
    for place in ("", str(tmp_path)):
        model = llava()
        model.config._name_or_path = place
        with pytest.raises(ValueError, match=r"no image processor.*processor\.save_pretrained"):
            vtc.wrap(model, VFlowOpt(alpha=0.1), 0.5)
        vtc.wrap(model, VFlowOpt(alpha=0.0), 0.5)


def test_vflowopt_without_a_relevant_patch_takes_all(models):
    inputs = prompt(models[0], (1,))
    trace, (tower, _) = kept_by(models, VFlowOpt(threshold=1e6, cell=0.5), 0.5, inputs)
    received = tower[3][0].mean(0)[1:, 1:].mean(0)
    torch.testing.assert_close(trace.scores(0)[0], received, atol=1e-6, rtol=1e-4)


def self_scores(model, seen, layer, row, alive):
    """S_self of ATP: full logits from transformers' own rotary embedding, averaged over heads and visual queries."""
    query, key = (states[row] for states in seen[layer])
    length = query.shape[0]
    query, key = (x.view(length, -1, 8).transpose(0, 1)[None] for x in (query, key))
    cos, sin = (table[row : row + 1] for table in seen["rotary"])
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    logits = ((query[0] @ key[0].repeat_interleave(2, 0).transpose(1, 2)).mean(0) / math.sqrt(8)).tolist()
    return [sum(logits[i][j] for i in alive) / len(alive) for j in alive]


def unit(values):
    return [(v - min(values)) / (max(values) - min(values)) for v in values]


@pytest.mark.parametrize("seed", SEEDS)
def test_atp(models, seed):
    """Stage by stage, with random thresholds; rows keep different counts."""
    inputs, layers, ids = prompt(models[0], (1, 0, 2), pad="left", seed=seed), (2, 3, 5), None
    torch.manual_seed(seed)
    method = Atp(layers=layers, rates=(0.25, 0.25, 0.0625)).untrained(vtc.adapter.find(models[0]).shape(), 16)
    method.modules.eval()
    for module in method.modules:  # near the middle of what passes, and the lattice on or off
        module.redundant.bias.data.fill_(-0.5 + 0.4 * torch.rand(()).item())
        module.spatial.bias.data.fill_(-2.5 * torch.rand(()).item())
    with vtc.compressed(models[0], method) as trace:
        models[0](**inputs)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    places = {row: (ids[row] == IMAGE).nonzero()[:, 0].tolist() for row in range(3)}
    images = [(0, places[0]), (2, places[2][:36]), (2, places[2][36:])]
    left = [list(range(36)) for _ in images]
    decoder_model = models[1].base_model.language_model
    for stage, layer in enumerate(layers):
        visible = [oracle.visible_keys(models[1], trace, inputs)[before] for before in range(layer)]
        seen, handles = {}, []

        def keep(m, args, out, number=None, seen=seen):
            seen.update(rotary=out) if number is None else seen.setdefault(number, []).append(out)

        for number, block in enumerate(decoder_model.layers):
            for projection in (block.self_attn.q_proj, block.self_attn.k_proj):
                handles.append(projection.register_forward_hook(partial(keep, number=number)))
        handles.append(decoder_model.rotary_emb.register_forward_hook(keep))
        with oracle.masked_layers(models[1], [*visible, *[visible[-1]] * (6 - layer)]):
            _, matrices = attentions(models[1], inputs)
        for handle in handles:
            handle.remove()
        for image, (row, where) in enumerate(images):
            alive = [where[index] for index in left[image]]
            own = unit(self_scores(models[1], seen, layer - 1, row, alive))
            text = [p for p in range(where[-1] + 1, ids.shape[1]) if real[row, p] and ids[row, p] != IMAGE]
            matrix = matrices[layer - 1][row].mean(0).tolist()
            cross = unit([sum(matrix[q][place] for q in text) / len(text) for place in alive])
            means = torch.tensor([[sum(own) / len(own), sum(cross) / len(cross)]])
            redundant, spatial = (threshold.item() for threshold in method.modules[stage](means))
            rate = method.rates[stage]
            step = round((1 / rate) ** 0.5)
            total = [(a + b) / 2 for a, b in zip(own, cross, strict=True)]
            kept = []
            for index, score in zip(left[image], total, strict=True):
                lattice = max(0, 1 - 3 * rate) if index // 6 % step == 0 and index % 6 % step == 0 else 0
                if score > redundant or lattice > spatial or score == max(total):
                    kept.append(index)
            left[image] = kept
        expected = [left[0], [], left[1] + [36 + index for index in left[2]]]
        assert [kept.tolist() for kept in trace.kept(stage)] == expected


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_atp_soft_gates_become_the_hard_drop(attn):
    """With steep gates the softly gated model answers as the pruned one."""
    model, inputs = llava(attn=attn), prompt(llava(), (1, 2), pad="left", seed=1)
    torch.manual_seed(0)
    method = Atp(layers=(1, 3), rates=(0.0625, 0.0625)).untrained(vtc.adapter.find(model).shape(), 16)
    with torch.no_grad():
        method.modules.eval()
        hard = vtc.wrap(model, method)(**inputs).logits
        kept = model.vtc.trace.tokens_per_layer
        method.modules.train()
        soft = vtc.wrap(model, replace(method, sharpness=1e6))(**inputs).logits
        plain = vtc.unwrap(model)(**inputs).logits
    assert (kept[:, -1] < kept[:, 0]).all()
    torch.testing.assert_close(soft[:, -1], hard[:, -1], atol=1e-3, rtol=1e-3)
    assert (plain[:, -1] - hard[:, -1]).abs().max() > 0.1


def test_atp_thresholds_learn_through_sdpa():
    """The gradient agrees with finite differences, for one module: a second one counts only the tokens above a half."""
    model = llava().double()
    inputs = prompt(model, (1, 1), pad="left")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    torch.manual_seed(0)
    method = Atp(layers=(2,), rates=(0.0625,)).untrained(vtc.adapter.find(model).shape(), 4)
    method.modules.train()
    vtc.wrap(model, method)

    def loss():
        return torch.nn.functional.cross_entropy(model(**inputs).logits[:, -1], torch.tensor([3, 5]))

    loss().backward()
    for parameter in method.modules.parameters():
        for place in range(min(3, parameter.numel())):
            values = []
            for step in (1e-2, -1e-2):
                with torch.no_grad():
                    parameter.view(-1)[place] += step
                    values.append(loss().item())
                    parameter.view(-1)[place] -= step
            slope = (values[0] - values[1]) / 2e-2
            assert parameter.grad.view(-1)[place].item() == pytest.approx(slope, rel=0.02, abs=1e-4)


def test_atp_saves_and_loads(tmp_path, models):
    method = Atp(rates=(0.2, 0.1, 0.05)).untrained(vtc.adapter.find(models[0]).shape(), 8)
    method.save_pretrained(tmp_path / "atp" / "0.25")
    again = Atp.from_pretrained(tmp_path / "atp" / "0.25")
    assert again == method
    state = method.modules.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.modules.state_dict().items())
    before, models[0].config._name_or_path = models[0].config._name_or_path, str(tmp_path)
    try:
        for budget in (0.25, 9):
            found = vtc.wrap(models[0], "atp", budget).vtc.method
            assert torch.equal(found.modules[0].mix.weight, method.modules[0].mix.weight)
        with pytest.raises(ValueError, match=r"0\.25, not for 0\.5.*vtc train atp"):
            vtc.wrap(models[0], "atp", 0.5)
    finally:
        vtc.unwrap(models[0])
        models[0].config._name_or_path = before


def test_random_depends_on_the_seed_alone(models):
    inputs = prompt(models[0], (1, 1), pad="left")
    kept = {}
    for seed in (0, 1):
        trace, _ = kept_by(models, Random(seed=seed), 9, inputs)
        kept[seed] = [row.tolist() for row in trace.kept()]
        assert kept[seed][0] == kept[seed][1]
    assert kept[0] != kept[1]


def test_a_longer_video_draws_more_and_begins_with_the_same():
    def scores(frames):
        tokens = frames * 196
        index = torch.arange(tokens)[None]
        seen = Seen({}, torch.ones(1, tokens, dtype=torch.bool), index, [[(14, 14)] * frames], [tokens])
        return Random()._scores(seen), drawn(0, 2, 4, seen)

    for short, long in zip(scores(80), scores(400), strict=True):
        assert torch.equal(long[..., : 80 * 196], short)
        assert long.unique().numel() > 0.99 * long.numel()


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


def test_attention_rows_are_rows_of_the_matrix():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 9, 8, generator=generator), torch.randn(2, 2, 9, 8, generator=generator)
    visible = torch.rand(2, 9, 9, generator=generator) > 0.3
    logits = query @ key.repeat_interleave(2, dim=1).transpose(2, 3) * 0.3
    full = logits.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    for places in ([0], [3, 8], [1, 2, 5]):
        rows = attention_rows(query[:, :, places], key, 0.3, visible[:, places])
        torch.testing.assert_close(rows, full[:, :, places])


def test_paper_layers_scale_with_the_depth():
    llava_7b, small = Shape(32, 23), Shape(8, 5)
    assert [stage.site for stage in FastV().stages(llava_7b)] == [2]
    assert [stage.site for stage in FastV().stages(small)] == [1]
    assert [need.layer for need in VtcCls().stages(llava_7b)[0].needs] == [20, 21, 22]
    assert [need.layer for need in VtcCls().stages(small)[0].needs] == [4]


def test_published_budgets():
    """FastV K=2 R=50 % averages 306 of 576 tokens over 32 layers, R=75 % 171 (METHODS.md B1)."""
    shape = Shape(32, 23)
    for ratio, published in ((0.5, 306), (0.75, 171)):
        kept = counts(FastV(ratio=ratio), 576, None, shape)
        assert average_tokens(576, kept, (2,), 32) == published
        assert counts(FastV(), 576, published, shape) == kept


def test_a_schedule_never_rises():
    odd = TransPrune(keep_ratios=(0.3, 0.9, 0.2))
    assert counts(odd, 100, None, Shape(32, 23)) == (30, 30, 20)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_schedule_meets_its_budget_or_says_that_it_cannot(seed):
    """However uneven its ratios: to the rounding of each stage, and to the one token that has to stay."""
    rng = random.Random(seed)
    shape, layers, tokens = Shape(32, 23), sorted(rng.sample(range(1, 32), 2)), rng.choice((144, 576, 2880))
    retain = rng.choice((1.0, 0.99, 1e-3)), rng.choice((1.0, 0.99, rng.random())), rng.choice((0.999, 0.3, 0.01))
    method = VFlowOpt(retain=retain, layers=tuple(layers))
    first = next(layer for layer, ratio in zip((0, *layers), retain, strict=True) if ratio < 1)
    floor = (first * tokens + 32 - first) / 32  # one token stays
    for budget in (0.9, 0.5, 0.25, 0.11, 0.03):
        if budget * tokens < floor - 0.5:
            with pytest.raises(vtc.BudgetError, match=f"first drop is before layer {first}"):
                counts(method, tokens, budget, shape)
            continue
        kept = counts(method, tokens, budget, shape)
        assert average_tokens(tokens, kept, (0, *layers), 32) == pytest.approx(budget * tokens, abs=1.5)
        assert list(kept) == sorted(kept, reverse=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_budget_is_met_to_half_a_token_or_the_floor_is_named(seed):
    """All methods, shapes, images from one token on: stages round by half a token, and one token has to stay."""
    rng = random.Random(seed)
    for _ in range(40):
        shape = Shape(rng.randint(4, 40), 23)
        layers = sorted(rng.sample(range(1, shape.decoder_layers), 3))
        shares = tuple(rng.choice((1.0, 0.9, 0.01, rng.random())) for _ in range(3))
        method = rng.choice(
            [
                *(kind() for kind in vtc.list_methods().values() if not kind.adaptive),
                FastV(layer=layers[0], ratio=shares[0]),
                TransPrune(layers=tuple(layers), keep_ratios=shares),
                VFlowOpt(layers=tuple(layers[:2]), retain=shares),
                ToMe(share=0.5),
            ]
        )
        tokens = rng.choice((1, 2, 3, 5, 36, 144, 576, 2880))
        budget = rng.choice((rng.random(), 0.5, 0.01, 1.0, rng.randint(1, tokens)))
        wanted = max(1, budget * tokens) if isinstance(budget, float) else budget
        bound = method if isinstance(method, vtc.Trained) else method.bind(None, budget, tokens)
        stages = tuple(stage.site for stage in bound.stages(shape))

        def average(budget, method=method, tokens=tokens, shape=shape, stages=stages):
            return average_tokens(tokens, counts(method, tokens, budget, shape), stages, shape.decoder_layers)

        refusal = None
        try:
            reached = average(budget)
        except vtc.BudgetError as error:
            refusal = error
        if refusal is None:
            assert reached == pytest.approx(wanted, abs=0.5 + 1e-9)
            continue
        named = float(re.search(r"\(([0-9.]+) to 1\.0 of the image\)", str(refusal))[1])
        assert wanted < refusal.floor * tokens - 0.5
        assert average(refusal.floor) == pytest.approx(refusal.floor * tokens)
        assert refusal.floor <= named
        assert average(named) == pytest.approx(named * tokens, abs=0.5)


def test_an_image_of_one_token_is_kept():
    for kind in (Random, VtcCls, FastV, TransPrune, VFlowOpt, Tally):
        for budget in (0.01, 0.25, 1, 1.0, 64):
            assert set(counts(kind(), 1, budget, Shape(32, 23))) == {1}
    assert counts(Random(), 1, 0, Shape(32, 23)) == (0,)
    with pytest.raises(vtc.BudgetError, match="cannot reach 0 of 1 visual tokens") as error:
        counts(FastV(), 1, 0, Shape(32, 23))
    assert error.value.floor == 1


def test_tuned_methods_survive_json(tmp_path):
    for method in (VFlowOpt().tuned({"retain.1": 0.5, "alpha": 0.1}), VtcCls().tuned({"layers": 2}), FastV(layer=3)):
        method.to_json(tmp_path / "method.json")
        assert vtc.find_method(tmp_path / "method.json") == method
    assert VFlowOpt().tuned({"retain.1": 0.5}).retain == (0.265, 0.5, 0.877)
    (tmp_path / "method.json").write_text('{"method": "magic"}')
    with pytest.raises(ValueError, match="'magic'; vtc knows"):
        vtc.find_method(tmp_path / "method.json")


@lru_cache(maxsize=1)
def without_cls(seed):
    return llava(seed, cls=False), llava(seed, attn="eager", cls=False)


@pytest.mark.parametrize("how", ["sum", "mean", "max"])
@pytest.mark.parametrize("seed", SEEDS)
def test_vtc_cls_without_a_cls_token(seed, how):
    """SigLIP: the mean attention that a patch receives, per block, then the ensemble."""
    pair = without_cls(seed)
    inputs = prompt(pair[0], (1, 2), pad="left", seed=seed)
    trace, (tower, _) = kept_by(pair, VtcCls(layers=2, ensemble=how), 7, inputs)
    combine = {"sum": sum, "mean": lambda parts: sum(parts) / 2, "max": max}[how]
    expected = [[], []]
    for image, row in ((0, 0), (1, 1), (2, 1)):
        blocks = [tower[layer][image].mean(0).mean(0).tolist() for layer in (2, 3)]
        score = [combine([block[patch] for block in blocks]) for patch in range(36)]
        expected[row] += [kept + 36 * (image == 2) for kept in top(score, 7)]
    assert [kept.tolist() for kept in trace.kept()] == expected


@pytest.mark.parametrize("images", [(1,), (1, 2, 0)])
def test_contiguous_positions_are_a_natively_short_prompt(models, images):
    """As the official code does: the survivors' features spliced into the text, numbered without gaps."""
    model, inputs = models[0], prompt(models[0], images, pad="left")
    options = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    with vtc.compressed(model, VtcCls(positions="contiguous"), 7) as trace:
        out = model.generate(**inputs, **options)
    features = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
    start = 0
    for row, count in enumerate(images):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        embeds = model.get_input_embeddings()(ids)
        visual = (ids == IMAGE).nonzero()[:, 0]
        embeds[visual] = features[start : start + 36 * count]
        start += 36 * count
        stay = (ids != IMAGE).index_fill(0, visual[trace.kept()[row]], True)
        short = model.generate(inputs_embeds=embeds[stay][None], **options)
        torch.testing.assert_close(
            torch.stack(out.logits, 1)[row], torch.stack(short.logits, 1)[0], atol=1e-4, rtol=1e-4
        )
