"""What judges from outside found wrong: each behaviour, on every family and method that it concerns."""

import contextvars
import copy
import io
import pickle
import threading

import oracle
import pytest
import torch
from bare import fingerprint, logits
from models import FAMILIES, batch, family, prompt, rows, visual
from table import EACH_KIND, HARD, METHODS, each_site, merges
from table import parametrize as pytest_generate_tests  # noqa: F401
from transformers import DynamicCache, StaticCache

import vtc
import vtc.adapter as adapters
from vtc.methods.vtc_cls import VtcCls

GREEDY = {"do_sample": False, "max_new_tokens": 5}
SITES = ["vtc-cls", "fastv-early", "transprune-high"]


# -- 1. an attention mask that hides visual tokens -----------------------------------------------------------------


def hide(inputs: dict, what: str) -> dict:
    """The prompt with some of its visual tokens hidden by the attention mask."""
    mask, images = inputs["attention_mask"].clone(), visual(inputs["input_ids"])
    generator = torch.Generator().manual_seed(0)
    if what == "first image":
        for row in range(len(mask)):
            places = images[row].nonzero()[:, 0].tolist()
            run = [place for number, place in enumerate(places) if place == places[0] + number]
            mask[row, run] = 0
    elif what == "holes":
        mask[images & (torch.rand(mask.shape, generator=generator) < 0.4)] = 0
    elif what == "edges":  # the first tokens of each row's images and the last
        for row in range(len(mask)):
            places = images[row].nonzero()[:, 0].tolist()
            mask[row, places[:7] + places[-9:]] = 0
    elif what == "holes everywhere":
        mask[torch.rand(mask.shape, generator=generator) < 0.2] = 0
        mask[:, -1] = inputs["attention_mask"][:, -1]
    elif what == "all images":
        mask[images] = 0
    else:
        mask[0] = 0
    return {**inputs, "attention_mask": mask}


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("setting", ["vtc-cls", "fastv-early"])
def test_prompts_that_share_a_row_are_refused(name, setting):
    """Without mask and cache transformers tells them apart by their positions, as padding-free collators give them."""
    model, (first, second) = FAMILIES[name].model, rows(FAMILIES[name].model, (1, 0))

    def packed(*parts):
        inputs = batch(model, [sum(parts[1:], start=parts[0])]) | {"use_cache": False}
        del inputs["attention_mask"]
        positions = torch.cat([torch.arange(len(part.ids)) for part in parts])[None]
        return inputs | {"position_ids": positions if name == "llava" else positions.expand(4, 1, -1)}

    inputs, start = packed(first, second), len(first.ids)
    other = inputs | {"input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, start - 2] = 5
    bare = logits(model, inputs)
    assert torch.equal(logits(model, other)[:, start:], bare[:, start:])
    with vtc.compressed(model, *METHODS[setting]):
        with pytest.raises(ValueError, match="pack several prompts into one row"):
            logits(model, inputs)
        assert logits(model, packed(first)).isfinite().all()
    with vtc.compressed(model, METHODS[setting][0], 1.0):
        assert torch.equal(logits(model, inputs), bare)


def placed(model, inputs: dict) -> dict:
    """With positions along the line, as generate() gives them; also in three axes, where transformers cannot number
    a prompt whose images are hidden."""
    mask, first = inputs["attention_mask"], family(model).first_position
    positions = (mask.cumsum(1) - 1 + (first or 0)).masked_fill(mask == 0, first or 0)
    return {**inputs, "position_ids": positions if first is not None else positions.expand(3, -1, -1)}


HIDDEN = ["first image", "holes", "edges", "holes everywhere", "all images", "row"]


def hidden_prompt(model, what: str, pad: str) -> dict:
    return hide(prompt(model, (2, 1), pad=pad), what)


CELLS = [("llava", setting, what) for setting in HARD for what in HIDDEN]
"""Every method with every mask on the first family; on the others each of one and of the other, not each of both."""
CELLS += [
    (name, setting, HIDDEN[(first + number) % len(HIDDEN)])
    for first, name in enumerate(FAMILIES)
    if name != "llava"
    for number, setting in enumerate(EACH_KIND)
]


@pytest.mark.parametrize(("name", "setting", "what"), CELLS)
def test_hidden_tokens_are_none(name, setting, what):
    """They are not listed, not counted and not in the cache; what stays answers as under the masking oracle."""
    model, method = FAMILIES[name].model, METHODS[setting]
    inputs = placed(model, hidden_prompt(model, what, "left" if HIDDEN.index(what) % 2 else "right"))
    shown = visual(inputs["input_ids"]) & inputs["attention_mask"].bool()
    text = (inputs["attention_mask"].bool() & ~visual(inputs["input_ids"])).sum(1)
    vtc.wrap(model, *method)
    with torch.no_grad():
        out = model(**inputs)
    trace = model.vtc.trace
    vtc.unwrap(model)
    for layer in range(trace.depth):
        for row, alive in enumerate(trace.alive(layer)):
            places = visual(inputs["input_ids"][row]).nonzero()[:, 0]
            assert shown[row, places[alive]].all()
            if layer == 0 and trace.stages[0].site:
                assert len(alive) == shown[row].sum()
        held = (text + trace.tokens_per_layer[:, layer]).max()
        assert out.past_key_values.layers[layer].get_seq_length() in (held, inputs["input_ids"].shape[1])
    if merges(setting):
        return
    expected = oracle.masked_logits(model, trace, inputs, inputs["input_ids"][:, :0])
    stays = oracle.visible_keys(model, trace, inputs)[-1]
    torch.testing.assert_close(out.logits[stays], expected[stays], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "setting", "what"), CELLS[::4])
def test_hidden_tokens_in_generation(name, setting, what):
    model, method = FAMILIES[name].model, METHODS[setting]
    if family(model).first_position is None:
        pytest.skip("transformers itself cannot number such a prompt")
    inputs = hidden_prompt(model, what, "left")
    vtc.wrap(model, *method)
    out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    trace, length = model.vtc.trace, inputs["input_ids"].shape[1]
    vtc.unwrap(model)
    new = out.sequences[:, length:]
    if merges(setting):
        return
    expected = oracle.masked_logits(model, trace, inputs, new[:, :-1])[:, length - 1 :]
    real = inputs["attention_mask"].any(1)  # of a row of nothing, nothing is promised
    torch.testing.assert_close(torch.stack(out.logits, dim=1)[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["random", "uniform", "vtc-cls", "vflowopt"])
def test_a_budget_is_of_the_tokens_that_can_be_seen(llava, name):
    inputs = hide(prompt(llava, (2, 1)), "holes")
    shown = visual(inputs["input_ids"]) & inputs["attention_mask"].bool()
    vtc.wrap(llava, name, 0.5)
    logits(llava, inputs)
    for row, average in enumerate(llava.vtc.trace.average_tokens.tolist()):
        images = 2 - row
        assert average == pytest.approx(float(shown[row].sum()) / 2, abs=0.5 * images + 1e-3)


def test_an_even_choice_of_tiles_leaves_hidden_tokens_out():
    model = FAMILIES["llava_next"].model
    inputs = hide(prompt(model, (1, 1)), "holes")
    shown = visual(inputs["input_ids"]) & inputs["attention_mask"].bool()
    with vtc.compressed(model, VtcCls(tiles="even"), 0.9) as trace:
        logits(model, inputs)
    for row, kept in enumerate(trace.kept()):
        places = visual(inputs["input_ids"][row]).nonzero()[:, 0]
        assert shown[row, places[kept]].all()
        assert len(kept) == round(0.9 * int(shown[row].sum()))


# -- 2. adapters of PEFT -------------------------------------------------------------------------------------------


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
    assert torch.equal(late.generate(**inputs, **GREEDY), first.generate(**inputs, **GREEDY))
    assert torch.equal(logits(late.unload(), inputs), plain)  # and the base layers again


@pytest.mark.parametrize("setting", SITES)
def test_a_peft_model_is_wrapped_and_unwrapped(setting):
    model, inputs = with_lora(FAMILIES["llava"].build()), prompt(FAMILIES["llava"].model, (2, 1))
    untouched, before = logits(model, inputs), fingerprint(model)
    assert vtc.wrap(model, *METHODS[setting]) is model
    out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
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
        expected = model.generate(**inputs, **GREEDY)
        cut = int(visual(inputs["input_ids"])[0].nonzero()[-1]) + 2
        shared = vtc.prefix(
            model,
            input_ids=inputs["input_ids"][:, :cut],
            attention_mask=inputs["attention_mask"][:, :cut],
            pixel_values=inputs["pixel_values"],
        )
        words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        assert torch.equal(model.generate(**words, past_key_values=shared, **GREEDY), expected)
        assert trace.average_tokens.tolist() == [14.0]
    assert fingerprint(model) == before


# -- 3. threads that compress one model in different ways ------------------------------------------------------------


def run(*functions):
    """Each in a thread of its own; the first exception of any is raised here."""
    results, errors = [None] * len(functions), []

    def call(number, function):
        try:
            results[number] = function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=pair) for pair in enumerate(functions)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]
    return results


CHOICES = ["random-half", "vtc-cls", "fastv-early", "tome", "transprune-high"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_threads_compress_one_model_each_in_its_own_way(llava, wrapped):
    before = fingerprint(llava)
    prompts = [prompt(llava, (1,), seed=seed, length=8 + seed) for seed in range(len(CHOICES))]
    expected = []
    for setting, inputs in zip(CHOICES, prompts, strict=True):
        with vtc.compressed(llava, *METHODS[setting]) as trace:
            expected.append((llava.generate(**inputs, **GREEDY), trace.kept()[0]))
    if wrapped:
        vtc.wrap(llava, "uniform", 0.25)
        base = llava.generate(**prompts[0], **GREEDY)

    def worker(number):
        def work():
            for _ in range(8):
                with vtc.compressed(llava, *METHODS[CHOICES[number]]) as trace:
                    text = llava.generate(**prompts[number], **GREEDY)
                    assert torch.equal(text, expected[number][0])
                    assert torch.equal(trace.kept()[0], expected[number][1])
                    with torch.no_grad():
                        llava(**prompts[number])
                    assert torch.equal(trace.kept()[0], expected[number][1])

        return work

    def untouched():
        for _ in range(8):
            assert torch.equal(llava.generate(**prompts[0], **GREEDY), base)

    run(*map(worker, range(len(CHOICES))), *([untouched] if wrapped else []))
    vtc.unwrap(llava)
    assert fingerprint(llava) == before


def test_a_thread_that_chose_nothing_is_refused(llava):
    inputs = prompt(llava)
    bare = llava.generate(**inputs, **GREEDY)
    with vtc.compressed(llava, "random", 4) as trace:
        for call in (lambda: llava.generate(**inputs, **GREEDY), lambda: logits(llava, inputs)):
            with pytest.raises(RuntimeError, match=r"has chosen nothing.*copy of the context"):
                run(call)
        context = contextvars.copy_context()
        inside, copied = (
            llava.generate(**inputs, **GREEDY),
            run(lambda: context.run(llava.generate, **inputs, **GREEDY)),
        )
        assert torch.equal(copied[0], inside)
        assert trace.average_tokens.tolist() == [4.0]
    assert torch.equal(run(lambda: llava.generate(**inputs, **GREEDY))[0], bare)


def test_text_of_a_thread_that_chose_nothing_is_read_as_ever(llava):
    inputs = prompt(llava, (0,))
    bare = llava.generate(**inputs, **GREEDY)
    with vtc.compressed(llava, "fastv", 0.4):
        for call in (lambda: llava.generate(**inputs, **GREEDY), lambda: llava.generate(inputs["input_ids"], **GREEDY)):
            assert torch.equal(run(call)[0], bare)


@pytest.mark.parametrize("change", ["unwrap", "wrap anew"])
def test_changes_wait_for_a_generation_of_another_thread(llava, change):
    inputs = prompt(llava)
    expected = vtc.wrap(llava, "fastv", 0.4).generate(**inputs, **GREEDY)
    begun, go_on, changed = threading.Event(), threading.Event(), threading.Event()

    def pause(ids, scores):
        begun.set()
        assert go_on.wait(30)
        return scores

    def other():
        assert begun.wait(30)
        vtc.unwrap(llava) if change == "unwrap" else vtc.wrap(llava, "random", 3)
        changed.set()

    def releaser():
        assert begun.wait(30)
        assert not changed.wait(0.3)
        go_on.set()

    text, *_ = run(lambda: llava.generate(**inputs, **GREEDY, logits_processor=[pause]), other, releaser)
    assert torch.equal(text, expected)
    assert changed.is_set()
    assert ("vtc" in vars(llava)) == (change != "unwrap")


def test_changes_inside_ones_own_generation_are_refused(llava):
    inputs = prompt(llava)
    expected = vtc.wrap(llava, "fastv", 0.4).generate(**inputs, **GREEDY)
    for change in (lambda: vtc.unwrap(llava), lambda: vtc.wrap(llava, "random", 3)):
        with pytest.raises(RuntimeError, match=r"generate\(\) is running"):
            llava.generate(**inputs, **GREEDY, logits_processor=[lambda ids, scores, change=change: change()])
    assert torch.equal(llava.generate(**inputs, **GREEDY), expected)


# -- 4. what logits a call wants --------------------------------------------------------------------------------------


@each_site
def test_the_logits_of_a_call_do_not_decide_what_is_pruned(model, method):
    inputs = prompt(model, (2, 1))
    length = inputs["input_ids"].shape[1]
    vtc.wrap(model, *method)
    whole, kept = logits(model, inputs), model.vtc.trace.kept()
    for wanted in (1, 2, 6, length - 1, length, length + 5, torch.tensor([3, length - 2])):
        some = logits(model, inputs, logits_to_keep=wanted)
        assert all(map(torch.equal, model.vtc.trace.kept(), kept))
        assert torch.equal(some, whole[:, wanted if isinstance(wanted, torch.Tensor) else slice(-wanted, None)])


@each_site
def test_the_logits_of_a_generation_do_not_either(model, method):
    inputs = prompt(model, (2, 1))
    vtc.wrap(model, *method)
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, logits_to_keep=5), expected)


@pytest.mark.parametrize("setting", SITES)
def test_guesses_after_a_prompt_without_a_mask(llava, setting):
    """The end of the prompt is known in every way in which generate() is given it."""
    inputs = prompt(llava)
    inputs["input_ids"][0, -6:-3] = inputs["input_ids"][0, -3:]  # an n-gram to guess from
    vtc.wrap(llava, *METHODS[setting])
    expected = llava.generate(**inputs, **GREEDY)
    inputs.pop("attention_mask")
    ids = inputs.pop("input_ids")
    for given in ({"input_ids": ids}, {"inputs": ids}):
        assert torch.equal(llava.generate(**given, **inputs, **GREEDY, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(llava.generate(ids, **inputs, **GREEDY, prompt_lookup_num_tokens=3), expected)


# -- 7. entries of a config that its family does not read --------------------------------------------------------------

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


# -- 8. rows of a cache, and a cache that is reset ---------------------------------------------------------------------

ROW_CHANGES = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "select by mask": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "twice": (lambda cache: (cache.batch_repeat_interleave(2), cache.reorder_cache(torch.tensor([5, 1, 3, 0, 2, 4]))),
              [2, 0, 1, 0, 1, 2]),
}  # fmt: skip
CACHED = ["llava", "llava_next", "gemma3", "internvl", "paligemma2"]
"""Families whose next step needs nothing but the cache, two of them with sliding windows."""
PRUNING = {**{name: METHODS[name] for name in SITES}, "contiguous": (VtcCls(positions="contiguous"), 0.4)}


CHANGED = [("llava", setting, change, False) for setting in PRUNING for change in ROW_CHANGES]
CHANGED += [(name, setting, "twice", True) for name in CACHED for setting in PRUNING]


@pytest.mark.parametrize(("name", "setting", "change", "unwrapped"), CHANGED)
def test_rows_of_a_cache_take_their_state_along(name, setting, change, unwrapped):
    model, steps = FAMILIES[name].model, torch.tensor([[7, 8], [9, 10], [11, 12]])
    inputs = prompt(model, (2, 1, 0))
    apply, order = ROW_CHANGES[change]
    vtc.wrap(model, *PRUNING[setting])
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        twin = copy.deepcopy(cache)
        expected = [model(input_ids=steps[:, n : n + 1], past_key_values=twin).logits for n in range(2)]
        if unwrapped:  # what is done to the cache meanwhile is the cache's
            vtc.unwrap(model)
        apply(cache)
        vtc.wrap(model, *PRUNING[setting])
        got = [model(input_ids=steps[order, n : n + 1], past_key_values=cache).logits for n in range(2)]
    vtc.unwrap(model)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [0.6, 1.0])
@pytest.mark.parametrize("method", ["tally", "vtc-cls", "fastv", "snapkv", "mikv", "tokenselect"])
@torch.no_grad()
def test_a_cache_that_is_written_down_goes_on(llava, method, budget):
    inputs, steps = prompt(llava, (2, 1)), torch.tensor([[7, 8], [9, 10]])
    vtc.wrap(llava, method, budget)
    cache = llava(**inputs).past_key_values
    others, seconds = [write(cache) for write in COPIES.values()], cache.vtc.trace.seconds

    def decoded(cache):
        return [llava(input_ids=steps[:, n : n + 1], past_key_values=cache).logits for n in range(2)]

    expected = decoded(cache)
    for other in others:
        assert type(other) is type(cache)
        assert other.vtc.trace.seconds == pytest.approx(seconds)
        assert all(map(torch.equal, decoded(other), expected))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("setting", PRUNING)
def test_a_cache_that_is_reset_is_new(llava, setting, kind):
    def fresh():
        return DynamicCache() if kind == "dynamic" else StaticCache(config=llava.config.text_config, max_cache_len=140)

    first, second = prompt(llava, (2, 1), seed=1), prompt(llava, (0, 0), seed=2, length=11)
    bare = llava.generate(**second, **GREEDY, past_key_values=fresh())
    again = llava.generate(**first, **GREEDY, past_key_values=fresh())
    vtc.wrap(llava, *PRUNING[setting])
    expected = llava.generate(**first, **GREEDY, past_key_values=fresh())
    cache = fresh()
    for _ in range(2):
        assert torch.equal(llava.generate(**first, **GREEDY, past_key_values=cache), expected)
        cache.reset()
        assert not vars(cache).keys() & {"vtc", "reset", "reorder_cache", "get_seq_length", "get_query_offset"}
        assert cache.get_seq_length() == 0
    assert torch.equal(llava.generate(**second, **GREEDY, past_key_values=cache), bare)
    cache.reset()
    llava.generate(**first, **GREEDY, past_key_values=cache)
    vtc.unwrap(llava)
    cache.reset()
    assert torch.equal(llava.generate(**first, **GREEDY, past_key_values=cache), again)


# -- 11. crashes -------------------------------------------------------------------------------------------------------

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _saved_and_loaded(model),
}


def _saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


# What transformers itself hangs on a model that was asked for hidden states cannot be pickled: those are built anew.
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
    assert torch.equal(twin.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))
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
    expected, text = logits(model, inputs), model.generate(**inputs, **GREEDY)
    kept = model.vtc.trace.kept()

    def interrupted():
        handle = oracle.layers(model)[4].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.generate(**inputs, **GREEDY) if generates else logits(model, inputs)
        handle.remove()

    interrupted()
    assert torch.equal(logits(model, inputs), expected)
    assert all(map(torch.equal, model.vtc.trace.kept(), kept))
    interrupted()
    assert torch.equal(model.generate(**inputs, **GREEDY), text)
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
    answers = [llava.generate(**words, past_key_values=cache, **GREEDY) for cache in (by_ids, by_embeds)]
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
            llava.generate(**batch(llava, parts), **GREEDY)
    vtc.wrap(llava, "random", 1)
    assert logits(llava, batch(llava, [alone, part])).isfinite().all()


def test_features_for_another_method_are_told_apart(llava):
    """Not a KeyError from the depths."""
    inputs = prompt(llava)
    with vtc.compressed(llava, "random", 0.5):
        features = {"image": llava.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)}
    with vtc.compressed(llava, "vtc-cls", 0.5), pytest.raises(RuntimeError, match="encode them anew"):
        llava(**inputs, mm_encoder_outputs=features)
