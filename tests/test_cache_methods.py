"""The methods of the cache site: scores against loops over whole attention matrices; what is held is what counts."""

import math
from contextlib import contextmanager

import oracle
import pytest
import test_cache_site as site
import torch
from models import FAMILIES, batch, continued, llava, prompt, rows, visual
from test_cache_site import GREEDY, PLAIN, expected_logits, hidden
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import vtc
from vtc.choice import Seen
from vtc.methods.caote import CAOTE
from vtc.methods.h2o import H2O
from vtc.methods.laq import LAQ
from vtc.methods.scissorhands import Scissorhands
from vtc.methods.snapkv import SnapKV
from vtc.methods.specprefill import SpecPrefill
from vtc.methods.tova import TOVA
from vtc.methods.vatp import VATP
from vtc.methods.window import pooled

SCORED = {
    "snapkv": SnapKV(),
    "snapkv-max": SnapKV(window=5, kernel=5, pooling="max"),
    "snapkv-plain": SnapKV(window="prompt", kernel=1),
    "h2o": H2O(),
    "h2o-sum": H2O(reduce="sum"),
    "vatp": VATP(),
    "vatp-prompt": VATP(window="prompt"),
    "caote": CAOTE(),
    "caote-last": CAOTE(window=3),
    "caote-fast": CAOTE(fast=True),
    "scissorhands": Scissorhands(),
    "tova": TOVA(),
}
METHODS = SCORED | {"laq": LAQ(steps=3)}
EACH_KIND = ("snapkv", "h2o", "caote", "tova")
"""A window of the question and one of all; with values; and one that all heads hold alike."""


@pytest.fixture(scope="module")
def eager():
    return llava(attn="eager")


@pytest.fixture
def model():
    yield FAMILIES["llava"].model
    vtc.unwrap(FAMILIES["llava"].model)


# -- scores -------------------------------------------------------------------------------------------------------


def attended(model, inputs):
    """Of an eager model without a cache, for each layer: attention (batch, heads, queries, keys), values (batch,
    key_heads, keys, head_dim)."""
    found = []
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda m, args, out: found.append(out))
        for layer in oracle.layers(model)
    ]
    with torch.no_grad():
        matrices = model(**inputs, use_cache=False, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    return matrices, [values.unflatten(-1, (2, 8)).transpose(1, 2) for values in found]


def entries(method, row, values, keys, sees):
    """What one query, which attends to all as `row` says and sees those in `sees`, makes of each key."""
    if isinstance(method, VATP):
        return [row[key] * sum(map(abs, values[key])) for key in keys]
    if isinstance(method, Scissorhands):
        return [float(row[key] > 1 / len(sees)) for key in keys]
    if isinstance(method, CAOTE):
        shares = [1 / len(sees) if method.fast else row[other] for other in sees]
        output = [sum(share * values[other][x] for share, other in zip(shares, sees, strict=True)) for x in range(8)]
        return [row[key] / (1 - row[key]) * math.dist(output, values[key]) for key in keys]
    return [row[key] for key in keys]


def expected_scores(method, matrix, values, places, ids, real, first=0):
    """[key head][token] of an image whose tokens are at `places`; queries from column `first` on are of this turn."""
    text = [place for place in range(places[-1] + 1, len(ids)) if real[place] and not visual(ids)[place]]
    everything = [place for place in range(first, len(ids)) if real[place]]
    window = 1 if isinstance(method, TOVA) else "prompt" if isinstance(method, H2O) else method.window
    queries = text if window == "question" else everything if window == "prompt" else everything[-window:]
    result, matrix, values = [], matrix.tolist(), values.tolist()
    for group in range(2):
        total, paid, number = {key: 0.0 for key in places}, {key: 0.0 for key in places}, {key: 0 for key in places}
        for query in queries:
            sees = [place for place in range(query + 1) if real[place]]
            keys = [key for key in places if key <= query]
            for key in keys:
                number[key] += 1
            for head in (2 * group, 2 * group + 1):
                row = matrix[head][query]
                for key, made in zip(keys, entries(method, row, values[group], keys, sees), strict=True):
                    total[key] += made
                    paid[key] += row[key] / len(queries)
        if isinstance(method, Scissorhands):
            scores = [total[key] + paid[key] / (1 + paid[key]) for key in places]
        elif isinstance(method, H2O):
            scores = [total[key] / (number[key] if method.reduce == "per-visible" else 1) for key in places]
        else:
            scores = [total[key] / len(queries) for key in places]
        result.append(blurred(method, scores) if isinstance(method, SnapKV) else scores)
    return [[sum(pair) / 2 for pair in zip(*result, strict=True)]] if isinstance(method, TOVA) else result


def blurred(method, scores):
    """Pooled over the squares of a 6 x 6 grid."""
    reach, result = method.kernel // 2, []
    for y in range(6):
        for x in range(6):
            rows, columns = (range(max(0, at - reach), min(6, at + reach + 1)) for at in (y, x))
            near = [scores[6 * row + column] for row in rows for column in columns]
            result.append(max(near) if method.pooling == "max" else sum(near) / len(near))
    return result


@pytest.mark.parametrize(
    ("name", "pad"), [*((name, "left") for name in SCORED), *((name, "right") for name in EACH_KIND)]
)
def test_scores_are_those_of_loops(model, eager, name, pad):
    """Of each image of a padded batch: all scores of a middle layer, and what each head keeps by them."""
    inputs, method = prompt(model, (1, 0, 2), pad=pad, seed=len(name)), SCORED[name]
    with vtc.compressed(model, method, 7) as trace, torch.no_grad():
        model(**inputs)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
    matrices, values = attended(eager, {**inputs, "position_ids": positions})
    for row, images in ((0, 1), (2, 2)):
        ids = inputs["input_ids"][row]
        places = visual(ids).nonzero()[:, 0].tolist()
        for image in range(images):
            own = places[36 * image :][:36]
            expected = expected_scores(method, matrices[3][row], values[3][row], own, ids, mask[row].bool())
            ours = trace.scores(3)[row][..., 36 * image :][..., :36]
            torch.testing.assert_close(ours.view(-1, 36), torch.tensor(expected), atol=1e-5, rtol=1e-3)
            kept = trace.held(3)[row].view(len(expected), -1)
            for head, scores in enumerate(expected):
                held = [index - 36 * image for index in kept[head].tolist() if index // 36 == image]
                assert held == oracle.top(scores, 7)


@pytest.mark.parametrize("name", EACH_KIND)
def test_scores_of_a_second_turn_are_over_what_each_head_holds_of_the_first(model, eager, name):
    method = METHODS[name]
    first, second = rows(model, (1,), seed=1)[0], rows(model, (1,), seed=2)[0]
    both, turn = batch(model, [first + second]), len(first.ids)
    with vtc.compressed(model, method, 9) as trace, torch.no_grad():
        cache = model(**batch(model, [first])).past_key_values
        before = [trace.held(layer) for layer in range(6)]
        now = batch(model, [second]) | {"attention_mask": both["attention_mask"]}
    with vtc.compressed(model, method, 9) as trace, torch.no_grad():
        model(**now, past_key_values=cache)

    def held(layer):
        mine = torch.arange(36, 72).expand(*before[layer][0].shape[:-1], -1)
        return [torch.cat((before[layer][0], mine), -1)]

    with hidden(eager, [(turn, held)], both, both):
        matrices, values = attended(eager, both)
    ids, real = both["input_ids"][0], both["attention_mask"][0].bool()
    places = visual(ids).nonzero()[:, 0].tolist()[36:]
    expected = expected_scores(method, matrices[3][0], values[3][0], places, ids, real, first=turn)
    torch.testing.assert_close(trace.scores(3)[0].view(-1, 36), torch.tensor(expected), atol=1e-5, rtol=1e-3)


def test_where_no_text_follows_an_image_the_last_token_looks(model, eager):
    """As before a next turn's question: the image ends the prompt, or another image follows it without a word."""
    inputs = prompt(model, (1,))
    end = visual(inputs["input_ids"])[0].nonzero().max() + 1
    inputs |= {name: inputs[name][:, :end] for name in ("input_ids", "attention_mask")}
    with vtc.compressed(model, SnapKV(kernel=1), 7) as trace, torch.no_grad():
        model(**inputs)
    matrix = attended(eager, inputs)[0][2][0, :, -1, -36:].view(2, 2, 36).sum(1)
    torch.testing.assert_close(trace.scores(2)[0], matrix, atol=1e-5, rtol=1e-4)


def test_guesses_do_not_look(model):
    """In assisted generation what is guessed stands behind the question in one forward, and is no part of it."""
    inputs = prompt(model)
    inputs["input_ids"][0, -6:-3] = inputs["input_ids"][0, -3:]
    for name in (*EACH_KIND, "laq"):
        vtc.wrap(model, METHODS[name], 0.3)
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        scores = model.vtc.trace.scores(3)[0]
        guessed = model.generate(**inputs, do_sample=False, max_new_tokens=8, prompt_lookup_num_tokens=3)
        assert torch.equal(guessed, expected)
        torch.testing.assert_close(model.vtc.trace.scores(3)[0], scores)


@contextmanager
def projected(model, layer):
    """What goes into the attention of a layer: queries and keys, rotated, (batch, heads, length, head_dim) each."""
    found, attention = {}, oracle.layers(model)[layer].self_attn

    def keep(name):
        return lambda module, args, output: found.__setitem__(name, output.unflatten(-1, (-1, 8)).transpose(1, 2))

    def rotate(module, args, kwargs, output):
        cos, sin = kwargs["position_embeddings"]
        found["query"], found["key"] = apply_rotary_pos_emb(found["query"], found["key"], cos, sin)

    handles = [
        attention.q_proj.register_forward_hook(keep("query")),
        attention.k_proj.register_forward_hook(keep("key")),
    ]
    handles.append(attention.register_forward_hook(rotate, with_kwargs=True))
    yield found
    for handle in handles:
        handle.remove()


def test_what_is_said_ahead_is_said_on_the_smaller_cache_and_scores_the_whole_one(model):
    inputs, smaller = prompt(model, (1, 0, 2), pad="left"), SnapKV(pooling="max")
    with vtc.compressed(model, smaller, 9) as copy:
        said = model.generate(**inputs, do_sample=False, max_new_tokens=3)[:, -3:]
    with vtc.compressed(model, LAQ(steps=3, share=0.25), 12) as trace, torch.no_grad():
        model(**inputs)
    start, full = inputs["input_ids"].shape[1], continued(model, inputs, said)
    with projected(model, 4) as found, hidden(model, [(start, copy.held)], inputs, full), torch.no_grad():
        model(**full, use_cache=False)
    for row, images in ((0, 1), (2, 2)):
        places = visual(inputs["input_ids"][row]).nonzero()[:, 0]
        real = inputs["attention_mask"][row].bool().nonzero()[:, 0]
        for image in range(images):
            expected = [[0.0] * 36, [0.0] * 36]
            for head in range(4):
                for step in range(start, start + 3):
                    logits = [
                        found["query"][row, head, step] @ found["key"][row, head // 2, key] / 8**0.5 for key in real
                    ]
                    paid = dict(zip(real.tolist(), torch.stack(logits).softmax(0).tolist(), strict=True))
                    for token, place in enumerate(places[36 * image :][:36].tolist()):
                        expected[head // 2][token] += paid[place] / 3
            expected = torch.tensor([blurred(smaller, scores) for scores in expected])
            ours = trace.scores(4)[row][:, 36 * image :][:, :36]
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-3)
            held = [
                [index - 36 * image for index in head if index // 36 == image] for head in trace.held(4)[row].tolist()
            ]
            assert held == [oracle.top(scores, 12) for scores in expected.tolist()]


def test_nothing_is_said_behind_the_end_of_an_answer(model, monkeypatch):
    inputs = prompt(model)
    with vtc.compressed(model, SnapKV(pooling="max"), 9):
        said = model.generate(**inputs, do_sample=False, max_new_tokens=3)[0, -3:].tolist()
    assert said[1] != said[0]
    with vtc.compressed(model, LAQ(steps=1), 12) as once, torch.no_grad():
        model(**inputs)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [said[1], 3])
    with vtc.compressed(model, LAQ(steps=3), 12) as ended, torch.no_grad():
        model(**inputs)
    torch.testing.assert_close(ended.scores(2)[0], once.scores(2)[0])


def test_looking_ahead_needs_a_head_and_all_tokens_up_to_the_end(model):
    with pytest.raises(ValueError, match="no head to say them with"):
        vtc.wrap(model.base_model, "laq", 0.5)
    vtc.wrap(model, "fastv+laq", 0.5)
    with pytest.raises(ValueError, match="tokens have left the cache of decoder layer 0"):
        model(**prompt(model))


def test_behind_a_method_that_drops_before_the_decoder_all_is_the_same(model):
    for method in ("vtc-cls+laq", "vtc-cls+caote", "vtc-cls+h2o"):
        assert_evicting_is_masking(model, method, prompt(model, (2, 0, 1)))


def test_a_map_shows_what_any_head_holds(model):
    with vtc.compressed(model, SnapKV(), 7) as trace, torch.no_grad():
        model(**prompt(model, (2,)))
    for image, (shown,) in enumerate(trace.maps(2)):
        held = {index - 36 * image for head in trace.held(2)[0].tolist() for index in head if index // 36 == image}
        assert {*shown.flatten().nonzero()[:, 0].tolist()} == held


@pytest.mark.parametrize("seed", range(5))
def test_specprefill(model, eager, seed):
    """Its scores from whole matrices, for an image of 6 x 6 tokens in chunks of 4 x 4, of which some are cut off."""
    inputs = prompt(model, (1, 0, 2), pad="left", seed=seed)
    with vtc.compressed(model, SpecPrefill(layer=3, chunk=4), 0.7) as trace, torch.no_grad():
        model(**inputs)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
    matrices, _ = attended(eager, {**inputs, "position_ids": positions})
    for row, images in ((0, 1), (2, 2)):
        places = visual(inputs["input_ids"][row]).nonzero()[:, 0].tolist()
        for image in range(images):
            own, best = places[36 * image :][:36], [0.0] * 36
            for layer in range(3):
                for head in range(4):
                    paid = [matrices[layer][row, head, -1, place].item() for place in own]
                    best = list(map(max, best, blurred(SnapKV(), paid)))
            chunks = [[j for j in range(36) if (j // 24, j % 6 // 4) == (i // 24, i % 6 // 4)] for i in range(36)]
            expected = torch.tensor([sum(best[j] for j in chunk) / len(chunk) for chunk in chunks])
            ours = trace.scores()[row][36 * image :][:36]
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("kernel", [3, 5])
def test_pooling_is_over_those_of_its_own_grid_that_are_there(how, kernel):
    """Images of several grids, in which tokens are missing, in any order."""
    generator = torch.Generator().manual_seed(kernel)
    parts = [[(4, 5), (2, 7), (1, 1)], [(3, 3)]]
    index = torch.stack([torch.randperm(35, generator=generator)[:28], torch.arange(28) % 9])
    valid = torch.stack([torch.ones(28, dtype=torch.bool), torch.arange(28) < 8])
    scores = torch.randn(2, 3, 28, generator=generator)
    ours = pooled(scores, Seen({}, valid, index, parts), kernel, how)
    for image, grids in enumerate(parts):
        cells = [(grid, y, x) for grid, (high, wide) in enumerate(grids) for y in range(high) for x in range(wide)]
        tokens = valid[image].nonzero()[:, 0].tolist()
        for token in tokens:
            grid, y, x = cells[index[image, token]]
            near = []
            for other in tokens:
                there, row, column = cells[index[image, other]]
                if there == grid and max(abs(row - y), abs(column - x)) <= kernel // 2:
                    near.append(scores[image, :, other])
            near = torch.stack(near)
            torch.testing.assert_close(ours[image, :, token], near.mean(0) if how == "mean" else near.amax(0))


# -- what is held is what counts ----------------------------------------------------------------------------------


def assert_evicting_is_masking(model, method, inputs, budget=0.3, **options):
    vtc.wrap(model, method, budget)
    out = model.generate(**inputs, **GREEDY | options)
    trace = model.vtc.trace
    vtc.unwrap(model)
    start = inputs["input_ids"].shape[1]
    full = continued(model, inputs, out.sequences[:, start:-1])
    with hidden(model, [(0, trace.alive), (start, trace.held)], inputs, full), torch.no_grad():
        expected = model(**full, use_cache=False).logits[:, start - 1 :]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, atol=1e-4, rtol=1e-4)
    assert (trace.held_per_layer[0] < trace.tokens_per_layer[0]).all()


@pytest.mark.parametrize("name", METHODS)
def test_evicting_is_masking_for_every_later_query(model, name):
    assert_evicting_is_masking(model, METHODS[name], prompt(model, (2, 0, 1)))


@pytest.mark.parametrize("family", [name for name in PLAIN if name != "llava"])
@pytest.mark.parametrize("name", ["caote", "laq"])
def test_evicting_is_masking_in_each_family(family, name):
    model = FAMILIES[family].model
    try:
        assert_evicting_is_masking(model, METHODS[name], prompt(model, (2, 0, 1)))
    finally:
        vtc.unwrap(model)


def test_evicting_is_masking_over_a_long_answer(model):
    assert_evicting_is_masking(model, SnapKV(), prompt(model, (1, 1)), max_new_tokens=60)


@pytest.mark.parametrize("name", [*EACH_KIND, "laq"])
def test_a_right_padded_row_is_that_of_a_single_run(model, name):
    """What is held of it, and a token that is decoded after it."""
    parts, step = rows(model, (1, 2, 1)), torch.tensor([[7]])
    vtc.wrap(model, METHODS[name], 0.3)

    def decoded(inputs):
        with torch.no_grad():
            cache = model(**inputs).past_key_values
            held = [model.vtc.trace.held(layer) for layer in range(6)]
            full = continued(model, inputs, step.expand(len(inputs["input_ids"]), -1))
            last = {"input_ids": full["input_ids"][:, -1:], "position_ids": full["position_ids"][:, -1:]}
            logits = model(**last, attention_mask=full["attention_mask"], past_key_values=cache).logits
        return held, logits[:, -1]

    together, logits = decoded(batch(model, parts, pad="right"))
    for row, part in enumerate(parts):
        held, alone = decoded(batch(model, [part]))
        assert all(torch.equal(one[row], other[0]) for one, other in zip(together, held, strict=True))
        torch.testing.assert_close(logits[row], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_the_prefill_is_as_before_and_a_full_budget_is_all(model, name):
    inputs, options = prompt(model, (1, 2)), {"do_sample": False, "max_new_tokens": 6}
    with torch.no_grad():
        untouched, text = model(**inputs).logits, model.generate(**inputs, **options)
        assert torch.equal(vtc.wrap(model, METHODS[name], 0.2)(**inputs).logits, untouched)
        assert not torch.equal(model.generate(**inputs, **options), text)
        vtc.wrap(model, METHODS[name], 1.0)
        assert torch.equal(model(**inputs).logits, untouched)
        assert torch.equal(model.generate(**inputs, **options), text)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_evicted_is_gone_from_memory(model, name):
    """Bytes equal the formula: text and the budget's visual tokens, in each layer and head."""
    inputs = prompt(model, (2,))
    vtc.wrap(model, METHODS[name], 9)
    with torch.no_grad():
        cache = model(**inputs).past_key_values
    text = int((~visual(inputs["input_ids"])).sum())
    for layer in cache.layers:
        assert layer.keys.nbytes + layer.values.nbytes == 2 * 4 * 2 * 8 * (text + 2 * 9)
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
        assert layer.values.untyped_storage().nbytes() == layer.values.nbytes
    assert model.vtc.trace.average_tokens.tolist() == [18.0]


@pytest.mark.parametrize("name", ["caote", "laq"])
def test_a_next_turn_with_a_second_image_and_a_copied_cache(model, name, monkeypatch):
    monkeypatch.setitem(site.METHODS, name, METHODS[name])
    site.test_a_next_turn_with_a_second_image_and_a_copied_cache(model, name)


@pytest.mark.parametrize("name", [*EACH_KIND, "laq"])
def test_beams(model, name):
    """The scores of beams are those of their own tokens one after the other."""
    inputs = prompt(model, (1,))
    vtc.wrap(model, METHODS[name], 0.3)
    options = {"num_beams": 3, "do_sample": False, "length_penalty": 0.0, "max_new_tokens": 5}
    out = model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
    trace = model.vtc.trace
    vtc.unwrap(model)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    logits = expected_logits(model, lambda layer: trace.held(layer)[:1], inputs, new)
    chosen = logits.log_softmax(-1).gather(2, new[..., None])
    torch.testing.assert_close(out.sequences_scores, chosen.sum((1, 2)), atol=1e-3, rtol=1e-4)
