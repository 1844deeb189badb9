"""Methods that merge, against loops: which token takes in which, and what becomes of its features."""

import math

import oracle
import pytest
import torch
from models import FAMILIES, IMAGE, llava, prompt
from oracle import top
from test_peers_attention import images_of, raters_of, text_after, tower_of, whole

import vtc
from vtc.choice import Seen
from vtc.core.stream import Stream
from vtc.grids import evenly_spaced
from vtc.merge import sizes
from vtc.methods.density_peaks import density_peaks
from vtc.methods.prumerge import PruMerge
from vtc.methods.prumerge_plus import PruMergePlus
from vtc.methods.sparsevlm import SparseVLM
from vtc.methods.visionzip import MeanKeys, VisionZip, dominant_and_contextual

SEEDS = range(8)


@pytest.fixture(scope="module")
def models():
    return llava(), llava(attn="eager")


def entering(model, layer, method, budget, inputs):
    """The trace of a run, and the states that enter a decoder layer."""
    states = []
    with vtc.compressed(model, method, budget) as trace, torch.no_grad():  # whose hooks come first
        handle = oracle.layers(model)[layer].register_forward_pre_hook(lambda m, args: states.append(args[0]))
        model(**inputs)
        handle.remove()
    return trace, states[0]


def check(trace, states, features, expected):
    """The source maps of the images (1, 0, 2) and what their groups became; `expected`: (map, mass) of each image."""
    offsets = (0, 0), (2, 0), (2, 36)
    for image, ((row, offset), (into, mass)) in enumerate(zip(offsets, expected, strict=True)):
        assert trace.stages[0].into[image].tolist() == into
        kept = [index - offset for index in trace.kept(0)[row].tolist() if 0 <= index - offset < 36]
        assert kept == sorted(set(into) - {-1})
        for token in kept:
            members = [other for other in range(36) if into[other] == token]
            total = sum(mass[other] for other in members)
            mean = sum(features[image][other] * (mass[other] / total) for other in members)
            assert torch.isclose(states[row], mean, atol=1e-5, rtol=1e-4).all(1).any()


def keys_of(model, inputs, block=3):
    """Keys of each image's patches in the block that the projector reads: (images, patches, heads, head_dim)."""
    found = []
    projection = vtc.adapter.find(model).tower_blocks()[block].self_attn.k_proj
    handle = projection.register_forward_hook(lambda m, args, out: found.append(out))
    tower = tower_of(model, inputs)
    handle.remove()
    return found[0][:, 1:].unflatten(-1, (4, 8)), tower


def cosine(a, b):
    return torch.cosine_similarity(a, b, dim=0).item()


def zipped(attention, keys, budget, share):
    """VisionZip's source map of one image."""
    contextual = round(share * budget)
    dominant = top(attention, budget - contextual)
    others = [p for p in range(36) if p not in dominant]
    targets = others[:: max(1, len(others) // contextual)][:contextual] if contextual else []
    into = {p: p for p in [*dominant, *targets]}
    for p in others:
        if p not in targets:
            into[p] = max(targets, key=lambda t: cosine(keys[p], keys[t])) if targets else -1
    return [into[p] for p in range(36)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("budget", "share"), [(9, 10 / 64), (20, 0.4), (5, 0.8), (6, 0.0)])
def test_visionzip(models, seed, budget, share):
    inputs = prompt(models[0], (1, 0, 2), seed=seed)
    trace, states = entering(models[0], 0, VisionZip(contextual=share), budget, inputs)
    features = models[0].get_image_features(inputs["pixel_values"]).pooler_output
    keys, tower = keys_of(models[1], inputs)
    expected = [
        (zipped(tower.attentions[3][image].mean(0)[0, 1:].tolist(), keys[image].mean(1), budget, share), [1.0] * 36)
        for image in range(3)
    ]
    check(trace, states, features, expected)


def pruned(attention, keys, budget, uniform, neighbours):
    """PruMerge's source map of one image and the weights of its means."""
    spaced = evenly_spaced(6, 6, int(uniform * (budget - 1)))
    ranked = sorted((p for p in range(36) if p not in spaced), key=lambda p: -attention[p])
    centres = [*spaced, *ranked[: budget - 1 - len(spaced)]]
    others = [p for p in range(36) if p not in centres]
    near = {
        c: sorted(others, key=lambda p: -cosine(keys[p], keys[c]))[:neighbours] for c in centres
    }  # of the code's 32 nearest
    leader = max(others, key=lambda p: attention[p])
    into = []
    for p in range(36):
        takers = [c for c in centres if p in near[c]]
        if p in centres or p == leader:
            into.append(p)
        else:
            into.append(max(takers, key=lambda c: cosine(keys[p], keys[c])) if takers else leader)
    return into, [1.0 if p in centres else attention[p] for p in range(36)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("method", "budget"),
    [(PruMerge(), 9), (PruMerge(neighbours=3), 6), (PruMerge(), 1), (PruMergePlus(neighbours=2), 12)],
)
def test_prumerge(models, seed, method, budget):
    inputs = prompt(models[0], (1, 0, 2), seed=seed)
    trace, states = entering(models[0], 0, method, budget, inputs)
    features = models[0].get_image_features(inputs["pixel_values"]).pooler_output
    queries, (keys, tower) = [], keys_of(models[1], inputs)
    block, expected = vtc.adapter.find(models[1]).tower_blocks()[3], []
    normed = block.layer_norm1(tower.hidden_states[3])
    queries = block.self_attn.q_proj(normed)[:, 0]
    with_cls = block.self_attn.k_proj(normed)
    for image in range(3):
        logits = [math.fsum((queries[image] * key).tolist()) * 32**-0.5 for key in with_cls[image]]
        partition = sum(math.exp(x) for x in logits)
        attention = [math.exp(x) / partition for x in logits[1:]]
        uniform = 0.75 if isinstance(method, PruMergePlus) else 0.0
        expected.append(pruned(attention, keys[image].flatten(1), budget, uniform, method.neighbours))
    check(trace, states, features, expected)


def clustered(states, count):
    """kNN density peaks: the centre that each of a list of states joins."""
    width, number = len(states[0]), range(len(states))
    apart = [[math.dist(a, b) / width**0.5 for b in states] for a in states]
    density = [math.exp(-sum(sorted(d * d for d in row)[:count]) / count) for row in apart]
    delta = []
    for i in number:
        denser = [j for j in number if density[j] > density[i] or (density[j] == density[i] and j < i)]
        delta.append(min(apart[i][j] for j in denser) if denser else max(map(max, apart)))
    centres = sorted(number, key=lambda i: -density[i] * delta[i])[:count]
    return [i if i in centres else min(centres, key=lambda c: apart[i][c]) for i in number]


@pytest.mark.parametrize("seed", SEEDS)
def test_density_peaks_are_those_of_loops(seed):
    """Images of different lengths with holes, from one centre to all."""
    generator = torch.Generator().manual_seed(seed)
    states, valid = torch.randn(4, 23, 5, generator=generator), torch.rand(4, 23, generator=generator) > 0.3
    count = torch.tensor([1, 2, 5, int(valid[3].sum())])
    found = density_peaks(states, valid, count)
    for image in range(4):
        places = valid[image].nonzero()[:, 0].tolist()
        centres = clustered(states[image, places].double().tolist(), int(count[image]))
        assert found[image, places].tolist() == [places[centre] for centre in centres]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ratio", [0.5, 0.2])
def test_sparsevlm_recycles(models, seed, ratio):
    inputs = prompt(models[0], (1, 0, 2), seed=seed)
    trace, states = entering(models[0], 3, SparseVLM(layers=(3,), keep_ratios=(ratio,)), None, inputs)
    out, keep, expected, features = whole(models[1], inputs), round(36 * ratio), [], []
    for row, where in images_of(inputs):
        raters = raters_of(out.hidden_states[0][row], where, text_after(inputs, row, where))
        score = [out.attentions[2][row].mean(0)[raters, place].sum().item() for place in where]
        clusters = next(
            c for c in range(1, keep) if int((int(0.3 * (36 - keep + c)) + 1) / 10) + 1 == c
        )  # clusters take the place of tokens
        best = top(score, keep - clusters)
        ranked = sorted((p for p in range(36) if p not in best), key=lambda p: -score[p])
        merged = sorted(ranked[: int(0.3 * len(ranked)) + 1])
        features.append(out.hidden_states[3][row, where])
        centres = clustered(features[-1][merged].double().tolist(), clusters)
        into = {p: p for p in best} | {p: merged[c] for p, c in zip(merged, centres, strict=True)}
        expected.append(([into.get(p, -1) for p in range(36)], [1.0] * 36))
    check(trace, states, features, expected)


METHODS = {
    "visionzip": (VisionZip(), 0.3),
    "prumerge": (PruMerge(), 0.2),
    "prumerge-plus": (PruMergePlus(), 0.5),
    "sparsevlm": (SparseVLM(layers=(1, 3), keep_ratios=(0.6, 0.3)), None),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl"])
def test_each_token_counts_once(name, family):
    """It stays, joins one that stays, or is dropped, which SparseVLM alone does; and images keep what they are told."""
    model, (method, budget) = FAMILIES[family].model, METHODS[name]
    inputs = prompt(model, (1, 2))
    if family != "qwen2_vl":  # transformers counts its positions by the mask
        places = (inputs["input_ids"][1] == IMAGE).nonzero()[:5, 0]
        inputs["attention_mask"][1, places] = 0  # tokens that are none
    with vtc.compressed(model, method, budget) as trace, torch.no_grad():
        model(**inputs)
    for stage in trace.stages:
        place = torch.arange(stage.into.shape[1]).expand_as(stage.into)
        joined = stage.into >= 0
        assert torch.equal(stage.kept, (stage.into == place) & stage.valid)
        assert stage.kept.gather(1, stage.into.clamp(min=0))[joined].all()
        assert not joined[~stage.valid].any()
        assert joined[stage.valid].all() or name == "sparsevlm"
        assert torch.equal(sizes(stage.into).sum(1), joined.sum(1).float())
        assert (stage.kept.sum(1) < joined.sum(1)).all()
    kept = trace.stages[-1].kept.sum(1)
    share = budget or 0.3
    torch.testing.assert_close(kept / trace.stages[0].valid.sum(1), torch.full((3,), share), atol=0.03, rtol=0)


def test_newlines_are_no_contextual_tokens_and_count_for_nothing_in_them():
    """Of 8 patches and 4 newlines 3 stay and 2 are contextual; and of the whole image but one all."""
    keys, generator = MeanKeys(0), torch.Generator().manual_seed(0)
    newline = torch.arange(12) % 3 == 2
    scores = torch.rand(1, 12, generator=generator).masked_fill(newline, 0)
    rows = torch.randn(1, 4, 12, generator=generator).masked_fill(newline, 0)
    seen = Seen({keys: rows}, torch.ones(1, 12, dtype=torch.bool), torch.arange(12)[None], [[(4, 3)]])
    choice = dominant_and_contextual(keys, 0.4, scores, seen, torch.tensor([5]))
    assert choice.keep.sum() == 5
    assert not choice.keep[0, newline].any()
    assert torch.equal(choice.mass[0], (~newline).float())
    assert dominant_and_contextual(keys, 0.4, scores, seen, torch.tensor([11])).keep.sum() == 11


@torch.no_grad()
def test_visionzip_may_weigh(models, monkeypatch):
    """Contextual tokens count, as keys, as many times as they have patches; as the paper has it, none does."""
    found, weigh = [], Stream.weighed
    monkeypatch.setattr(Stream, "weighed", lambda self, weight: found.append(weight) or weigh(self, weight))
    inputs = prompt(models[0], (1, 2))
    for weighs in (False, True):
        with vtc.compressed(models[0], VisionZip(weighs=weighs), 9) as trace:
            models[0](**inputs)
    (weights,), stage = found, trace.stages[0]
    for weight, into, kept in zip(weights.tolist(), stage.into.tolist(), stage.kept.tolist(), strict=True):
        assert [w for w, stays in zip(weight, kept, strict=True) if stays] == [
            into.count(token) for token in range(36) if kept[token]
        ]
        assert sum(w for w, stays in zip(weight, kept, strict=True) if stays) == 36
