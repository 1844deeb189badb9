"""Methods that read attention, keys or states, against loops over full attention matrices."""

import math

import oracle
import pytest
import torch
from models import IMAGE, llava, prompt
from oracle import top
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import vtc
from vtc.budget import average_tokens, counts
from vtc.methods.dart import Dart
from vtc.methods.evocut import EvoCut
from vtc.methods.fastervlm import FasterVLM
from vtc.methods.fitprune import DELETED, FitPrune
from vtc.methods.pyramiddrop import PyramidDrop
from vtc.methods.sparsevlm import SparseVLM
from vtc.methods.v2drop import V2Drop
from vtc.methods.vispruner import VisPruner
from vtc.stage import Shape

SEEDS = range(8)
LAYERS, RATIOS = (1, 3, 4), (0.75, 0.5, 0.25)


@pytest.fixture(scope="module")
def models():
    return llava(), llava(attn="eager")


def images_of(inputs):
    """Row and places of each image of a prompt with the images (1, 0, 2)."""
    places = [(row == IMAGE).nonzero()[:, 0].tolist() for row in inputs["input_ids"]]
    return [(0, places[0]), (2, places[2][:36]), (2, places[2][36:])]


def text_after(inputs, row, where):
    ids, real = inputs["input_ids"][row], inputs["attention_mask"][row]
    return [p for p in range(where[-1] + 1, len(ids)) if real[p] and ids[p] != IMAGE]


def last_of(inputs, row):
    return max(p for p in range(inputs["input_ids"].shape[1]) if inputs["attention_mask"][row, p])


@torch.no_grad()
def whole(model, inputs):
    """All states and attention matrices of the eager twin."""
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
    return model(**inputs, position_ids=positions, output_attentions=True, output_hidden_states=True)


def stage_by_stage(models, method, inputs, layers, ratios, score):
    """What stays at each stage: the next one sees the full model with the dropped keys masked.

    `score` gets that model's run, the layer, and of an image its row, the places of the tokens left, those of the text
    after it, those of all its tokens, and the keys that its row sees.
    """
    with vtc.compressed(models[0], method) as trace:
        models[0](**inputs)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    left = [list(range(36)) for _ in range(3)]
    for stage, (layer, ratio) in enumerate(zip(layers, ratios, strict=True)):
        keys = real & (ids != IMAGE)
        for (row, where), alive in zip(images_of(inputs), left, strict=True):
            keys[row, [where[index] for index in alive]] = True
        past = [oracle.visible_keys(models[1], trace, inputs)[before] for before in range(layer)]
        with oracle.masked_layers(models[1], [*past, *[keys] * (6 - layer)]):
            out = whole(models[1], inputs)
        for image, (row, where) in enumerate(images_of(inputs)):
            alive = [where[index] for index in left[image]]
            found = score(out, layer, row, alive, text_after(inputs, row, where), where, keys[row])
            left[image] = [left[image][index] for index in top(found, round(36 * ratio))]
        expected = [left[0], [], left[1] + [36 + index for index in left[2]]]
        assert [kept.tolist() for kept in trace.kept(stage)] == expected


def tower_of(model, inputs):
    with torch.no_grad():
        return model.base_model.vision_tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_fastervlm(models, seed):
    inputs = prompt(models[0], (1, 0, 2), seed=seed)
    with vtc.compressed(models[0], FasterVLM(), 7) as trace:
        models[0](**inputs)
    attention = tower_of(models[1], inputs).attentions[3]  # 5 blocks; the projector reads the output of block 3
    expected = [top([sum(image[h, 0, 1 + p].item() for h in range(4)) for p in range(36)], 7) for image in attention]
    kept = [kept.tolist() for kept in trace.kept()]
    assert kept == [expected[0], [], expected[1] + [36 + index for index in expected[2]]]


def important_and_diverse(attention, states, budget, share, step):
    important = top(attention, int(budget * share))
    rest = sorted((p for p in range(36) if p not in important), key=lambda p: -attention[p])
    while len(rest) > budget - len(important):
        even, odd = rest[::2], rest[1::2]
        twin = {
            e: max((torch.cosine_similarity(states[e], states[o], dim=0).item() for o in odd), default=-2) for e in even
        }
        number = min(step, len(rest) - (budget - len(important)), len(even))
        gone = sorted(even, key=lambda e: -twin[e])[:number]
        rest = [p for p in rest if p not in gone]
    return sorted(important + rest)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("budget", "share", "step"), [(9, 0.5, 8), (20, 0.3, 2), (2, 0.0, 5), (3, 1.0, 3)])
def test_vispruner(models, seed, budget, share, step):
    inputs = prompt(models[0], (1, 0, 2), seed=seed)
    with vtc.compressed(models[0], VisPruner(important=share, step=step), budget) as trace:
        models[0](**inputs)
    tower = tower_of(models[1], inputs)
    expected = [
        important_and_diverse(attention.mean(0)[0, 1:].tolist(), states[1:], budget, share, step)
        for attention, states in zip(tower.attentions[3], tower.hidden_states[4], strict=True)
    ]
    kept = [kept.tolist() for kept in trace.kept()]
    assert kept == [expected[0], [], expected[1] + [36 + index for index in expected[2]]]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("pad", ["left", "right"])
def test_pyramiddrop(models, seed, pad):
    inputs = prompt(models[0], (1, 0, 2), pad=pad, seed=seed)

    def score(out, layer, row, alive, text, *_):
        return out.attentions[layer][row].mean(0)[last_of(inputs, row), alive].tolist()

    stage_by_stage(models, PyramidDrop(layers=LAYERS, keep_ratios=RATIOS), inputs, LAYERS, RATIOS, score)


@pytest.mark.parametrize("seed", SEEDS)
def test_v2drop(models, seed):
    inputs = prompt(models[0], (1, 0, 2), seed=seed)

    def score(out, layer, row, alive, text, *_):
        before, after = (out.hidden_states[number][row] for number in (layer - 1, layer))
        return [math.dist(after[place].tolist(), before[place].tolist()) for place in alive]

    stage_by_stage(models, V2Drop(layers=LAYERS, keep_ratios=RATIOS), inputs, LAYERS, RATIOS, score)


def masses(out, layer, row, alive, text):
    """Cross and self score of FitPrune: means over the text after the image and over the image's tokens."""
    matrix = out.attentions[layer][row].amax(0)
    return [[sum(matrix[q, k].item() for q in payers) / len(payers) for k in alive] for payers in (text, alive)]


@pytest.mark.parametrize("seed", SEEDS)
def test_fitprune(models, seed):
    inputs, layers, ratios = prompt(models[0], (1, 0, 2), seed=seed), (1, 2, 3, 4, 5), (0.9, 0.75, 0.5, 0.25, 0.2)

    def score(out, layer, row, alive, text, *_):
        return [a * b for a, b in zip(*masses(out, layer - 1, row, alive, text), strict=True)]

    stage_by_stage(models, FitPrune(keep_ratios=ratios, layers=layers), inputs, layers, ratios, score)


def test_fitprune_has_the_published_schedules():
    """Layer by layer at their own averages, for LLaVA-1.5-7B; and something between them, whatever the depth."""
    shape = Shape(32, 23)
    for deleted in DELETED:
        assert len(deleted) == 32
        published = [576 - sum(deleted[:layer]) for layer in range(1, 32)]
        average = average_tokens(576, published, range(1, 32), 32)
        assert counts(FitPrune(), 576, average / 576, shape) == tuple(published)
    for depth in (6, 32, 40):
        for budget in (0.9, 0.5, 0.3):
            kept = counts(FitPrune(), 576, budget, Shape(depth, 23))
            assert average_tokens(576, kept, range(1, depth), depth) == pytest.approx(576 * budget, abs=0.5)
            assert list(kept) == sorted(kept, reverse=True)


def raters_of(embeds, alive, text):
    """The text tokens that the image matches more than the mean one; one token at a time."""
    match = [0.0] * len(text)
    for place in alive:
        products = [
            math.fsum(a * b for a, b in zip(embeds[place].tolist(), embeds[t].tolist(), strict=True)) for t in text
        ]
        partition = sum(math.exp(x - max(products)) for x in products)
        match = [m + math.exp(x - max(products)) / partition / len(alive) for m, x in zip(match, products, strict=True)]
    chosen = [t for t, m in zip(text, match, strict=True) if m > sum(match) / len(match)]
    return chosen or text


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("pad", ["left", "right"])
def test_sparsevlm_raters_and_scores(models, seed, pad):
    inputs = prompt(models[0], (1, 0, 2), pad=pad, seed=seed)
    with vtc.compressed(models[0], SparseVLM(layers=(3,), keep_ratios=(0.5,))) as trace:
        models[0](**inputs)
    out, found = whole(models[1], inputs), {0: [], 2: []}
    for row, where in images_of(inputs):
        raters = raters_of(out.hidden_states[0][row], where, text_after(inputs, row, where))
        matrix = out.attentions[2][row].mean(0)
        found[row] += [sum(matrix[r, place].item() for r in raters) / len(raters) for place in where]
    for row, scores in found.items():
        torch.testing.assert_close(trace.scores()[row], torch.tensor(scores), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def rotary_attention(model, inputs, row, keys):
    """softmax of the products of queries and keys of ones, rotated by transformers' own embedding: (queries, keys)."""
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)[row : row + 1]
    ones = torch.ones(1, 1, positions.shape[1], 8)
    query, key = apply_rotary_pos_emb(ones, ones, *model.base_model.language_model.rotary_emb(ones, positions))
    logits = (query[0, 0] @ key[0, 0].T) * 8**-0.5
    hidden = torch.ones_like(logits, dtype=torch.bool).triu(1) | ~keys
    return logits.masked_fill(hidden, -torch.inf).softmax(1)


@pytest.mark.parametrize("seed", SEEDS)
def test_sparsevlm_plus(models, seed):
    inputs, layers, ratios = prompt(models[0], (1, 0, 2), seed=seed), (1, 3), (0.5, 0.25)
    embeds = whole(models[1], inputs).hidden_states[0]

    def score(out, layer, row, alive, text, where, keys):
        raters, heads = raters_of(embeds[row], where, text), []
        bias = rotary_attention(models[1], inputs, row, keys)
        for matrix in out.attentions[layer - 1][row]:
            rows = matrix / bias.clamp(min=1e-12)
            heads.append([sum(rows[r, place].item() for r in raters) / len(raters) for place in alive])
        best = top([sum(head) for head in heads], round(4 * 14 / 32))
        return [sum(heads[h][token] for h in best) / len(best) for token in range(len(alive))]

    stage_by_stage(models, SparseVLM(layers=layers, keep_ratios=ratios, plus=True), inputs, layers, ratios, score)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("pivots", "budget"), [((4, 4), 15), ((4, 4), 14), ((5, 0), 30), ((4, 40), 20)])
def test_dart(models, seed, pivots, budget):
    """One pivot after the other; a prompt with fewer text tokens than pivots has those that it has."""
    inputs = prompt(models[0], (1, 0, 2), seed=seed)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)  # norms of rotated keys depend on them
    with vtc.compressed(models[0], Dart(layer=2, image_pivots=pivots[0], text_pivots=pivots[1]), budget) as trace:
        models[0](**inputs, position_ids=positions)
    keys, model = [], models[1]
    decoder = model.base_model.language_model
    handle = decoder.layers[1].self_attn.k_proj.register_forward_hook(lambda m, args, out: keys.append(out))
    out = whole(model, inputs)
    handle.remove()
    key = keys[0].unflatten(-1, (2, 8)).transpose(1, 2)
    key, _ = apply_rotary_pos_emb(key, key, *decoder.rotary_emb(key, positions))
    states, expected = decoder.norm(out.hidden_states[2]), []
    (stay,) = counts(Dart(layer=2), 36, budget, Shape(6, 4))
    for row, where in images_of(inputs):

        def cosine(a, b, row=row):
            return torch.cosine_similarity(states[row, a], states[row, b], dim=0).item()

        norm = {place: key[row, :, place].abs().sum().item() for place in range(key.shape[2])}
        ranked = sorted(where, key=lambda place: -norm[place])
        text = sorted(text_after(inputs, row, where), key=lambda place: -norm[place])[: pivots[1]]
        chosen = ranked[: min(pivots[0], stay)]
        queue, rest = [*ranked[: pivots[0]], *text], stay - len(chosen)
        for number, pivot in enumerate(queue):
            share = rest // len(queue) + (number < rest % len(queue))
            free = sorted((place for place in where if place not in chosen), key=lambda place: cosine(place, pivot))
            chosen += free[:share]
        expected.append(sorted(where.index(place) for place in chosen))
    kept = [kept.tolist() for kept in trace.kept()]
    assert kept == [expected[0], [], expected[1] + [36 + index for index in expected[2]]]


def deviations(before, after, number):
    """1 - the cosine of each direction with the nearest of `number` main ones: Lloyd's rounds from farthest points."""
    direction = torch.nn.functional.normalize(after - before, dim=1)
    centres = [direction[0]]
    while len(centres) < number:
        gap = [min((d - c).norm().item() for c in centres) for d in direction]
        centres.append(direction[gap.index(max(gap))])
    for _ in range(6):
        group = [max(range(number), key=lambda c: (d @ centres[c]).item()) for d in direction]
        members = [[d for d, g in zip(direction, group, strict=True) if g == c] for c in range(number)]
        centres = [
            torch.nn.functional.normalize(sum(own), dim=0) if own else centre
            for own, centre in zip(members, centres, strict=True)
        ]
    return [1 - max((d @ c).item() for c, own in zip(centres, members, strict=True) if own) for d in direction]


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_evocut(models, seed):
    inputs = prompt(models[0], (1, 0, 2), seed=seed)
    with vtc.compressed(models[0], EvoCut(directions=4, memory=0.7), 9) as trace:
        models[0](**inputs)
    states, found = tower_of(models[1], inputs).hidden_states, []
    for image in range(3):
        score = None  # the projector reads the output of the fourth block of five
        for block in (2, 3, 4):
            own = deviations(states[block - 1][image, 1:], states[block][image, 1:], 4)
            score = own if score is None else [0.7 * s + 0.3 * r for s, r in zip(score, own, strict=True)]
        found.append(score)
    torch.testing.assert_close(trace.scores()[0], torch.tensor(found[0]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(trace.scores()[2], torch.tensor(found[1] + found[2]), atol=1e-5, rtol=1e-4)
    assert trace.kept()[0].tolist() == top(found[0], 9)


def test_as_many_layers_as_ratios():
    with pytest.raises(ValueError, match="pyramiddrop: 2 layers and 3 keep_ratios"):
        PyramidDrop(layers=(1, 2))
    assert len(V2Drop(layers=(1, 2), keep_ratios=(0.5, 0.2)).stages(Shape(6, 4))) == 2
