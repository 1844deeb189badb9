"""Adapters of PEFT: seen when they come after wrapping, wrapped and unwrapped with the model."""

import oracle
import pytest
import torch
from bare import SHORT, fingerprint, logits
from models import FAMILIES, prompt, visual
from table import METHODS, SITES

import vtc


def with_lora(model, targets: str = r".*\.(q_proj|k_proj)"):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False, r=4, lora_alpha=16)).eval()


@pytest.mark.parametrize("setting", [*SITES, "vtc-cls-ensemble", "tome"])
def test_an_adapter_after_wrapping_is_observed(setting):
    inputs = prompt(FAMILIES["llava"].model, (2, 1))
    before = vtc.wrap(FAMILIES["llava"].build(), *METHODS[setting])
    plain = logits(before, inputs)
    bare = before.vtc.trace.kept()
    late = with_lora(before)
    first = vtc.wrap(with_lora(FAMILIES["llava"].build()), *METHODS[setting])
    got, expected = logits(late, inputs), logits(first, inputs)
    assert all(map(torch.equal, before.vtc.trace.kept(), first.vtc.trace.kept()))
    assert not all(map(torch.equal, before.vtc.trace.kept(), bare))
    assert torch.equal(got, expected)
    assert torch.equal(late.generate(**inputs, **SHORT), first.generate(**inputs, **SHORT))
    assert torch.equal(logits(late.unload(), inputs), plain)  # and the base layers again


@pytest.mark.parametrize("setting", SITES)
def test_a_peft_model_is_wrapped_and_unwrapped(setting):
    model, inputs = with_lora(FAMILIES["llava"].build()), prompt(FAMILIES["llava"].model, (2, 1))
    untouched, before = logits(model, inputs), fingerprint(model)
    assert vtc.wrap(model, *METHODS[setting]) is model
    out = model.generate(**inputs, **SHORT, return_dict_in_generate=True, output_logits=True)
    trace, length = model.vtc.trace, inputs["input_ids"].shape[1]
    assert vtc.unwrap(model) is model
    assert fingerprint(model) == before
    assert torch.equal(logits(model, inputs), untouched)
    new = out.sequences[:, length:]
    expected = oracle.masked_logits(model.get_base_model(), trace, inputs, new[:, :-1])[:, length - 1 :]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_a_peft_model_is_compressed_and_shares_prefixes():
    model, inputs = with_lora(FAMILIES["llava"].build()), prompt(FAMILIES["llava"].model)
    logits(model, inputs)
    before = fingerprint(model)
    with vtc.compressed(model, "vtc-cls", 0.4) as trace:
        expected = model.generate(**inputs, **SHORT)
        cut = int(visual(inputs["input_ids"])[0].nonzero()[-1]) + 2
        shared = vtc.prefix(
            model,
            input_ids=inputs["input_ids"][:, :cut],
            attention_mask=inputs["attention_mask"][:, :cut],
            pixel_values=inputs["pixel_values"],
        )
        words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        assert torch.equal(model.generate(**words, past_key_values=shared, **SHORT), expected)
        assert trace.average_tokens.tolist() == [14.0]
    assert fingerprint(model) == before
