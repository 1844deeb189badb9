"""The methods that select by coverage, diversity and quotas, against their formulas in loops with full attention."""

import functools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from models import FAMILIES, IMAGE, llava, prompt, visual
from oracle import attentions, top
from torch import Tensor

import vtc
from vtc.choice import Seen
from vtc.methods.cdpruner import CDPruner
from vtc.methods.cosine import Cosine
from vtc.methods.coverpruner import CoverPruner
from vtc.methods.divprune import DivPrune
from vtc.methods.g_prune import GPrune
from vtc.methods.hiprune import HiPrune
from vtc.methods.hired import HiRED
from vtc.methods.holov import HoloV
from vtc.methods.msdg import Msdg
from vtc.methods.prunesid import PruneSID
from vtc.methods.rate import Rate, _direction
from vtc.methods.score import SCoRe
from vtc.observe import ClsRow, PatchStates
from vtc.stage import Shape

N, ROWS = 36, ((0, 0), (2, 0), (2, 36))
"""Tokens of an image; the row of each image, and where its tokens begin among those of its row."""


@dataclass
class Shown:
    """All that a method could look at of one image, in double precision."""

    attention: list[Tensor]
    """(heads, 37, 37) of each block of the tower."""
    states: list[Tensor]
    """(36, width): the patches' states before the first block of the tower, and after each of its blocks."""
    features: Tensor
    """(36, width)"""
    question: Tensor
    """(tokens, width) embeddings of the text after the image."""
    probe: Tensor
    """(heads, tokens of that text, 36): its attention in decoder layer 0."""

    def cls(self, block: int) -> list[float]:
        return [sum(heads) / 4 for heads in self.attention[block][:, 0, 1:].T.tolist()]

    def alike(self, x: Tensor) -> list[list[float]]:
        unit = torch.stack([token / token.norm() for token in x])
        return (unit @ unit.T).tolist()


@functools.cache
def models():
    return llava(), llava(attn="eager")


@functools.cache
def asked(seed):
    """Three images in a padded batch of three rows, one of which has none."""
    return prompt(models()[0], (1, 0, 2), pad=("left", "right")[seed % 2], seed=seed)


@functools.cache
@torch.no_grad()
def shown(seed) -> list[Shown]:
    eager, inputs = models()[1], asked(seed)
    tower, decoder = attentions(eager, inputs)
    states = eager.base_model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    features = eager.get_image_features(inputs["pixel_values"]).pooler_output
    ids, real, found = inputs["input_ids"], inputs["attention_mask"].bool(), []
    for image, (row, offset) in enumerate(ROWS):
        places = visual(ids[row]).nonzero()[:, 0][offset : offset + N]
        text = [p for p in range(int(places[-1]), ids.shape[1]) if real[row, p] and ids[row, p] != IMAGE]
        found.append(
            Shown(
                [layer[image].double() for layer in tower],
                [layer[image, 1:].double() for layer in states],
                features[image].double(),
                eager.get_input_embeddings()(ids[row, text]).double(),
                decoder[0][row][:, text][:, :, places].double(),
            )
        )
    return found


def best(candidates, value):
    """The one of most value; of equals the first."""
    return max(candidates, key=lambda j: (value(j), -j))


def others(kept):
    return [j for j in range(N) if j not in kept]


# -- one image's formula: what was shown, and how many stay -> which -------------------------------------------------


def score(image, count, alpha):
    alike, weight = image.alike(image.states[4]), image.cls(3)
    kept = [best(range(N), lambda j: weight[j])]
    while len(kept) < count:
        kept.append(best(others(kept), lambda j: min(1 - alike[j][s] for s in kept) * weight[j] ** alpha))
    return kept


def coverpruner(image, count):
    alike = image.alike(image.features - image.features.mean(0))
    demand = [sum(sum(head) for head in token) for token in image.probe.permute(2, 0, 1).tolist()]

    def covered(kept):
        return sum(demand[i] * max(0.0, *(alike[i][j] for j in kept)) for i in range(N))

    kept = []
    while len(kept) < count:
        kept.append(best(others(kept), lambda j: covered([*kept, j])))
    return kept


def divprune(image, count):
    alike = image.alike(image.features)
    kept = [best(range(N), lambda j: min(1 - alike[j][i] for i in range(N) if i != j))]
    while len(kept) < count:
        kept.append(best(others(kept), lambda j: min(1 - alike[j][s] for s in kept)))
    return kept


def cdpruner(image, count, sign):
    relevance = [
        sign * sum(float(x @ e / x.norm() / e.norm()) for e in image.question) / len(image.question)
        for x in image.features
    ]
    low, high = min(relevance), max(relevance)
    relevance = [(r - low) / (high - low) + 1e-6 for r in relevance]
    alike = image.alike(image.features)
    kernel = torch.tensor([[relevance[i] * alike[i][j] * relevance[j] for j in range(N)] for i in range(N)])
    kept = []
    while len(kept) < count:
        kept.append(best(others(kept), lambda j: float(kernel[[*kept, j]][:, [*kept, j]].double().det())))
    return kept


def cosine(image, count):
    alike = image.alike(image.features)
    return top([-sum(alike[j][i] for i in range(N) if i != j) for j in range(N)], count)


def rate(image, count, per_bin, tail):
    alike, direction = image.alike(image.features), _direction(image.features.shape[1], 0)[:, 0].double()
    line = [float(x @ direction / x.norm()) for x in image.features]
    order = sorted(range(N), key=lambda j: line[j])
    low, high = (line[order[round(share * (N - 1))]] for share in (tail, 1 - tail))
    bins, pivots = max(1, N // per_bin), set()
    for border in range(bins + 1):
        value = high if border == bins else low + (high - low) * border / bins
        pivots.add(next(j for j in order if line[j] >= value - 1e-9))
    mean = [sum(alike[j][p] for p in pivots) / len(pivots) for j in range(N)]
    return sorted(range(N), key=lambda j: (j not in pivots, mean[j]))[:count]


def g_prune(image, count):
    alike = image.alike(image.features)
    near = [[alike[i][j] if alike[i][j] >= 0.5 - 1e-12 else 0 for j in range(N)] for i in range(N)]
    walk = torch.tensor([[a / 0.03 if a else -5000.0 for a in line] for line in near], dtype=torch.double).softmax(1)
    flow = image.features.norm(dim=1) @ torch.linalg.matrix_power(walk, 5)
    return top([float(flow[j]) / sum(float(p) > 0 for p in walk[j]) for j in range(N)], count)


def handed_out(scores, group, base, first, count, tokens=range(N)):
    """The base numbers of each group of tokens, and then one each in turns."""
    kept = {
        g: sorted((j for j in tokens if group[j] == g), key=lambda j: -scores[j]) for g in {group[j] for j in tokens}
    }
    got = {g: min(base[g], len(kept[g])) for g in kept}
    while sum(got.values()) < count:
        for g in sorted(got, key=lambda g: first[g], reverse=True):
            if got[g] < len(kept[g]) and sum(got.values()) < count:
                got[g] += 1
    return [j for g in kept for j in kept[g][: got[g]]]


def holov(image, count, by):
    attention, alike = image.cls(3), image.alike(image.states[4])
    strip = []
    for number in range(16):
        strip += [number] * (N // 16 + (number < N % 16))
    varied = []
    for i in range(N):
        row = [alike[i][j] if j != i else 0.0 for j in range(N) if strip[j] == strip[i]]
        mean = sum(row) / (len(row) - 1)
        varied.append(sum((x - mean) ** 2 for x in row) / (len(row) - 1))
    unit = sum(1000 * a for a in attention) / sum(varied)
    full = [1000 * a + 0.09 * v * unit for a, v in zip(attention, varied, strict=True)]
    means = [sum(full[j] for j in range(N) if strip[j] == g) / strip.count(g) for g in range(16)]
    share = [m / sum(means) for m in means]
    base = [int(count * s) for s in share]
    return handed_out(attention if by == "attention" else full, strip, base, share, count)


def hiprune(image, count, alpha):
    def received(block):
        return [float(image.attention[block][:, :, j + 1].mean()) for j in range(N)]

    middle, last = received(1), received(3)  # block 9 of 24 is 2 of 5, counted from 1
    anchors = top(middle, round(alpha * count / 5))
    kept = set(anchors)
    for anchor in anchors:
        y, x = divmod(anchor, 6)
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            if 0 <= y + dy < 6 and 0 <= x + dx < 6:
                kept.add((y + dy) * 6 + x + dx)
    for j in sorted(range(N), key=lambda j: -last[j]):
        if len(kept) < count:
            kept.add(j)
    return list(kept)


def prunesid(image, count):
    attention, alike = image.cls(3), image.alike(image.states[4])
    x = image.states[4].sigmoid().T
    loading = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[: max(1, count // 4)].abs()
    group = loading.argmax(0).tolist()
    mean = sum(alike[i][j] for i in range(N) for j in range(i)) / (N * (N - 1) / 2)
    stands = []
    for j in sorted(range(N), key=lambda j: -attention[j]):
        if all(group[i] != group[j] or alike[i][j] <= count / 32 * mean for i in stands):
            stands.append(j)
    size = {g: group.count(g) for g in set(group)}
    left = {g: sum(group[j] == g for j in stands) for g in size}
    most = {g: min(5 * math.ceil(count / 64), size[g], left[g]) for g in size}
    while sum(most.values()) < count:
        most = {g: min(most[g] + 1, size[g]) for g in size}
    rest, got, before, total = count - len(size), {}, 0, 0
    for g in sorted(size):
        total += left[g]
        end = round(rest * total / len(stands))
        got[g], before = min(1 + end - before, most[g]), end
    for g in sorted(size, key=lambda g: (-left[g], g)):
        got[g] += min(most[g] - got[g], count - sum(got.values()))
    kept = []
    for g in size:
        members = sorted((j for j in range(N) if group[j] == g), key=lambda j: (j not in stands, -attention[j]))
        kept += members[: got[g]]
    return kept


def msdg(image, count, clusters, sink):
    def unit(x):
        return x / x.norm(dim=1, keepdim=True)

    def cosine(x, e):
        return float(x @ e / x.norm() / e.norm())

    # layers 2, 12, 14, 19 and 23 of 24 are 1, 2, 3, 4 and 4 of 5, and the projector reads the fourth
    sizes = image.states[2].abs()
    large = sorted(range(sizes.shape[1]), key=lambda c: -float(sizes[:, c].max()))[:8]
    extreme = max(large, key=lambda c: float(sizes[:, c].max() / sizes[:, c].median()))
    clear = [j for j in range(N) if sizes[j, extreme] <= sink]
    salience = [float((image.states[4][j] - image.states[3][j]).norm()) for j in range(N)]
    scores = [salience[j] * max(cosine(image.features[j], e) for e in image.question) for j in range(N)]
    direction = unit(unit(image.states[4]) - unit(image.states[1]))
    centres = [direction[clear[0]]]
    while len(centres) < min(clusters, len(clear)):
        centres.append(direction[best(clear, lambda j: min(float((direction[j] - c).square().sum()) for c in centres))])
    for _ in range(11):
        member = {j: max(range(len(centres)), key=lambda c: float(direction[j] @ centres[c])) for j in clear}
        for c in set(member.values()):
            mean = sum(direction[j] for j in clear if member[j] == c)
            centres[c] = mean / mean.norm()
    group = [member.get(j, -1) for j in range(N)]
    mean = {c: sum(scores[j] for j in clear if member[j] == c) / group.count(c) for c in set(member.values())}
    top_mean = max(mean.values())
    share = {c: math.exp(m - top_mean) for c, m in mean.items()}
    share = {c: s / sum(share.values()) for c, s in share.items()}
    room = min(count, len(clear))
    base = {c: int(room * s) for c, s in share.items()}
    order = {c: (room * s - base[c], s) for c, s in share.items()}
    kept = handed_out(scores, group, base, order, room, clear)
    return kept + [j for j in range(N) if j not in clear][: count - room]


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_without_later_text_all_tokens_ask_alike(seed):
    model = models()[0]
    inputs = prompt(model, (1,), seed=seed)
    end = int(visual(inputs["input_ids"])[0].nonzero().max()) + 1
    inputs |= {name: inputs[name][:, :end] for name in ("input_ids", "attention_mask")}
    features = model.get_image_features(inputs["pixel_values"]).pooler_output[0].double()
    with vtc.compressed(model, CoverPruner(), 9) as trace:
        model(**inputs)
    alike = Shown([], [], features, features, torch.ones(1, 1, N))
    assert trace.kept()[0].tolist() == sorted(coverpruner(alike, 9))


@pytest.mark.parametrize("seed", range(4))
def test_prunesid_takes_the_earlier_of_equal_patches(seed):
    """Where attention has three values only."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.randint(1, 4, (N,), generator=generator).double() / 4
    (stage,) = PruneSID().stages(Shape(6, 5))
    attention = torch.zeros(4, 37, 37, dtype=torch.double)
    attention[:, 0, 1:] = level
    image = replace(shown(seed)[0], attention=[attention] * 5)
    needs = {PatchStates(4): image.states[4].float().T[None], ClsRow(4): level.float().expand(1, 4, N)}
    seen = Seen(needs, torch.ones(1, N, dtype=torch.bool), torch.arange(N)[None], [[(6, 6)]])
    for count in (9, 16, 24):
        kept = stage.select(stage.score(seen), seen, torch.tensor([count])).keep[0]
        assert kept.nonzero()[:, 0].tolist() == sorted(prunesid(image, count))


CASES = {
    "score": (SCoRe(), lambda image, count: score(image, count, 0.8)),
    "score-whole": (SCoRe(alpha=1.0), lambda image, count: score(image, count, 1.0)),
    "score-cover": (SCoRe(alpha=0.0), lambda image, count: score(image, count, 0.0)),
    "coverpruner": (CoverPruner(), coverpruner),
    "divprune": (DivPrune(), divprune),
    "cdpruner": (CDPruner(), lambda image, count: cdpruner(image, count, 1)),
    "cdpruner-negated": (CDPruner(negated=True), lambda image, count: cdpruner(image, count, -1)),
    "cosine": (Cosine(), cosine),
    "rate": (Rate(), lambda image, count: rate(image, count, 32, 0.01)),
    "rate-many": (Rate(tokens_per_bin=4, tail=0.1), lambda image, count: rate(image, count, 4, 0.1)),
    "g-prune": (GPrune(), g_prune),
    "holov": (HoloV(), lambda image, count: holov(image, count, "attention")),
    "holov-score": (HoloV(by="score"), lambda image, count: holov(image, count, "score")),
    "hiprune": (HiPrune(), lambda image, count: hiprune(image, count, 0.1)),
    "hiprune-anchors": (HiPrune(alpha=0.6), lambda image, count: hiprune(image, count, 0.6)),
    "prunesid": (PruneSID(), prunesid),
    "msdg": (Msdg(clusters=6), lambda image, count: msdg(image, count, 6, 50.0)),
    "msdg-sinks": (Msdg(clusters=4, sink=0.5), lambda image, count: msdg(image, count, 4, 0.5)),
}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", CASES)
def test_what_stays_is_what_the_formula_keeps(name, seed):
    (model, _), (method, formula), count = models(), CASES[name], (9, 12, 4, 24)[seed % 4]
    with vtc.compressed(model, method, count) as trace, torch.no_grad():
        model(**asked(seed))
    expected = [[], [], []]
    for image, (row, offset) in zip(shown(seed), ROWS, strict=True):
        expected[row] += sorted(offset + j for j in formula(image, count))
    assert [kept.tolist() for kept in trace.kept()] == expected


# -- tiles --------------------------------------------------------------------------------------------------------


def tiled(model, inputs, maps):
    """Maps over the patches of each crop, packed as the model packs its features; -1 at newlines."""
    sizes, newline = inputs["image_sizes"], torch.tensor([-1.0])
    crops = [part[:, :, None] for part in maps]
    return [x[:, 0].tolist() for x in model.base_model.pack_image_features(crops, sizes, "default", newline)[0]]


def hired(early, late, tile, count, alpha, strips):
    """Which tokens stay of an image whose tokens lie in the tiles `tile`, 0 being the overview, -1 a newline."""
    height, mosaic = 6, tile[36:]
    width = mosaic.index(-1)
    rows = [mosaic[start : start + width] for start in range(0, len(mosaic), width + 1)]
    tiles = int(max(tile))

    def lies_in(cell):
        y, x = divmod(cell, 6)
        if strips:
            return 1 + cell * tiles // 36
        return rows[int((y + 0.5) / height * len(rows))][int((x + 0.5) / 6 * width)]

    full = min(int(alpha * count), 36)
    marks = [lies_in(cell) for cell in top(early[:36], int((1 - alpha) * 36))]
    share = {number: marks.count(number) / max(1, len(marks)) for number in range(1, tiles + 1)}
    base = {number: int(s * (count - full)) for number, s in share.items()} | {0: full}
    order = {number: (s * (count - full) - base[number], s) for number, s in share.items()} | {0: (-1, 0)}
    group = [int(number) for number in tile]
    for j, number in enumerate(group):
        group[j] = group[j - 1] if number < 0 else number  # a newline counts to the tile before it
    late = [0.0 if number < 0 else value for value, number in zip(late, tile, strict=True)]
    return sorted(handed_out(late, group, base, order, count, range(len(group))))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("alpha", "strips"), [(0.5, False), (0.2, False), (0.5, True), (1.0, False)])
@torch.no_grad()
def test_hired_shares_out_among_tiles(seed, alpha, strips):
    model = FAMILIES["llava_next"].model
    inputs = prompt(model, (1, 2), seed=seed)
    with vtc.compressed(model, HiRED(alpha=alpha, strips=strips), 0.2) as trace:
        model(**inputs)
    crops = [[3, 3, 5][(seed + image) % 3] for image in range(3)]
    images = [pixels[:number] for pixels, number in zip(inputs["pixel_values"], crops, strict=True)]
    attention = [tower()(image, output_attentions=True).attentions for image in images]
    early, late = (tiled(model, inputs, [x[block][:, :, 0, 1:].mean(1) for x in attention]) for block in (0, 1))
    tile = tiled(model, inputs, [torch.arange(number)[:, None].expand(-1, 36).float() for number in crops])
    expected = [[], []]
    for image, row in enumerate((0, 1, 1)):
        length, offset = len(tile[image]), len(tile[1]) * (image == 2)
        kept = hired(early[image], late[image], tile[image], round(0.2 * length), alpha, strips)
        expected[row] += [offset + j for j in kept]
    assert [kept.tolist() for kept in trace.kept()] == expected


@functools.cache
def tower():
    return FAMILIES["llava_next"].build(attn="eager").base_model.vision_tower


@pytest.mark.parametrize("seed", range(4))
def test_hired_without_tiles_is_the_highest_attention(seed):
    (model, _), expected = models(), [[], [], []]
    with vtc.compressed(model, HiRED(), 9) as trace, torch.no_grad():
        model(**asked(seed))
    for image, (row, offset) in zip(shown(seed), ROWS, strict=True):
        expected[row] += [offset + j for j in top(image.cls(3), 9)]
    assert [kept.tolist() for kept in trace.kept()] == expected
