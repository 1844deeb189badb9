"""Entries of a config: those that a family does not read change nothing."""

import pytest
import torch
from bare import logits
from models import FAMILIES, prompt

import vtc

UNREAD = ["gemma3", "paligemma", "paligemma2", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@pytest.mark.parametrize("name", UNREAD)
def test_entries_that_a_family_does_not_read_change_nothing(name):
    model = FAMILIES[name].build()
    inputs = prompt(model)
    bare, kept = logits(model, inputs), []
    for _ in range(2):
        with vtc.compressed(model, "vtc-cls", 1.0):
            assert torch.equal(logits(model, inputs), bare)
        with vtc.compressed(model, "vtc-cls", 0.4) as trace:
            logits(model, inputs)
        kept.append(trace.kept()[0])
        model.config.vision_feature_layer, model.config.vision_feature_select_strategy = -2, "default"
    assert torch.equal(*kept)


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "internvl"])
def test_entries_that_a_family_reads_count(name):
    model = FAMILIES[name].build()
    inputs = prompt(model)
    model.config.vision_feature_layer = -3
    bare = logits(model, inputs)
    with vtc.compressed(model, "vtc-cls", 1.0):
        assert torch.equal(logits(model, inputs), bare)
