"""The slow, obvious references that the library is compared with."""

from __future__ import annotations

from contextlib import contextmanager

import torch


@contextmanager
def masked_layers(model, visible: list[torch.Tensor]):
    """Run `model` with keys hidden by hand: visible[layer] is (batch, length) bool, for every decoder layer.

    Needs calls without a cache. The mask is causal, and each query sees itself, so that no softmax is empty.
    """
    layers = model.base_model.language_model.layers

    def hide(layer: int):
        def hook(module, args, kwargs):
            keys = visible[layer]
            length = keys.shape[1]
            mask = keys[:, None, None, :] & torch.ones(length, length, dtype=torch.bool).tril()
            mask = mask | torch.eye(length, dtype=torch.bool)
            bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            return args, {**kwargs, "attention_mask": bias}

        return hook

    handles = [layer.register_forward_pre_hook(hide(n), with_kwargs=True) for n, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def visible_keys(model, trace, inputs: dict, extra: int = 0) -> list[torch.Tensor]:
    """What each layer may see by a trace: real text, the visual tokens alive there, and `extra` decoded tokens."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    result = []
    for layer in range(trace.depth):
        keys = real & (ids != model.config.image_token_id)
        for row, alive in enumerate(trace.alive(layer)):
            places = (ids[row] == model.config.image_token_id).nonzero()[:, 0]
            keys[row, places[alive]] = True
        result.append(torch.cat((keys, torch.ones(len(ids), extra, dtype=torch.bool)), dim=1))
    return result


@torch.no_grad()
def masked_logits(model, trace, inputs: dict, new_tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the unwrapped model over prompt + new tokens, dropped keys masked instead of removed."""
    extra = new_tokens.shape[1]
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(new_tokens)), dim=1)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
    full = {**inputs, "input_ids": torch.cat((inputs["input_ids"], new_tokens), dim=1), "attention_mask": mask}
    with masked_layers(model, visible_keys(model, trace, inputs, extra)):
        return model(**full, position_ids=positions, use_cache=False).logits


@torch.no_grad()
def attentions(model, inputs: dict):
    """All attention matrices of an unwrapped eager model: (tower, decoder), each a tuple of (batch, heads, q, k)."""
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
    decoder = model(**inputs, position_ids=positions, output_attentions=True).attentions
    tower = model.base_model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    return tower, decoder


def top(scores: list[float], count: int) -> list[int]:
    """Indices of the `count` largest, sorted; a loop on purpose."""
    left, picked = list(range(len(scores))), []
    for _ in range(count):
        best = max(left, key=lambda i: scores[i])
        left.remove(best)
        picked.append(best)
    return sorted(picked)
