"""What each adapter says about its family, against the model itself.

Scores are recomputed from whole attention matrices, and the way from patches to visual tokens is read off gradients, so
that nothing here knows how a family packs, merges, pools or reorders.
"""

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from models import FAMILIES, batch, prompt, rows, visual
from own_models import llava_next_processor
from PIL import Image
from table import METHODS
from table import parametrize as pytest_generate_tests  # noqa: F401
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtc
from vtc.methods.fastv import FastV
from vtc.methods.msdg import Msdg
from vtc.methods.score import SCoRe
from vtc.methods.vflowopt import VFlowOpt
from vtc.methods.vtc_cls import VtcCls
from vtc.observe import TextRow
from vtc.stage import Method, Shape, Stage

VIDEOS = [name for name, family in FAMILIES.items() if family.video]


@contextmanager
def matrices(config):
    """All attention matrices of the part of a model that has this config: lists of (batch, heads, q, k) by module."""
    found, before = defaultdict(list), config._attn_implementation

    def attend(module, query, key, value, attention_mask, scaling, softcap=None, **_):
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        logits = query @ key.transpose(-1, -2) * scaling
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        weights = (logits if attention_mask is None else logits + attention_mask).softmax(-1)
        found[module].append(weights.detach())
        return (weights @ value).transpose(1, 2), weights

    ALL_ATTENTION_FUNCTIONS.register("matrices", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("matrices", eager_mask)
    config._attn_implementation = "matrices"
    try:
        yield found
    finally:
        config._attn_implementation = before


def encode(model, inputs: dict, modality: str) -> list[torch.Tensor]:
    """The features of all images or videos, (tokens, width) each."""
    encoder = getattr(model.base_model, f"get_{modality}_features")
    pixels = "pixel_values_videos" if modality == "video" else "pixel_values"
    names = (pixels, "image_sizes", f"{modality}_grid_thw")
    return list(encoder(**{name: inputs[name] for name in names if name in inputs}).pooler_output)


def shares(model, inputs: dict, modality: str) -> torch.Tensor:
    """(tokens, patches): how much of each visual token comes from each patch, by the model's own gradients.

    Taken at the projector's output where packing comes after it, and is linear; else each patch that matters counts
    the same.
    """
    backbone, taken = model.base_model, []
    packs_last = modality == "image" and hasattr(backbone, "pack_image_features")
    packs_last |= model.config.model_type in ("llava", "vipllava", "llava_onevision", "paligemma")

    def take(module, args, output):
        taken.append(output.detach().requires_grad_())
        return taken[-1]

    def take_input(module, args):
        taken.append(args[0].detach().requires_grad_())
        return (taken[-1],)

    if packs_last:
        handle = backbone.multi_modal_projector.register_forward_hook(take)
    elif hasattr(backbone, "visual"):
        handle = backbone.visual.merger.register_forward_pre_hook(take_input)
    elif hasattr(backbone, "vision_resampler"):
        handle = backbone.vision_resampler.register_forward_pre_hook(take_input)
    else:
        handle = vtc.adapter.find(model).tower_blocks()[-1].register_forward_hook(take)
    features = torch.cat(encode(model, inputs, modality))
    handle.remove()
    states = taken[0]
    rows = []
    for token in range(len(features)):
        (grad,) = torch.autograd.grad(features[token, 0], states, retain_graph=True, allow_unused=True)
        rows.append(grad[..., 0] if packs_last else grad.abs().sum(-1))
    rows = torch.stack(rows)
    if model.config.model_type == "internvl":
        rows = rows[:, :, 1:]  # taken in the tower, where there is a CLS token yet
    rows = rows.flatten(1)
    return rows if packs_last else (rows > 0).float() / (rows > 0).sum(1, keepdim=True).clamp(min=1)


def patch_scores(model, inputs: dict, modality: str) -> torch.Tensor:
    """CLS attention, or without CLS the mean attention received, of all patches of all crops in the tower's order."""
    adapter = vtc.adapter.find(model)
    block = adapter.tower_blocks()[-1]
    module = next(child for name, child in block.named_children() if "att" in name)
    with matrices(model.config.vision_config) as found, torch.no_grad():
        encode(model, inputs, modality)
    crops = [crop.mean(0) for weights in found[module] for crop in weights]
    return torch.cat([crop[0, 1:] if adapter.has_cls() else crop.mean(0) for crop in crops])


@pytest.mark.parametrize(
    ("name", "modality"), [(name, "image") for name in FAMILIES] + [(name, "video") for name in VIDEOS]
)
def test_the_scores_of_the_tower_reach_their_tokens(name, modality):
    model = FAMILIES[name].model
    inputs = prompt(model, (2, 1) if modality == "image" else ("v", "v"))
    expected = shares(model, inputs, modality) @ patch_scores(model, inputs, modality)
    vtc.wrap(model, VtcCls(layers=1), 0.5)
    with torch.no_grad():
        model(**inputs)
    trace = model.vtc.trace
    vtc.unwrap(model)
    torch.testing.assert_close(torch.cat(trace.scores(0)), expected, atol=1e-6, rtol=1e-4)
    for scores, kept in zip(torch.cat(trace.scores(0)).split(trace.sizes), trace.maps(0), strict=True):
        stays = torch.cat([part.flatten() for part in kept])
        assert scores[stays].min() >= scores[~stays].max()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("images", [(1,), (2, 0, 1), ("iv", "v")])
def test_the_attention_of_the_last_token_is_the_models_own(name, images):
    """With rotary embeddings of all kinds, norms and caps of logits, windows, and prefixes that see both ways."""
    model = FAMILIES[name].model
    if "iv" in images and not FAMILIES[name].video:
        images = (1, 1, 2)
    inputs = prompt(model, images)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if FAMILIES[name].first_position is not None:
        inputs["position_ids"] = positions + FAMILIES[name].first_position
    with matrices(model.config.text_config) as found, torch.no_grad():
        model(**inputs, use_cache=False)
    rows = [weights[0][:, :, -1].mean(1) for weights in found.values()]
    vtc.wrap(model, FastV(layer=2), 0.7)
    with torch.no_grad():
        model(**inputs)
    trace = model.vtc.trace
    vtc.unwrap(model)
    for row, scores in enumerate(trace.scores()):
        torch.testing.assert_close(scores, rows[1][row][visual(inputs["input_ids"][row])], atol=1e-6, rtol=1e-4)


@dataclass(frozen=True)
class Asked(Method):
    """Drops what the text after an image attends to least in decoder layer 1."""

    ahead: bool = False
    name = "asked"

    def stages(self, shape):
        need = TextRow(1, ahead=self.ahead)
        return (Stage(need.before, lambda seen: seen[need][:, 0], (need,)),)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("ahead", [False, True])
def test_the_attention_of_the_question_is_the_models_own(name, ahead):
    """The mean over heads and over the text that follows each image; within a prefix it also sees what comes later."""
    model = FAMILIES[name].model
    inputs = prompt(model, (2, 0, 1))
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if FAMILIES[name].first_position is not None:
        inputs["position_ids"] = positions + FAMILIES[name].first_position
    with matrices(model.config.text_config) as found, torch.no_grad():
        model(**inputs, use_cache=False)
    weights = [weights[0].mean(1) for weights in found.values()][1]
    vtc.wrap(model, Asked(ahead=ahead), 0.7)
    with torch.no_grad():
        model(**inputs)
    trace = model.vtc.trace
    vtc.unwrap(model)
    scores = trace.scores()
    for row in (0, 2):
        is_visual, taken = visual(inputs["input_ids"][row]), 0
        places = is_visual.nonzero()[:, 0]
        for image in (number for number, where in enumerate(trace.rows) if where == row):
            mine = places[taken : taken + trace.sizes[image]]
            text = ~is_visual & (torch.arange(len(is_visual)) > mine[-1])
            expected = weights[row][text][:, mine].mean(0)
            torch.testing.assert_close(scores[row][taken : taken + len(mine)], expected, atol=1e-6, rtol=1e-4)
            taken += len(mine)


def test_the_trace_tells_tiles_and_frames(model, method, inputs):
    """Its grids hold all tokens of each image, and its maps those that are left."""
    vtc.wrap(model, *method)
    with torch.no_grad():
        model(**inputs)
    trace = model.vtc.trace
    assert sum(trace.sizes) == visual(inputs["input_ids"]).sum()
    assert [sum(height * width for height, width in parts) for parts in trace.parts] == trace.sizes
    left = [sum(int(part.sum()) for part in parts) for parts in trace.maps()]
    for row, kept in enumerate(trace.kept()):
        assert sum(count for count, image in zip(left, trace.rows, strict=True) if image == row) == len(kept)


def test_grids_of_each_family():
    """A newline is a column; frames and tiles stand for themselves; tiles of one image are joined."""

    def parts(name, images):
        model = FAMILIES[name].model
        vtc.wrap(model, "uniform", 0.5)
        with torch.no_grad():
            model(**prompt(model, images))
        found = model.vtc.trace.parts
        vtc.unwrap(model)
        return found

    assert parts("llava_next", (3,)) == [[(6, 6), (6, 13)], [(6, 6), (8, 7)], [(6, 6), (12, 13)]]
    assert parts("llava_onevision", ("v",)) == [[(3, 3), (3, 3), (3, 3), (1, 1)]]
    assert parts("llava_next_video", ("v",)) == [[(3, 3)] * 3]
    assert parts("qwen2_5_vl", ("iv",)) == [[(4, 6)], [(4, 3)] * 3]
    assert parts("qwen3_vl", ("v",)) == [[(4, 3)] * 2]
    assert parts("internvl", (2,)) == [[(6, 6)], [(6, 6)] * 3]
    assert parts("smolvlm", (1,)) == [[(6, 6)], [(6, 6)]]
    assert parts("gemma3", (1,)) == parts("paligemma", (1,)) == [[(6, 6)]]


def test_of_a_strip_the_overview_may_be_all():
    """Unpadding leaves no row of it in the mosaic; beside an image of which it does."""
    model = FAMILIES["llava_next"].model
    images = [Image.new("RGB", size, "red") for size in ((1440, 24), (96, 48))]
    inputs = llava_next_processor()(images=images, text="<image> <image> what", return_tensors="pt")
    vtc.wrap(model, "vtc-cls", 0.25)
    with torch.no_grad():
        model(**inputs)
    trace = model.vtc.trace
    vtc.unwrap(model)
    assert trace.parts == [[(6, 6)], [(6, 6), (6, 13)]]
    assert [sum(int(grid.sum()) for grid in maps) for maps in trace.maps()] == [9, 28]


def test_an_even_grid_is_shared_out_over_tiles_and_frames():
    model = FAMILIES["qwen2_vl"].model
    vtc.wrap(model, "uniform", 8)
    with torch.no_grad():
        model(**prompt(model, ("v", "i"), seed=1))
    video, image = model.vtc.trace.maps()
    vtc.unwrap(model)
    assert sorted(int(frame.sum()) for frame in video) == [2, 3, 3]
    assert int(image[0].sum()) == 8


@pytest.mark.parametrize("name", ["llava_next", "internvl", "llava_onevision", "qwen2_vl"])
def test_tiles_and_frames_may_share_a_budget_evenly(name):
    """The best of each grid by its size, where otherwise the best of the whole image stay."""
    model = FAMILIES[name].model
    vtc.wrap(model, VtcCls(tiles="even"), 0.4)
    with torch.no_grad():
        model(**prompt(model, ("v", "v") if FAMILIES[name].video else (2, 3), seed=1))
    trace = model.vtc.trace
    vtc.unwrap(model)
    images = torch.cat(trace.scores()).split(trace.sizes)
    for scores, maps in zip(images, trace.maps(), strict=True):
        kept = sum(int(grid.sum()) for grid in maps)
        for grid, own in zip(maps, scores.split([grid.numel() for grid in maps]), strict=True):
            assert int(grid.sum()) == pytest.approx(kept * grid.numel() / len(scores), abs=1)
            best = own.argsort(descending=True, stable=True)[: int(grid.sum())]
            assert grid.flatten().nonzero()[:, 0].tolist() == best.sort().values.tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_method_runs_on_every_family(name):
    """Or says early why it does not."""
    model, ran = FAMILIES[name].model, []
    adapter = vtc.adapter.find(model)
    refused = {  # trained or measured for a model
        name for name, kind in vtc.list_methods().items() if kind.adaptive or issubclass(kind, vtc.Trained)
    }
    refused |= set() if adapter.merges_patches else {"tome"}
    if len(adapter.tower_blocks()) < 3:
        refused.add("msdg")
        with pytest.raises(ValueError, match="compares what the tower's blocks 14 and 19 of 24 leave"):
            vtc.wrap(model, "msdg", 0.7)
    if any(map(adapter.window, adapter.layers)):
        stages = {
            name: kind().stages(adapter.shape()) for name, kind in vtc.list_methods().items() if name not in refused
        }
        refused |= {name for name, own in stages.items() if any(isinstance(stage.site, vtc.Cache) for stage in own)}
    for method in sorted(set(vtc.list_methods()) - refused):
        vtc.wrap(model, method, 0.7)
        with torch.no_grad():
            model(**prompt(model, (2, 1)))
        share = sum(model.vtc.trace.average_tokens) / sum(model.vtc.trace.sizes)
        assert share == pytest.approx(0.7, abs=0.05)
        ran.append(method)
    vtc.unwrap(model)
    assert {"fastv", "random", "transprune", "uniform", "vflowopt", "vtc-cls"} <= set(ran)


@pytest.mark.parametrize("name", FAMILIES)
def test_entropy_of_pixels_or_an_early_error(name):
    model = FAMILIES[name].model
    method = VFlowOpt(alpha=0.5, threshold=1.2)
    if not vtc.adapter.find(model).has_pixels:
        with pytest.raises(ValueError, match="pixels of patches, which this family packs"):
            vtc.wrap(model, method, 0.5)
        return
    scores = []
    for weight in (method, VFlowOpt(threshold=1.2)):
        vtc.wrap(model, weight, 0.5)
        with torch.no_grad():
            model(**prompt(model, (2, 1)))
        scores.append(torch.cat(model.vtc.trace.scores(0)))
        vtc.unwrap(model)
    assert (scores[0] > scores[1]).float().mean() > 0.9  # entropies are positive, but newlines have none


@pytest.mark.parametrize("method", ["vtc-cls", "visionzip", "tally", "fastv"])
def test_a_tower_of_windows_alone_tells_nothing(method):
    """Where no block of Qwen2.5-VL's tower sees the whole image."""
    model = FAMILIES["qwen2_5_vl"].build()
    model.model.visual.fullatt_block_indexes = [7]
    if method == "fastv":
        vtc.wrap(model, method, 0.5)
        return
    with pytest.raises(ValueError, match=f"^{method} looks at blocks of the vision tower .* has none"):
        vtc.wrap(model, method, 0.5)
    assert not hasattr(model, "vtc")


def test_positions_in_three_axes_are_not_renumbered():
    model = FAMILIES["qwen2_5_vl"].model
    vtc.wrap(model, VtcCls(positions="contiguous"), 0.5)
    with pytest.raises(ValueError, match="time, height and width cannot be renumbered"):
        model(**prompt(model))
    vtc.unwrap(model)


def test_features_from_before_are_told_apart():
    model = FAMILIES["gemma3"].model
    inputs = prompt(model)
    features = {"image": model.base_model.get_image_features(inputs.pop("pixel_values"), return_dict=True)}
    vtc.wrap(model, "random", 0.5)
    with pytest.raises(RuntimeError, match=r"encoded before vtc\.wrap"):
        model(**inputs, mm_encoder_outputs=features)
    vtc.unwrap(model)


@pytest.mark.parametrize("family", ["llava", "vipllava", "llava_next", "llava_onevision"])
def test_blocks_that_nobody_reads_are_not_run(family):
    model, inputs = FAMILIES[family].model, prompt(FAMILIES[family].model)
    tower = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    backbone, blocks = model.base_model, model.base_model.vision_tower.encoder.layers
    calls = []
    handle = blocks[-1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    whole, every = (backbone.get_image_features(**tower, output_hidden_states=each) for each in (None, True))
    unread = int(family != "llava_onevision")  # its projector reads the last block
    with vtc.compressed(model, "random", 0.5):
        calls.clear()
        features = backbone.get_image_features(**tower)
        assert len(calls) == 1 - unread
        assert ("last_hidden_state" in features) == (not unread)
        assert all(map(torch.equal, features.pooler_output, whole.pooler_output))
        model.generate(**inputs, max_new_tokens=2)
        assert len(calls) == 2 * (1 - unread)
        # whoever asks for more, or for the tower itself, gets what it is
        asked = backbone.get_image_features(**tower, output_hidden_states=True)
        assert all(map(torch.equal, asked.hidden_states, every.hidden_states))
        assert torch.equal(asked.last_hidden_state, whole.last_hidden_state)
        pixels = tower["pixel_values"].flatten(0, -4)
        direct = backbone.vision_tower(pixels[: len(whole.last_hidden_state)]).last_hidden_state
        torch.testing.assert_close(direct, whole.last_hidden_state)
    handle.remove()
    assert all("forward" not in vars(block) for block in blocks)


SHAPE = Shape(6, 6)
BY_THE_TOWER = {
    name: kind()
    for name, kind in vtc.list_methods().items()
    if not kind.adaptive
    and all(stage.needs and all(need.tower for need in stage.needs) for stage in kind().stages(SHAPE))
} | {"score-cover": SCoRe(alpha=0.0), "vflowopt-minus": VFlowOpt(alpha=-1.0), "msdg": Msdg()}
"""Methods that look at nothing but the tower, and one that does so but for the question."""


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("name", BY_THE_TOWER)
@torch.no_grad()
def test_newlines_leave_first(family, name):
    model = FAMILIES[family].model
    if name == "msdg" and family == "llava_next":
        pytest.skip("its tower has too few blocks")
    for seed, budget in enumerate((0.25, 0.11, 0.25, 0.99)):
        with vtc.compressed(model, BY_THE_TOWER[name], budget) as trace:
            model(**prompt(model, (1, 2), seed=seed))
        stage = trace.stages[0]
        for image, ((overview, (high, wide)), size) in enumerate(zip(trace.parts, trace.sizes, strict=True)):
            newlines = {overview[0] * overview[1] + row * wide + wide - 1 for row in range(high)}
            kept = stage.entered[image][stage.kept[image] & stage.valid[image]].tolist()
            assert budget == 0.99 or not newlines & {*kept}
            if len(trace.stages) == 1:
                assert len(kept) == round(budget * size)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"atp", "tokenbutler"}))  # those were trained for a model
@torch.no_grad()
def test_what_stays_does_not_depend_on_the_batch(name):
    """Images of three sizes, together and one by one."""
    shallow, (method, budget) = name not in ("msdg", "vtc-cls-ensemble"), METHODS[name]
    model = FAMILIES["llava_next" if shallow else "llava_onevision"].model
    together, found = rows(model, (2, 1, 1), seed=1), []
    for chosen in ([0, 1, 2], [0], [1], [2]):
        with vtc.compressed(model, method, budget) as trace:
            model(**positioned(batch(model, [together[row] for row in chosen])))
        found += [[trace.kept(stage)[row].tolist() for stage in range(len(trace.stages))] for row in range(len(chosen))]
    assert found[:3] == found[3:]


def positioned(inputs):
    """With the positions that generate() counts, from the first real token on."""
    real = inputs["attention_mask"]
    return inputs | {"position_ids": (real.cumsum(1) - 1).masked_fill(real == 0, 0)}
