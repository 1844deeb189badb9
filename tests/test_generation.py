"""The generation contract: every way in which transformers generates, on pruned prompts."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import oracle
import pytest
import torch
from bare import GREEDY
from models import FAMILIES, IMAGE, batch, prompt, rows
from table import METHODS, SITES
from transformers import CompileConfig, DynamicCache, TextStreamer
from transformers.cache_utils import QuantizedLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtc
from vtc.core.patch import sees


@pytest.fixture(params=FAMILIES)
def model(request):
    yield FAMILIES[request.param].model
    vtc.unwrap(FAMILIES[request.param].model)


def windowed(model) -> bool:
    return any(window is not None for window in oracle.windows(model))


# -- caches that are taken back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SITES)
def test_guesses_from_the_prompt_change_nothing(model, setting):
    """Assisted generation: guessed tokens are in the prefill too, but no prompt; wrong ones are cropped."""
    inputs = prompt(model)
    inputs["input_ids"][0, -6:-3] = inputs["input_ids"][0, -3:]  # an n-gram to guess from
    vtc.wrap(model, *METHODS[setting])
    expected = model.generate(**inputs, **GREEDY)
    guessed = model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=3, return_dict_in_generate=True)
    assert torch.equal(guessed.sequences, expected)
    assert model.vtc.trace.tokens_per_layer[0, -1] < model.vtc.trace.sizes[0] * len(model.vtc.trace.sizes)


@pytest.mark.parametrize("setting", SITES)
def test_an_assistant_changes_nothing(setting):
    """The assistant is wrapped, too: its cache is cropped as well."""
    model, assistant = (FAMILIES["llava"].build(seed=seed) for seed in (0, 1))
    inputs = prompt(model)
    vtc.wrap(model, *METHODS[setting])
    expected = model.generate(**inputs, **GREEDY)
    for helper in (assistant, vtc.wrap(assistant, "random", 9)):
        assert torch.equal(model.generate(**inputs, **GREEDY, assistant_model=helper), expected)


def test_a_cropped_cache_goes_on_from_where_it_was(llava):
    inputs = prompt(llava, (1, 2))
    vtc.wrap(llava, "fastv", 0.4)
    step = torch.tensor([[7], [9]])
    with torch.no_grad():
        cache = llava(**inputs).past_key_values
        twin = copy.deepcopy(cache)
        expected = llava(input_ids=step, past_key_values=twin).logits
        llava(input_ids=torch.tensor([[3, 4, 5], [5, 4, 3]]), past_key_values=cache)
        cache.crop(-3)
        torch.testing.assert_close(llava(input_ids=step, past_key_values=cache).logits, expected)


def test_a_cache_cropped_into_the_images_is_refused(llava):
    inputs = prompt(llava)
    vtc.wrap(llava, "random", 4)
    with torch.no_grad():
        cache = llava(**inputs).past_key_values
        cache.crop(-10)
        llava(input_ids=torch.tensor([[7]]), past_key_values=cache)
        cache.crop(-2)
        with pytest.raises(RuntimeError, match="cropped by the 1 tokens"):
            llava(input_ids=torch.tensor([[7]]), past_key_values=cache)


@torch.no_grad()
def test_a_crop_reaches_back_to_a_hole_in_the_text(llava):
    """Which later layers do not hold, so that the same number of keys would be other tokens there."""
    inputs = prompt(llava)
    inputs["attention_mask"][0, -3] = 0
    vtc.wrap(llava, vtc.FastV(layer=3), 0.7)
    outputs = llava(**inputs)
    for count in (2, 4):
        cache = copy.deepcopy(outputs.past_key_values)
        cache.crop(-count)
        again = {"input_ids": inputs["input_ids"][:, -count:], "attention_mask": inputs["attention_mask"]}
        if count == 2:
            got = llava(**again, past_key_values=cache).logits
            torch.testing.assert_close(got, outputs.logits[:, -2:])
            continue
        with pytest.raises(RuntimeError, match="cropped by the 2 tokens"):
            llava(**again, past_key_values=cache)


@torch.no_grad()
def test_a_crop_goes_behind_the_padding_of_another_row(llava):
    long, short = rows(llava, (1, 0))
    short.ids = short.ids[-4:]
    inputs = batch(llava, [long, short])
    vtc.wrap(llava, vtc.FastV(layer=3), 0.7)
    outputs = llava(**inputs)
    outputs.past_key_values.crop(-8)
    again = {"input_ids": inputs["input_ids"][:, -8:], "attention_mask": inputs["attention_mask"]}
    got, real = llava(**again, past_key_values=outputs.past_key_values).logits, inputs["attention_mask"][:, -8:] > 0
    torch.testing.assert_close(got[real], outputs.logits[:, -8:][real])


@pytest.mark.parametrize("setting", ["tally", "vtc-cls", "fastv-early"])
@torch.no_grad()
def test_a_pruned_cache_is_refused_by_a_model_that_is_not_wrapped(llava, setting):
    """It would lose the weights of keys, or misread what layers hold. A cache that holds everything goes on."""
    inputs, step = prompt(llava, (1, 2)), {"input_ids": torch.tensor([[7], [9]])}
    padded = step | {"attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)}
    with vtc.compressed(llava, *METHODS[setting]):
        cache = llava(**inputs).past_key_values
        expected = llava(**padded, past_key_values=copy.deepcopy(cache)).logits
    for call in (step, padded, {"input_ids": torch.tensor([[7, 8], [9, 8]])}):
        with pytest.raises(RuntimeError, match="wrap the model again"):
            llava(**call, past_key_values=cache)
    with vtc.compressed(llava, *METHODS[setting]):
        assert torch.equal(llava(**padded, past_key_values=cache).logits, expected)
    with pytest.raises(RuntimeError, match="wrap the model again"):
        llava(**step, past_key_values=cache)
    whole = llava(**inputs).past_key_values
    with vtc.compressed(llava, METHODS[setting][0], 1.0):
        cache = llava(**inputs).past_key_values
    got, bare = (llava(**padded, past_key_values=one).logits for one in (cache, whole))
    assert torch.equal(got, bare)


# -- kinds of caches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SITES)
@pytest.mark.parametrize("images", [(1,), (2, 0, 1)])
def test_a_static_cache_holds_the_same(model, setting, images):
    if model is FAMILIES["paligemma2"].model:
        pytest.skip("transformers itself has no static cache for PaliGemma 2")
    inputs = prompt(model, images)
    vtc.wrap(model, *METHODS[setting])
    if windowed(model):
        with pytest.raises(ValueError, match="static cache cannot hold"):
            model.generate(**inputs, **GREEDY, cache_implementation="static")
        return
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), expected)


class Int8Layer(QuantizedLayer):
    """Keys and values as int8 with one scale a token and head, in transformers' own frame for quantised caches."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, tensor):
        return tensor[0] * tensor[1]


def quantised(model) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [Int8Layer(residual_length=4) for _ in oracle.layers(model)]
    return cache


@pytest.mark.parametrize("setting", SITES)
def test_a_quantised_cache(model, setting):
    """A pruned cache in int8 gives nearly the logits of the pruned cache."""
    if windowed(model):
        pytest.skip("transformers has no quantised sliding window")
    inputs = prompt(model, (1,))
    vtc.wrap(model, *METHODS[setting])
    step = torch.tensor([[7]])
    with torch.no_grad():
        expected = model(input_ids=step, past_key_values=model(**inputs).past_key_values).logits
        cache = model(**inputs, past_key_values=quantised(model)).past_key_values
        logits = model(input_ids=step, past_key_values=cache).logits
    error = (logits - expected).norm() / expected.norm()
    assert 0 < error < 0.05
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 1


def test_a_quantised_cache_is_not_looked_into(llava):
    first, second = rows(llava, (1,), seed=1)[0], rows(llava, (1,), seed=2)[0]
    mask = batch(llava, [first + second])["attention_mask"]
    vtc.wrap(llava, "fastv", 0.5)
    with torch.no_grad():
        cache = llava(**batch(llava, [first]), past_key_values=quantised(llava)).past_key_values
        with pytest.raises(ValueError, match="Int8Layer does not hold all past keys"):
            llava(**{**batch(llava, [second]), "attention_mask": mask}, past_key_values=cache)


# -- sampling and streaming ----------------------------------------------------------------------------------------


def test_streaming_and_stopping(model):
    """What a streamer is handed is what is returned."""

    class Tokens(TextStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen.append(value.flatten())

        def end(self):
            self.seen = torch.cat(self.seen)

    inputs, streamer = prompt(model), Tokens()
    vtc.wrap(model, "vtc-cls", 0.3)
    out = model.generate(**inputs, **GREEDY, streamer=streamer)
    assert torch.equal(streamer.seen, out[0])


def test_contrastive_settings_of_sampling(model):
    """Seeded sampling is repeatable, and rows of one prompt differ."""
    inputs = prompt(model, (1, 2))
    vtc.wrap(model, "fastv", 0.4)
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        options = {"do_sample": True, "num_return_sequences": 3, "top_p": 0.95, "temperature": 1.5, "max_new_tokens": 6}
        draws.append(model.generate(**inputs, **options))
    assert torch.equal(*draws)
    assert len({tuple(row.tolist()) for row in draws[0][:, -6:]}) > 2


# -- numbers of other kinds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("setting", SITES)
def test_half_precision(model, setting, dtype):
    """Nothing comes back in another type, and what is kept agrees with float32 for the most part."""
    inputs = prompt(model, (2, 0, 1))
    vtc.wrap(model, *METHODS[setting])
    with torch.no_grad():
        model(**inputs)
    expected = [set(kept.tolist()) for kept in model.vtc.trace.kept()]
    half = vtc.wrap(copy.deepcopy(vtc.unwrap(model)).to(dtype), *METHODS[setting])
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    out = half.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert out.past_key_values.layers[-1].keys.dtype == dtype
    assert torch.stack(out.logits).isfinite().all()
    agreement = [len(a & set(b.tolist())) / len(a) for a, b in zip(expected, half.vtc.trace.kept(), strict=True) if a]
    assert min(agreement) > 0.6


def test_a_prompt_in_chunks_is_refused_where_it_has_an_image(llava):
    vtc.wrap(llava, "vtc-cls", 0.4)
    inputs = prompt(llava, (1,))
    few = dict(GREEDY, prefill_chunk_size=16)
    with pytest.raises(ValueError, match="reads a prompt with images whole: leave prefill_chunk_size out"):
        llava.generate(**inputs, **few)
    text = {"input_ids": inputs["input_ids"][:, -6:]}
    assert torch.equal(llava.generate(**text, **few), llava.generate(**text, **GREEDY))


# -- other devices, other weights, compilers -----------------------------------------------------------------------


@pytest.mark.parametrize("setting", SITES)
def test_layers_on_disk(model, setting, tmp_path):
    """A decoder that is read from disk layer by layer, as by `device_map`, answers as the one in memory."""
    from accelerate import disk_offload

    inputs, few = prompt(model, (1, 2)), GREEDY | {"max_new_tokens": 3}
    expected = vtc.wrap(model, *METHODS[setting]).generate(**inputs, **few)
    vtc.unwrap(model)
    offloaded = copy.deepcopy(model)
    for number, layer in enumerate(oracle.layers(offloaded)):
        disk_offload(layer, str(tmp_path / str(number)), execution_device="cpu", offload_buffers=True)
    assert all(weight.device.type == "meta" for weight in oracle.layers(offloaded)[0].parameters())
    vtc.wrap(offloaded, *METHODS[setting])
    assert torch.equal(offloaded.generate(**inputs, **few), expected)


@pytest.mark.parametrize("part", ["decoder layers", "vision tower"])
@pytest.mark.parametrize("setting", SITES)
def test_compiled_parts_answer_the_same(setting, part):
    """Also where they were compiled, and ran, before the model was wrapped."""
    plain, compiled = (FAMILIES["llava"].build(layers=4) for _ in range(2))
    inputs, few = prompt(plain, (1, 2)), GREEDY | {"max_new_tokens": 4}
    bare = plain.generate(**inputs, **few)
    expected = vtc.wrap(plain, *METHODS[setting]).generate(**inputs, **few)
    for module in oracle.layers(compiled) if part == "decoder layers" else [compiled.model.vision_tower]:
        module.compile(backend="eager")
    assert torch.equal(compiled.generate(**inputs, **few), bare)
    vtc.wrap(compiled, *METHODS[setting])
    assert torch.equal(compiled.generate(**inputs, **few), expected)
    vtc.unwrap(compiled)
    assert torch.equal(compiled.generate(**inputs, **few), bare)


def compiled_decoding(graphs: list) -> dict:
    """Options of generate() that compile its steps, each as one graph where it can be; `graphs` gets what is made."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


@torch._dynamo.config.patch(recompile_limit=64)
@pytest.mark.parametrize("setting", ["vtc-cls", "fastv-early"])
def test_decoding_is_compiled_once(llava, setting):
    """Nothing of a call is baked into the graphs: later steps and later prompts find them as they are."""
    graphs, compiled = [], copy.deepcopy(llava)
    options = compiled_decoding(graphs)
    vtc.wrap(compiled, *METHODS[setting])
    prompts = [prompt(llava, (1,), seed=seed) for seed in (0, 1)]
    expected = [compiled.generate(**inputs, **GREEDY) for inputs in prompts]
    with pytest.warns(UserWarning, match="several graphs"):
        got = compiled.generate(**prompts[0], **GREEDY, **options)
    made = len(graphs)
    assert made > 0
    assert all(map(torch.equal, (got, compiled.generate(**prompts[1], **GREEDY, **options)), expected))
    assert len(graphs) == made


@pytest.mark.parametrize("images", [(1, 1), (0, 0)], ids=["all tokens stay", "no image"])
def test_steps_with_nothing_to_do_are_one_graph(llava, images):
    graphs, compiled = [], copy.deepcopy(llava)
    prompts = [prompt(llava, images, seed=seed) for seed in (0, 1)]
    expected = [llava.generate(**inputs, **GREEDY) for inputs in prompts]
    vtc.wrap(compiled, "vtc-cls", 1.0 if any(images) else 0.4)
    options = compiled_decoding(graphs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        got = [compiled.generate(**inputs, **GREEDY, **options) for inputs in prompts]
    assert all(map(torch.equal, got, expected))
    assert len(graphs) == 1


@torch._dynamo.config.patch(recompile_limit=64)
@pytest.mark.parametrize(
    ("method", "whole"), [(vtc.VtcCls(), "model"), (vtc.FastV(layer=1), "model"), (vtc.FastV(layer=1), "layers")]
)
def test_compiled_steps_do_not_hide_a_later_image(method, whole):
    """Text is read, and steps are compiled without hooks; then an image comes, which is pruned as ever."""
    plain, compiled = (FAMILIES["llava"].build(layers=2) for _ in range(2))
    few = GREEDY | {"max_new_tokens": 3}
    for module in [compiled] if whole == "model" else oracle.layers(compiled):
        module.compile(backend="eager")
    text, image = prompt(plain, (0,)), prompt(plain, (1,))

    def answers(model):
        first = model.generate(**text, **few, return_dict_in_generate=True)
        second = {"input_ids": torch.cat((first.sequences, image["input_ids"]), dim=1)}
        second["attention_mask"] = torch.ones_like(second["input_ids"])
        second |= {"pixel_values": image["pixel_values"], "past_key_values": first.past_key_values}
        again = model.generate(**second, **few)
        return first.sequences, again, model.vtc.trace.kept()[0]

    expected, got = (answers(vtc.wrap(model, method, 0.6)) for model in (plain, compiled))
    assert all(map(torch.equal, got, expected))
    assert len(got[2]) < 36


def test_a_graph_without_an_image_is_not_taken_for_one_with():
    """torch.compile does not guard on bool(dict): what {} was compiled to was run with an image, too."""
    seen = torch.compile(lambda given, x: (sees(given), x + 1), backend="eager")
    encoded = {"image": torch.zeros(2, 2)}
    calls = [{}, {"mm_encoder_outputs": None}, {"mm_encoder_outputs": {}}, {"mm_encoder_outputs": encoded}]
    calls += [{"pixel_values": None}, {"pixel_values": torch.zeros(2)}, {"pixel_values_videos": torch.zeros(2)}]
    assert [seen(given, torch.zeros(1))[0] for given in calls] == [False, False, False, True, False, True, True]


def test_what_torch_compile_returns_is_refused(llava):
    with pytest.raises(TypeError, match="wrap the model itself"):
        vtc.wrap(torch.compile(llava), "random", 0.5)


@pytest.mark.parametrize("setting", SITES)
def test_int8_weights(model, setting):
    """torchao's int8 weights: the masking oracle holds on the quantised model itself."""
    from torchao import quantization

    quantised = copy.deepcopy(model)
    quantization.quantize_(quantised, quantization.Int8WeightOnlyConfig())
    inputs = prompt(model)
    vtc.wrap(quantised, *METHODS[setting])
    out = quantised.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    trace = quantised.vtc.trace
    vtc.unwrap(quantised)
    new, start = out.sequences[:, inputs["input_ids"].shape[1] :], inputs["input_ids"].shape[1]
    expected = oracle.masked_logits(quantised, trace, inputs, new[:, :-1])[:, start - 1 :]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), expected, atol=1e-3, rtol=1e-3)


# -- masks of kernels that this machine does not have --------------------------------------------------------------


def masks_of(model, implementation: str, inputs: dict) -> list:
    """What each decoder layer is handed as its mask when the decoder's kernel is `implementation`, which never runs."""
    seen, text = [], model.config.text_config
    before = text._attn_implementation
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((kwargs["attention_mask"], kwargs.get("position_ids"))),
            with_kwargs=True,
        )
        for layer in oracle.layers(model)
    ]

    def stand_in(module, query, key, value, mask, **_):
        return torch.zeros_like(query).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("stand-in", stand_in)
    ALL_MASK_ATTENTION_FUNCTIONS.register("stand-in", ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    text._attn_implementation = "stand-in"
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        text._attn_implementation = before
        for handle in handles:
            handle.remove()
    return seen


def test_flash_attention_gets_a_padding_mask_or_none(llava):
    """Of the length of the keys; none where a row has no gaps; never positions, whose gaps look like packed prompts."""
    single, padded = prompt(llava, (1,)), prompt(llava, (2, 0, 1))
    vtc.wrap(llava, "fastv", 0.4)
    assert [mask for mask, _ in masks_of(llava, "flash_attention_2", single)] == [None] * 6
    masks = masks_of(llava, "flash_attention_2", padded)
    kept, text = llava.vtc.trace.tokens_per_layer, (padded["input_ids"] > 0).sum(1) - torch.tensor([72, 0, 36])
    for layer in range(1, 6):
        mask, positions = masks[layer]
        assert positions is None
        assert mask.ndim == 2
        assert torch.equal(mask.sum(1), text + kept[:, layer])


def test_flex_attention_gets_a_block_mask(llava, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # the mask is what matters, not who makes it
    padded = prompt(llava, (2, 0, 1))
    vtc.wrap(llava, "fastv", 0.4)
    masks = masks_of(llava, "flex_attention", padded)
    expected = masks_of(llava, "sdpa", padded)
    for (block, _), (dense, _) in zip(masks[1:], expected[1:], strict=True):
        batch_size, _, queries, keys = dense.shape
        places = (torch.arange(n) for n in (batch_size, queries, keys))
        row, query, key = torch.meshgrid(*places, indexing="ij")
        assert torch.equal(block.mask_mod(row, torch.tensor(0), query, key), dense[:, 0])


def test_flash_attention_refuses_a_window_that_hides(llava):
    """Its window counts the keys that are left; a shorter prompt is no matter."""
    model = FAMILIES["llava_next"].model
    vtc.wrap(model, "fastv", 0.4)
    try:
        with pytest.raises(ValueError, match="counts its sliding window of 90 tokens"):
            masks_of(model, "flash_attention_2", prompt(model, (1,)))
    finally:
        vtc.unwrap(model)


@pytest.mark.parametrize("setting", ["vtc-cls", "fastv-early"])
def test_a_later_mask_cannot_hide_what_a_pruned_cache_holds(setting):
    """The cache keeps columns, not masks: to hide a token afterwards is refused, not overlooked."""
    model = FAMILIES["llava"].build()
    inputs = prompt(model, (1,))
    word = torch.ones_like(inputs["input_ids"][:, :1])
    with vtc.compressed(model, *METHODS[setting]) as trace, torch.no_grad():
        cache = model(**inputs).past_key_values
        mask = torch.cat((inputs["attention_mask"], word), dim=1)
        dropped = torch.ones(36, dtype=torch.bool).index_fill(0, trace.kept()[0], False).nonzero()[0, 0]
        place = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
        gone, held = (mask.index_fill(1, place[token], 0) for token in (dropped, trace.kept()[0][0]))
        expected = model(input_ids=word, attention_mask=mask, past_key_values=copy.deepcopy(cache)).logits
        if setting == "vtc-cls":  # which left every layer
            got = model(input_ids=word, attention_mask=gone, past_key_values=copy.deepcopy(cache)).logits
            assert torch.equal(got, expected)
        with pytest.raises(ValueError, match="start again from the prompt"):
            model(input_ids=word, attention_mask=held, past_key_values=copy.deepcopy(cache))
        ids = torch.cat((inputs["input_ids"], word), dim=1)  # of which generate() reads the last one first
        model.generate(ids, attention_mask=mask, past_key_values=copy.deepcopy(cache), **GREEDY)
        with pytest.raises(ValueError, match="start again from the prompt"):
            model.generate(ids, attention_mask=held, past_key_values=cache, **GREEDY)


def test_a_hook_that_is_half_on_does_not_meet_another_threads_call(llava):
    """torch registers a hook, and then that it takes keyword arguments: a call in between is the bare model's."""
    inputs = prompt(llava, (0,))  # with an image it would have to choose
    bare = llava(**inputs).logits
    with vtc.compressed(llava, "fastv", 0.5):
        halves = [
            (part, part._forward_pre_hooks_with_kwargs.copy())
            for part in llava.modules()
            if part._forward_pre_hooks_with_kwargs
        ]
        assert len(halves) == 2 + len(oracle.layers(llava))
        for part, _ in halves:
            part._forward_pre_hooks_with_kwargs.clear()
        with ThreadPoolExecutor(1) as other:
            assert torch.equal(other.submit(lambda: llava(**inputs).logits).result(), bare)
        for part, flags in halves:
            part._forward_pre_hooks_with_kwargs.update(flags)
