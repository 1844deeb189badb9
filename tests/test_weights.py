"""Weights: a merged token counts as many times as it has patches. Where those are identical, nothing is lost."""

import functools
from contextlib import contextmanager
from dataclasses import dataclass

import oracle
import pytest
import torch
from models import FAMILIES, continued, prompt, visual

import vtc
from vtc.choice import Choice
from vtc.stage import Method, Stage

GROUPS = 9
GREEDY = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}


def leader(token: int) -> int:
    """The first token of a token's group: groups are spread over the image."""
    return next(first for first in range(token + 1) if first * 7 % GROUPS == token * 7 % GROUPS)


@dataclass(frozen=True)
class Grouped(Method):
    """Merges each group into its first token."""

    weighs: bool = True
    layer: int = 0
    name = "grouped"
    adaptive = True

    def stages(self, shape):
        return (Stage(self.layer, lambda seen: seen.valid.float(), select=self._select),)

    def _select(self, scores, seen, keep):
        first = torch.tensor([[leader(token) for token in row] for row in seen.index.tolist()])
        into = torch.where(seen.valid, first, -1)
        sizes = torch.zeros_like(scores).scatter_add(1, first, seen.valid.float())
        stays = (into == seen.index) & seen.valid
        return Choice(stays, into, weight=sizes.clamp(min=1) if self.weighs else None)


@contextmanager
def identical(model):
    """A model whose encoder gives all tokens of a group the features of their leader."""
    encode = model.base_model.get_image_features

    def copied(features):
        parts = [image[[leader(token) for token in range(len(image))]] for image in features]
        return torch.stack(parts) if isinstance(features, torch.Tensor) else parts

    @functools.wraps(encode)
    def get_image_features(*args, **kwargs):
        outputs = encode(*args, **kwargs)
        outputs.pooler_output = copied(outputs.pooler_output)
        if outputs.get("deepstack_features") is not None:
            outputs.deepstack_features = [copied(features) for features in outputs.deepstack_features]
        return outputs

    model.base_model.get_image_features = get_image_features
    try:
        yield
    finally:
        del model.base_model.get_image_features


def leading_columns(model, inputs, trace, extra: int) -> torch.Tensor:
    """(batch, length): for each column that of its group's leader, its own for text."""
    ids = inputs["input_ids"]
    columns = torch.arange(ids.shape[1] + extra).repeat(len(ids), 1)
    for row in range(len(ids)):
        places = visual(ids[row]).nonzero()[:, 0].tolist()
        for size in (size for size, where in zip(trace.sizes, trace.rows, strict=True) if where == row):
            own, places = places[:size], places[size:]
            for token, place in enumerate(own):
                columns[row, place] = own[leader(token)]
    return columns


@contextmanager
def standing_together(model, lead, full, real):
    """The full model, whose tokens of a group have one position and see the same."""
    numbers = oracle.blocks(model, full)
    query, key = lead[:, :, None], lead[:, None]

    def hide(layer: int):
        window, seen = oracle.windows(model)[layer], key <= query
        near = torch.ones_like(seen) if window is None else query - key < window
        if numbers is None:
            seen = seen & near
        else:
            block = torch.tensor(numbers)
            same = (block[:, :, None] == block[:, None]) & (block[:, None] >= 0)
            seen = seen & near | same if model.config.model_type == "paligemma" else (seen | same) & near
        seen = seen & real[:, None] | torch.eye(lead.shape[1], dtype=torch.bool)
        bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
        return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": bias})

    def stand(module, args, kwargs):
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(lead.shape[1])[None]
        positions = positions.expand(*positions.shape[:-2], len(lead), -1)
        index = lead.expand(positions.shape)
        return args, {**kwargs, "position_ids": positions.gather(-1, index)}

    decoder = vtc.adapter.find(model).decoder
    handles = [decoder.register_forward_pre_hook(stand, with_kwargs=True)]
    for number, layer in enumerate(oracle.layers(model)):
        handles.append(layer.register_forward_pre_hook(hide(number), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("images", [(1,), (2, 0, 1)])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_merging_what_is_equal_is_lossless(name, attn, images):
    """Prefill and decoding equal the full model's; without weights they do not."""
    if (name, attn) == ("paligemma2", "sdpa"):
        pytest.skip("transformers has eager attention only for its decoder")
    if name == "internvl":
        images = (1,)  # of one tile: tiles of an image are joined after they were encoded
    kind = FAMILIES[name]
    model = kind.model if attn == "sdpa" else kind.build(attn="eager")
    inputs = prompt(model, images)
    with identical(model):
        found = {}
        for weighs in (False, True):
            vtc.wrap(model, Grouped(weighs))
            found[weighs] = model.generate(**inputs, **GREEDY)
            trace = model.vtc.trace
            vtc.unwrap(model)
            new = found[weighs].sequences[:, inputs["input_ids"].shape[1] :]
            full = continued(model, inputs, new[:, :-1])
            lead = leading_columns(model, inputs, trace, new.shape[1] - 1)
            with standing_together(model, lead, full, full["attention_mask"].bool()), torch.no_grad():
                expected = model(**full, use_cache=False).logits[:, inputs["input_ids"].shape[1] - 1 :]
            logits = torch.stack(found[weighs].logits, 1)
            if weighs:
                torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
            elif not any(oracle.windows(model)):  # beyond a window nobody sees the leaders
                assert (logits - expected)[0].abs().max() > 1e-2


def test_weights_reach_the_rows_that_later_stages_see():
    """Attention observed after merging is that of all the patches: each merged token has its members' sum."""
    model = FAMILIES["llava"].model
    inputs = prompt(model, (1,))

    @dataclass(frozen=True)
    class ThenFastV(Grouped):
        def stages(self, shape):
            from vtc.observe import LastTokenRow

            need = LastTokenRow(1)
            later = Stage(2, lambda seen: seen[need].mean(1), (need,), select=lambda s, seen, keep: Choice(seen.valid))
            return (*super().stages(shape), later)

    with identical(model):
        vtc.wrap(model, ThenFastV())
        with torch.no_grad():
            model(**inputs)
        trace = model.vtc.trace
        vtc.unwrap(model)
        lead, real = leading_columns(model, inputs, trace, 0), inputs["attention_mask"].bool()
        eager = FAMILIES["llava"].build(attn="eager")
        with identical(eager), standing_together(eager, lead, inputs, real), torch.no_grad():
            rows = eager(**inputs, use_cache=False, output_attentions=True).attentions[1][0, :, -1].mean(0)
    rows = rows[visual(inputs["input_ids"][0])]
    expected = [
        rows[[t for t in range(36) if leader(t) == first]].sum() for first in range(36) if leader(first) == first
    ]
    torch.testing.assert_close(trace.scores(1)[0], torch.stack(expected), atol=1e-6, rtol=1e-4)


def test_other_kernels_refuse_weights(monkeypatch):
    model = FAMILIES["llava"].model
    vtc.wrap(model, Grouped())
    monkeypatch.setattr(model.config.text_config, "_attn_implementation", "flash_attention_2")
    with pytest.raises(ValueError, match="flash_attention_2 cannot weigh keys"):
        model(**prompt(model))
    vtc.unwrap(model)
