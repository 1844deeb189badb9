"""Copies, exceptions, Ctrl-C, parts of a model, features of one's own: nothing is left behind."""

import copy
import threading

import oracle
import pytest
import torch
from bare import COPIES, SHORT, fingerprint, logits
from models import FAMILIES, batch, prompt, rows, visual
from table import METHODS, SITES, each_site
from table import parametrize as pytest_generate_tests  # noqa: F401

import vtc
import vtc.adapter as adapters

WAYS = [("deepcopy", name, setting) for name in FAMILIES for setting in SITES[:2]]
WAYS += [(way, name, "vtc-cls") for way in ("pickle", "torch.save") for name in ("llava", "qwen2_5_vl", "gemma3")]
WAYS += [("deepcopy", "llava", "atp")]
WAYS += [(way, "llava", setting) for way in COPIES for setting in ("tome", "vflowopt", "uniform", "transprune-high")]


@pytest.mark.parametrize(("way", "name", "setting"), WAYS)
def test_a_copy_of_a_wrapped_model_is_wrapped_and_its_own(way, name, setting):
    model, inputs = FAMILIES[name].build(), prompt(FAMILIES[name].model, (2, 1))
    twin = COPIES[way](vtc.wrap(model, *METHODS[setting]))
    expected = logits(model, inputs)
    assert torch.equal(logits(twin, inputs), expected)
    assert all(map(torch.equal, twin.vtc.trace.kept(), model.vtc.trace.kept()))
    assert torch.equal(twin.generate(**inputs, **SHORT), model.generate(**inputs, **SHORT))
    vtc.unwrap(model)
    bare = logits(model, inputs)
    assert torch.equal(logits(twin, inputs), expected)
    second = copy.deepcopy(twin)
    for weight in second.parameters():
        weight.data.zero_()
    assert torch.equal(logits(twin, inputs), expected)
    assert not torch.equal(logits(second, inputs), expected)
    vtc.unwrap(twin)
    assert fingerprint(twin) == fingerprint(model)
    assert torch.equal(logits(twin, inputs), bare)


def test_a_copy_made_inside_compressed_stays_as_it_was_there(llava):
    inputs = prompt(llava)
    with vtc.compressed(llava, "random", 4):
        expected = logits(llava, inputs)
        twin = copy.deepcopy(llava)
    assert torch.equal(logits(twin, inputs), expected)
    vtc.unwrap(twin)
    assert torch.equal(logits(twin, inputs), logits(llava, inputs))


def test_features_as_a_tuple_are_those_of_the_bare_model(model):
    inputs = prompt(model)
    tower = {name: x for name, x in inputs.items() if name.startswith(("pixel", "image_"))}
    with torch.no_grad():
        bare = model.base_model.get_image_features(**tower, return_dict=False)
        vtc.wrap(model, "random", 0.5)
        wrapped = model.base_model.get_image_features(**tower, return_dict=False)
    assert isinstance(wrapped, tuple)
    torch.testing.assert_close(wrapped, bare, rtol=0, atol=0)


@pytest.mark.parametrize("wanted", [[0, 3], [-1], 2])
def test_some_hidden_states(model, wanted):
    """Those that the bare model would give: in the shape of the whole prompt."""
    inputs = prompt(model, (2, 1))
    with torch.no_grad():
        bare = model(**inputs, output_hidden_states=wanted).hidden_states
        vtc.wrap(model, "fastv", 0.4)
        every = model(**inputs, output_hidden_states=True).hidden_states
        some = model(**inputs, output_hidden_states=wanted).hidden_states
    assert [x is None for x in some] == [x is None for x in bare]
    for one, whole, plain in zip(some, every, bare, strict=True):
        assert one is None or (torch.equal(one, whole) and one.shape == plain.shape)


@each_site
def test_after_an_exception_the_trace_is_of_the_last_call_that_ended(model, method):
    first, second = prompt(model, (1,), seed=1), prompt(model, (2, 1), seed=2)
    vtc.wrap(model, *method)
    logits(model, first)
    kept, seconds = model.vtc.trace.kept(), model.vtc.trace.seconds
    for place in (oracle.layers(model)[0], oracle.layers(model)[-1]):
        handle = place.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(model, second)
        handle.remove()
        assert all(map(torch.equal, model.vtc.trace.kept(), kept))
        assert model.vtc.trace.seconds == seconds
        assert len(model.vtc.trace.tokens_per_layer) == 1
    logits(model, second)
    assert len(model.vtc.trace.kept()) == 2


@pytest.mark.parametrize("generates", [False, True], ids=["forward", "generate"])
@each_site
def test_ctrl_c_leaves_nothing_behind(model, method, generates):
    """It is no `Exception`: torch's own hooks behind a module do not hear of it."""
    inputs, decoder = prompt(model, (2, 1)), adapters.find(model).decoder
    states = torch.randn(1, 5, model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0))

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        bare = decoder(inputs_embeds=states).last_hidden_state
    vtc.wrap(model, *method)
    expected, text = logits(model, inputs), model.generate(**inputs, **SHORT)
    kept = model.vtc.trace.kept()

    def interrupted():
        handle = oracle.layers(model)[4].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.generate(**inputs, **SHORT) if generates else logits(model, inputs)
        handle.remove()

    interrupted()
    assert torch.equal(logits(model, inputs), expected)
    assert all(map(torch.equal, model.vtc.trace.kept(), kept))
    interrupted()
    assert torch.equal(model.generate(**inputs, **SHORT), text)
    interrupted()
    with torch.no_grad():
        assert torch.equal(decoder(inputs_embeds=states).last_hidden_state, bare)
    thread = threading.Thread(target=vtc.unwrap, args=(model,), daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert "vtc" not in vars(model)


def test_a_prefix_of_embeddings(llava):
    inputs = prompt(llava)
    cut = int(visual(inputs["input_ids"])[0].nonzero()[-1]) + 2
    beginning = {"attention_mask": inputs["attention_mask"][:, :cut], "pixel_values": inputs["pixel_values"]}
    ids = inputs["input_ids"][:, :cut]
    words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    vtc.wrap(llava, "vtc-cls", 0.4)
    by_ids = vtc.prefix(llava, input_ids=ids, **beginning)
    by_embeds = vtc.prefix(llava, inputs_embeds=llava.get_input_embeddings()(ids), **beginning)
    answers = [llava.generate(**words, past_key_values=cache, **SHORT) for cache in (by_ids, by_embeds)]
    assert torch.equal(*answers)


def test_a_prefix_of_embeddings_that_the_image_reads_is_refused():
    model = FAMILIES["paligemma"].model
    inputs = prompt(model)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with vtc.compressed(model, "vtc-cls", 0.5), pytest.raises(ValueError, match="reads the question"):
        vtc.prefix(model, inputs_embeds=embeds, **inputs)


def test_an_own_way_to_features_survives(llava):
    inputs, backbone = prompt(llava), llava.base_model
    original = backbone.get_image_features

    def own(*args, **kwargs):
        features = original(*args, **kwargs)
        features["pooler_output"] = [feature * 2 for feature in features.pooler_output]
        return features

    backbone.get_image_features = own
    try:
        expected = logits(llava, inputs)
        with vtc.compressed(llava, "random", 1.0):
            assert torch.equal(logits(llava, inputs), expected)
        assert vars(backbone)["get_image_features"] is own
        assert torch.equal(logits(llava, inputs), expected)
    finally:
        del backbone.get_image_features


def test_a_model_and_a_part_of_it_are_not_both_wrapped(llava):
    before = fingerprint(llava)
    vtc.wrap(llava, "random", 0.5)
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration that is wrapped"):
        vtc.wrap(llava.model, "random", 0.5)
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration that is wrapped"):
        vtc.unwrap(llava.model)
    vtc.unwrap(llava)
    vtc.wrap(llava.model, "random", 0.5)
    with pytest.raises(ValueError, match="part of this LlavaForConditionalGeneration is wrapped"):
        vtc.wrap(llava, "random", 0.5)
    vtc.unwrap(llava.model)
    assert fingerprint(llava) == before


def test_a_backbone_alone_is_compressed(llava):
    inputs = prompt(llava, (2, 1))
    with vtc.compressed(llava, "fastv", 0.4):
        expected = logits(llava, inputs)
    with vtc.compressed(llava.model, "fastv", 0.4), torch.no_grad():
        states = llava.model(**inputs).last_hidden_state
        assert torch.equal(llava.lm_head(states), expected)


def test_budget_zero_on_an_image_alone_is_refused(llava):
    part = rows(llava, (1,))[0]
    alone = copy.deepcopy(part)
    alone.ids = [token for token in part.ids if token == 99]
    vtc.wrap(llava, "random", 0)
    for parts in ([alone], [alone, part]):
        with pytest.raises(ValueError, match="nothing left at budget 0"):
            logits(llava, batch(llava, parts))
        with pytest.raises(ValueError, match="nothing left at budget 0"):
            llava.generate(**batch(llava, parts), **SHORT)
    vtc.wrap(llava, "random", 1)
    assert logits(llava, batch(llava, [alone, part])).isfinite().all()


def test_features_for_another_method_are_told_apart(llava):
    """Not a KeyError from the depths."""
    inputs = prompt(llava)
    with vtc.compressed(llava, "random", 0.5):
        features = {"image": llava.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)}
    with vtc.compressed(llava, "vtc-cls", 0.5), pytest.raises(RuntimeError, match="encode them anew"):
        llava(**inputs, mm_encoder_outputs=features)
