"""The cache site: what is evicted after the prefill is masked for every later query, and gone from memory."""

import copy

import oracle
import pytest
import torch
from models import FAMILIES, batch, continued, prompt, rows, visual

import vtc
from vtc.methods.random_kv import RandomKv

GREEDY = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
PLAIN = [name for name, kind in FAMILIES.items() if not any(oracle.windows(kind.model))]
WINDOWED = [name for name in FAMILIES if name not in PLAIN]
METHODS = {"per-layer": RandomKv(per_head=False), "per-head": RandomKv()}


@pytest.fixture(params=PLAIN)
def model(request):
    yield FAMILIES[request.param].model
    vtc.unwrap(FAMILIES[request.param].model)


def hidden(model, spans, inputs: dict, full: dict):
    """The unwrapped model over prompt and answer; from column `start` on each head of a layer sees of the visual tokens
    what `held(layer)` says, for (start, held) in `spans`."""
    ids, real = full["input_ids"], full["attention_mask"].bool()
    heads = model.config.text_config.num_attention_heads
    repeats = oracle.layers(model)[0].self_attn.num_key_value_groups

    def sees(layer: int):
        seen = oracle.allowed(model, layer, ids.shape[1], len(ids), full)[:, None].repeat(1, heads, 1, 1)
        seen &= real[:, None, None]
        for start, held in spans:
            for row, index in enumerate(held(layer)):
                places = visual(inputs["input_ids"][row]).nonzero()[:, 0]
                for head in range(heads):
                    own = index if index.ndim == 1 else index[head // repeats]
                    gone = torch.ones(len(places), dtype=torch.bool).index_fill(0, own, False)
                    seen[row, head, start:, places[gone]] = False
        return seen

    return oracle.seeing(model, sees)


def expected_logits(model, held, inputs, new):
    """(batch, steps, vocabulary) of the steps that decode `new`, whose first came from the full prefill."""
    full, start = continued(model, inputs, new[:, :-1]), inputs["input_ids"].shape[1]
    with hidden(model, [(start, held)], inputs, full), torch.no_grad():
        return model(**full, use_cache=False).logits[:, start - 1 :]


@pytest.mark.parametrize("images", [(1,), (2, 0, 1)])
@pytest.mark.parametrize("method", METHODS)
def test_evicting_is_masking_for_every_later_query(model, method, images):
    inputs = prompt(model, images)
    vtc.wrap(model, METHODS[method], 0.3)
    out = model.generate(**inputs, **GREEDY)
    trace = model.vtc.trace
    vtc.unwrap(model)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    expected = expected_logits(model, trace.held, inputs, new)
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, atol=1e-4, rtol=1e-4)
    assert (trace.held_per_layer[0] < trace.tokens_per_layer[0]).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_prefill_is_as_before_and_a_full_budget_is_all(model, method):
    inputs = prompt(model, (1, 2))
    with torch.no_grad():
        untouched = model(**inputs).logits
    text = model.generate(**inputs, **GREEDY).sequences
    with torch.no_grad():
        assert torch.equal(vtc.wrap(model, METHODS[method], 0.2)(**inputs).logits, untouched)
    vtc.wrap(model, METHODS[method], 1.0)
    assert torch.equal(model.generate(**inputs, **GREEDY).sequences, text)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_evicted_is_gone_from_memory(llava, method):
    """Bytes equal the formula: text and the budget's visual tokens, in each layer and head."""
    inputs = prompt(llava, (2,))
    vtc.wrap(llava, METHODS[method], 9)
    with torch.no_grad():
        cache = llava(**inputs).past_key_values
    text = int((~visual(inputs["input_ids"])).sum())
    for layer in cache.layers:
        assert layer.keys.nbytes + layer.values.nbytes == 2 * 4 * 2 * 8 * (text + 2 * 9)
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
    assert llava.vtc.trace.average_tokens.tolist() == [18.0]


def test_heads_and_layers_keep_their_own(llava):
    vtc.wrap(llava, RandomKv(), 9)
    with torch.no_grad():
        llava(**prompt(llava))
    held = [llava.vtc.trace.held(layer)[0] for layer in range(6)]
    assert [index.shape for index in held] == [(2, 9)] * 6
    assert len({tuple(index.flatten().tolist()) for index in held}) == 6
    assert all(index[0].tolist() != index[1].tolist() for index in held)
    assert all(torch.equal(index, index.sort().values) for index in held)


@pytest.mark.parametrize("method", METHODS)
def test_padded_rows_equal_single_runs(llava, method):
    parts = rows(llava, (1, 2, 1))
    vtc.wrap(llava, METHODS[method], 0.3)
    together = llava.generate(**batch(llava, parts), **GREEDY).sequences[:, -6:]
    for row, part in enumerate(parts):
        assert torch.equal(llava.generate(**batch(llava, [part]), **GREEDY).sequences[0, -6:], together[row])


@pytest.mark.parametrize("method", METHODS)
def test_beams(llava, method):
    """The scores of beams are those of their own tokens one after the other."""
    inputs = prompt(llava, (1,))
    vtc.wrap(llava, METHODS[method], 0.3)
    options = {"num_beams": 3, "do_sample": False, "length_penalty": 0.0, "max_new_tokens": 5}
    out = llava.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
    trace = llava.vtc.trace
    vtc.unwrap(llava)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    chosen = (
        expected_logits(llava, lambda layer: trace.held(layer)[:1], inputs, new)
        .log_softmax(-1)
        .gather(2, new[..., None])
    )
    torch.testing.assert_close(out.sequences_scores, chosen.sum((1, 2)), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_next_turn_with_a_second_image_and_a_copied_cache(llava, method):
    """The new image is evicted by its own right; what is evicted stays so; copies and crops go on alike."""
    first, second = rows(llava, (1,), seed=1)[0], rows(llava, (2,), seed=2)[0]
    both = batch(llava, [first + second])
    vtc.wrap(llava, METHODS[method], 9)
    step = torch.tensor([[7]])
    with torch.no_grad():
        cache = llava(**batch(llava, [first])).past_key_values
        before = [llava.vtc.trace.held(layer)[0] for layer in range(6)]
        mask = both["attention_mask"]
        prefill = llava(**{**batch(llava, [second]), "attention_mask": mask}, past_key_values=cache).logits
        after = [llava.vtc.trace.held(layer)[0] + 36 for layer in range(6)]
        twin = copy.deepcopy(cache)
        out = llava(input_ids=step, past_key_values=cache).logits
        llava(input_ids=torch.tensor([[3, 4]]), past_key_values=twin)
        twin.crop(-2)
        assert torch.equal(llava(input_ids=step, past_key_values=twin).logits, out)
    vtc.unwrap(llava)
    turn, end, full = len(first.ids), both["input_ids"].shape[1], continued(llava, both, step)

    def in_turn_two(layer):
        return [torch.cat((before[layer], torch.arange(36, 108).expand(*before[layer].shape[:-1], -1)), -1)]

    def in_the_step(layer):
        return [torch.cat((before[layer], after[layer]), -1)]

    with hidden(llava, [(turn, in_turn_two), (end, in_the_step)], both, full), torch.no_grad():
        expected = llava(**full, use_cache=False).logits
    torch.testing.assert_close(prefill[:, -1], expected[:, end - 1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out[:, -1], expected[:, end], atol=1e-4, rtol=1e-4)


def test_assisted_generation(llava):
    inputs = prompt(llava)
    inputs["input_ids"][0, -6:-3] = inputs["input_ids"][0, -3:]
    vtc.wrap(llava, RandomKv(), 0.3)
    expected = llava.generate(**inputs, do_sample=False, max_new_tokens=8)
    guessed = llava.generate(**inputs, do_sample=False, max_new_tokens=8, prompt_lookup_num_tokens=3)
    assert torch.equal(guessed, expected)


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("method", ["random-kv", "snapkv"])
def test_windows_are_refused_before_work(name, method):
    with pytest.raises(ValueError, match="has a sliding window and forgets by itself"):
        vtc.wrap(FAMILIES[name].model, method, 0.5)


@pytest.mark.parametrize("method", ["random-kv", "snapkv"])
def test_caches_that_cannot_give_back_say_so(llava, method):
    inputs = prompt(llava)
    vtc.wrap(llava, method, 0.5)
    with pytest.raises(ValueError, match="not this StaticLayer"):
        llava.generate(**inputs, max_new_tokens=4, cache_implementation="static")
    with pytest.raises(ValueError, match="this call has none: use_cache=True"):
        llava(**inputs, use_cache=False)
