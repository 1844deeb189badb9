"""Our own method, against loops: which patches join, what a group is, which groups the question leaves."""

import math

import oracle
import pytest
import torch
from models import FAMILIES, continued, llava, prompt, visual
from test_weights import GREEDY, GROUPS, identical, leader, leading_columns, standing_together

import vtc
from vtc.budget import counts
from vtc.core.stream import Stream
from vtc.methods import ward as clustering
from vtc.methods.tally import Tally
from vtc.methods.tome import ToMe
from vtc.methods.vflowopt import VFlowOpt
from vtc.methods.ward import ward
from vtc.stage import Shape


def pairs(states, groups):
    """(cost, i, j) of groups that are each other's nearest, cheapest first; none of less than two groups.

    Joining two costs n m / (n + m) times the squared distance of their means, made anew.
    """
    if len(groups) < 2:
        return []
    rows = states.double().tolist()
    means = [[sum(channel) / len(group) for channel in zip(*(rows[i] for i in group), strict=True)] for group in groups]
    costs = [
        [len(a) * len(b) / (len(a) + len(b)) * math.dist(means[i], means[j]) ** 2 for j, b in enumerate(groups)]
        for i, a in enumerate(groups)
    ]
    nearest = [min((cost, j) for j, cost in enumerate(row) if j != i) for i, row in enumerate(costs)]
    return sorted((cost, i, j) for i, (cost, j) in enumerate(nearest) if i < j and nearest[j][1] == i)


def grouped(states, tokens, count):
    """The source map of one image, whose `tokens` are joined until `count` groups are left."""
    groups = [[token] for token in tokens]
    while len(groups) > max(1, count):
        near = pairs(states, groups)
        for _, i, j in near[: min((len(near) + 1) // 2, len(groups) - max(1, count))]:
            groups[i], groups[j] = groups[i] + groups[j], []
        groups = [group for group in groups if group]
    into = [-1] * len(states)
    for group in groups:
        for token in group:
            into[token] = min(group)
    return into


@pytest.mark.parametrize("seed", range(20))
def test_ward_is_that_of_loops(seed, monkeypatch):
    """Images of different lengths, with holes, down to one group; also where they are not clustered all at once."""
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(1, 40, (1,), generator=generator))
    states = torch.randn(3, length, 5, generator=generator)
    valid = torch.rand(3, length, generator=generator) > 0.2
    count = torch.randint(0, length + 1, (3,), generator=generator)
    tokens = [image.nonzero()[:, 0].tolist() for image in valid]
    expected = [grouped(*image) for image in zip(states, tokens, count.tolist(), strict=True)]
    assert ward(states, valid, count).tolist() == expected
    monkeypatch.setattr(clustering, "ENTRIES", 1)
    assert ward(states, valid, count).tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_what_stands_where_there_is_no_token_does_not_matter(seed):
    """Of states far from 0, which round less once the mean of the image's own tokens is gone."""
    generator = torch.Generator().manual_seed(seed)
    states = 0.3 * torch.randn(1, 72, 16, generator=generator) + 200 * torch.randn(1, 1, 16, generator=generator)
    everyone, count = torch.ones(1, 72, dtype=torch.bool), torch.tensor([18])
    wide, valid = torch.nn.functional.pad(states, (0, 0, 0, 648)), torch.nn.functional.pad(everyone, (0, 648))
    expected = ward(states, everyone, count)
    assert torch.equal(ward(wide, valid, count)[:, :72], expected)
    assert expected[0].tolist() == grouped(states[0], list(range(72)), 18)


def test_equal_tokens_are_joined_first_and_ties_by_index():
    states = torch.tensor([[[0.0], [4.0], [0.0], [4.0], [9.0], [0.0]]])
    everyone = torch.ones(1, 6, dtype=torch.bool)
    assert ward(states, everyone, torch.tensor([3])).tolist() == [[0, 1, 0, 1, 4, 0]]
    same = torch.ones(1, 6, 3)
    for count in range(1, 7):
        into = ward(same, everyone, torch.tensor([count]))
        assert into.tolist() == [grouped(same[0], range(6), count)]
        assert len(into.unique()) == count


def test_states_that_are_no_numbers_are_grouped_all_the_same():
    states = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    states[0, 3], states[1, 5, 1] = torch.nan, torch.inf
    into = ward(states, torch.ones(2, 12, dtype=torch.bool), torch.tensor([5, 1]))
    assert [len(image.unique()) for image in into] == [5, 1]


def patch_states(model, inputs):
    """The states that the projector reads, of each image: (images, patches, width)."""
    with torch.no_grad():
        states = model.base_model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    return states[model.config.vision_feature_layer][:, 1:]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("pad", ["left", "right"])
@torch.no_grad()
def test_groups_features_and_the_cut(seed, pad):
    """What is merged, what the groups' features and weights are, and which of them the text leaves."""
    model, eager = FAMILIES["llava"].model, llava(attn="eager")
    inputs = prompt(model, (1, 0, 2), pad=pad, seed=seed)
    entering = []
    handle = oracle.layers(model)[0].register_forward_pre_hook(lambda m, args: entering.append(args[0]))
    with vtc.compressed(model, Tally(ratio=0.4, layer=2), None) as trace:
        model(**inputs)
    handle.remove()
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    columns = torch.arange(ids.shape[1]).repeat(3, 1)
    for image, (row, offset) in enumerate(((0, 0), (2, 0), (2, 36))):
        into = grouped(patch_states(model, inputs)[image], range(36), 14)
        assert trace.stages[0].into[image].tolist() == into
        assert sorted(set(into)) == [kept - offset for kept in trace.kept(0)[row].tolist() if 0 <= kept - offset < 36]
        for first in set(into):
            members = [token for token in range(36) if into[token] == first]
            expected = sum(features[image][token] for token in members) / len(members)
            assert torch.isclose(entering[0][row], expected, atol=1e-5, rtol=1e-4).all(1).any()
        places = visual(ids[row]).nonzero()[:, 0][offset : offset + 36]
        columns[row, places] = places[torch.tensor(into)]
    # the full model in which each patch is its group: all of a group with its mean, where its first patch stands
    embeds = eager.get_input_embeddings()(ids)
    for image, (row, offset) in enumerate(((0, 0), (2, 0), (2, 36))):
        places = visual(ids[row]).nonzero()[:, 0][offset : offset + 36]
        into = trace.stages[0].into[image]
        means = torch.stack([features[image][into == first].mean(0) for first in into])
        embeds[row, places] = means
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    with standing_together(eager, columns, inputs, real):
        attention = eager.base_model.language_model(
            inputs_embeds=embeds, position_ids=positions, use_cache=False, output_attentions=True
        ).attentions[2]
    for image, (row, offset) in enumerate(((0, 0), (2, 0), (2, 36))):
        places = visual(ids[row]).nonzero()[:, 0][offset : offset + 36].tolist()
        into = trace.stages[0].into[image].tolist()
        text = [p for p in range(places[-1] + 1, ids.shape[1]) if real[row, p] and not visual(ids[row, p])]
        score = {first: 0.0 for first in sorted(set(into))}
        for token, first in enumerate(into):
            score[first] += sum(attention[row, :, query, places[token]].mean().item() for query in text) / len(text)
        expected = [list(score)[index] for index in oracle.top(list(score.values()), round(36 * 0.4**2))]
        assert expected == [kept - offset for kept in trace.kept(1)[row].tolist() if 0 <= kept - offset < 36]


def test_the_schedule_is_the_recipes():
    shape = Shape(8, 5)
    assert [stage.site for stage in Tally().stages(shape)] == [0, 4]
    assert counts(Tally(), 144, 0.11, shape) == (27, 5)
    assert counts(Tally(), 144, 0.25, shape) == counts(Tally(), 144, None, shape) == (53, 19)
    assert counts(Tally(power=1.0), 144, 0.25, shape) == (36,)


@torch.no_grad()
def test_a_batch_is_each_prompt_alone():
    model = FAMILIES["llava"].model
    whole = prompt(model, (1, 1, 1), pad=None)
    with vtc.compressed(model, Tally(), 0.3) as trace:
        logits = model(**whole).logits
        kept = [trace.kept(stage) for stage in (0, 1)]
        for row in range(3):
            alone = {name: x[row : row + 1] for name, x in whole.items()}
            torch.testing.assert_close(model(**alone).logits[0], logits[row], atol=1e-4, rtol=1e-4)
            assert [trace.kept(stage)[0].tolist() for stage in (0, 1)] == [part[row].tolist() for part in kept]


@pytest.mark.parametrize("images", [(1,), (2, 0, 1)])
@pytest.mark.parametrize("name", FAMILIES)
def test_merging_identical_patches_is_lossless(name, images, monkeypatch):
    """As many groups as there are different patches, and the answer is that of the full model."""
    model = FAMILIES[name].model
    if name == "internvl":
        images = (1,)  # of one tile: tiles of an image are joined after they were encoded
    pack = type(vtc.adapter.find(model)).pack

    def copied(self, patches, call):
        return [states[[leader(token) for token in range(len(states))]] for states in pack(self, patches, call)]

    monkeypatch.setattr(type(vtc.adapter.find(model)), "pack", copied)
    inputs = prompt(model, images)
    with identical(model):
        with vtc.compressed(model, Tally(power=1.0), GROUPS) as trace:
            out = model.generate(**inputs, **GREEDY)
        assert trace.average_tokens.tolist() == [GROUPS * trace.rows.count(row) for row in range(len(images))]
        new = out.sequences[:, inputs["input_ids"].shape[1] :]
        full = continued(model, inputs, new[:, :-1])
        lead = leading_columns(model, inputs, trace, new.shape[1] - 1)
        with standing_together(model, lead, full, full["attention_mask"].bool()), torch.no_grad():
            expected = model(**full, use_cache=False).logits[:, inputs["input_ids"].shape[1] - 1 :]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [Tally(layer=2), ToMe(weighs=True), VFlowOpt(cell=0.4, threshold=1.2, weighs=True)])
@torch.no_grad()
def test_weights_are_the_sizes_of_groups(method, monkeypatch):
    """Of whichever method merges, counted by hand; all patches count, but those that were dropped."""
    model, found = FAMILIES["llava"].model, []
    weigh = Stream.weighed
    monkeypatch.setattr(Stream, "weighed", lambda self, weight: found.append(weight) or weigh(self, weight))
    with vtc.compressed(model, method, 0.3) as trace:
        model(**prompt(model, (1, 2)))
    (weights,) = found
    stage = trace.stages[0]
    for weight, into, kept in zip(weights.tolist(), stage.into.tolist(), stage.kept.tolist(), strict=True):
        assert [w for w, stays in zip(weight, kept, strict=True) if stays] == [
            into.count(token) for token in range(36) if kept[token]
        ]
        assert max(weight) > 1


@pytest.mark.parametrize("method", [ToMe(), VFlowOpt(cell=0.4, threshold=1.2)])
def test_papers_do_not_weigh(method, monkeypatch):
    model = FAMILIES["llava"].model
    monkeypatch.setattr(Stream, "weighed", lambda self, weight: 1 / 0)
    with vtc.compressed(model, method, 0.3), torch.no_grad():
        model(**prompt(model))
