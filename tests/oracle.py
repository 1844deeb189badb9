"""The slow, obvious references that the library is compared with."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from models import continued, visual


def layers(model):
    """The decoder's layers."""
    backbone = model.base_model
    return getattr(backbone, "language_model", getattr(backbone, "text_model", None)).layers


def windows(model) -> list[int | None]:
    """How far back each decoder layer sees, in tokens of the unpruned prompt."""
    text = model.config.text_config
    window = getattr(text, "sliding_window", None)
    if text.model_type == "mistral":
        return [window] * text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def blocks(model, inputs: dict) -> list[list[int]] | None:
    """The block of each token, -1 for none; its tokens see each other: an image of Gemma 3, PaliGemma's prefix."""
    types = (inputs or {}).get("token_type_ids")
    if types is None:
        return None
    if model.config.model_type == "paligemma":
        return [[0 if kind == 0 else -1 for kind in row] for row in types.tolist()]
    numbered = []
    for row in types.tolist():
        starts = [kind == 1 and (place == 0 or row[place - 1] != 1) for place, kind in enumerate(row)]
        numbered.append([sum(starts[: place + 1]) if kind == 1 else -1 for place, kind in enumerate(row)])
    return numbered


def allowed(model, layer: int, length: int, count: int, inputs: dict) -> torch.Tensor:
    """(count, length, length) bool: what the unpruned model lets each token of decoder layer `layer` see."""
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(count, -1, -1)
    window, numbers = windows(model)[layer], blocks(model, inputs)
    near = torch.ones_like(mask) if window is None else torch.ones(length, length, dtype=torch.bool).triu(1 - window)
    if numbers is None:
        return mask & near
    numbers = torch.tensor(numbers)
    same = (numbers[:, :, None] == numbers[:, None]) & (numbers[:, None] >= 0)
    return mask & near | same if model.config.model_type == "paligemma" else (mask | same) & near


@contextmanager
def seeing(model, sees):
    """Run `model` with its masks made by hand: sees(layer) is (batch, heads or 1, queries, keys) bool.

    Needs calls without a cache. Each query sees itself, so that no softmax is empty.
    """

    def hide(layer: int):
        def hook(module, args, kwargs):
            seen = sees(layer)
            seen = seen | torch.eye(seen.shape[-1], dtype=torch.bool)
            bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
            return args, {**kwargs, "attention_mask": bias}

        return hook

    handles = [layer.register_forward_pre_hook(hide(n), with_kwargs=True) for n, layer in enumerate(layers(model))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def masked_layers(model, visible: list[torch.Tensor], inputs: dict | None = None):
    """`seeing` where keys are hidden from all queries: visible[layer] is (batch, length) bool, for every decoder layer.

    `inputs` tell the blocks of tokens, where the family has such.
    """

    def sees(layer: int):
        keys = visible[layer]
        return keys[:, None, None, :] & allowed(model, layer, keys.shape[1], len(keys), inputs)[:, None]

    return seeing(model, sees)


def visible_keys(model, trace, inputs: dict, extra: int = 0) -> list[torch.Tensor]:
    """What each layer may see by a trace: real text, the visual tokens alive there, and `extra` decoded tokens."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    result = []
    for layer in range(trace.depth):
        keys = real & ~visual(ids)
        for row, alive in enumerate(trace.alive(layer)):
            places = visual(ids[row]).nonzero()[:, 0]
            keys[row, places[alive]] = True
        result.append(torch.cat((keys, torch.ones(len(ids), extra, dtype=torch.bool)), dim=1))
    return result


@torch.no_grad()
def masked_logits(model, trace, inputs: dict, new_tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the unwrapped model over prompt + new tokens, dropped keys masked instead of removed."""
    full = continued(model, inputs, new_tokens)
    with masked_layers(model, visible_keys(model, trace, inputs, new_tokens.shape[1]), full):
        return model(**full, use_cache=False).logits


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
