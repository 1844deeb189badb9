"""The model without vtc: what it answers, and what wrapping could leave on it."""

from __future__ import annotations

import functools

import torch
from models import FAMILIES, prompt
from table import BATCHES

GREEDY = {"do_sample": False, "max_new_tokens": 8}


def logits(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options).logits


def fingerprint(model):
    """Everything on the modules that wrapping could leave behind."""
    return [
        (name, sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@functools.cache
def untouched(family: str, batch: str) -> tuple:
    """Outputs with all hidden states, and greedily generated ids, of a family's unwrapped model on a batch."""
    model, (images, pad) = FAMILIES[family].model, BATCHES[batch]
    assert "vtc" not in vars(model)
    inputs = prompt(model, images, pad=pad)
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True), model.generate(**inputs, **GREEDY)
