"""The model without vtc: what it answers, and what wrapping could leave on it."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import torch
from models import FAMILIES, prompt
from table import BATCHES

GREEDY = {"do_sample": False, "max_new_tokens": 8}
SHORT = {"do_sample": False, "max_new_tokens": 5}
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _saved_and_loaded(model),
}
"""Ways to copy a model or what it returns."""


def _saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


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
