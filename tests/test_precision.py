"""Visual tokens at fewer bits: what is packed is what rounding says, in the bytes that the formula says."""

import copy
import math

import oracle
import pytest
import torch
from models import FAMILIES, batch, llava, prompt, rows, visual
from test_cache_site import GREEDY, PLAIN, WINDOWED
from transformers import DynamicCache

import vtc
from vtc.cache.packed import Codes, Grain, pack, unpack
from vtc.cache.precision import Precision
from vtc.choice import Seen
from vtc.methods.bits import Bits
from vtc.methods.mikv import MiKV
from vtc.methods.zipcache import ZipCache

METHODS = {
    "bits": (Bits(), 0.3),
    "mikv": (MiKV(), 0.5),
    "mikv-low": (MiKV(high=8, low=4), 0.5),
    "zipcache": (ZipCache(), 0.15),
    "zipcache-high": (ZipCache(probes=0.2, reduce="sum"), 0.5),
}
GRAINS = {
    "bits": (Grain(channels=1, tokens=True), Grain()),
    "mikv": (Grain(channels=4), Grain(channels=4)),
    "zipcache": (Grain(channels=1, tokens=True), Grain(heads=True, evened=True)),
}
UNIT = 2 * 8 * 4
"""Bytes of a token in one head of the tiny models: keys and values, 8 channels, float32."""


@pytest.fixture
def model():
    yield FAMILIES["llava"].model
    vtc.unwrap(FAMILIES["llava"].model)


def half(x: float) -> float:
    """As float16 holds it."""
    return float(torch.tensor(x, dtype=torch.float32).half())


# -- rounding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_are_packed_into_bytes_and_come_back(bits):
    codes = torch.randint(0, 2**bits, (3, 5, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert packed.nbytes == codes.numel() * bits // 8
    assert torch.equal(unpack(packed, bits), codes)


def rounded(x, bits: int) -> list[float]:
    """Numbers that share a scale and a zero, rounded to `bits`: by the formula, one after the other."""
    zero, scale = half(min(x)), half(max((max(x) - min(x)) / (2**bits - 1), 2.0**-24))
    return [zero + scale * min(2**bits - 1, max(0, round((number - zero) / scale))) for number in x]


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", GRAINS)
@pytest.mark.parametrize("side", [0, 1])
def test_numbers_are_read_back_as_rounding_says(name, side, bits):
    """To the loops' numbers, and within half a step and what float16 takes from a scale and a zero."""
    grain, generator = GRAINS[name][side], torch.Generator().manual_seed(bits)
    x = torch.randn(2, 3, 7, 8, generator=generator) * torch.rand(8, generator=generator) * 10
    x[1, 0, 5:, 3], real = 4.0, torch.ones(2, 3, 7, dtype=torch.bool)
    real[0, :, :2] = False
    codes = Codes.of(x, real, bits, grain)
    read = codes.numbers()
    shared = {}
    for row in range(2):
        for head in range(3):
            for token in range(7):
                for channel in range(8):
                    group = channel // (grain.channels or 8)
                    place = row, None if grain.heads else head, None if grain.tokens else token, group
                    if real[row, head, token]:
                        shared.setdefault(place, []).append((row, head, token, channel))
    for places in shared.values():
        numbers = [float(x[place]) for place in places]
        got = torch.tensor([float(read[place]) for place in places])
        torch.testing.assert_close(got, torch.tensor(rounded(numbers, bits)), atol=2e-6, rtol=1e-6)
        step = (max(numbers) - min(numbers)) / (2**bits - 1)
        bound = step / 2 + 2**-11 * (abs(min(numbers)) + max(numbers) - min(numbers)) + 2**-23
        assert max(abs(float(x[place]) - float(read[place])) for place in places) <= bound
    assert codes.nbytes == x.numel() * bits // 8 + 4 * math.prod(codes.scale.shape)


def test_what_float16_cannot_hold_is_refused():
    x, real = torch.full((1, 1, 2, 8), 1e5), torch.ones(1, 1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="beyond the range of float16"):
        Codes.of(x, real, 8, Grain())


# -- what is held -------------------------------------------------------------------------------------------------


def packed_size(bits: list[int], key, value, factors: int) -> float:
    """Bytes of the visual tokens of a layer with two heads, all of whose heads have tokens at `bits`."""
    total = 0
    for level in {*bits}:
        count = bits.count(level)
        total += 2 * count * (1 + (UNIT if level == 16 else 2 * 8 * level / 8))
        for grain in (key, value) if level < 16 else ():
            scales = (1 if grain.tokens else count) * 8 / (grain.channels or 8) * (1 if grain.heads else 2)
            total += 4 * scales
    return total + (2 * 2 * 8 * factors if min(bits) < 16 else 0)


@pytest.mark.parametrize("name", METHODS)
def test_bytes_equal_the_formula(model, name):
    """Text as it is, and a byte of each head and position that tells the level; what the trace says is what is held."""
    method, budget = METHODS[name]
    inputs = prompt(model)
    vtc.wrap(model, method, budget)
    with torch.no_grad():
        cache = model(**inputs).past_key_values
    trace, text = model.vtc.trace, int((~visual(inputs["input_ids"])).sum())
    factors = {"bits": 0, "mikv": 1, "zipcache": 1}[method.name]
    sizes = []
    for layer, stage in zip(cache.layers, trace.stages, strict=True):
        each = [head.tolist() for head in (stage.bits[0] if stage.bits.ndim == 3 else stage.bits)]
        assert all(sorted(head) == sorted(each[0]) for head in each)
        expected = packed_size(each[0], *GRAINS[method.name], factors)
        assert layer.nbytes == 2 * text * (UNIT + 1) + expected
        sizes.append(expected / (2 * UNIT))
        tensors = [layer.keys, layer.values, layer.level]
        for codes in (codes for pair in layer.packed for side in pair for codes in side.levels):
            tensors += [codes.packed, codes.scale, codes.zero]
        tensors += [side.factor for pair in layer.packed for side in pair if side.factor is not None]
        assert sum(x.untyped_storage().nbytes() for x in tensors) == layer.nbytes
    assert trace.average_tokens.tolist() == pytest.approx([sum(sizes) / 6])
    assert sum(sizes) / 6 == pytest.approx(budget * 36, abs=0.5)
    assert trace.held_per_layer.tolist() == [[36] * 6]


@pytest.mark.parametrize("name", METHODS)
def test_text_and_important_tokens_are_as_they_were(model, name):
    method, budget = METHODS[name]
    inputs = prompt(model, (2, 0, 1))
    with torch.no_grad():
        full = model(**inputs)
        out = vtc.wrap(model, method, budget)(**inputs)
    assert torch.equal(out.logits, full.logits)
    as_it_is = (~visual(inputs["input_ids"]))[:, None].repeat(1, 2, 1)
    for stage, layer, before in zip(
        model.vtc.trace.stages, out.past_key_values.layers, full.past_key_values.layers, strict=True
    ):
        exact, bits = as_it_is.clone(), stage.bits
        for image, row in enumerate(model.vtc.trace.rows):
            places = visual(inputs["input_ids"][row]).nonzero()[:, 0][36 * (image == 1) :][:36]
            exact[row, :, places] = bits[image] == 16
        for ours, theirs in zip(layer.read(), (before.keys, before.values), strict=True):
            assert torch.equal(ours[exact], theirs[exact])
            assert not torch.equal(ours[~exact], theirs[~exact])


def fake(method, bits, keys, values, queries):
    """Keys and values (tokens, 8) of each head of one layer and image, rounded by hand: each list is by head."""
    key, value = GRAINS[method.name]
    shrink = [torch.ones(8), torch.ones(8)], [torch.ones(8), torch.ones(8)]
    for head in range(2):
        if method.name == "mikv":
            largest = queries[head].abs().amax((0, 1)).clamp(min=1e-6)
            shrink[0][head] = (largest / keys[head].abs().amax(0).clamp(min=1e-6)).sqrt().half().float()
        if value.evened:
            shrink[1][head] = values[head].abs().amax(0).clamp(min=1e-6).rsqrt().half().float()
    done = [x.clone() for x in keys], [x.clone() for x in values]
    for level in {*bits[0].tolist()} - {16}:
        members = [(bits[head] == level).nonzero()[:, 0].tolist() for head in range(2)]
        for side, (x, grain) in enumerate(((keys, key), (values, value))):
            shared = {}
            for head in range(2):
                for place, token in enumerate(members[head]):
                    for channel in range(8):
                        group = channel // (grain.channels or 8)
                        name = None if grain.heads else head, None if grain.tokens else place, group
                        shared.setdefault(name, []).append((head, token, channel))
            for places in shared.values():
                numbers = [float(x[head][token, c] * shrink[side][head][c]) for head, token, c in places]
                for (head, token, c), number in zip(places, rounded(numbers, level), strict=True):
                    done[side][head][token, c] = number / shrink[side][head][c]
    return done


@pytest.mark.parametrize("name", METHODS)
def test_packing_is_rounding_for_every_later_query(model, name):
    """Logits of a generation against the untouched model on its own cache, with visual keys and values rounded by
    hand in it."""
    method, budget = METHODS[name]
    inputs = prompt(model)
    vtc.wrap(model, method, budget)
    out = model.generate(**inputs, **GREEDY)
    trace, places = model.vtc.trace, visual(inputs["input_ids"][0]).nonzero()[:, 0]
    vtc.unwrap(model)
    queries = []
    handles = [
        layer.self_attn.q_proj.register_forward_hook(lambda m, args, x: queries.append(x[0]))
        for layer in oracle.layers(model)
    ]
    with torch.no_grad():
        cache = model(**inputs, past_key_values=DynamicCache()).past_key_values
    for handle in handles:
        handle.remove()
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    rotary = model.model.language_model.rotary_emb(cache.layers[0].keys, positions)
    for layer, stage, query in zip(cache.layers, trace.stages, queries, strict=True):
        query = vtc.adapter.find(model).rotate(query.view(1, -1, 4, 8).transpose(1, 2), *rotary)[0]
        keys, values = ([x[0, head, places] for head in range(2)] for x in (layer.keys, layer.values))
        done = fake(method, stage.bits[0], keys, values, query.view(2, 2, -1, 8))
        for x, new in zip((layer.keys, layer.values), done, strict=True):
            for head in range(2):
                x[0, head, places] = new[head]
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    with torch.no_grad():
        expected = model(input_ids=new[:, :-1], past_key_values=cache).logits
    torch.testing.assert_close(torch.stack(out.logits[1:], 1), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", [Bits(), MiKV(), ZipCache()])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
def test_a_full_budget_is_bit_identical_and_8_bits_are_near(method, family):
    kind = FAMILIES[family].model
    inputs = prompt(kind, (1, 2))
    full = kind.generate(**inputs, **GREEDY)
    vtc.wrap(kind, method, 1.0)
    out = kind.generate(**inputs, **GREEDY)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(out.logits, full.logits, strict=True))
    assert type(out.past_key_values.layers[0]).__name__ == "DynamicLayer"
    near = method if method.name == "bits" else type(method)(high=8, low=8)
    vtc.wrap(kind, near, 0.5 if method.name == "bits" else 0.65)
    out = kind.generate(**inputs, **GREEDY)
    assert {*kind.vtc.trace.stages[0].bits.unique().tolist()} - {0, 16} == {8}  # 0 is no token
    vtc.unwrap(kind)
    for ours, theirs in zip(out.logits, full.logits, strict=True):
        assert (ours - theirs).abs().max() < 0.05 * theirs.std()


# -- batches, beams, turns ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bits", "mikv", "zipcache"])
def test_padded_rows_equal_single_runs(model, name):
    parts = rows(model, (1, 2, 0))
    vtc.wrap(model, *METHODS[name])
    together = model.generate(**batch(model, parts), **GREEDY)
    for row, part in enumerate(parts):
        alone = model.generate(**batch(model, [part]), **GREEDY)
        for ours, theirs in zip(alone.logits, together.logits, strict=True):
            torch.testing.assert_close(ours[0], theirs[row], atol=1e-4, rtol=1e-4)


def test_beams(model):
    """The scores of beams are those of their own tokens in one forward on the packed cache."""
    inputs = prompt(model)
    vtc.wrap(model, *METHODS["zipcache"])
    options = {"num_beams": 3, "do_sample": False, "length_penalty": 0.0, "max_new_tokens": 5}
    out = model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    with torch.no_grad():
        first = model(**inputs)
        later = model(input_ids=new[:, :-1], past_key_values=first.past_key_values).logits
    logits = torch.cat((first.logits[:, -1:], later), dim=1).log_softmax(-1)
    torch.testing.assert_close(out.sequences_scores, logits.gather(2, new[..., None]).sum((1, 2)), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["mikv", "zipcache"])
def test_a_next_turn_with_a_second_image(model, name):
    """What is packed stays as it is; the new image is packed by its own right; copies, crops and rows go on alike."""
    method, budget = METHODS[name]
    first, second = rows(model, (1,), seed=1)[0], rows(model, (1,), seed=2)[0]
    both = batch(model, [first + second])
    vtc.wrap(model, method, budget)
    step = torch.tensor([[7]])
    with torch.no_grad():
        cache = model(**batch(model, [first])).past_key_values
        before = [layer.read() for layer in cache.layers]
        model(**{**batch(model, [second]), "attention_mask": both["attention_mask"]}, past_key_values=cache)
        for layer, pair in zip(cache.layers, before, strict=True):
            assert len(layer.packed) == 2
            for ours, theirs in zip(layer.read(), pair, strict=True):
                torch.testing.assert_close(ours[:, :, : theirs.shape[2]], theirs, atol=0, rtol=0)
        twin, wide = copy.deepcopy(cache), copy.deepcopy(cache)
        out = model(input_ids=step, past_key_values=cache).logits
        model(input_ids=torch.tensor([[3, 4]]), past_key_values=twin)
        twin.crop(-2)
        assert torch.equal(model(input_ids=step, past_key_values=twin).logits, out)
        wide.batch_repeat_interleave(3)
        wide.batch_select_indices(torch.tensor([2, 0]))
        wide.reorder_cache(torch.tensor([1, 0]))
        both_rows = model(input_ids=step.repeat(2, 1), past_key_values=wide).logits
        torch.testing.assert_close(both_rows, out.repeat(2, 1, 1), atol=1e-5, rtol=1e-5)
        cache.reset()
        assert {type(layer).__name__ for layer in cache.layers} == {"DynamicLayer"}


def test_after_an_eviction_what_is_left_is_packed(model):
    """Two stages at one cache: heads drop their own tokens, and the others are found by their columns."""

    class Both(vtc.Method):
        name = "both"

        def stages(self, shape):
            drop, grade = (kind.stages(shape) for kind in (vtc.RandomKv(), Bits()))
            return tuple(stage for pair in zip(drop, grade, strict=True) for stage in pair)

        def schedule(self, strength, shape):
            return (0.5, 0.3) * shape.decoder_layers

    inputs = prompt(model)
    with torch.no_grad():
        full = model(**inputs).past_key_values
        cache = vtc.wrap(model, Both(), 0.3)(**inputs).past_key_values
    dropped, graded = model.vtc.trace.stages[:2]
    places = visual(inputs["input_ids"][0]).nonzero()[:, 0]
    for head in range(2):
        gone = torch.zeros(inputs["input_ids"].shape[1], dtype=torch.bool)
        gone[places[~dropped.kept[0, head]]] = True
        exact = ~gone
        exact[places[graded.bits[0, head] < 16]] = False
        ours = cache.layers[0].read()[0][0, head]
        assert torch.equal(ours[exact[~gone]], full.layers[0].keys[0, head][exact])


# -- who is important ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mikv", "zipcache", "zipcache-high", "zipcache-most"])
def test_scores_are_those_of_loops(model, name):
    method, budget = (METHODS | {"zipcache-most": (ZipCache(probes=0.7), 0.15)})[name]
    inputs = prompt(model, (1, 0, 1))
    with vtc.compressed(model, method, budget) as trace, torch.no_grad():
        model(**inputs)
    matrices = oracle.attentions(llava(attn="eager"), inputs)[1]
    for row in (0, 2):
        real = inputs["attention_mask"][row].nonzero()[:, 0].tolist()
        places = visual(inputs["input_ids"][row]).nonzero()[:, 0].tolist()
        queries = real
        if method.name == "zipcache":
            number = math.ceil(method.probes * len(real))
            earlier = len(real) - number
            before = min(number, earlier)
            queries = [*(real[int((k + 0.5) * earlier / before)] for k in range(before)), *real[-number:]]
        for head in range(2):
            expected = []
            for place in places:
                paid = [float(matrices[3][row, 2 * head + k, q, place]) for q in queries for k in (0, 1) if q >= place]
                by_all = method.name == "zipcache" and method.reduce == "sum"
                seeing = sum(q >= place for q in (real if by_all else queries))
                expected.append(sum(paid) / max(1, seeing))
            torch.testing.assert_close(trace.scores(3)[row][head], torch.tensor(expected), atol=1e-5, rtol=1e-3)
            bits, order = trace.stages[3].bits[row // 2, head], torch.tensor(expected).argsort(descending=True)
            assert bits[order].tolist() == sorted(bits.tolist(), reverse=True)


def test_important_tokens_get_no_fewer_bits_and_sizes_meet_the_budget():
    generator = torch.Generator().manual_seed(0)
    valid = torch.arange(60) < torch.tensor([[60], [37], [1]])
    seen = Seen({}, valid, torch.arange(60).expand(3, -1), [[(6, 10)]] * 3)
    for levels in ((16, 8, 4, 2), (16, 2), (16, 8, 4), (16, 4)):
        precision = Precision(levels, *GRAINS["zipcache"], 2, 64, 16)
        scores = torch.randn(3, 60, generator=generator)
        for share in (0.95, 0.6, 0.4, 0.3, 0.2):
            number = valid.sum(1)
            least = torch.tensor([precision.least(int(n)) for n in number])
            wanted = (share * number).maximum(least)
            bits = precision.select(scores, seen, wanted).bits
            assert (bits[~valid] == 0).all()
            over = precision.size(bits) - wanted
            assert (over[:2] <= 0.5).all()
            assert (over[:2] >= -0.5 - (1 + 0.5 * (16 in levels))).all()  # what a level shares, where none is at it
            for image in range(3):
                own = bits[image][valid[image]]
                order = scores[image][valid[image]].argsort(descending=True)
                assert own[order].tolist() == sorted(own.tolist(), reverse=True)


# -- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WINDOWED[:1])
def test_windows_are_refused_before_work(name):
    assert name not in PLAIN
    with pytest.raises(ValueError, match="has a sliding window and forgets by itself"):
        vtc.wrap(FAMILIES[name].model, "mikv", 0.5)


def test_errors_say_what_to_do(model):
    inputs = prompt(model)
    with pytest.raises(vtc.BudgetError, match=r"it drops none, so its range is 12\.1 to 36 tokens"):
        vtc.wrap(model, "mikv", 0.1)
    with pytest.raises(ValueError, match="must fall"):
        vtc.wrap(model, MiKV(high=4, low=8), 0.5)
    with pytest.raises(ValueError, match=r"bits \(16, 3\): 16 stands for as it is"):
        Precision((16, 3), Grain(), Grain(), 2, 8, 32)
    with pytest.raises(ValueError, match="do not fill bytes"):
        Precision((16, 2), Grain(), Grain(), 2, 6, 32)
    vtc.wrap(model, "mikv", 0.5)
    with pytest.raises(ValueError, match="not this StaticLayer"):
        model.generate(**inputs, max_new_tokens=4, cache_implementation="static")
    with pytest.raises(ValueError, match="this call has none: use_cache=True"):
        model(**inputs, use_cache=False)
    cache = DynamicCache(offloading=False)
    cache.offloading, cache.update = True, lambda *args, **kwargs: DynamicCache.update(_plain(cache), *args, **kwargs)
    with pytest.raises(ValueError, match="offloaded cannot be packed"), torch.no_grad():
        model(**inputs, past_key_values=cache)


def _plain(cache):
    """The same, without the streams of a GPU."""
    twin = copy.copy(cache)
    twin.offloading = False
    return twin


def test_a_model_that_changed_its_numbers_has_to_be_wrapped_again():
    changed = llava()
    vtc.wrap(changed, "zipcache", 0.3)
    changed.half().float().to(torch.bfloat16)
    inputs = prompt(changed)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with pytest.raises(ValueError, match="the model had 32 bits a number: wrap it again"), torch.no_grad():
        changed(**inputs)
    with torch.no_grad():
        cache = vtc.wrap(changed, "zipcache", 0.3)(**inputs).past_key_values
    assert cache.layers[0].read()[0].dtype == torch.bfloat16
