"""Questions about one image on a copied, pruned cache: the answers of separate prompts."""

import copy

import pytest
import torch
from models import FAMILIES, llava, prompt

import vtc
from vtc.methods.tally import Tally

OPTIONS = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def parted(inputs):
    """The beginning of a prompt up to one word after its image, and the prompt without its image."""
    ids = inputs["input_ids"]
    cut = int((ids[0] >= 98).nonzero()[-1]) + 2
    beginning = {name: x[:, :cut] if name in BY_TOKEN else x for name, x in inputs.items()}
    return beginning, {name: x for name, x in inputs.items() if name in BY_TOKEN}


@pytest.mark.parametrize("method", ["vtc-cls", "tome", "uniform", Tally(power=1.0)], ids=str)
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "gemma3", "internvl"])
def test_answers_are_those_of_separate_prompts(family, method):
    model = FAMILIES[family].model
    if method == "tome" and not vtc.adapter.find(model).merges_patches:
        pytest.skip("patches cannot merge in this tower")
    first = prompt(model, length=9)
    others = [{**first, "input_ids": first["input_ids"].clone()} for _ in range(2)]
    for seed, other in enumerate(others):
        other["input_ids"][:, -6:] = torch.randint(7, 90, (1, 6), generator=torch.Generator().manual_seed(seed))
    with vtc.compressed(model, method, 0.4) as trace:
        shared = vtc.prefix(model, **parted(first)[0])
        kept = trace.kept()
        held = shared.layers[0].get_seq_length()
        for inputs in (first, *others):
            got = model.generate(**parted(inputs)[1], past_key_values=copy.deepcopy(shared), **OPTIONS)
            expected = model.generate(**inputs, **OPTIONS)
            assert all(map(torch.equal, trace.kept(), kept))
            torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
            assert torch.equal(got.sequences, expected.sequences)
        assert shared.layers[0].get_seq_length() == held


def test_what_cannot_be_shared_is_refused():
    model = llava()
    beginning = parted(prompt(model))[0]
    with pytest.raises(ValueError, match="wrap the model first"):
        vtc.prefix(model, **beginning)
    vtc.wrap(model, "fastv", 0.5)
    with pytest.raises(ValueError, match="fastv drops before decoder layers"):
        vtc.prefix(model, **beginning)
    vtc.wrap(model, "cdpruner", 0.5)
    with pytest.raises(ValueError, match="cdpruner chooses by the question"):
        vtc.prefix(model, **beginning)
    model = FAMILIES["paligemma"].model
    with vtc.compressed(model, "vtc-cls", 0.5), pytest.raises(ValueError, match="reads the question"):
        vtc.prefix(model, **parted(prompt(model))[0])
