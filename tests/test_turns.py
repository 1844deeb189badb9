"""Masks, caches and turns as transformers itself reads them: against a bare model that hides what was dropped."""

import copy
import functools
import threading

import accelerate
import oracle
import pytest
import torch
from bare import GREEDY
from models import FAMILIES, PAD, batch, gemma3, prompt, rows, visual
from peft import LoraConfig, get_peft_model
from table import METHODS
from transformers import DynamicCache, StaticCache

import vtc

SETTINGS = [("vtc-cls", 0.4), ("fastv", 0.6)]
FEW = GREEDY | {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}


class Hiding:
    """A bare model under its own masks, which hides besides what traces say was dropped."""

    def __init__(self, model):
        self.model, self.hidden = model, {}

    def drop(self, trace, ids, start=0):
        """What a turn with `ids`, whose first column is `start`, has left out."""
        for layer in range(len(oracle.layers(self.model))):
            hidden = torch.zeros(len(ids), start + ids.shape[1], dtype=torch.bool)
            if layer in self.hidden:
                hidden[:, : self.hidden[layer].shape[1]] |= self.hidden[layer]
            for row, alive in enumerate(trace.alive(layer)):
                places = visual(ids[row]).nonzero()[:, 0]
                gone = torch.ones(len(places), dtype=torch.bool)
                gone[alive] = False
                hidden[row, start + places[gone]] = True
            self.hidden[layer] = hidden

    @torch.no_grad()
    def __call__(self, **inputs):
        def hide(layer, module, args, kwargs):
            mask, hidden = kwargs["attention_mask"], self.hidden.get(layer)
            if hidden is None:
                return None
            wide = torch.zeros(len(hidden), mask.shape[-1], dtype=torch.bool)
            wide[:, : hidden.shape[1]] = hidden[:, : mask.shape[-1]]
            least = torch.finfo(mask.dtype).min
            return args, kwargs | {
                "attention_mask": mask.expand(len(wide), -1, -1, -1).masked_fill(wide[:, None, None], least)
            }

        layers = oracle.layers(self.model)
        handles = [
            layer.register_forward_pre_hook(functools.partial(hide, number), with_kwargs=True)
            for number, layer in enumerate(layers)
        ]
        try:
            return self.model(**inputs)
        finally:
            [handle.remove() for handle in handles]


def widened(model, window):
    """With another sliding window, where the model has one."""
    for part in (model.config.text_config, *(layer.self_attn for layer in oracle.layers(model))):
        if getattr(part, "sliding_window", None) is not None:
            part.sliding_window = window
    return model


def agree(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def eager():
    """The plainest model and a bare twin of it, whose masks can be added to."""
    model = FAMILIES["llava"].build(attn="eager")
    return model, Hiding(copy.deepcopy(model))


# -- masks --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("static", [False, True])
def test_a_mask_longer_than_the_sequence_hides_nothing(eager, setting, static):
    """That of a loop over a cache of a fixed size, made once: transformers reads masks by column."""
    model, _ = eager
    inputs = batch(model, rows(model, (1, 1), vary=False))
    length = inputs["input_ids"].shape[1]
    long = torch.nn.functional.pad(inputs["attention_mask"], (0, 128 - length))

    def asked(mask):
        cache = StaticCache(config=model.config, max_cache_len=128) if static else DynamicCache(config=model.config)
        return model(**{**inputs, "attention_mask": mask}, past_key_values=cache).logits

    vtc.wrap(model, *setting)
    agree(asked(long), asked(inputs["attention_mask"]))
    assert model.vtc.trace.average_tokens.min() > 0


@torch.no_grad()
@pytest.mark.parametrize("setting", [*SETTINGS, ("vtc-cls", 1.0)])
def test_a_later_mask_may_hide_what_an_unpruned_cache_shows(eager, setting):
    model, bare = eager
    text, image = torch.tensor([[1, 11, 12, 13, 14, 15]]), prompt(model, (1,))
    mask = torch.cat((torch.tensor([[1, 0, 0, 1, 1, 1]]), image["attention_mask"]), dim=1)
    vtc.wrap(model, *setting)
    found = model(**image | {"attention_mask": mask}, past_key_values=model(input_ids=text).past_key_values).logits
    bare.drop(model.vtc.trace, image["input_ids"], start=6)
    before = bare.model(input_ids=text).past_key_values
    agree(found[:, -1], bare(**image | {"attention_mask": mask}, past_key_values=before).logits[:, -1])


@torch.no_grad()
@pytest.mark.parametrize("setting", [*SETTINGS, ("vtc-cls", 1.0)])
def test_later_turns_on_a_static_cache_are_padded(llava, setting):
    """generate() makes the masks of static caches itself: what the second turn's mask hides stays hidden."""
    model, first = llava, batch(llava, rows(llava, (1, 1), length=8, vary=False))
    question = torch.tensor([[PAD, PAD, 21, 22, 23], [31, 32, 33, 34, 35]])
    ids = torch.cat((first["input_ids"], question), dim=1)
    mask = torch.cat((first["attention_mask"], (question != PAD).long()), dim=1)
    vtc.wrap(model, *setting)
    found = []
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=128)):
        model(**first, past_key_values=cache)
        out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **FEW)
        found.append(torch.stack(out.logits))
    agree(*found)


@torch.no_grad()
@pytest.mark.parametrize("setting", [("vtc-cls", 0.4), ("uniform", 0.25)])
def test_an_image_in_a_later_turn_on_a_static_cache_is_padded(llava, setting):
    model = llava
    text = torch.tensor([[PAD, PAD, 5, 6], [7, 8, 9, 10]])
    second = batch(model, rows(model, (1, 1), length=8, vary=False))
    ids = torch.cat((text, second["input_ids"]), dim=1)
    mask = torch.cat(((text != PAD).long(), second["attention_mask"]), dim=1)
    model_inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": second["pixel_values"]}
    found = []
    for kind in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=128)):
        model(input_ids=text, attention_mask=(text != PAD).long(), past_key_values=kind)
        with vtc.compressed(model, *setting):
            found.append(torch.stack(model.generate(**model_inputs, past_key_values=kind, **FEW).logits))
    agree(*found)


@torch.no_grad()
def test_masks_of_more_axes_are_refused(eager):
    """Of a static cache, too, where they are not generate()'s own; and the dictionaries that some models take."""
    model, inputs = eager[0], prompt(eager[0], (1,))
    length = inputs["input_ids"].shape[1]
    four = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    vtc.wrap(model, "vtc-cls", 0.4)
    with pytest.raises(ValueError, match=r"shape \(batch, length\); this one is 4-D"):
        model(**inputs | {"attention_mask": four})
    wide = torch.nn.functional.pad(four, (0, 128 - length))
    cache = StaticCache(config=model.config, max_cache_len=128)
    with pytest.raises(ValueError, match=r"shape \(batch, length\); this one is 4-D"):
        model(**inputs | {"attention_mask": wide}, past_key_values=cache)
    windows = gemma3()
    inputs = prompt(windows, (1,))
    vtc.wrap(windows, "uniform", 0.4)
    with pytest.raises(ValueError, match=r"shape \(batch, length\); this one is a dict"):
        windows(**inputs | {"attention_mask": {"full_attention": four, "sliding_attention": four}})


# -- images that see both ways ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
@pytest.mark.parametrize("budget", [35, 0.4])
def test_an_image_behind_a_cached_turn_sees_itself_both_ways(name, budget):
    """With the types of all turns, as generate() hands them on."""
    model = FAMILIES[name].build(attn="eager")
    widened(model, 300)
    bare = Hiding(copy.deepcopy(model))
    text, image = prompt(model, (0,), seed=5), prompt(model, (1,), seed=1)
    both = {key: torch.cat((text[key], image[key]), dim=1) for key in ("attention_mask", "token_type_ids")}
    vtc.wrap(model, "uniform", budget)
    found = model(**image | both, past_key_values=model(**text).past_key_values).logits
    bare.drop(model.vtc.trace, image["input_ids"], start=text["input_ids"].shape[1])
    cache = bare.model(**text).past_key_values
    agree(found[:, -1], bare(**image | both, past_key_values=cache).logits[:, -1])


@torch.no_grad()
@pytest.mark.parametrize("setting", [("uniform", 0.4), ("fastv", 0.6)])
def test_a_static_cache_whose_layers_have_windows_holds_a_prompt_within_them(setting):
    model = widened(FAMILIES["gemma3"].build(), 80)
    text = model.config.text_config
    inputs = prompt(model, (1,))
    vtc.wrap(model, *setting)
    found = [
        torch.stack(model.generate(**inputs, past_key_values=cache, **FEW).logits)
        for cache in (DynamicCache(), StaticCache(config=text, max_cache_len=128))
    ]
    agree(*found)


# -- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["tally", "tally-whole", "fastv-early"])
def test_gradients_of_a_left_padded_batch_are_those_of_differences(setting):
    """Also where the first word is learned, which the last filling predicts."""
    model = FAMILIES["llava"].build()
    inputs = prompt(model, (1, 2), pad="left")
    hidden = visual(inputs["input_ids"]) | (inputs["attention_mask"] == 0)
    labels = inputs["input_ids"].masked_fill(hidden, -100)
    vtc.wrap(model, *METHODS[setting])
    model(**inputs, labels=labels).loss.backward()
    weight, step = oracle.layers(model)[0].self_attn.v_proj.weight, 1e-3
    slope = weight.grad.norm()
    with torch.no_grad():
        weight += step * weight.grad / slope
        above = model(**inputs, labels=labels).loss
        weight -= 2 * step * weight.grad / slope
        below = model(**inputs, labels=labels).loss
    torch.testing.assert_close(slope, (above - below) / (2 * step), atol=0.02, rtol=0.02)


# -- calls and what outlives them ---------------------------------------------------------------------------------


@torch.no_grad()
def test_a_call_that_the_model_refuses_is_over(llava):
    """A thread that made it holds up no other one that unwraps."""
    model, inputs, said = llava, prompt(llava), []
    vtc.wrap(model, "vtc-cls", 0.4)
    asked, stop = threading.Event(), threading.Event()

    def work():
        try:
            model(attention_mask=inputs["attention_mask"])
        except ValueError as error:
            said.append(str(error))
        asked.set()
        stop.wait()

    worker = threading.Thread(target=work)
    worker.start()
    asked.wait()
    other = threading.Thread(target=vtc.unwrap, args=(model,), daemon=True)
    other.start()
    other.join(20)
    ended = not other.is_alive()
    stop.set()
    worker.join()
    assert ended
    assert "exactly one of input_ids or inputs_embeds" in said[0]


@torch.no_grad()
def test_a_backbone_called_by_position_is_called_by_name():
    model = FAMILIES["gemma3"].model
    inputs = prompt(model, (1,))
    with vtc.compressed(model, "uniform", 0.4):
        names = ("input_ids", "pixel_values", "attention_mask")
        named = model.model(**inputs).last_hidden_state
        found = model.model(*map(inputs.get, names), None, None, inputs["token_type_ids"]).last_hidden_state
    agree(found, named)


@torch.no_grad()
def test_what_was_taken_from_a_wrapped_model_outlives_that(llava):
    inputs = prompt(llava)
    expected = llava.generate(**inputs, **GREEDY)
    vtc.wrap(llava, "vtc-cls", 0.4)
    generate, encode = llava.generate, llava.model.get_image_features
    vtc.unwrap(llava)
    assert torch.equal(generate(**inputs, **GREEDY), expected)
    assert "vtc" not in encode(inputs["pixel_values"])


def test_a_block_that_has_ended_compresses_nothing(llava):
    import contextvars

    inputs = prompt(llava)
    with vtc.compressed(llava, "vtc-cls", 0.4):
        context, generate = contextvars.copy_context(), llava.generate
    with pytest.raises(RuntimeError, match="has ended"):
        context.run(generate, **inputs, **GREEDY)


@torch.no_grad()
def test_what_others_put_round_a_wrapped_model_stays(llava):
    inputs, calls = prompt(llava), []
    expected = llava.generate(**inputs, **GREEDY)
    vtc.wrap(llava, "vtc-cls", 0.4)
    ours = llava.generate

    def counted(**kwargs):
        calls.append(1)
        return ours(**kwargs)

    llava.generate = counted
    pruned = llava.generate(**inputs, **GREEDY)
    vtc.unwrap(llava)
    assert torch.equal(llava.generate(**inputs, **GREEDY), expected)
    vtc.wrap(llava, "vtc-cls", 0.4)
    assert torch.equal(llava.generate(**inputs, **GREEDY), pruned)
    assert len(calls) == 3
    vtc.unwrap(llava)
    del llava.generate


@torch.no_grad()
def test_a_model_that_is_offloaded_is_pruned_as_before():
    model = FAMILIES["llava"].build()
    inputs = prompt(model)
    with vtc.compressed(model, "vtc-cls", 0.4):
        expected = model(**inputs).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    with vtc.compressed(model, "vtc-cls", 0.4):
        agree(model(**inputs).logits, expected)


@torch.no_grad()
def test_a_cache_that_nothing_left_is_cropped_anywhere(llava):
    inputs, step = prompt(llava, (1,)), torch.tensor([[7]])

    def cropped():
        cache = llava(**inputs).past_key_values
        cache.crop(-20)
        return llava(input_ids=step, past_key_values=cache).logits

    expected = cropped()
    vtc.wrap(llava, "vtc-cls", 1.0)
    assert torch.equal(cropped(), expected)


@torch.no_grad()
def test_an_adapter_that_comes_amid_a_conversation_is_read():
    """By a method that looks at each step's queries."""
    model = FAMILIES["llava"].build()
    inputs, step = prompt(model, (1,)), torch.tensor([[7, 8]])
    vtc.wrap(model, "tokenselect", 0.3)
    cache = model(**inputs).past_key_values
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    twin = copy.deepcopy(cache)
    found = tuned(input_ids=step, past_key_values=cache).logits
    vtc.unwrap(model)
    vtc.wrap(model, "tokenselect", 0.3)
    agree(found, tuned(input_ids=step, past_key_values=twin).logits)
