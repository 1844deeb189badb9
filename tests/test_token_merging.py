"""Merging inside the vision tower, against loops over patches and groups."""

import math

import pytest
import torch
from models import FAMILIES, Row, batch, counted, llava, pixels, prompt

import vtc
from vtc.methods.tome import MergedPatches, ToMe, matches


def pairs(key, count, first):
    """The `count` best pairs (token that joins, token that takes it in), each even one with its best odd one."""
    found = []
    for a in range(2 * first, len(key), 2):
        similarity, b = max((float(torch.cosine_similarity(key[a], key[b], dim=0)), -b) for b in range(1, len(key), 2))
        found.append((similarity, a, -b))
    return {a: b for _, a, b in sorted(found, reverse=True)[:count]}


@pytest.mark.parametrize(("length", "count", "protected"), [(10, 3, 0), (11, 4, 1), (9, 5, 0)])
def test_matches(length, count, protected):
    key = torch.randn(2, length, 4, generator=torch.Generator().manual_seed(0))
    for row, into in zip(key, matches(key, count, protected).tolist(), strict=True):
        joined = pairs(row, count, protected)
        assert into == [joined.get(token, token) for token in range(length)]


def slow_tower(model, pixels, share):
    """Features after the tower's last read block, and the groups: one crop, one head and one group at a time."""
    tower, cls = model.base_model.vision_tower, int(vtc.adapter.find(model).has_cls())
    blocks, entering = vtc.adapter.find(model).tower_blocks(), []
    handle = blocks[0].register_forward_pre_hook(lambda block, args: entering.append(args[0][0]))
    tower(pixels[None])
    handle.remove()
    hidden = entering[0]
    groups = [[place] for place in range(len(hidden))]
    left = cls + max(1, round(share * (len(hidden) - cls)))
    for number, block in enumerate(blocks):
        x, attention = block.layer_norm1(hidden), block.self_attn
        heads, width = attention.num_heads, attention.head_dim
        q, k, v = (
            linear(x).view(-1, heads, width) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        out = torch.zeros_like(q)
        for head in range(heads):
            for place in range(len(q)):
                weights = [
                    len(group) * math.exp(float(q[place, head] @ k[other, head]) * width**-0.5)
                    for other, group in enumerate(groups)
                ]
                out[place, head] = sum(w * row for w, row in zip(weights, v[:, head], strict=True)) / sum(weights)
        hidden = hidden + attention.out_proj(out.flatten(1))
        hidden = hidden + block.mlp(block.layer_norm2(hidden))
        if number == len(blocks) - 1:
            break
        wanted = math.ceil((len(hidden) - left) / (len(blocks) - 1 - number))
        joined = pairs(k.mean(1), min(wanted, len(range(2 * cls, len(hidden), 2))), cls)
        merged = {}
        for place, group in enumerate(groups):
            merged.setdefault(joined.get(place, place), []).append((group, hidden[place]))
        groups, states = [], []
        for _, members in sorted(merged.items()):
            groups.append(sorted(place for group, _ in members for place in group))
            states.append(sum(len(group) * state for group, state in members) / len(groups[-1]))
        hidden = torch.stack(states)
    whole = torch.stack(
        [hidden[next(i for i, group in enumerate(groups) if place in group)] for place in range(sum(map(len, groups)))]
    )
    return whole[cls:], [[place - cls for place in group] for group in groups[cls:]]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("cls", [True, False])
@torch.no_grad()
def test_the_tower_is_that_of_loops(cls, attn):
    model = llava(cls=cls, attn=attn)
    inputs = prompt(model, (2,))
    with vtc.compressed(model, "tome", 0.25) as trace:
        features = model.base_model.get_image_features(inputs["pixel_values"]).pooler_output
        model(**inputs)
    kept = trace.kept()[0].tolist()
    for image, crop in enumerate(inputs["pixel_values"]):
        states, groups = slow_tower(model, crop, 0.25)
        expected = model.base_model.multi_modal_projector(states)
        torch.testing.assert_close(features[image], expected, atol=1e-4, rtol=1e-4)
        assert [place - 36 * image for place in kept if place // 36 == image] == sorted(map(min, groups))


def test_the_tower_reads_fewer_patches():
    model, lengths = llava(), []
    inputs = prompt(model)
    for block in vtc.adapter.find(model).tower_blocks():
        block.register_forward_pre_hook(lambda block, args: lengths.append(args[0].shape[1]))
    with vtc.compressed(model, "tome", 12) as trace:
        model(**inputs)
    assert lengths == [1 + 36, 1 + 28, 1 + 20, 1 + 12]
    assert trace.average_tokens.tolist() == [12]


def test_the_largest_groups_stay_where_blocks_cannot_merge_enough():
    model = llava()
    with vtc.compressed(model, "tome", 2) as trace:
        model(**prompt(model))
    sizes = trace.scores()[0]
    assert sizes.sum() == 36
    assert (sizes > 0).sum() == 7  # with CLS 37, 25, 14, and of those 14 only 6 may join another
    assert sorted(sizes[trace.kept()[0]]) == sorted(sizes)[-2:]


def large(model, seed):
    """A prompt with an image of 2 x 2 tiles, whose patches OneVision scales down to fewer tokens."""
    call = {"image_sizes": torch.tensor([(96, 96)])}
    crops = vtc.adapter.find(model).tiles(call)[0]
    tiles = pixels(torch.Generator().manual_seed(seed), crops, size=48)
    image = counted(model, {"tiles": tiles, **call})
    return batch(model, [Row([1, *image.ids, 7, 8], [image])])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["llava_next_video", "llava_onevision", "llava_next", "scaled"])
@torch.no_grad()
def test_tokens_that_are_merged_are_of_one_group(kind, seed, monkeypatch):
    """Also where a token is a mean of patches: the packing of a unit matrix says of which."""
    model = FAMILIES["llava_onevision" if kind == "scaled" else kind].model
    inputs = (
        large(model, seed) if kind == "scaled" else prompt(model, ("i" if kind == "llava_next" else "v",), seed=seed)
    )
    made, row = [], MergedPatches.row
    monkeypatch.setattr(MergedPatches, "row", lambda *args: made.append((row(*args), args[2])) or made[-1][0])
    joined = 0
    for budget in (0.7, 0.3):
        with vtc.compressed(model, "tome", budget) as trace:
            model(**inputs)
        rows, tower = made[-1]
        crops, _, patches = rows.shape
        number = rows[:, 1].long().flatten()
        unit = torch.eye(crops * patches).view(crops, patches, -1)
        (weights,) = tower.adapter.pack(unit, tower.call)
        for token, into in enumerate(trace.stages[0].into[0].tolist()):
            if into not in (-1, token):
                joined += 1
                assert number[weights[[token, into]].any(0)].unique().numel() == 1
    assert joined or kind not in ("llava_next", "scaled")  # hardly any token of a video is of one group


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "paligemma"])
def test_other_towers_of_patches(family):
    model = FAMILIES[family].model
    inputs = prompt(model, (1, 2))
    with torch.no_grad(), vtc.compressed(model, "tome", 0.5) as trace:
        model(**inputs)
        sizes = trace.record.sizes
        assert trace.average_tokens.tolist() == [round(sizes[0] / 2), sum(round(size / 2) for size in sizes[1:])]


def weights_of_patches(adapter, call, crops):
    """What each patch adds to each visual token of an image: (crops, patches, tokens), one patch at a time."""
    bare = torch.zeros(crops, 36, 1)
    start = adapter.pack(bare, call)[0][:, 0]
    weights = torch.zeros(crops, 36, len(start))
    for crop in range(crops):
        for patch in range(36):
            one = bare.clone()
            one[crop, patch] = 1
            weights[crop, patch] = adapter.pack(one, call)[0][:, 0] - start
    return weights


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("size", [(20, 90), (90, 20), (70, 96)])
@torch.no_grad()
def test_no_group_is_lost_with_the_padding(family, size):
    """A group of an anyres tile sits at its first patch that unpadding leaves in; OneVision scales the last."""
    model = FAMILIES[family].model
    adapter, generator = vtc.adapter.find(model), torch.Generator().manual_seed(0)
    call = {"image_sizes": torch.tensor([size])}
    crops = adapter.tiles(call)[0]
    image = counted(model, {"tiles": pixels(generator, crops, size=48), **call})
    inputs = batch(model, [Row([1, *image.ids, 7, 8], [image])])
    weights = weights_of_patches(adapter, call, crops)
    assert (weights.sum(-1) == 0).any()  # something is cut away
    sizes = torch.zeros(crops, 36, 1)
    for crop, tile in enumerate(inputs["pixel_values"][0]):
        for group in slow_tower(model, tile, 0.4)[1]:
            visible = [place for place in group if weights[crop, place].any()]
            sizes[crop, visible[0] if visible else group[0]] = len(group)
    with vtc.compressed(model, "tome", 0.4) as trace:
        model(**inputs)
    torch.testing.assert_close(trace.scores()[0], adapter.pack(sizes, call)[0][:, 0])


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@torch.no_grad()
def test_a_full_budget_merges_nothing_whatever_the_share(family):
    model = FAMILIES[family].model
    inputs = prompt(model, (1, 2))
    plain = model(**inputs).logits
    for budget in (1.0, 36) if family == "llava" else (1.0,):
        assert torch.equal(vtc.wrap(model, ToMe(share=0.5), budget)(**inputs).logits, plain)
    vtc.wrap(model, ToMe(share=0.5), 0.75)(**inputs)
    if family == "llava":  # merges as far as the budget asks, and no further
        assert [int((sizes > 0).sum()) for sizes in model.vtc.trace.scores()] == [27, 54]
    vtc.unwrap(model)


@pytest.mark.parametrize("family", ["vipllava", "qwen2_5_vl", "gemma3", "internvl", "idefics3"])
def test_towers_that_cannot_merge_say_so(family):
    with pytest.raises(ValueError, match="where each patch becomes a visual token"):
        vtc.wrap(FAMILIES[family].model, "tome", 0.5)
    assert "vtc" not in vars(FAMILIES[family].model)


def test_early_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"pass budget="):
        vtc.wrap(llava(), "tome")
    with pytest.raises(ValueError, match="give tome a fraction, not 64 tokens"):
        vtc.wrap(FAMILIES["llava_next"].model, "tome", 64)
    with pytest.raises(ValueError, match="give tome a fraction, not 64 tokens"):
        vtc.wrap(FAMILIES["llava_next"].model, ToMe(share=0.5), 64)
    model = llava()
    monkeypatch.setattr(model.base_model.vision_tower.config, "_attn_implementation", "flash_attention_2")
    with pytest.raises(ValueError, match="flash_attention_2 cannot do"):
        vtc.wrap(model, ToMe(share=0.5))
